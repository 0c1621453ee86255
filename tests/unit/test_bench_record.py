"""The record of a benchmark: how samples of ranks become a metric, what is refused, what is written and shipped."""

from __future__ import annotations

import errno
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.bench.record import (
    Record,
    build_metric,
    cell_key,
    check_record,
    new_id,
    read_record,
    read_samples,
    render_schema,
    write_record,
)
from aifactory_train.bench.statistics import median_interval, summarize
from aifactory_train.errors import RunFolderError, StorageError
from aifactory_train.rundir import write_atomic
from bench_records import GEMM, PROVENANCE, STEADY, a_metric, a_record

STEP = "aifactory_train_step_duration_seconds"
ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILE = ROOT / "benchmarks" / "schema" / "aifactory-bench-1.json"
RECORDED = Path(__file__).parent / "recorded" / "aifactory-bench-1.json"


def test_a_sample_of_all_ranks_is_that_of_the_slowest() -> None:
    metric = build_metric(STEP, "lower", {0: [1.0, 5.0, 2.0], 1: [3.0, 1.0, 4.0]}, ["n1", "n2"], "max")
    assert (metric.median, metric.min, metric.max, metric.n) == (4.0, 3.0, 5.0, 3)
    assert metric.worst_rank is not None
    assert metric.worst_rank.model_dump() == {"rank": 1, "host": "n2", "median": 3.0}
    assert (metric.unit, metric.better, metric.ci95) == ("s", "lower", None)


def test_a_rate_of_all_ranks_is_the_lowest() -> None:
    metric = build_metric(GEMM, "higher", {0: [9.0, 7.0, 8.0], 1: [6.0, 10.0, 6.0]}, ["n1", "n2"], "max")
    assert (metric.median, metric.min, metric.max) == (6.0, 6.0, 7.0)
    assert metric.worst_rank is not None and metric.worst_rank.rank == 1


def test_ranks_that_work_alone_keep_all_their_samples() -> None:
    metric = build_metric(GEMM, "higher", {0: [9.0, 7.0], 1: [6.0]}, ["n1", "n2"], "none")
    assert (metric.median, metric.max, metric.n) == (7.0, 9.0, 3)
    assert metric.flagged == {}


def test_spikes_are_counted_and_stay_in() -> None:
    steps = {0: [1.0] * 10, 1: [1.0] * 9 + [2.0], 2: [1.0] * 9 + [2.0]}
    steps[0][3] = 3.0
    metric = build_metric(STEP, "lower", steps, ["n1"] * 3, "max")
    assert metric.flagged == {"straggler": 1, "system": 1}
    assert (metric.max, metric.n) == (3.0, 10)
    rates = {rank: [1 / s for s in values] for rank, values in steps.items()}
    assert build_metric(GEMM, "higher", rates, ["n1"] * 3, "max").flagged == metric.flagged


def test_ranks_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"number of samples by rank: \{0: 2, 1: 1\}"):
        build_metric(STEP, "lower", {0: [1.0, 1.0], 1: [1.0]}, ["n1"] * 2, "max")
    with pytest.raises(ValueError, match="number of samples by rank"):
        build_metric(STEP, "lower", {0: [1.0], 1: []}, ["n1"] * 2, "none")
    with pytest.raises(ValueError, match="is nan"):
        build_metric(STEP, "lower", {0: [1.0, math.nan]}, ["n1"], "none")


def without(**changes: Any) -> dict[str, Any]:
    return {"provenance": {**PROVENANCE, **changes}}


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        (without(git_sha=None), "git sha"),
        (without(versions={}), "versions"),
        ({"hosts": []}, "hosts"),
        ({"machine": ""}, "machine"),
        ({"ended": ""}, "start and end"),
        ({"protocol": None}, "protocol"),
        ({"samples": None}, "samples"),
        ({"metrics": []}, "metrics, fault or verdict"),
        ({"metrics": [a_metric("aifactory_gem_flops_per_second")]}, f"the nearest known one is {GEMM}"),
        ({"metrics": [a_metric(), a_metric()]}, "2 times"),
        ({"metrics": [a_metric(unit="TFLOP/s")]}, "it is FLOP/s, higher"),
        ({"metrics": [a_metric(better="lower")]}, "it is FLOP/s, higher"),
    ],
)
def test_a_record_that_cannot_be_believed_is_refused(changes: dict[str, Any], missing: str) -> None:
    whole = a_record().model_copy(update={"samples": "r1.samples.jsonl.zst"})
    check_record(whole)
    with pytest.raises(RunFolderError, match=re.escape(missing)):
        check_record(whole.model_copy(update=changes))


def test_a_fault_needs_neither_protocol_nor_samples(tmp_path: Path) -> None:
    path = write_record(tmp_path, a_record(metrics=[], protocol=None, fault="rank 1 on n2 is missing"), {})
    assert read_record(path).fault == "rank 1 on n2 is missing"
    assert [p.name for p in path.parent.iterdir()] == ["r1.json"]


