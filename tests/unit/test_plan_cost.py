"""What a run costs: hours, energy, chained jobs, checkpoints and failures, by hand-computed cases."""

import re

import pytest

from aifactory_train.faults import deadline
from aifactory_train.machine.machine import Device, Host, Machine, Measured, Topology
from aifactory_train.machine.site import Accounting, Partition, Slurm
from aifactory_train.plan import cost, failures
from aifactory_train.plan.contract import Layout
from aifactory_train.recipe.load import load_recipe
from aifactory_train.strictyaml import configs_dir
from aifactory_train.units import format_seconds


def a_machine(**changes):
    fields = {
        "name": "site",
        "device": Device(kind="cuda", name="NVIDIA A100-SXM4-40GB", per_node=4, power_w=400.0),
        "host": Host(cores=32),
        "measured": Measured(checkpoint_bytes_per_s=1e9),
        "slurm": Slurm(partitions=[Partition(name="gpu", max_time_h=24.0)]),
        "accounting": Accounting(unit="core-hour", units_per_node_hour=48.0),
    }
    return Machine(**{**fields, **changes})


def a_layout(n_nodes=2, per_node=4):
    n = n_nodes * per_node
    return Layout(
        engine="fsdp2", world_size=n, n_nodes=n_nodes, dp_shard=n, micro_batch_rows=1, accumulation=1,
        reshard_after_forward=True, remat="none", precision="bf16", threads_per_rank=8,
    )  # fmt: skip


def a_size(**changes):
    fields = {
        "n_steps": 36_000,
        "step_tokens": 1_000_000,
        "checkpoint_bytes": 60 * 10**9,
        "checkpoint_every_steps": 600,
        "asynchronous_save": False,
    }
    return cost.RunSize(**{**fields, **changes})


def test_the_grant_is_charged_in_the_sites_unit():
    assert cost.estimate_cost(a_machine(), 3, 7200) == (3 * 2 * 48.0, "core-hour")
    assert cost.estimate_cost(a_machine(accounting=None), 3, 7200) == (6.0, "node-hours")


def test_a_package_fails_as_often_as_in_the_training_of_llama_3():
    # 419 interruptions in 54 days of 16 384 devices: 50 678 h for each.
    published_h = 16384 * 54 * 24 / 419
    assert published_h == pytest.approx(failures.PACKAGE_MTBF_H, rel=1e-3)
    # One such device in 16 384 every 3.09 hours.
    assert failures.mtbf_s(16384) / 3600 == pytest.approx(3.09, abs=0.01)
    low_h, high_h = failures.PACKAGE_MTBF_RANGE_H
    assert low_h == pytest.approx(7.9 * 1024, rel=0.01)
    assert high_h == pytest.approx(1000 * 24 * 8 / 2.34, rel=0.01)
    told = [float(number) for number in re.findall(r"\d+\.\d", failures.FAILURES)]
    assert told == [round(hours / 8766, 1) for hours in (failures.PACKAGE_MTBF_H, low_h, high_h)], "in years of 8766 h"


@pytest.mark.parametrize(("mtbf_min", "digits", "best_min"), [(24 * 60, 0, 117), (6 * 60, 0, 57), (15, 1, 9.1)])
def test_the_best_interval_is_that_of_dalys_paper(mtbf_min, digits, best_min):
    # Figures 3 to 5 of Daly 2006, rounded as printed there: a save of 5 minutes.
    assert round(failures.best_interval_s(5 * 60, mtbf_min * 60) / 60, digits) == best_min


def test_the_best_interval_of_a_short_save_is_youngs():
    # sqrt(2 * 1 s * 20 000 s) = 200 s, less the save itself and more by a third of its root: 200 * (1 + 1/600) - 1.
    assert failures.best_interval_s(1.0, 20_000.0) == pytest.approx(199.33, abs=0.01)


def test_a_save_longer_than_two_times_between_failures_takes_the_time_between_failures():
    assert failures.best_interval_s(100.0, 50.0) == 50.0


def test_time_without_failures_is_the_steps_and_the_saves():
    # 10 segments of 100 s, each with a save of 5 s.
    assert failures.expected_time_s(1000.0, 100.0, 5.0, 60.0, 1e12) == pytest.approx(1050.0, rel=1e-6)


