"""Verdicts: what is red, what is green, and that the unknown never passes."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from aifactory_train.bench.judge import FolderVerdict, judge, judge_folder
from aifactory_train.bench.record import Record, Validity, read_record
from aifactory_train.bench.references import References, learn, render_references
from bench_records import a_metric, a_protocol, a_record, write_folder

TODAY = date(2026, 11, 23)


def known(**changes: object) -> References:
    """A reference of 100 FLOP/s with 7 % tolerance, of 20 nodes."""
    learned = learn([a_record(samples=[100.0] * 10, id=f"s{i}", hosts=[f"s{i}"]) for i in range(20)], "tests")
    (limit,) = learned.references
    return References(machine="here", references=[limit.model_copy(update=changes)])


def verdict_of(record: Record, references: References | None, **options: bool) -> str:
    (judgement,) = judge(record, references, TODAY, **options)
    assert len(judgement.why) > 10
    return judgement.verdict


def around(value: float, spread: float = 1.0) -> Record:
    """Its interval is from 0.6 x spread below to 0.6 x spread above `value`."""
    return a_record(samples=[value + spread * (i - 4.5) / 4.5 * 1.08 for i in range(10)])


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(92.0, "regression"), (92.8, "pass"), (100.0, "pass"), (107.4, "pass"), (108.0, "improvement")],
)
def test_the_whole_interval_must_lie_beyond_the_tolerance(value: float, verdict: str) -> None:
    assert verdict_of(around(value), known()) == verdict


def test_seconds_are_worse_when_longer() -> None:
    def timed(seconds: float) -> Record:
        name = "aifactory_train_step_duration_seconds"
        metric = a_metric(name, [seconds] * 10, unit="s", better="lower")
        return a_record(id=f"t{seconds}", hosts=[f"n{seconds}"], metrics=[metric])

    references = learn([timed(1.0).model_copy(update={"hosts": [f"s{i}"]}) for i in range(20)], "tests")
    assert verdict_of(timed(1.1), references) == "regression"
    assert verdict_of(timed(0.9), references) == "improvement"
    assert verdict_of(timed(1.05), references) == "pass"


def test_beyond_either_side_of_a_band_is_red() -> None:
    assert verdict_of(around(110.0), known(kind="band")) == "regression"
    assert verdict_of(around(90.0), known(kind="band")) == "regression"
    assert verdict_of(around(100.0), known(kind="band")) == "pass"


def test_without_an_interval_all_samples_must_lie_beyond() -> None:
    assert verdict_of(a_record(samples=[80.0, 90.0, 92.0]), known()) == "regression"
    assert verdict_of(a_record(samples=[80.0, 90.0, 94.0]), known()) == "pass"


def test_unknown_machines_cells_and_devices_never_pass() -> None:
    other_cell = a_record(cell={"dtype": "fp32"})
    other_cpu = a_record(provenance={"git_sha": "1", "cpu": "other", "n_cpus": 2})
    nameless = a_record(provenance={"git_sha": "1"})
    for record, references in ((a_record(), None), (other_cell, known()), (other_cpu, known()), (nameless, known())):
        assert verdict_of(record, references) == "no_reference"
    assert "AMD EPYC, 2 cores" in judge(other_cpu, known(), TODAY)[0].why
    assert "has no file of references" in judge(a_record(), None, TODAY)[0].why


def test_a_reference_of_few_nodes_judges_only_when_asked() -> None:
    few = known(kind="info", n_nodes=3)
    assert verdict_of(around(50.0), few) == "no_reference"
    (judgement,) = judge(around(50.0), few, TODAY)
    assert judgement.reference == 100.0 and "3 node(s), which are too few" in judgement.why
    assert verdict_of(around(50.0), few, use_info=True) == "regression"


def test_an_expired_reference_says_so() -> None:
    assert "expired on 2026-11-22" in judge(around(100.0), known(expires_on=date(2026, 11, 22)), TODAY)[0].why
    assert "expired" not in judge(around(100.0), known(expires_on=TODAY), TODAY)[0].why


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"fault": "rank 3 died"}, "incomplete"),
        ({"validity": Validity(wrong_values=1)}, "invalid"),
        ({"validity": Validity(loss_finite=False)}, "invalid"),
        ({"validity": Validity(throttled=True)}, "degraded"),
        ({"protocol": a_protocol(steady=False)}, "unstable"),
        ({"metrics": [], "facts": {"skipped": "one device has no pair"}}, "skipped"),
    ],
)
def test_numbers_that_are_worth_nothing_are_not_compared(changes: dict[str, object], verdict: str) -> None:
    assert verdict_of(a_record(**changes), known()) == verdict


@pytest.mark.parametrize("name", ["fingerprint", "n_parameters"])
def test_the_node_that_computes_something_else_is_found(name: str) -> None:
    value: dict[str, tuple[object, object]] = {"fingerprint": ("aa", "ab"), "n_parameters": (10, 11)}
    records = [a_record(id=f"r{i}", validity=Validity(**{name: value[name][i == 2]})) for i in range(3)]
    verdicts = [judge(r, None, TODAY, others=records)[0].verdict for r in records]
    assert verdicts == ["no_reference", "no_reference", "invalid"]
    two = [judge(r, None, TODAY, others=records[1:])[0].verdict for r in records[1:]]
    assert two == ["invalid", "invalid"]
    other_stack = records[2].model_copy(update={"provenance": {"git_sha": "1", "versions": {"torch": "2.8.0"}}})
    assert judge(other_stack, None, TODAY, others=[*records[:2], other_stack])[0].verdict == "no_reference"


def of_nodes(*values: float) -> list[Record]:
    return [a_record(samples=[v] * 10, id=f"r{i}", hosts=[f"n{i:02}"]) for i, v in enumerate(values)]


def folder_verdict(
    tmp_path: Path, records: list[Record], hosts: list[str], references: References | None = None
) -> FolderVerdict:
    folder = write_folder(tmp_path / "bench", records, hosts=hosts)
    if references:
        (tmp_path / "here.yaml").write_text(render_references(references))
    return judge_folder(folder, TODAY, references_dir=tmp_path)


def test_slow_silent_and_sound_nodes_are_listed_for_slurm(tmp_path: Path) -> None:
    verdict = folder_verdict(tmp_path, of_nodes(100, 101, 99, 80, 100.5), [f"n{i:02}" for i in range(6)])
    folder = tmp_path / "bench"
    assert (folder / "passing_nodes.txt").read_text() == "n[00-02,04]\n"
    assert (folder / "failing_nodes.txt").read_text() == "n03\n"
    assert (folder / "missing_nodes.txt").read_text() == "n05\n"
    assert "worse than the median of 5 nodes" in verdict.nodes.why["n03"] and verdict.exit_code == 1
    again = read_record(folder / "records" / "r3.json")
    assert [j.verdict for j in again.verdicts] == ["no_reference"] and verdict.records[3] == again


def test_all_green_is_exit_code_0_and_empty_lists(tmp_path: Path) -> None:
    verdict = folder_verdict(tmp_path, of_nodes(100, 100, 100), ["n00", "n01", "n02"], known())
    assert verdict.exit_code == 0 and [j.verdict for r in verdict.records for j in r.verdicts] == ["pass"] * 3
    assert (tmp_path / "bench" / "failing_nodes.txt").read_text() == ""


def test_a_regression_fails_its_node(tmp_path: Path) -> None:
    verdict = folder_verdict(tmp_path, of_nodes(90, 90), ["n00", "n01"], known())
    assert verdict.exit_code == 1 and verdict.nodes.failing == ["n00", "n01"]


def test_a_missing_node_is_incomplete(tmp_path: Path) -> None:
    verdict = folder_verdict(tmp_path, of_nodes(100), ["n00", "n01"])
    assert verdict.exit_code == 2 and verdict.nodes.missing == ["n01"] and verdict.nodes.passing == ["n00"]


def test_a_job_that_died_accuses_the_ranks_that_did_not_answer(tmp_path: Path) -> None:
    hosts = ["n00", "n00", "n01", "n01"]
    fault = a_record(id="f", hosts=hosts, metrics=[], fault="no answer", protocol=None, facts={"missing_ranks": [3]})
    verdict = folder_verdict(tmp_path, [*of_nodes(100, 100), fault], ["n00", "n01"])
    assert verdict.exit_code == 2
    assert (verdict.nodes.passing, verdict.nodes.failing, verdict.nodes.missing) == (["n00"], ["n01"], [])
