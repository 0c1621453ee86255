"""Verdicts: what is red, what is green, and that the unknown never passes."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from aifactory_train.bench.fingerprints import odd_results
from aifactory_train.bench.judge import FolderVerdict, judge, judge_folder
from aifactory_train.bench.learn import learn
from aifactory_train.bench.record import Record, Validity, read_record
from aifactory_train.bench.references import References, render_references
from bench_records import a_metric, a_protocol, a_record, write_folder

TODAY = date(2026, 11, 23)


def known(**changes: object) -> References:
    """A reference of 100 FLOP/s with 7 % tolerance, of 20 nodes."""
    learned = learn([[a_record(samples=[100.0] * 10, id=f"s{i}", hosts=[f"s{i}"]) for i in range(20)]], "tests")
    (limit,) = learned.references
    return References(machine="here", references=[limit.model_copy(update=changes)])


def verdict_of(record: Record, references: References | None) -> str:
    (judgement,) = judge(record, references, TODAY)
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

    sound = [timed(1.0).model_copy(update={"hosts": [f"s{i}"], "id": f"s{i}"}) for i in range(20)]
    references = learn([sound], "tests")
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


def test_a_reference_that_is_no_limit_is_told_and_judges_nothing() -> None:
    few = known(kind="info", why_info="3 node(s) say too little")
    (judgement,) = judge(around(50.0), few, TODAY)
    assert judgement.verdict == "no_reference" and judgement.reference == 100.0
    assert "which is no limit; 3 node(s) say too little" in judgement.why


def test_a_limit_of_few_nodes_judges_those_alone() -> None:
    few = known(n_nodes=1, n_jobs=3, nodes=["n1"])
    assert verdict_of(around(50.0), few) == "regression"
    (judgement,) = judge(a_record(hosts=["n2"]), few, TODAY)
    assert judgement.verdict == "no_reference" and "measured on n2; the reference is of n1 alone" in judgement.why


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
        ({"validity": Validity(device_errors=["rank 1: Xid 79"])}, "degraded"),
        ({"protocol": a_protocol(steady=False)}, "unstable"),
        ({"metrics": [], "facts": {"skipped": "one device has no pair"}}, "skipped"),
    ],
)
def test_numbers_that_are_worth_nothing_are_not_compared(changes: dict[str, object], verdict: str) -> None:
    assert verdict_of(a_record(**changes), known()) == verdict


def of_steps(*digests: object, name: str = "fingerprint", **changes: object) -> list[Record]:
    """A record of each of n00, n01 ..."""
    return [
        a_record(id=f"r{i}", hosts=[f"n{i:02}"], validity=Validity(**{name: digest}), **changes)
        for i, digest in enumerate(digests)
    ]


@pytest.mark.parametrize(("name", "right", "wrong"), [("fingerprint", "aa", "ab"), ("n_parameters", 10, 11)])
def test_the_node_that_computes_something_else_is_found(name: str, right: object, wrong: object) -> None:
    records = of_steps(right, right, wrong, name=name)
    (sentence,) = odd_results(records).values()
    assert list(odd_results(records)) == ["r2"]
    assert f"{name} is {wrong} on n02, {right} on n00, n01: 2 of 3 node(s) agree" in sentence
    verdicts = [judge(r, None, TODAY, odd_results(records))[0].verdict for r in records]
    assert verdicts == ["no_reference", "no_reference", "invalid"]
    two = odd_results(records[1:])
    assert set(two) == {"r1", "r2"} and "no majority tells which" in two["r1"]


def test_another_stack_recipe_or_code_may_compute_something_else() -> None:
    one, other = of_steps("aa", "ab")
    for changes in (
        {"provenance": {**one.provenance, "versions": {"torch": "2.8.0"}}},
        {"provenance": {**one.provenance, "cpu": "Grace"}},
        {"facts": {"recipe_hash": "other"}},
        {"facts": {"code_sha256": "other"}},
    ):
        assert odd_results([one, other.model_copy(update=changes)]) == {}
    assert set(odd_results([one, other])) == {"r0", "r1"}


def test_a_wrong_result_counts_before_speed_and_its_node_fails_with_a_sentence(tmp_path: Path) -> None:
    records = of_steps("aa", "aa", "ab", protocol=a_protocol(steady=False))
    verdict = folder_verdict(tmp_path, records, ["n00", "n01", "n02"])
    verdicts = {r.hosts[0]: r.verdicts[0].verdict for r in verdict.records}
    assert verdicts == {"n00": "unstable", "n01": "unstable", "n02": "invalid"}
    steady = folder_verdict(tmp_path, of_steps("aa", "aa", "ab"), ["n00", "n01", "n02"])
    assert (tmp_path / "bench/failing_nodes.txt").read_text() == "n02\n" and steady.exit_code == 1
    assert "invalid: fingerprint is ab on n02, aa on n00, n01" in steady.nodes.why["n02"]


def test_a_fingerprint_of_the_references_tells_which_of_two_nodes_is_wrong() -> None:
    records = of_steps("aa", "ab")
    references = learn([of_steps("aa", "aa")], "tests")
    verdicts = [judge(r, references, TODAY, odd_results(records))[0] for r in records]
    assert [v.verdict for v in verdicts] == ["no_reference", "invalid"]
    assert "ab on n01, 2 node(s) computed aa on 2026-11-20" in verdicts[1].why


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


def test_of_a_dead_link_the_end_with_more_such_links_fails_or_both(tmp_path: Path) -> None:
    def pair(first: str, second: str, fault: str | None, **changes: object) -> Record:
        cell = {"pair": f"{first}+{second}", "bytes": 1024}
        measured = {} if fault is None else {"metrics": [], "protocol": None, "fault": fault}
        return a_record(id=f"{first}{second}", cell=cell, hosts=[first, second], **measured, **changes)

    def failing(name: str, *records: Record) -> list[str]:
        nodes = judge_folder(write_folder(tmp_path / name, list(records)), TODAY).nodes
        assert not nodes.missing
        return nodes.failing

    sound = pair("n0", "n1", None)
    assert failing("node", sound, pair("n0", "n2", "dead"), pair("n1", "n2", "dead")) == ["n2"]
    assert failing("link", sound, pair("n0", "n2", None), pair("n1", "n2", "dead")) == ["n1", "n2"]
    ended = pair("n1", "n2", "n2 has ended", facts={"missing_ranks": [1]})
    assert failing("rank", sound, pair("n0", "n2", None), ended) == ["n2"]