def test_time_with_failures_is_dalys_sum():
    # M = 1000 s, segments of 90 + 10 s: 1000 * e^(50/1000) * (e^(100/1000) - 1) = 110.56 s each, 10 of them.
    expected = 10 * 1000 * 1.0512711 * 0.1051709
    assert failures.expected_time_s(900.0, 90.0, 10.0, 50.0, 1000.0) == pytest.approx(expected, rel=1e-6)


def test_the_best_interval_has_the_least_expected_time():
    def overhead(interval_s):
        return failures.expected_time_s(1.0, interval_s, 30.0, 100.0, 5000.0)

    best_s = failures.best_interval_s(30.0, 5000.0)
    assert overhead(best_s) < min(overhead(0.9 * best_s), overhead(1.1 * best_s))


def test_jobs_are_chained_under_the_time_limit():
    # 60 h of work; each job of 24 h spends 1 h at its start and end, and from the second on 2 h: 23 + 22 + 22 >= 60.
    assert cost.n_chained_jobs(60 * 3600, 24 * 3600, 3600, 7200) == 3
    assert cost.n_chained_jobs(67 * 3600, 24 * 3600, 3600, 7200) == 3
    assert cost.n_chained_jobs(67 * 3600 + 1, 24 * 3600, 3600, 7200) == 4
    assert cost.n_chained_jobs(23 * 3600, 24 * 3600, 3600, 7200) == 1
    assert cost.n_chained_jobs(1e9, None, 3600, 7200) == 1
    assert cost.n_chained_jobs(60 * 3600, 7200, 3600, 7200) is None


def test_a_synchronous_save_stalls_for_the_write_and_an_asynchronous_one_for_the_copy():
    n_bytes = 60 * 10**9
    waits = cost.estimate_save(a_machine(), a_layout(), n_bytes, asynchronous=False)
    assert (waits.write_s, waits.stall_s) == (60.0, 60.0)
    goes_on = cost.estimate_save(a_machine(), a_layout(), n_bytes, asynchronous=True)
    assert goes_on.write_s == 60.0
    # 60 GB from 8 devices at 5 GB/s each.
    assert goes_on.stall_s == pytest.approx(60 / (8 * 5))
    slow_host = a_machine(topology=Topology(host_bytes_per_s=1e9))
    assert cost.estimate_save(slow_host, a_layout(), n_bytes, asynchronous=True).stall_s == pytest.approx(60 / 8)


def test_a_file_system_of_unknown_rate_is_assumed_as_the_deadline_does():
    assert (cost.RANK_SAVE_BYTES_PER_S, cost.JOB_SAVE_BYTES_PER_S) == (
        deadline.RANK_SAVE_BYTES_PER_S,
        deadline.JOB_SAVE_BYTES_PER_S,
    )
    unknown = a_machine(measured=Measured())
    few = cost.estimate_save(unknown, a_layout(n_nodes=2), 8 * 10**9, asynchronous=False)
    many = cost.estimate_save(unknown, a_layout(n_nodes=64), 8 * 10**9, asynchronous=False)
    assert few.write_s == pytest.approx(10.0)  # 8 ranks of 100 MB/s
    assert many.write_s == pytest.approx(4.0)  # 2 GB/s for the job, not 25.6


def test_a_checkpoint_has_weights_and_moments_in_fp32():
    adamw = load_recipe(configs_dir() / "recipes" / "demo.yaml", ["optim.name=adamw"])
    muon = load_recipe(configs_dir() / "recipes" / "demo.yaml", ["optim.name=muon"])
    model = adamw.model
    blocks = model.n_layers * (
        model.hidden_size * model.head_size * 2 * (model.n_heads + model.n_kv_heads)
        + 3 * model.hidden_size * model.ffn_size
    )
    assert cost.checkpoint_bytes(adamw) == 12 * cost.shape.n_parameters(model)
    assert cost.checkpoint_bytes(adamw) - cost.checkpoint_bytes(muon) == 4 * blocks


