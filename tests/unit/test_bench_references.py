"""References: learned from results, refused where they could judge nothing or judge wrongly."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from aifactory_train.bench.learn import learn
from aifactory_train.bench.record import Record, Validity, cell_key
from aifactory_train.bench.references import (
    Reference,
    References,
    default_tolerance_frac,
    lint,
    load_references,
    references_dir,
    render_references,
    sku_of,
)
from aifactory_train.bench.statistics import outlier_nodes
from aifactory_train.errors import MachineError
from bench_records import GEMM, a_protocol, a_record

LIMIT = Reference(
    cell="benchmark=gemm,dtype=bf16,k=1024,m=1024,n=1024",
    metric=GEMM,
    kind="min",
    value=100.0,
    source_value=100.0,
    tolerance_frac=0.02,
    source_result_ids=["r1"],
    n_nodes=20,
    n_jobs=1,
    sku="AMD EPYC, 2 cores",
    power_cap_w=None,
    stack="torch 2.13.0",
    measured_on=date(2026, 11, 20),
    expires_on=date(2027, 11, 20),
    author="tests",
)


def nodes(*values: float) -> list[Record]:
    return [a_record(samples=[v] * 10, id=f"r{i}", hosts=[f"n{i}"]) for i, v in enumerate(values)]


def lint_of(**changes: object) -> list[str]:
    return lint(References(machine="here", references=[LIMIT.model_copy(update=changes)]), date(2026, 11, 21))


def test_bad_nodes_are_taken_out_until_none_is_left() -> None:
    """The very bad nodes widen the spread, so that the bad one only shows once they are gone."""
    records = nodes(*[98.0 + i / 5 for i in range(20)], *[50.0] * 4, 93.0)
    first_look = outlier_nodes({r.hosts[0]: r.metrics[0].median for r in records}, "higher")
    (found,) = learn([records], "tests").references
    assert set(first_look) == {"n20", "n21", "n22", "n23"}
    assert (found.kind, found.n_nodes, found.value) == ("min", 20, pytest.approx(99.9))
    assert sorted(found.source_result_ids) == sorted(f"r{i}" for i in range(20))
    assert found.measured_on == date(2026, 11, 20) and found.expires_on == date(2027, 11, 20)
    assert found.cell == cell_key(a_record()) and found.sku == "AMD EPYC, 2 cores"


def test_nineteen_nodes_in_one_job_make_no_limit() -> None:
    (found,) = learn([nodes(*[100.0] * 19)], "tests").references
    assert (found.kind, found.n_nodes, found.n_jobs) == ("info", 19, 1)
    assert found.why_info is not None and "19 node(s) in 1 steady job(s)" in found.why_info


def test_a_node_that_ran_twice_in_a_job_counts_once() -> None:
    records = [a_record(samples=[100.0 + i] * 10, id=f"r{i}", hosts=["n0"]) for i in range(30)]
    (found,) = learn([records, records], "tests").references
    assert (found.kind, found.n_nodes, found.n_jobs, found.value) == ("info", 1, 1, 114.5)


def jobs(*values: float, **changes: object) -> list[list[Record]]:
    """A bench for each value, of one node."""
    return [[a_record(**({"samples": [v] * 10, "id": f"j{i}"} | changes))] for i, v in enumerate(values)]


def test_three_jobs_of_one_node_make_a_limit_for_that_node_alone() -> None:
    learned = learn(jobs(100.0, 88.0, 104.0), "tests")
    (found,) = learned.references
    assert (found.kind, found.value, found.n_nodes, found.n_jobs, found.nodes) == ("min", 100.0, 1, 3, ["n1"])
    assert found.tolerance_frac == pytest.approx(0.12, abs=0.002), "the slowest of its own jobs passes"
    assert found.ci95 == (88.0, 104.0) and found.source_result_ids == ["j0", "j1", "j2"]
    assert lint(learned) == [] and learned.find(a_record(), GEMM) == found
    assert learned.find(a_record(hosts=["n2"]), GEMM) is None
    assert (learn(jobs(100.0, 99.0), "tests").references[0].kind) == "info"


def test_a_reference_of_the_machine_local_is_never_applied_to_other_hardware() -> None:
    """Every machine without a file is called local; the processor tells them apart, and the name of the host."""
    learned = learn(jobs(100.0, 99.0, 101.0, machine="local", hosts=["vm"]), "tests")
    here = a_record(machine="local", hosts=["vm"])
    assert learned.find(here, GEMM) is not None
    for other in ({"cpu": "Grace", "n_cpus": 2}, {"cpu": "AMD EPYC", "n_cpus": 64}, {}):
        elsewhere = here.model_copy(update={"provenance": {"git_sha": "1", **other}})
        assert learned.find(elsewhere, GEMM) is None
    assert learned.find(here.model_copy(update={"hosts": ["login1"]}), GEMM) is None


def test_what_was_not_steady_or_differs_widely_is_told_and_limits_nothing() -> None:
    restless = a_protocol(steady=False)
    (never,) = learn(jobs(100.0, 99.0, 101.0, protocol=restless), "tests").references
    assert (never.kind, never.value, never.why_info) == ("info", 100.0, "it was steady in no job")
    some = [*jobs(100.0, 99.0), [a_record(samples=[50.0] * 10, id="j9", protocol=restless)]]
    (two_steady,) = learn(some, "tests").references
    assert (two_steady.kind, two_steady.value, two_steady.n_jobs) == ("info", 99.5, 2)
    (wide,) = learn(jobs(100.0, 40.0, 101.0), "tests").references
    assert wide.kind == "info" and wide.why_info is not None and "differ by 60%" in wide.why_info
    (unsure,) = learn(jobs(100.0, 99.0, 101.0, protocol=a_protocol(ci_reached=False)), "tests").references
    assert unsure.kind == "min", "a wide interval of the samples is no wide spread of the jobs"


def test_the_tolerance_lets_all_nodes_pass_that_the_reference_is_made_of() -> None:
    (found,) = learn([nodes(*[100.0] * 11, *[96.0] * 10)], "tests").references
    assert found.tolerance_frac >= 0.04
    (close,) = learn([nodes(*[100.0] * 20)], "tests").references
    assert close.tolerance_frac == 0.07


def test_results_that_are_not_sound_teach_nothing() -> None:
    bad = [
        a_record(id="b1", fault="died", metrics=[]),
        a_record(id="b2", validity=Validity(throttled=True)),
        a_record(id="b3", validity=Validity(device_errors=["rank 0: 1 memory rows remapped"])),
        a_record(id="b3", validity=Validity(wrong_values=3)),
        a_record(id="b5", validity=Validity(loss_finite=False)),
    ]
    (found,) = learn([[a_record(), *bad]], "tests").references
    assert found.source_result_ids == ["r1"]
    with pytest.raises(MachineError, match="no sound record"):
        learn([bad], "tests")


def test_records_of_two_machines_are_not_mixed() -> None:
    with pytest.raises(MachineError, match="records of 2 machines: here, there"):
        learn([[a_record()], [a_record(id="r2", machine="there")]], "tests")


def test_devices_and_power_caps_have_references_of_their_own() -> None:
    def on(gpu: str, cap_w: float) -> Record:
        rank = {"gpu": gpu, "gpu_memory_bytes": 80 * 2**30, "power_cap_w": cap_w}
        return a_record(facts={"ranks": [rank, rank]}, id=f"{gpu}{cap_w}")

    references = learn([[on("A", 700.0), on("A", 500.0), on("B", 700.0)]], "tests")
    kinds = {(r.sku, r.power_cap_w) for r in references.references}
    assert kinds == {("A, 80 GiB", 700.0), ("A, 80 GiB", 500.0), ("B, 80 GiB", 700.0)}
    found = references.find(on("A", 500.0), GEMM)
    assert found is not None and found.power_cap_w == 500.0
    assert references.find(on("A", 600.0), GEMM) is None and references.find(on("C", 700.0), GEMM) is None
    assert sku_of(a_record(provenance={"git_sha": "1"})) is None
    nameless_gpu = a_record(protocol=a_protocol(timer="device_event+wall"))
    assert sku_of(nameless_gpu) is None and default_tolerance_frac(nameless_gpu) == 0.02


def test_what_was_learned_is_read_again_as_it_was(tmp_path: Path) -> None:
    learned = learn([nodes(*[100.0] * 20)], "tests")
    (tmp_path / "here.yaml").write_text(render_references(learned))
    assert load_references("here", tmp_path) == learned
    assert load_references("elsewhere", tmp_path) is None


def test_a_limit_of_few_nodes_needs_jobs_and_names_and_none_may_let_half_pass() -> None:
    assert "needs 20 nodes, or 3 jobs" in lint_of(n_nodes=3)[0] and lint_of(n_nodes=3, n_jobs=3)
    assert lint_of(n_nodes=3, n_jobs=3, nodes=["n1", "n2", "n3"]) == []
    assert "catches nothing" in lint_of(tolerance_frac=0.6)[0]


def computed(digest: str | None, number: int, **changes: object) -> Record:
    facts = {"recipe_hash": "r", "code_sha256": "c"} | changes
    return a_record(
        id=f"f{number}", hosts=[f"n{number}"], validity=Validity(fingerprint=digest), facts=facts,
    )  # fmt: skip


def test_a_fingerprint_is_learned_from_a_majority_of_one_setting() -> None:
    records = [computed("aa", 0), computed("aa", 1), computed("bb", 2), computed("cc", 3, code_sha256="other")]
    first, second = learn([records], "tests").fingerprints
    assert (first.fingerprint, first.n_nodes, first.source_result_ids) == ("aa", 2, ["f0", "f1"])
    assert second.fingerprint == "cc" and second.setting.code == "other"
    assert learn([[computed("aa", 0), computed("bb", 1)]], "tests").fingerprints == []
    nameless = computed("aa", 0).model_copy(update={"provenance": {"git_sha": "1"}})
    assert learn([[nameless]], "tests").fingerprints == []
    twice = References(machine="here", references=[], fingerprints=[first, first])
    assert "fault: fingerprint of" in lint(twice)[0]


@pytest.mark.parametrize("name", ["source_result_ids", "source_value", "sku", "measured_on", "expires_on"])
def test_a_limit_without_its_origin_is_a_fault(name: str) -> None:
    assert lint_of() == []
    (line,) = lint_of(**{name: [] if name == "source_result_ids" else None})
    assert line.startswith("fault: ") and f"a limit without {name}" in line
    assert lint_of(kind="info", **{name: [] if name == "source_result_ids" else None}) == []


@pytest.mark.parametrize(
    ("value", "ok"), [(49.0, False), (50.0, True), (100.0, True), (101.0, False), (2333e-3, False)]
)
def test_a_limit_far_from_its_source_is_a_fault(value: float, ok: bool) -> None:
    assert (lint_of(value=value) == []) == ok


def test_a_limit_of_seconds_may_be_longer_but_not_shorter_than_its_source() -> None:
    seconds = {"metric": "aifactory_train_step_duration_seconds", "kind": "max"}
    assert lint_of(**seconds, value=199.0) == []
    assert lint_of(**seconds, value=201.0) and lint_of(**seconds, value=99.0)
    assert "kind min, but lower is better" in lint_of(metric=seconds["metric"])[0]


def test_what_has_expired_only_warns() -> None:
    (line,) = lint_of(expires_on=date(2026, 11, 20))
    assert line.startswith("warning: ") and "expired on 2026-11-20" in line


def test_a_metric_that_nobody_measures_and_a_reference_twice_are_faults() -> None:
    assert "no metric of" in lint_of(metric="gemm_speed")[0]
    assert "twice" in lint(References(machine="here", references=[LIMIT, LIMIT]))[0]


def test_a_file_with_faults_is_not_used(tmp_path: Path) -> None:
    bad = References(machine="here", references=[LIMIT.model_copy(update={"value": 2.333})])
    (tmp_path / "here.yaml").write_text(render_references(bad))
    with pytest.raises(MachineError, match="0.02333 of its source 100"):
        load_references("here", tmp_path)
    (tmp_path / "here.yaml").write_text(render_references(bad).replace("tolerance_frac", "tolerance"))
    with pytest.raises(MachineError, match="did you mean tolerance_frac"):
        load_references("here", tmp_path)
    (tmp_path / "there.yaml").write_text(render_references(References(machine="here", references=[LIMIT])))
    with pytest.raises(MachineError, match="its name says 'there'"):
        load_references("there", tmp_path)


def test_all_references_of_the_project_can_be_used() -> None:
    for path in references_dir().glob("*.yaml"):
        assert load_references(path.stem) is not None
