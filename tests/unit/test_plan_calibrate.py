"""Rates of a device, and what measured results do to a plan."""

import json
import re
from pathlib import Path

import pytest
import yaml

from aifactory_train.cli import main
from aifactory_train.errors import AifactoryError, MachineError
from aifactory_train.machine.check import check_machine
from aifactory_train.machine.load import load_machine, write_machine
from aifactory_train.machine.machine import ByDtype, Device, FactSource, Host, Machine, Measured, Network, Ratio
from aifactory_train.machine.machine import RatioByDtype as Ratios
from aifactory_train.plan.basis import measured_vs_assumed
from aifactory_train.plan.calibrate import (
    LEAST_RANGE_FRAC,
    UNCALIBRATED_RANGE_FRAC,
    RateObservation,
    RunObservation,
    calibrate,
    correct_step_time,
    differing_facts,
)
from aifactory_train.plan.rates import device_rates, family_rates
from aifactory_train.plan.steptime import estimate_step_time_s, total_step_time_s
from aifactory_train.plan.work import work_of
from aifactory_train.results.observed import load_observations
from aifactory_train.results.record import write_result
from bench_json import a_gemm
from results_run import ORIGIN, a_plan, a_run

TODAY = "2026-11-23"


def a_gpu_machine(measured=None, **device):
    fields = {"kind": "cuda", "name": "NVIDIA A100-SXM-64GB", "per_node": 4, **device}
    return Machine(name="site", device=Device(**fields), host=Host(cores=32), measured=measured or Measured())


def a_machine_with_a_result(tmp_path, steps=range(1, 40)):
    run = a_run(tmp_path / "run", steps)
    write_result(run)
    return a_plan().machine, run


def observed(step_time_s, precision="fp32", **changes):
    plan = a_plan()
    layout = plan.layout.model_copy(update={"precision": precision})
    fields = {"origin": f"run of {step_time_s:g} s", "work": work_of(plan.recipe), "layout": layout}
    return RunObservation(**{**fields, "step_time_s": step_time_s, **changes})


def predicted_s(machine, run):
    return total_step_time_s(estimate_step_time_s(run.work, machine, run.layout))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("NVIDIA A100-SXM-64GB", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA GH200 120GB", "GH200 96GB"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("AMD Instinct MI250X / MI250", "MI250X, one GCD"),
    ],
)
def test_a_device_is_of_the_family_that_its_name_says(name, family):
    assert family_rates(name).name == family


@pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA H20", "AMD EPYC 9354", "XH100", "cpu"])
def test_a_name_of_no_family_has_no_rates(name):
    assert family_rates(name) is None


def test_a_measured_rate_wins_over_a_published_one_and_that_over_the_familys():
    published = ByDtype(bf16=300e12)
    measured = Measured(matmul_flops_per_s=ByDtype(bf16=250e12), memory_bytes_per_s=1.7e12)
    first = device_rates(a_gpu_machine(measured, peak_flops_per_s=published, memory_bytes_per_s=1.9e12), "bf16")
    assert (first.peak_flops_per_s, first.matmul_source) == (250e12, "measured")
    assert (first.memory_bytes_per_s, first.memory_source) == (1.7e12, "measured")
    second = device_rates(a_gpu_machine(peak_flops_per_s=published, memory_bytes_per_s=1.9e12), "bf16")
    assert (second.peak_flops_per_s, second.matmul_source) == (300e12, "published")
    assert (second.memory_bytes_per_s, second.memory_source, second.assumed) == (1.9e12, "published", ())
    third = device_rates(a_gpu_machine(), "bf16")
    assert (third.peak_flops_per_s, third.memory_bytes_per_s) == (312e12, 2.0e12)
    assert third.assumed == (
        "assumed: the bf16 peak of NVIDIA A100-SXM-64GB is not published; 312 TFLOP/s is that of A100 SXM 80GB",
        "assumed: the memory rate of NVIDIA A100-SXM-64GB is not published; 2.00 TB/s is that of A100 SXM 80GB",
    )


def test_a_part_without_fp8_and_a_cpu_have_no_assumed_rate():
    assert device_rates(a_gpu_machine(), "fp8").matmul_source == "unknown"
    cpu = device_rates(a_gpu_machine(kind="cpu"), "bf16")
    assert (cpu.peak_flops_per_s, cpu.memory_bytes_per_s, cpu.assumed) == (None, None, ())


