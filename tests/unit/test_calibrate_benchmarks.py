"""What `calibrate` takes from the records of benchmarks, and what it refuses."""

from __future__ import annotations

import json

import pytest

from aifactory_train.errors import AifactoryError
from aifactory_train.machine.load import write_machine
from aifactory_train.machine.machine import ByDtype, Device, Host, Machine, Measured
from aifactory_train.plan.work import work_of
from aifactory_train.results.calibration import calibrate_file
from aifactory_train.results.observed import load_observations
from bench_json import a_bench_record, a_gemm
from results_run import a_plan

SITE = Machine(name="site", device=Device(kind="cuda", name="NVIDIA A100-SXM-64GB", per_node=4), host=Host(cores=32))


def refused(machine, path):
    with pytest.raises(AifactoryError) as caught:
        load_observations(machine, [path])
    assert caught.value.exit_code == 2 and caught.value.do
    return caught.value.render()


def write_records(folder, *records):
    (folder / "records").mkdir(parents=True)
    for i, record in enumerate(records):
        (folder / "records" / f"{i}.json").write_text(json.dumps(record))
    return folder


def test_a_record_of_a_benchmark_is_read_and_one_of_another_machine_or_without_git_sha_refused(tmp_path):
    def written(**changes):
        (tmp_path / "gemm.json").write_text(json.dumps(a_gemm(**changes)))
        return tmp_path / "gemm.json"

    [rates], runs = load_observations(SITE, [written()])
    assert rates.origin == "gemm-1 (git 0123456789)" and runs == []
    assert rates.measured == Measured(matmul_flops_per_s=ByDtype(bf16=2.7e14))
    assert "machine other in place of site" in refused(SITE, written(machine="other"))
    assert "git sha" in refused(SITE, written(provenance={}))
    assert "neither a run nor a record" in refused(SITE, written(schema="peers/1"))
    assert "it failed: no route" in refused(SITE, written(fault="no route", metrics=[]))
    assert "is wrong" in refused(SITE, written(validity={"wrong_values": 3}))
    assert "nothing that a plan" in refused(SITE, written(benchmark="loader"))
    (tmp_path / "notes.json").write_text("not JSON")
    assert "neither a run nor a record" in refused(SITE, tmp_path / "notes.json")


def test_a_machine_file_with_another_name_is_known_by_its_processor(tmp_path):
    folder = write_records(tmp_path, a_gemm(machine="here"))
    known = SITE.model_copy(update={"host": Host(cores=32, cpu="EPYC")})
    assert len(load_observations(known, [folder])[0]) == 1
    other = SITE.model_copy(update={"host": Host(cores=32, cpu="Grace")})
    assert "host.cpu EPYC in place of Grace" in refused(other, folder)


def test_of_a_bench_folder_the_best_shape_of_each_node_counts(tmp_path):
    copy = a_bench_record("memory", "memory_bandwidth_bytes_per_second", 1.5e12, cell={"kernel": "copy"})
    folder = write_records(
        tmp_path,
        *(a_gemm(rate) for rate in (1e14, 2.5e14, 2e14)),
        a_gemm(2.2e14, hosts=["n2"]),
        a_gemm(9e14, fault="a kernel failed", metrics=[]),
        copy,
        copy | {"cell": {"kernel": "triad"}, "metrics": [copy["metrics"][0] | {"median": 9e12}]},
        a_bench_record("loader", "loader_tokens_per_second", 1.0),
    )
    first, second = load_observations(SITE, [folder])[0]
    assert first.measured == Measured(matmul_flops_per_s=ByDtype(bf16=2.5e14), memory_bytes_per_s=1.5e12)
    assert second.measured == Measured(matmul_flops_per_s=ByDtype(bf16=2.2e14))
    on_cpu = SITE.model_copy(update={"device": Device(kind="cpu", name="EPYC", per_node=1)})
    assert load_observations(on_cpu, [folder])[0][0].measured.matmul_flops_per_s.bf16 == 5e14, "two ranks share it"
    assert "none of the 1 records here" in refused(SITE, write_records(tmp_path / "b", a_gemm(fault="x")))


def test_steps_of_a_benchmark_count_as_a_run_of_their_plan(tmp_path):
    plan = a_plan()
    facts = {"plan": plan.model_dump(mode="json")}
    step = a_bench_record("step", "train_step_duration_seconds", 0.25, facts=facts)
    folder = write_records(tmp_path, step, step | {"cell": {"deterministic": True}})
    rates, [run] = load_observations(plan.machine, [folder])
    assert rates == [] and run.step_time_s == 0.25
    assert (run.work, run.layout) == (work_of(plan.recipe), plan.layout)
    assert run.origin == "step-1 (git 0123456789), 1 node"
    assert "measured on another machine" in refused(SITE, folder)
    assert "no plan of this version" in refused(
        plan.machine, write_records(tmp_path / "b", step | {"facts": {"plan": {}}})
    )


def test_records_of_a_busy_or_sick_node_are_left_out_where_a_sound_one_measured_the_same(tmp_path):
    restless = {"steady": False, "ci_reached": False}
    wide = {"metrics": [{"name": "aifactory_gemm_flops_per_second", "median": 8e14, "ci95": [7e14, 9e14]}]}
    records = [a_gemm(2e14), a_gemm(9e14, protocol=restless), a_gemm(8e14, **wide)]
    records += [a_gemm(7e14, validity=sick) for sick in ({"throttled": True}, {"device_errors": ["rank 0: Xid 79"]})]
    [quiet] = load_observations(SITE, [write_records(tmp_path / "a", *records)])[0]
    assert quiet.measured.matmul_flops_per_s.bf16 == 2e14 and quiet.doubt is None
    elsewhere = a_gemm(9e14, protocol=restless, hosts=["n2"])
    _, busy = load_observations(SITE, [write_records(tmp_path / "b", a_gemm(2e14), elsewhere)])[0]
    assert busy.measured.matmul_flops_per_s.bf16 == 9e14, "nobody else measured n2"


def test_a_calibration_with_doubtful_records_says_so(tmp_path):
    plan = a_plan()
    facts = {"plan": plan.model_dump(mode="json")}
    step = a_bench_record("step", "train_step_duration_seconds", 0.25, facts=facts, protocol={"steady": False})
    wide = a_gemm(metrics=[{"name": "aifactory_gemm_flops_per_second", "median": 8e14, "ci95": [7e14, 9e14]}])
    _, [run] = load_observations(plan.machine, [write_records(tmp_path / "a", step)])
    assert run.doubt == "step-1 is not steady" and "not steady" in run.origin
    [rates] = load_observations(SITE, [write_records(tmp_path / "b", wide)])[0]
    assert rates.doubt == "gemm-1 is known to within 12.5 %" and "known to within 12.5 %" in rates.origin
    write_machine(SITE, tmp_path / "site.yaml")
    told = calibrate_file(str(tmp_path / "site.yaml"), [tmp_path / "b"], tmp_path / "out.yaml")
    assert "doubtful: gemm-1 is known to within 12.5 %; measure it again on a quiet node" in told