def test_the_whole_run_adds_up():
    # 36 000 steps of 10 s are 100 h on 8 devices; a save each 600 steps (100 min) stalls for 60 s.
    found = cost.estimate_run_cost(a_machine(), a_layout(), a_size(), step_time_s=10.0)
    assert found.training_time_s == 360_000
    assert found.stall_frac == pytest.approx(60 / 6000)
    # 8 devices fail each 50700 / 8 h = 22 815 000 s. A failure costs half a segment (3030 s) and its restart
    # (180 s + 60 s to read), so (3030 + 240) / 22815000 of the time with its saves.
    assert found.mtbf_s == pytest.approx(22_815_000)
    assert found.lost_frac == pytest.approx(1.01 * 3270 / 22_815_000, rel=0.01)
    work_s = 360_000 * (1.01 + found.lost_frac)
    # Jobs of 86 400 s: the first has 86 400 - 180 - 60 left, each further one 60 s less: 86 160 + 4 * 86 100 s.
    assert found.n_jobs == 5
    assert found.held_time_s == pytest.approx(work_s + 5 * 240 + 4 * 60)
    hours = found.held_time_s / 3600
    assert found.node_hours == pytest.approx(2 * hours)
    assert found.device_hours == pytest.approx(8 * hours)
    assert (found.grant_amount, found.grant_unit) == (pytest.approx(2 * 48 * hours), "core-hour")
    assert found.expected_failures == pytest.approx(found.held_time_s / 22_815_000)
    # 8 devices of 400 W: 3.2 kW; the node draws 0.8 to 1.5 times that.
    assert found.energy_kwh == (pytest.approx(0.8 * 3.2 * hours), pytest.approx(1.5 * 3.2 * hours))
    assert found.tokens_per_device_hour == pytest.approx(36e9 / (8 * hours))
    assert found.makes_progress


def test_a_budget_buys_tokens_at_the_price_of_the_whole_run():
    found = cost.estimate_run_cost(a_machine(), a_layout(), a_size(), step_time_s=10.0)
    assert cost.tokens_for_device_hours(found, found.device_hours) == pytest.approx(36e9, rel=1e-9)
    assert cost.tokens_for_device_hours(found, found.device_hours / 2) == pytest.approx(18e9, rel=1e-9)


def test_the_advised_interval_is_the_longest_that_costs_a_hundredth():
    # 60 s for each save and half an interval plus a restart of 240 s for each failure, of which there is one in
    # 22 815 000 s: 60/t + (t/2 + 30 + 240) / 22815000 = 0.01 at t = 438 000 s; a job has 86 400 s.
    few = cost.estimate_run_cost(a_machine(), a_layout(), a_size(), step_time_s=10.0)
    assert few.best_every_steps == 8640
    # 2048 devices, one failure in 89 121 s: 60/t + (t/2 + 270) / 89121 = 0.01, and its longer root is
    # t = 621.2 + sqrt(621.2 ** 2 - 2 * 60 * 89121), which has none; so the least cost, sqrt(2 * 60 * 89121) = 3270 s.
    many = cost.estimate_run_cost(a_machine(), a_layout(512), a_size(), step_time_s=10.0)
    assert many.best_overhead_frac > 0.01 and many.best_every_steps == pytest.approx(323, abs=2)
    # An asynchronous save of 60 s stalls for 60 GB / (2048 x 5 GB/s) = 5.9 ms, and a failure costs 60 s more:
    # (t/2 + 300) / 89121 = 0.01 at t = 1182 s; failures of restarts and of segments twice over make it a little less.
    quick = cost.estimate_run_cost(a_machine(), a_layout(512), a_size(asynchronous_save=True), step_time_s=10.0)
    assert quick.best_every_steps == pytest.approx(117, abs=2) and 0.0095 < quick.best_overhead_frac <= 0.01
    [line] = [line for line in cost.render_run_cost(quick) if "checkpoint.every_steps" in line]
    assert line.startswith(f"checkpoint.every_steps 600: save every {quick.best_every_steps} steps (19 min ")


def test_the_advised_interval_is_never_shorter_than_a_write():
    quick = cost.estimate_run_cost(
        a_machine(measured=Measured(checkpoint_bytes_per_s=1e6)),
        a_layout(64),
        a_size(asynchronous_save=True),
        step_time_s=10.0,
    )
    assert quick.save.write_s == 60_000
    assert quick.best_every_steps == 6000
    # A save each 6000 s that takes 60 000 s: training waits for the rest of it each time.
    assert quick.stall_frac == pytest.approx(54_000 / 6000)


def test_no_interval_is_advised_where_the_given_one_costs_less_than_a_hundredth():
    cheap = cost.estimate_run_cost(a_machine(), a_layout(), a_size(asynchronous_save=True), step_time_s=10.0)
    assert cheap.overhead_frac < 0.01
    assert not any("every_steps" in line for line in cost.render_run_cost(cheap))


