"""Where the files of a bench lie, the index over benches, and the archive of one."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile
from pathlib import Path

import pytest
import zstandard

from aifactory_train.bench.record import Judgement
from aifactory_train.bench.store import BenchDir, archive, load_records, update_index
from aifactory_train.errors import RunFolderError, StorageError
from bench_records import GEMM, STEADY, a_record, write_folder


def rows(parent: Path, query: str) -> list[tuple[object, ...]]:
    index = sqlite3.connect(parent / "index.sqlite")
    found = index.execute(query).fetchall()
    index.close()
    return found


def test_records_come_in_the_order_of_their_start(tmp_path: Path) -> None:
    late = a_record(id="a", started="2026-11-20T12:00:00Z")
    early = a_record(id="b", started="2026-11-20T11:00:00Z")
    folder = write_folder(tmp_path / "one", [late, early])
    assert [record.id for record in load_records(folder)] == ["b", "a"]
    assert load_records(tmp_path / "none") == []


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, [a_record()])
    BenchDir(folder).record("r1").write_text("{")
    with pytest.raises(RunFolderError, match="r1.json"):
        load_records(folder)


def test_the_samples_of_a_record_are_found_beside_it(tmp_path: Path) -> None:
    bench = BenchDir(write_folder(tmp_path, [a_record(), a_record(id="r2")], {"r1": {GEMM: {0: STEADY}}}))
    first, second = load_records(bench.root)
    path = bench.samples(first)
    assert path is not None and path.is_file() and path.parent == bench.records
    assert bench.samples(second) is None


def test_the_index_holds_every_metric_with_its_interval_worst_host_and_verdict(tmp_path: Path) -> None:
    judged = Judgement(metric=GEMM, verdict="no_reference", reference=None, tolerance_frac=None, why="unknown device")
    write_folder(tmp_path / "one", [a_record(hosts=["n1", "n2"], verdicts=[judged])])
    write_folder(tmp_path / "two", [a_record(id="r2", metrics=[], fault="no GPU")])
    (tmp_path / "no-bench").mkdir()
    assert update_index(tmp_path) == []
    assert rows(tmp_path, "SELECT folder, id, hosts, fault FROM records ORDER BY folder") == [
        ("one", "r1", "n[1-2]", None),
        ("two", "r2", "n1", "no GPU"),
    ]
    assert rows(tmp_path, "SELECT cell FROM records WHERE id = 'r1'") == [
        ("benchmark=gemm,dtype=bf16,k=1024,m=1024,n=1024",)
    ]
    columns = "name, median, ci_low, ci_high, n, worst_host, verdict"
    assert rows(tmp_path, f"SELECT {columns} FROM metrics") == [(GEMM, 100.0, 99.8, 100.2, 10, "n1", "no_reference")]


def test_the_index_follows_changed_and_removed_records(tmp_path: Path) -> None:
    bench = BenchDir(write_folder(tmp_path / "one", [a_record(), a_record(id="r2")]))
    update_index(tmp_path)
    bench.record("r2").unlink()
    write_folder(bench.root, [a_record(machine="elsewhere")])
    update_index(tmp_path)
    assert rows(tmp_path, "SELECT id, machine FROM records") == [("r1", "elsewhere")]
    assert rows(tmp_path, "SELECT id FROM metrics") == [("r1",)]


def test_records_that_have_not_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "one", [a_record()])
    update_index(tmp_path)
    monkeypatch.setattr("aifactory_train.bench.store.read_record", lambda path: pytest.fail(f"{path} was read"))
    assert update_index(tmp_path) == []
    assert rows(tmp_path, "SELECT count(*) FROM records") == [(1,)]


@pytest.mark.parametrize("keep_bytes", [0, 5, 16, 5000, -4096])
def test_a_damaged_index_is_made_anew(tmp_path: Path, keep_bytes: int) -> None:
    write_folder(tmp_path / "one", [a_record()])
    update_index(tmp_path)
    whole = (tmp_path / "index.sqlite").read_bytes()
    (tmp_path / "index.sqlite").write_bytes(whole[:keep_bytes] + b"\xff" * min(abs(keep_bytes), 4096))
    assert update_index(tmp_path) == []
    assert rows(tmp_path, "SELECT id FROM records") == [("r1",)]


def test_an_index_of_another_version_is_made_anew(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", [a_record()])
    old = sqlite3.connect(tmp_path / "index.sqlite")
    old.executescript("PRAGMA user_version = 99; CREATE TABLE records (id TEXT);")
    old.close()
    update_index(tmp_path)
    assert rows(tmp_path, "SELECT folder, id FROM records") == [("one", "r1")]


def test_a_record_that_cannot_be_read_is_told_and_the_others_are_indexed(tmp_path: Path) -> None:
    bench = BenchDir(write_folder(tmp_path / "one", [a_record(), a_record(id="r2")]))
    bench.record("r1").write_text('{"schema": "aifactory-bench/1"}')
    (sentence,) = update_index(tmp_path)
    assert "r1.json" in sentence and "no record of aifactory-bench/1" in sentence
    assert rows(tmp_path, "SELECT id FROM records") == [("r2",)]


def test_the_archive_holds_records_samples_logs_and_what_lies_beside(tmp_path: Path) -> None:
    bench = BenchDir(write_folder(tmp_path / "one", [a_record()], {"r1": {GEMM: {0: STEADY}}}))
    bench.logs.mkdir()
    bench.log(1, "gemm").write_text("a line\n")
    bench.report.write_text("<html>")
    (bench.root / "checkpoints").mkdir()
    (bench.root / "checkpoints" / "weights").write_text("large")
    (bench.root / ".lock").touch()
    assert archive(bench.root, bench.root / "first.tar.zst").stat().st_size > 0
    path = archive(bench.root, tmp_path)
    assert path == tmp_path / "one.tar.zst"
    data = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        assert sorted(member.name for member in members) == [
            "one/logs/1-gemm.txt",
            "one/records/r1.json",
            "one/records/r1.samples.jsonl.zst",
            "one/report.html",
            "one/suite.json",
        ]
        assert {(member.uid, member.uname, member.gname) for member in members} == {(0, "", "")}
        suite = tar.extractfile("one/suite.json")
        assert suite is not None and json.load(suite)["hosts"] == ["n1"]


def test_an_archive_is_made_of_a_bench_folder_only(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="suite.json"):
        archive(tmp_path, tmp_path / "x.tar.zst")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "one", [a_record()])
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="writing the archive of a bench"):
        archive(folder, tmp_path / "file" / "x.tar.zst")
    (tmp_path / "index.sqlite").mkdir()
    with pytest.raises(StorageError, match="writing the index"):
        update_index(tmp_path)