def test_the_ratio_is_measured_by_predicted_with_median_and_range():
    machine = a_plan().machine
    whole_s = predicted_s(machine, observed(1.0))
    runs = [observed(factor * whole_s) for factor in (1.5, 1.2, 1.9)]
    found = calibrate(machine, [], runs, TODAY).measured.step_time_ratio
    assert found.bf16 is None
    assert (found.fp32.median, found.fp32.low, found.fp32.high) == pytest.approx((1.5, 1.2, 1.9))
    assert found.fp32.n_results == 3


def test_the_ratio_is_to_what_is_predicted_from_the_new_rates():
    machine = a_plan().machine
    run = observed(predicted_s(machine, observed(1.0)))
    twice = Measured(
        matmul_flops_per_s=ByDtype(fp32=2 * machine.measured.matmul_flops_per_s.fp32),
        memory_bytes_per_s=2 * machine.measured.memory_bytes_per_s,
    )
    after = calibrate(machine, [RateObservation("bench.json", twice)], [run], TODAY)
    assert after.measured.matmul_flops_per_s == ByDtype(fp32=2.4e11, bf16=3.5e11)  # bf16 was not measured anew
    assert predicted_s(after, run) * after.measured.step_time_ratio.fp32.median == pytest.approx(run.step_time_s)
    assert after.measured.step_time_ratio.fp32.median > 1.3


def test_rates_are_medians_and_each_names_its_records():
    rates = [
        RateObservation(f"bench-{n:.0e}.json", Measured(matmul_flops_per_s=ByDtype(bf16=n), memory_bytes_per_s=n / 1e3))
        for n in (3e12, 9e12, 5e12)
    ]
    after = calibrate(a_plan().machine, rates, [], TODAY)
    assert after.measured.matmul_flops_per_s.bf16 == 5e12
    assert after.measured.memory_bytes_per_s == 5e9
    source = after.source_of("measured.matmul_flops_per_s.bf16")
    assert (source.source, source.by, source.date) == (
        "median of bench-3e+12.json; bench-9e+12.json; bench-5e+12.json",
        "measured",
        TODAY,
    )


def test_a_second_calibration_takes_the_place_of_the_first():
    machine = a_plan().machine
    whole_s = predicted_s(machine, observed(1.0))
    once = calibrate(machine, [], [observed(3 * whole_s, checkpoint_bytes_per_s=1e6)], "2026-11-01")
    twice = calibrate(once, [], [observed(2 * whole_s)], TODAY)
    assert twice.measured.step_time_ratio.fp32.median == pytest.approx(2.0), "not 2/3: the correction is not applied"
    assert twice.source_of("measured.step_time_ratio.fp32").date == TODAY
    assert [s.date for s in twice.sources if "measured.step_time_ratio.fp32" in s.facts] == [TODAY]
    assert twice.source_of("measured.checkpoint_bytes_per_s").date == "2026-11-01"
    without = calibrate(twice, [], [], TODAY)
    assert without.measured.step_time_ratio == Ratios() and without.source_of("measured.step_time_ratio.fp32") is None


def test_a_run_without_a_predicted_time_says_what_to_measure():
    machine = a_plan().machine.model_copy(update={"measured": Measured()})
    with pytest.raises(MachineError) as caught:
        calibrate(machine, [], [observed(1.0)], TODAY)
    assert "aifactory-train probe" in caught.value.do and "run of 1 s" in caught.value.where


def test_a_ratio_corrects_the_step_and_its_range():
    ratio = Ratio(median=1.5, low=1.2, high=1.55, n_results=4)
    machine = a_gpu_machine(Measured(step_time_ratio=Ratios(bf16=ratio)))
    found = correct_step_time(machine, "bf16", 2.0)
    # The highest result is nearer than the least range of a tenth: 1.5 * 1.1 = 1.65.
    assert (found.expected_s, found.low_s, found.high_s) == pytest.approx((3.0, 2.4, 3.3))
    assert LEAST_RANGE_FRAC == 0.10
    alike = Measured(step_time_ratio=Ratios(bf16=Ratio(median=1.5, low=1.5, high=1.5, n_results=1)))
    found_once = correct_step_time(a_gpu_machine(alike), "bf16", 2.0)
    assert (found_once.low_s, found_once.high_s) == pytest.approx((2.7, 3.3)), "one run shows no range of its own"
    assert found.why == "corrected by +50.0 %, as measured in 4 bf16 runs"


def test_without_a_ratio_the_range_is_that_of_published_results_and_on_a_cpu_there_is_none():
    far = 1 + UNCALIBRATED_RANGE_FRAC
    found = correct_step_time(a_gpu_machine(), "bf16", 2.0)
    assert (found.expected_s, found.low_s, found.high_s) == pytest.approx((2.0, 2.0 / far, 2.0 * far))
    cpu = correct_step_time(a_gpu_machine(kind="cpu"), "bf16", 2.0)
    assert (cpu.expected_s, cpu.low_s, cpu.high_s) == (2.0, None, None)


