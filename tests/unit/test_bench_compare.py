"""Comparing two benches: a difference must be shown by its interval and be larger than the tolerance."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aifactory_train.bench.compare import Row, build_comparison, compare
from aifactory_train.bench.paired import Ratio
from aifactory_train.bench.record import Record, Validity
from aifactory_train.errors import RunFolderError
from bench_records import GEMM, PROVENANCE, a_metric, a_protocol, a_record, write_folder


def drawn(median: float, seed: int, n: int = 50, spread: float = 0.01) -> list[float]:
    draw = random.Random(seed)
    return [median * (1 + draw.uniform(-spread, spread)) for _ in range(n)]


def folder(root: Path, name: str, values: list[list[float]], **changes: object) -> Path:
    """One record for each list of samples, a minute apart."""
    records, samples = [], {}
    for i, one in enumerate(values):
        records.append(
            a_record(samples=one, **({"id": f"{name}{i}", "started": f"2026-11-20T10:{i:02}:00Z"} | changes))
        )
        samples[f"{name}{i}"] = {GEMM: {0: one}}
    return write_folder(root / name, records, samples)


def only_row(a: Path, b: Path) -> Row:
    (row,) = build_comparison(a, b).rows
    return row


def ratio_of(a: Path, b: Path) -> Ratio:
    ratio = only_row(a, b).ratio
    assert ratio is not None
    return ratio


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "pass"), (1.05, "pass"), (0.95, "pass"), (0.85, "regression"), (1.15, "improvement")]
)
def test_a_difference_has_to_be_shown_and_to_matter(tmp_path: Path, factor: float, verdict: str) -> None:
    """7 % is the tolerance on a CPU."""
    a, b = folder(tmp_path, "a", [drawn(100, 1)]), folder(tmp_path, "b", [drawn(100 * factor, 2)])
    row = only_row(a, b)
    assert row.verdict == verdict and "not paired" in row.method
    ratio = ratio_of(a, b)
    assert ratio.low <= ratio.ratio <= ratio.high and ratio.ratio == pytest.approx(factor, abs=0.01)


def test_a_large_difference_that_noise_explains_is_none(tmp_path: Path) -> None:
    a, b = folder(tmp_path, "a", [drawn(100, 1, 6, 0.9)]), folder(tmp_path, "b", [drawn(75, 2, 6, 0.9)])
    assert (only_row(a, b).verdict, only_row(a, b).why) == ("pass", "no difference shown")


def test_blocks_in_turns_are_paired_and_a_common_drift_cancels(tmp_path: Path) -> None:
    """Both sides slow down by two thirds while they run; B is 10 % faster in every block."""
    turns = ["a", "b", "b", "a"] * 3
    values = {"a": [], "b": []}
    starts = {"a": [], "b": []}
    for i, side in enumerate(turns):
        values[side].append(drawn((110 if side == "b" else 100) * (1 - i // 2 / 8), i))
        starts[side].append(f"2026-11-20T10:{i:02}:00Z")
    folders = {}
    for side in ("a", "b"):
        records = [
            a_record(samples=one, id=f"{side}{i}", started=start)
            for i, (one, start) in enumerate(zip(values[side], starts[side], strict=True))
        ]
        samples = {r.id: {GEMM: {0: one}} for r, one in zip(records, values[side], strict=True)}
        folders[side] = write_folder(tmp_path / side, records, samples)
    row = only_row(folders["a"], folders["b"])
    assert row.method == "paired, 6 blocks in turns" and row.verdict == "improvement"
    assert row.ratio is not None and 1.05 < row.ratio.low < 1.1 < row.ratio.high < 1.15


def test_one_after_the_other_is_not_in_turns(tmp_path: Path) -> None:
    a = folder(tmp_path, "a", [drawn(100, i) for i in range(6)])
    b = folder(tmp_path, "b", [drawn(100, i) for i in range(6)], started="2026-11-20T11:00:00Z")
    assert only_row(a, b).method.startswith("not paired")


def test_a_sample_of_ranks_that_worked_together_is_that_of_the_worst(tmp_path: Path) -> None:
    def two_ranks(name: str, slow: float, reduction: str) -> Path:
        record = a_record(id=name, hosts=["n1", "n1"], protocol=a_protocol(rank_reduction=reduction))
        samples = {name: {GEMM: {0: [100.0] * 10, 1: [slow] * 10}}}
        return write_folder(tmp_path / name, [record], samples)

    assert ratio_of(two_ranks("a", 100.0, "max"), two_ranks("b", 50.0, "max")).ratio == 0.5
    assert ratio_of(two_ranks("c", 100.0, "none"), two_ranks("d", 50.0, "none")).ratio == 0.75


def test_seconds_are_worse_when_longer(tmp_path: Path) -> None:
    name = "aifactory_train_step_duration_seconds"

    def timed(side: str, seconds: float) -> Path:
        samples = drawn(seconds, 3)
        record = a_record(id=side, metrics=[a_metric(name, samples, unit="s", better="lower")])
        return write_folder(tmp_path / side, [record], {side: {name: {0: samples}}})

    assert only_row(timed("a", 1.0), timed("b", 1.2)).verdict == "regression"
    assert only_row(timed("c", 1.0), timed("d", 0.8)).verdict == "improvement"


def test_the_same_node_is_compared_with_itself(tmp_path: Path) -> None:
    def two_nodes(side: str, first: float, second: float) -> Path:
        values = {f"{side}0": drawn(first, 1), f"{side}1": drawn(second, 2)}
        records = [a_record(samples=v, id=i, hosts=[f"n{i[-1]}"]) for i, v in values.items()]
        return write_folder(tmp_path / side, records, {i: {GEMM: {0: v}} for i, v in values.items()})

    rows = build_comparison(two_nodes("a", 100, 100), two_nodes("b", 100, 50)).rows
    assert [(row.cell.partition(" on ")[2], row.verdict) for row in rows] == [("n0", "pass"), ("n1", "regression")]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"fault": "died", "metrics": []}, "incomplete"),
        ({"validity": Validity(throttled=True)}, "degraded"),
        ({"validity": Validity(n_parameters=11)}, "invalid"),
        ({"protocol": a_protocol(steady=False)}, "unstable"),
    ],
)
def test_what_is_worth_nothing_is_not_compared(tmp_path: Path, changes: dict[str, object], verdict: str) -> None:
    def side(name: str, **own: object) -> Path:
        record: Record = a_record(**({"id": name, "validity": Validity(n_parameters=10)} | own))
        return write_folder(tmp_path / name, [record], {name: {GEMM: {0: [100.0] * 10}}})

    row = only_row(side("a"), side("b", **changes))
    assert row.verdict == verdict and row.ratio is None
    assert only_row(tmp_path / "b", tmp_path / "a").verdict == verdict
    assert verdict in compare(tmp_path / "a", tmp_path / "b")


def test_text_names_cells_of_one_side_and_what_else_changed(tmp_path: Path) -> None:
    versions = {**PROVENANCE["versions"], "torch": "2.14.0"}
    b_only = a_record(id="b9", cell={"dtype": "fp32"})
    a = folder(tmp_path, "a", [drawn(100, 1)])
    b = folder(tmp_path, "b", [drawn(80, 2)], provenance={**PROVENANCE, "versions": versions, "load_1min": 3})
    write_folder(b, [b_only], {"b9": {GEMM: {0: [1.0] * 10}}})
    text = compare(a, b)
    assert "only in B: benchmark=gemm,dtype=fp32" in text and "only in A" not in text
    assert "changed versions.torch: A 2.13.0 | B 2.13.0; 2.14.0" in text and "load_1min" not in text
    assert text.splitlines()[-1] == "1 regression"
    assert "regression, more than 7 %" in text and "\N{MINUS SIGN}20" in text


def test_two_records_compare_as_two_folders_do(tmp_path: Path) -> None:
    a, b = folder(tmp_path, "a", [drawn(100, 1)]), folder(tmp_path, "b", [drawn(80, 2)])
    assert compare(a / "records" / "a0.json", b / "records" / "b0.json") == compare(a, b)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    a = folder(tmp_path, "a", [drawn(100, 1)])
    with pytest.raises(RunFolderError, match="no records here"):
        compare(a, tmp_path)


def test_sides_that_should_compute_the_same_are_compared_by_their_fingerprints(tmp_path: Path) -> None:
    def side(name: str, digest: str, **changes: object) -> Path:
        record = a_record(**({"id": name, "validity": Validity(fingerprint=digest)} | changes))
        return write_folder(tmp_path / name, [record], {name: {GEMM: {0: [100.0] * 10}}})

    a = side("a", "aa" * 32)
    assert "fingerprint of benchmark=gemm" in compare(a, side("b", "aa" * 32))
    assert "aaaaaaaaaaaa in A and B" in compare(a, side("b", "aa" * 32))
    text = compare(a, side("c", "bb" * 32))
    assert "A aaaaaaaaaaaa, B bbbbbbbbbbbb; nothing else differs, so that is silent corruption" in text
    assert only_row(a, tmp_path / "c").verdict == "invalid" and "no majority" in only_row(a, tmp_path / "c").why
    new = compare(a, side("d", "bb" * 32, facts={"code_sha256": "other"}))
    assert "code differ, so they may" in new and "invalid" not in new


def test_the_node_of_either_side_that_computes_something_else_is_named(tmp_path: Path) -> None:
    def side(name: str, *digests: str) -> Path:
        records = [
            a_record(id=f"{name}{i}", hosts=[f"n{i}"], validity=Validity(fingerprint=digest))
            for i, digest in enumerate(digests)
        ]
        return write_folder(tmp_path / name, records, {r.id: {GEMM: {0: [100.0] * 10}} for r in records})

    rows = build_comparison(side("a", "aa", "aa", "aa"), side("b", "aa", "aa", "ab")).rows
    assert [(row.cell.partition(" on ")[2], row.verdict) for row in rows] == [
        *(("n0", "pass"), ("n1", "pass"), ("n2", "invalid"))
    ]
    assert "B: fingerprint is ab on n2, aa on n0, n1, n2" in rows[-1].why