def test_what_is_written_is_read_again_and_every_number_can_be_recomputed(tmp_path: Path) -> None:
    by_rank = {0: list(STEADY), 1: [x * 0.9 + 0.1 for x in STEADY]}
    metric = build_metric(GEMM, "higher", by_rank, ["n1", "n2"], "max")
    path = write_record(tmp_path, a_record(metrics=[metric]), {GEMM: by_rank, "warm_up_s": {0: [1.0], 1: [2.0]}})
    assert path == tmp_path / "records" / "r1.json"
    record = read_record(path)
    assert record == a_record(metrics=[metric]).model_copy(update={"samples": "r1.samples.jsonl.zst"})
    samples = read_samples(path.parent / str(record.samples))
    assert samples == {GEMM: by_rank, "warm_up_s": {0: [1.0], 1: [2.0]}}
    slowest = [min(pair) for pair in zip(*samples[GEMM].values(), strict=True)]
    read = record.metrics[0]
    assert (read.median, read.ci95) == (statistics.median(slowest), median_interval(slowest))
    assert summarize(slowest)._asdict().items() <= read.model_dump().items()


def test_a_metric_without_its_samples_is_not_written(tmp_path: Path) -> None:
    for samples in ({STEP: {0: [1.0]}}, {GEMM: {0: []}}):
        with pytest.raises(RunFolderError, match=f"without the samples of {GEMM}"):
            write_record(tmp_path, a_record(), samples)
    assert not (tmp_path / "records").exists()


def test_no_record_stands_without_its_samples_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: str | bytes) -> None:
        if path.suffix == ".zst":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomic(path, data)

    monkeypatch.setattr("aifactory_train.bench.record.write_atomic", write)
    with pytest.raises(StorageError, match="No space left on device while writing a benchmark record"):
        write_record(tmp_path, a_record(), {GEMM: {0: STEADY}})
    assert not (tmp_path / "records" / "r1.json").exists()


def test_a_file_that_is_no_record_is_named_with_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(RunFolderError, match="No such file"):
        read_record(path)
    path.write_text("[]")
    with pytest.raises(RunFolderError, match="the whole file"):
        read_record(path)
    path.write_text(a_record().model_dump_json(by_alias=True).replace('"n":10,"worst', '"n":0,"worst'))
    with pytest.raises(RunFolderError, match=r"metrics.0.n: .*greater than or equal to 1"):
        read_record(path)


def test_samples_that_were_cut_short_are_told(tmp_path: Path) -> None:
    path = write_record(tmp_path, a_record(), {GEMM: {0: STEADY}})
    raw = path.with_name("r1.samples.jsonl.zst")
    raw.write_bytes(b"\0" + raw.read_bytes()[1:])
    with pytest.raises(RunFolderError, match="the samples are damaged"):
        read_samples(raw)
    with pytest.raises(RunFolderError, match="No such file"):
        read_samples(tmp_path / "none.zst")


def test_the_key_of_a_cell_is_sorted_and_leaves_out_what_is_not_there() -> None:
    cell = {"seq": 4096, "dtype": "bf16", "compiled": True, "share": 0.5, "layout": None}
    key = "benchmark=gemm,compiled=true,dtype=bf16,seq=4096,share=0.5"
    assert cell_key(a_record(cell=cell)) == key
    assert cell_key(a_record(cell=dict(reversed(cell.items())), machine="elsewhere")) == key


def test_ids_differ_and_name_the_benchmark() -> None:
    ids = {new_id("gemm") for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-gemm-[0-9a-f]{8}", one) for one in ids)


def test_the_shipped_schema_is_that_of_the_record() -> None:
    do = "python -c 'from aifactory_train.bench.record import render_schema; print(render_schema(), end=\"\")'"
    assert SCHEMA_FILE.read_text() == render_schema(), f"write anew: {do} > {SCHEMA_FILE.relative_to(ROOT)}"


def assert_kept(written: object, read: object) -> None:
    """All that was written, at any depth; a mapping that is read may have more."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            assert key in read
            assert_kept(value, read[key])
    else:
        assert written == read


def test_a_record_of_the_first_day_can_still_be_read() -> None:
    record = read_record(RECORDED)
    written = json.loads(RECORDED.read_text())
    assert_kept(written, json.loads(record.model_dump_json(by_alias=True)))
    assert written.keys() <= json.loads(SCHEMA_FILE.read_text())["properties"].keys()


def test_a_record_with_a_field_that_the_schema_lacks_is_refused() -> None:
    fields = json.loads(a_record().model_dump_json(by_alias=True))
    with pytest.raises(ValueError, match="guess"):
        Record.model_validate({**fields, "guess": 1})