def test_the_range_of_published_results_is_not_told_narrower_than_it_was_found():
    page = (Path(__file__).parents[2] / "docs" / "planner-accuracy.md").read_text()
    found = re.search(r"tokens/s, 90th percentile \|[^|]*\| ([\d.]+) %", page)
    assert float(found[1]) <= 100 * UNCALIBRATED_RANGE_FRAC


def test_a_ratio_that_is_out_of_order_is_refused():
    with pytest.raises(ValueError, match="not between low 2 and high 3"):
        Ratio(median=1.0, low=2.0, high=3.0, n_results=1)


def test_machines_differ_by_hardware_and_not_by_what_one_does_not_know():
    one = a_gpu_machine()
    assert differing_facts(one, one.model_copy(update={"name": "other", "network": Network(nics_per_node=4)})) == []
    known = one.model_copy(update={"network": Network(nics_per_node=2)})
    other = one.model_copy(update={"network": Network(nics_per_node=4)})
    assert differing_facts(known, other) == [("network.nics_per_node", 2, 4)]


def test_a_result_gives_step_time_and_checkpoint_rate(tmp_path):
    machine, run = a_machine_with_a_result(tmp_path, range(1, 201))
    rates, runs = load_observations(machine, [run.root, run.result])
    assert rates == [] and len(runs) == 1, "the folder and its result.json are one run"
    assert runs[0].step_time_s == pytest.approx(4096 / 12_000, rel=0.02)
    assert runs[0].checkpoint_bytes_per_s == pytest.approx(28_400_000 / 0.21)
    assert runs[0].origin == "run demo (git 0123456789, steps to 200, 1 node)"


def refused(machine, path):
    with pytest.raises(AifactoryError) as caught:
        load_observations(machine, [path])
    assert caught.value.exit_code == 2 and caught.value.do
    return caught.value.render()


def edit_result(run, **changes):
    run.result.write_text(json.dumps(json.loads(run.result.read_text()) | changes))


def test_an_empty_folder_and_a_run_without_result_are_refused(tmp_path):
    machine = a_plan().machine
    assert "no result here" in refused(machine, tmp_path)
    assert "no result here" in refused(machine, tmp_path / "nowhere")
    run = a_run(tmp_path / "run", range(1, 9))
    assert f"aifactory-train report {run.root}" in refused(machine, run.root)


def test_a_result_of_another_machine_is_refused(tmp_path):
    machine, run = a_machine_with_a_result(tmp_path)
    renamed = machine.model_copy(update={"name": "elsewhere"})
    assert "name local in place of elsewhere" in refused(renamed, run.root)
    device = machine.device.model_copy(update={"name": "AMD EPYC 7763"})
    text = refused(machine.model_copy(update={"device": device}), run.root)
    assert "device.name AMD EPYC 9354 in place of AMD EPYC 7763" in text


def test_a_result_of_another_plan_is_refused(tmp_path):
    machine, run = a_machine_with_a_result(tmp_path)
    edit_result(run, machine_hash="0" * 64)
    assert "of two plans" in refused(machine, run.root)


def test_a_result_without_provenance_is_refused(tmp_path):
    machine, run = a_machine_with_a_result(tmp_path)
    edit_result(run, provenance={**ORIGIN, "git_sha": None})
    assert "without git sha" in refused(machine, run.root)
    edit_result(run, provenance={})
    assert "without git sha" in refused(machine, run.root)


def test_a_result_that_holds_only_its_start_is_refused(tmp_path):
    machine, run = a_machine_with_a_result(tmp_path, [10])
    assert "no steady state" in refused(machine, run.root)


def test_a_damaged_result_is_refused(tmp_path):
    machine, run = a_machine_with_a_result(tmp_path)
    run.result.write_text("{}")
    assert "not a result of this version" in refused(machine, run.root)


def test_a_file_of_probe_is_read_under_whatever_name_and_refused_without_rates(tmp_path):
    source = FactSource(facts=["measured"], source="aifactory-train probe", by="measured", date="2026-11-01")
    here = a_gpu_machine(Measured(memory_bytes_per_s=1.5e12)).model_copy(update={"name": "node7", "sources": [source]})
    write_machine(here, tmp_path / "node.yaml")
    [rates], _ = load_observations(a_gpu_machine(), [tmp_path / "node.yaml"])
    assert rates.measured.memory_bytes_per_s == 1.5e12
    assert rates.origin == "node.yaml (aifactory-train probe, 2026-11-01)"
    write_machine(a_gpu_machine(), tmp_path / "bare.yaml")
    assert "without measured rates" in refused(a_gpu_machine(), tmp_path / "bare.yaml")
    assert "device.per_node 4 in place of 8" in refused(a_gpu_machine(per_node=8), tmp_path / "node.yaml")


