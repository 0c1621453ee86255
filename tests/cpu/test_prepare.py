"""prepare for real: processes, kills, a full disk, damaged shards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aifactory_train.data import tokenize
from aifactory_train.data.prepare import prepare
from aifactory_train.data.shards import load_prepared
from aifactory_train.data.tokenize import load_encoder
from aifactory_train.errors import DataError, StorageError, storage_errors
from aifactory_train.recipe.schema import Data
from prepared_data import UNIT_TEXT_BYTES, build_data

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(whole: Data, tmp_path: Path) -> Data:
    shutil.copytree(whole.prepared_dir, tmp_path / "copy")
    return whole.model_copy(update={"prepared_dir": str(tmp_path / "copy")})


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file that training reads."""
    skip = ("cache", ".lock")
    files = [p for p in Path(folder).rglob("*") if p.is_file() and p.relative_to(folder).parts[0] not in skip]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def start_prepare(data: Data) -> subprocess.Popen[bytes]:
    code = (
        "import sys; from aifactory_train.data import tokenize; from aifactory_train.data.prepare import prepare; "
        "from aifactory_train.recipe.schema import Data; "
        f"tokenize.UNIT_TEXT_BYTES = {UNIT_TEXT_BYTES}; prepare(Data.model_validate_json(sys.argv[1]))"
    )
    return subprocess.Popen([sys.executable, "-c", code, data.model_dump_json()], cwd=ROOT, stderr=subprocess.PIPE)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + 60
    while not ready():
        assert process.poll() is None and time.monotonic() < end_s, "prepare ended before it could be killed"
        time.sleep(0.002)


def test_all_text_comes_back_from_the_tokens(whole: Data, corpora: dict[str, Path]) -> None:
    prepared = load_prepared(whole)
    encoder = load_encoder(prepared.tokenizer_dir / "tokenizer.json")
    for stream in prepared.streams:
        rows = [json.loads(line)["text"] for line in corpora[stream.entry.name].read_text().splitlines()]
        texts = [text for text in rows if text]
        starts = [0, *stream.document_starts(0, stream.n_tokens).tolist()]
        assert len(starts) == len(texts) + 1 == stream.entry.n_documents + 1 and starts[-1] == stream.n_tokens
        for text, start, end in zip(texts, starts[:-1], starts[1:], strict=True):
            ids = stream.tokens(start, end).tolist()
            assert ids[-1] == prepared.manifest.eos_id and prepared.manifest.eos_id not in ids[:-1]
            assert encoder.decode(ids[:-1], skip_special_tokens=False) == text


def test_the_manifest_counts_what_is_there(whole: Data, corpora: dict[str, Path]) -> None:
    prepared = load_prepared(whole)
    manifest = prepared.manifest
    assert manifest.dtype == "uint16" and manifest.vocab_size == 400
    assert [len(s.shards) for s in manifest.sources] == [
        len(list((prepared.folder / n).glob("*.tokens"))) for n in corpora
    ]
    assert all(len(s.shards) > 2 for s in manifest.sources)
    for stream in prepared.streams:
        tokens = stream.tokens(0, stream.n_tokens)
        counts = np.bincount(tokens, minlength=manifest.vocab_size)
        np.testing.assert_array_equal(np.load(stream.folder / "counts.npy"), counts)
        p = counts[counts > 0] / len(tokens)
        assert stream.entry.unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum())
        lines = corpora[stream.entry.name].read_text().splitlines()
        assert stream.entry.n_text_bytes == sum(len(json.loads(line)["text"].encode()) for line in lines)
    n = sum(len(s.shards) for s in manifest.sources)
    assert prepared.describe().startswith(f"{n} of {n} shards, ")
    assert prepared.describe().endswith("1,666 documents")
    prepared.verify()


def test_entropy_is_that_of_the_mixture(whole: Data) -> None:
    sources = [s.model_copy(update={"weight": w}) for s, w in zip(whole.sources, (3.0, 1.0), strict=True)]
    prepared = load_prepared(whole.model_copy(update={"sources": sources}))
    shares = [np.load(s.folder / "counts.npy") / s.n_tokens for s in prepared.streams]
    p = 0.75 * shares[0] + 0.25 * shares[1]
    assert prepared.unigram_entropy_nats() == pytest.approx(-(p[p > 0] * np.log(p[p > 0])).sum())


