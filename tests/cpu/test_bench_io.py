"""The programs that touch storage: what they write is measured, compared, and removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from aifactory_train.bench.record import Record, read_record, read_samples
from aifactory_train.measure.scratch import write_text
from aifactory_train.measure.state import weight_shapes

ROOT = Path(__file__).resolve().parents[2]
MPIRUN = [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2"]


def run(program: str, folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> list[Record]:
    """Records of a run whose scratch files lie below `folder`, in the order of their time."""
    common = ["--out", str(folder / "out"), "--folder", str(folder / "scratch"), "--budget-s", "0.2"]
    command = [*launcher, sys.executable, str(ROOT / "benchmarks" / f"{program}.py"), *common, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((folder / "scratch").iterdir()) == [], "something was left behind"
    return sorted((read_record(path) for path in (folder / "out" / "records").glob("*.json")), key=lambda r: r.started)


def test_a_checkpoint_of_two_ranks_is_saved_loaded_and_the_same(tmp_path: Path) -> None:
    [record] = run("checkpoint", tmp_path, "--parameters", "4.2e6", launcher=tuple(MPIRUN))
    assert record.validity.wrong_values == 0 and record.cell["ranks"] == 2
    n_bytes = record.facts["bytes"]
    assert n_bytes == 12 * sum(rows * columns for rows, columns in weight_shapes(4.2e6).values())
    samples = read_samples(tmp_path / "out" / "records" / (record.samples or ""))
    prefix = "aifactory_checkpoint_"
    for rank in (0, 1):
        stalls, saves = (samples[f"{prefix}{name}"][rank] for name in ("stall_seconds", "save_duration_seconds"))
        assert len(saves) >= 6
        assert all(stall <= save for stall, save in zip(stalls, saves, strict=True))
        rates = samples[f"{prefix}save_bandwidth_bytes_per_second"][rank]
        assert rates == pytest.approx([n_bytes / s for s in saves])


def test_a_folder_without_room_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)the benchmark needs .*name another folder with --folder"):
        run("checkpoint", tmp_path, "--parameters", "1e15")


def test_the_loader_is_measured_flat_out_and_beside_a_step(tmp_path: Path) -> None:
    records = run("loader", tmp_path, "--text-bytes", "300000", "--seq-len", "64", "--step-s", "0.005")
    by_step = {record.cell["step_s"]: {metric.name for metric in record.metrics} for record in records}
    duration, rate = "aifactory_loader_batch_duration_seconds", "aifactory_loader_tokens_per_second"
    assert by_step == {0.0: {duration, rate}, 0.005: {duration}}


def test_tokenization_counts_the_bytes_of_the_text_and_the_tokens_of_its_shard(tmp_path: Path) -> None:
    [record] = run("tokenization", tmp_path, "--text-bytes", "60000", "--vocab-size", "400")
    rates = {metric.name.removeprefix("aifactory_tokenization_"): metric.median for metric in record.metrics}
    ratio = record.facts["text_bytes"] / record.facts["tokens"]
    assert rates["text_bytes_per_second"] / rates["tokens_per_second"] == pytest.approx(ratio)
    assert 1 < ratio < 6  # a token of a small vocabulary stands for a few bytes


def test_text_is_as_large_as_asked_for_and_the_same_each_time(tmp_path: Path) -> None:
    sizes = [write_text(tmp_path / name, 200_000) for name in ("a", "b")]
    assert sizes[0] == sizes[1] and 150_000 < sizes[0] <= 200_000
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