def test_calibrate_writes_a_sound_machine_file_beside_the_old_one(tmp_path, monkeypatch, capsys):
    machine, run = a_machine_with_a_result(tmp_path, range(1, 201))
    monkeypatch.chdir(tmp_path)
    write_machine(machine, tmp_path / "old.yaml")
    before = (tmp_path / "old.yaml").read_bytes()
    assert main(["calibrate", str(tmp_path / "old.yaml"), str(run.root)]) == 0
    assert "written: local-measured.yaml" in capsys.readouterr().out
    assert (tmp_path / "old.yaml").read_bytes() == before
    after = load_machine(tmp_path / "local-measured.yaml")
    assert after.measured.step_time_ratio.fp32 or after.measured.step_time_ratio.bf16
    faults = [f for f in check_machine(after, "local") if "step_time_ratio" in f or "checkpoint" in f]
    assert faults == []
    data = yaml.safe_load((tmp_path / "local-measured.yaml").read_text())
    assert "run demo (git 0123456789" in json.dumps(data["sources"])
    assert main(["calibrate", str(tmp_path / "old.yaml"), str(run.root), "--out", str(tmp_path / "new.yaml")]) == 0
    assert load_machine(tmp_path / "new.yaml") == after


def test_a_plan_says_which_terms_are_measured_published_and_assumed():
    layout = a_plan().layout.model_copy(update={"precision": "bf16", "world_size": 8, "n_nodes": 2, "dp_shard": 8})
    source = FactSource(facts=["measured"], source="aifactory-train probe", by="measured", date="2026-11-01")
    machine = a_gpu_machine(
        Measured(matmul_flops_per_s=ByDtype(bf16=2.5e14)), memory_bytes_per_s=1.6e12
    ).model_copy(update={"network": Network(nics_per_node=4, nic_gbit_per_s=100.0), "sources": [source]})  # fmt: skip
    found = {term: (how, text) for term, how, text in measured_vs_assumed(machine, layout)}
    assert found["matrix products"] == ("measured", "250 TFLOP/s: aifactory-train probe, 2026-11-01")
    assert found["device memory"] == ("published", "1.60 TB/s, the peak")
    assert found["checkpoint writes"][0] == found["whole step"][0] == found["failures"][0] == "assumed"
    assert found["checkpoint writes"][1] == "800 MB/s for one job"  # 8 ranks x 100 MB/s, as its time is counted
    assert "links of fsdp" in found and "links of tp" not in found
    bare = {term: how for term, how, _ in measured_vs_assumed(a_gpu_machine(), layout)}
    assert bare["matrix products"] == bare["device memory"] == bare["links of fsdp"] == "assumed"


def test_calibrate_replaces_a_machine_file_and_no_other(tmp_path, capsys):
    machine, run = a_machine_with_a_result(tmp_path, range(1, 201))
    write_machine(machine, tmp_path / "old.yaml")
    readme, verb = tmp_path / "README.md", ["calibrate", str(tmp_path / "old.yaml"), str(run.root), "--out"]
    readme.write_text("# mine\n")
    assert main([*verb, str(readme)]) == 2
    assert readme.read_text() == "# mine\n" and "--out FILE" in capsys.readouterr().err
    for said in ("written", "replaced"):
        assert main([*verb, str(tmp_path / "new.yaml")]) == 0
        assert f"{said}: {tmp_path / 'new.yaml'}" in capsys.readouterr().out


def test_calibrate_with_rates_alone_says_that_the_ratio_is_dropped(tmp_path, capsys):
    ratio = Ratio(median=1.5, low=1.2, high=1.9, n_results=3)
    write_machine(a_gpu_machine(Measured(step_time_ratio=Ratios(bf16=ratio))), tmp_path / "site.yaml")
    (tmp_path / "gemm.json").write_text(json.dumps(a_gemm()))
    verb = ["calibrate", str(tmp_path / "site.yaml"), str(tmp_path / "gemm.json"), "--out", str(tmp_path / "new.yaml")]
    assert main(verb) == 0
    said = capsys.readouterr().out
    assert "step_time_ratio.bf16: dropped, because no bf16 run was given" in said and "step_time_ratio.fp32" not in said