def test_any_number_of_workers_and_a_second_run_give_the_same_bytes(
    whole: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "UNIT_TEXT_BYTES", UNIT_TEXT_BYTES)
    other = whole.model_copy(update={"prepared_dir": str(tmp_path / "other"), "workers": 1})
    prepare(other)
    assert contents(other.prepared_dir) == contents(whole.prepared_dir)


def test_a_second_prepare_reuses_everything(
    copy: Data, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stamps() -> dict[Path, int]:
        return {
            p: p.stat().st_mtime_ns for p in Path(copy.prepared_dir).rglob("*") if p.name != ".lock" and p.is_file()
        }

    before = stamps()
    monkeypatch.setattr(tokenize, "ProcessPoolExecutor", None)
    other_rows = copy.model_copy(update={"seq_len_tokens": 128, "document_mask": False, "workers": 5})
    assert prepare(other_rows) == load_prepared(copy).manifest
    assert stamps() == before
    assert "reused" in capfd.readouterr().err


def test_a_prepare_killed_at_any_stage_goes_on_and_ends_byte_identical(
    whole: Data, corpora: dict[str, Path], tmp_path: Path
) -> None:
    data = whole.model_copy(update={"prepared_dir": str(tmp_path / "killed")})
    folder = Path(data.prepared_dir)

    def finished() -> dict[Path, int]:
        return {p: p.stat().st_ino for p in folder.glob("*/shard-*.json")}

    before: dict[Path, int] = {}
    stages: list[Callable[[], bool]] = [
        lambda: (folder / "cache").exists(),
        lambda: (folder / "tokenizer").exists(),
        lambda: len(finished()) > 2,
        lambda: len(finished()) > len(before) + 3,
    ]
    for stage in stages:
        process = start_prepare(data)
        wait_for(stage, process)
        workers = children_of(process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        end_s = time.monotonic() + 10
        while any(runs(pid) for pid in workers):
            assert time.monotonic() < end_s, "the workers outlive their parent"
            time.sleep(0.05)
        assert not (folder / "manifest.json").exists()
        with pytest.raises(DataError, match="aifactory-train prepare RECIPE"):
            load_prepared(data)
        kept = {p: ino for p, ino in finished().items() if p in before}
        assert kept == before, "a finished shard was written again"
        before = finished()
    assert len(before) >= 6 and len(workers) >= 2
    process = start_prepare(data)
    errors = process.communicate()[1].decode()
    assert process.returncode == 0, errors
    assert f"{len(before)} of " in errors
    assert {p: ino for p, ino in finished().items() if p in before} == before
    assert contents(folder) == contents(whole.prepared_dir)


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_prepares_at_the_same_time_do_not_mix(whole: Data, tmp_path: Path) -> None:
    data = whole.model_copy(update={"prepared_dir": str(tmp_path / "twice")})
    process = start_prepare(data)
    wait_for(lambda: (Path(data.prepared_dir) / "cache").exists(), process)
    with pytest.raises(DataError, match="another prepare is at work"):
        prepare(data)
    process.kill()
    process.communicate()


def test_a_full_disk_is_one_message_and_prepare_goes_on_after_space_is_freed(
    whole: Data, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "UNIT_TEXT_BYTES", UNIT_TEXT_BYTES)
    disk = small_disk(8)
    data = whole.model_copy(update={"prepared_dir": str(disk / "prepared")})
    ballast = disk / "ballast"
    stages = []
    reference = contents(whole.prepared_dir)
    size = sum(p.stat().st_blocks * 512 for p in Path(whole.prepared_dir).rglob("*") if p.is_file())
    for missing_bytes in (size - 16_384, size // 2, size // 4, 200_000, 40_000):
        # The rest of the disk is filled up, so that this many bytes are missing for the whole.
        used = shutil.disk_usage(disk).used - (ballast.stat().st_blocks * 512 if ballast.exists() else 0)
        own = used
        ballast.write_bytes(b"")
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(max(0, free - (size - own) + missing_bytes)))
        with pytest.raises(StorageError, match="No space left on device while preparing data") as caught:
            prepare(data)
        assert str(disk) in str(caught.value)
        here = contents(data.prepared_dir) if Path(data.prepared_dir).exists() else {}
        assert "manifest.json" not in here
        for name, raw in here.items():  # whatever has a sidecar is whole
            if name.endswith(".json") and "shard-" in name:
                assert raw == reference[name]
                for suffix in (".tokens", ".docs"):
                    other = name.removesuffix(".json") + suffix
                    assert here[other] == reference[other]
        stages.append(len([n for n in here if "shard-" in n and n.endswith(".json")]))
    assert stages[0] == 0 and stages[-1] > 0, stages
    ballast.unlink()
    prepare(data)
    assert contents(data.prepared_dir) == reference


def test_a_disk_that_is_full_when_the_tokenizer_is_saved_leaves_no_tokenizer(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(8)
    from datasets import Dataset

    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(free - 4 * 4096))
    documents = Dataset.from_dict({"text": [Path(tokenize.__file__).read_text()]})
    with pytest.raises(StorageError, match="No space left"), storage_errors("saving", small_disk, "free space"):
        tokenize.train_tokenizer([documents], 1000, disk / "tokenizer")
    assert not (disk / "tokenizer").exists()


@pytest.mark.parametrize("suffix", [".tokens", ".docs"])
def test_a_truncated_or_missing_shard_is_refused_by_name_and_prepare_mends_it(copy: Data, suffix: str) -> None:
    victim = Path(copy.prepared_dir) / "one" / f"shard-00001{suffix}"
    good = victim.read_bytes()
    victim.write_bytes(good[:-2])
    with pytest.raises(DataError, match=rf"one/shard-00001{suffix} has {len(good) - 2} bytes, .* {len(good)} "):
        load_prepared(copy)
    victim.unlink()
    with pytest.raises(DataError, match=f"one/shard-00001{suffix} is missing"):
        load_prepared(copy)
    left_over = victim.with_name(f".{victim.name}.4711.tmp")  # by a prepare that was killed while it wrote
    left_over.write_bytes(b"half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "UNIT_TEXT_BYTES", UNIT_TEXT_BYTES)
        prepare(copy)
    assert victim.read_bytes() == good and not left_over.exists()
    load_prepared(copy).verify()


def test_a_damaged_shard_is_refused_by_name_and_its_advice_mends_it(copy: Data) -> None:
    victim = Path(copy.prepared_dir) / "one" / "shard-00002.tokens"
    good = victim.read_bytes()
    victim.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    prepared = load_prepared(copy)
    refused = []
    for rank in range(3):
        try:
            prepared.verify(rank, 3)
        except DataError as error:
            refused.append(rank)
            assert f"{victim} is damaged" in str(error)
            advice = error.do
    assert refused == [2]
    subprocess.run(advice.split("  ")[0].split(), check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "UNIT_TEXT_BYTES", UNIT_TEXT_BYTES)
        prepare(copy)
    assert victim.read_bytes() == good


def test_a_folder_of_other_settings_is_refused_and_left_alone(copy: Data, corpora: dict[str, Path]) -> None:
    before = contents(copy.prepared_dir)
    other = build_data(Path(copy.prepared_dir), corpora, tokenizer={"train_vocab_size": 500})
    for refuse in (prepare, load_prepared):
        with pytest.raises(DataError, match="tokenizer.train_vocab_size: folder has 400, recipe has 500"):
            refuse(other)
    fewer = build_data(Path(copy.prepared_dir), {"one": corpora["one"]})
    with pytest.raises(DataError, match="sources.two: folder has something else, recipe has nothing"):
        prepare(fewer)
    assert contents(copy.prepared_dir) == before


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, corpora: dict[str, Path]) -> None:
    (tmp_path / "theirs" / "one").mkdir(parents=True)
    with pytest.raises(DataError, match="not a prepared folder, but has one in it"):
        prepare(build_data(tmp_path / "theirs", corpora))
    assert [p.name for p in (tmp_path / "theirs").rglob("*")] == ["one"]
    for name in ("cache", "tokenizer"):
        with pytest.raises(DataError, match="cannot be named"):
            prepare(build_data(tmp_path / "new", {name: corpora["one"]}))
    assert not (tmp_path / "new").exists()


def test_changed_text_is_reported_but_does_not_change_what_is_prepared(
    copy: Data, corpora: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    stat = corpora["two"].stat()
    os.utime(corpora["two"], ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    try:
        prepare(copy)
    finally:
        os.utime(corpora["two"], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "source two: its files have changed since" in capfd.readouterr().err