def test_two_dies_of_one_package_fail_together():
    def expected(kind, name):
        machine = a_machine(device=Device(kind=kind, name=name, per_node=8))
        return cost.estimate_run_cost(machine, a_layout(2, per_node=8), a_size(), step_time_s=10.0)

    one, two = expected("rocm", "AMD Instinct MI300X"), expected("rocm", "AMD Instinct MI250X")
    assert two.mtbf_s == 2 * one.mtbf_s == pytest.approx(2 * 50_700 * 3600 / 16)
    # Between one failure in 82 100 h of a package and one in 8 100 h; 8 packages for the hours that it is held.
    hours = two.held_time_s / 3600
    assert two.failures_range == (pytest.approx(8 * hours / 82_100), pytest.approx(8 * hours / 8_100))


def test_a_run_of_a_range_of_speeds_is_told_as_a_range():
    fast, cost_, slow = (cost.estimate_run_cost(a_machine(), a_layout(), a_size(), step_time_s=s) for s in (7, 10, 13))
    run, time, energy, *_ = cost.render_run_cost(cost_, (fast, slow))
    # 36 000 steps of 7, 10 and 13 s are 70, 100 and 130 h, and a little over 1 % more with saves and starts.
    assert run.startswith("the run: about 9.74\N{NO-BREAK SPACE}k (6.8")
    assert "k to 12.6\N{NO-BREAK SPACE}k) core-hours (about 203 node-hours" in run
    assert time.startswith("time: about 4 d 5 h (71 h ") and " to 5 d 11 h)" in time
    assert "in 3 to 6 chained jobs" in time
    assert energy.startswith("energy: 18") and " to 63" in energy


def test_a_run_that_fails_faster_than_it_saves_is_said_never_to_end():
    hopeless = cost.estimate_run_cost(
        a_machine(), a_layout(4096), a_size(checkpoint_every_steps=36_000), step_time_s=10.0
    )
    assert not hopeless.makes_progress
    [line] = cost.render_run_cost(hopeless)
    assert "never ends" in line and f"checkpoint.every_steps {hopeless.best_every_steps}" in line
    too_short = cost.estimate_run_cost(a_machine(), a_layout(), a_size(), step_time_s=10.0, job_time_s=300.0)
    assert not too_short.makes_progress
    assert "ask for longer jobs" in cost.render_run_cost(too_short)[0]


def test_unknown_power_is_that_of_the_family_and_none_without_one():
    def energy(name, kind="cuda"):
        machine = a_machine(device=Device(kind=kind, name=name, per_node=4))
        return cost.estimate_run_cost(machine, a_layout(), a_size(), step_time_s=10.0)

    assumed = energy("NVIDIA A100-SXM-64GB")
    assert assumed.energy_kwh[1] == pytest.approx(assumed.device_hours * 0.4 * 1.5)
    assert energy("NVIDIA X9000").energy_kwh is None
    assert energy("AMD EPYC A100", kind="cpu").energy_kwh is None


def test_the_lines_name_hours_time_energy_and_checkpoints():
    found = cost.estimate_run_cost(a_machine(), a_layout(), a_size(), step_time_s=10.0)
    hours_101_4 = format_seconds(found.held_time_s)
    text = "\n".join(cost.render_run_cost(found))
    assert text.splitlines() == [
        "the run: about 9.74\N{NO-BREAK SPACE}k core-hours (about 203 node-hours, 811 device-hours)",
        f"time: about {hours_101_4} in 5 chained jobs of at most 24 h 00 min, waiting in the queue not counted",
        "energy: 260 kWh to 487 kWh at the nodes, cooling not included",
        "checkpoints: 55.9 GiB, written in 60 s, stall 60 s; saves and 0.016 failures (0.0099 to 0.1) cost 1.0 %",
        "checkpoint.every_steps 600: save every 8640 steps (24 h 00 min), at a cost of 0.3 %",
    ]


def test_one_job_is_said_to_rest_on_no_known_limit():
    without = a_machine(slurm=Slurm(partitions=[Partition(name="gpu")]))
    found = cost.estimate_run_cost(without, a_layout(), a_size(), step_time_s=10.0)
    assert "in 1 job, as no limit of a job's time is known, waiting" in cost.render_run_cost(found)[1]
