"""How the slow end of a predicted range and the size of a machine bear upon the number of nodes."""

from __future__ import annotations

import pytest

from aifactory_train.cli import main
from aifactory_train.errors import PlanError
from aifactory_train.machine.load import load_machine
from aifactory_train.machine.site import Partition, Qos, Slurm
from aifactory_train.plan.calibrate import UNCALIBRATED_RANGE_FRAC
from aifactory_train.plan.limits import job_limits
from aifactory_train.plan.nodes import build_node_table, check_nodes, nodes_for_deadline, wider_limits
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import load_recipe
from aifactory_train.units import format_seconds
from plan_machines import LLAMA_8B, gpus

FSDP_ALONE = ["layout.pp=1", "layout.cp=1", "layout.tp=1", "layout.dp_replicate=1", "layout.remat=full"]


def test_a_deadline_that_only_the_middle_of_the_range_meets_is_warned_about():
    recipe, machine = load_recipe(LLAMA_8B, FSDP_ALONE), gpus()
    table = build_node_table(recipe, machine, 2)
    fast_s = table.rows[-1].run_time_s
    slow = format_seconds(fast_s * (1 + UNCALIBRATED_RANGE_FRAC))
    near = nodes_for_deadline(recipe, machine, table, 1.01 * fast_s)
    assert near.recommended == 2
    assert f"warning: only the middle of the predicted range meets it, the slow end, {slow}, does not" in near.why
    easy = nodes_for_deadline(recipe, machine, table, 1.01 * fast_s * (1 + UNCALIBRATED_RANGE_FRAC))
    assert easy.recommended == 2 and f"the slow end of the predicted range, {slow}, meets it too" in easy.why


def test_what_gives_a_job_more_nodes_is_a_qos_with_its_limits():
    leonardo = load_machine("leonardo-booster")
    assert wider_limits(leonardo, 65) == ("--qos boost_qos_bprod (256 nodes, 24 h a job)",)
    assert wider_limits(leonardo, 4000) == wider_limits(gpus(), 2) == ()


def test_a_machine_with_too_few_devices_is_not_told_to_take_more_of_its_nodes():
    with pytest.raises(PlanError) as caught:
        make_plan(load_recipe(LLAMA_8B), load_machine("h200-node"))
    text = caught.value.render()
    # 8 G parameters have 64 GB of moments, and 128 GiB of host memory hold them beside a copy of each checkpoint not.
    assert "take a smaller model" in text and "layout(s) with offload fit on the devices, and not into the host" in text
    assert "2 such devices would do" in text and "this machine has 1" in text and "use 2 ranks" not in text


def test_the_longest_job_is_that_of_the_qos_and_else_of_the_partition():
    slurm = Slurm(
        partitions=[Partition(name="gpu", max_time_h=24.0)],
        qos=[Qos(name="short", max_time_h=4.0), Qos(name="long", max_time_h=96.0), Qos(name="plain")],
    )
    machine = gpus().model_copy(update={"slurm": slurm})
    assert job_limits(machine).max_time_h == job_limits(machine, qos="plain").max_time_h == 24
    assert (job_limits(machine, qos="short").max_time_h, job_limits(machine, qos="long").max_time_h) == (4, 96)
    by_default = machine.model_copy(update={"slurm": slurm.model_copy(update={"default_qos": "short"})})
    assert job_limits(by_default).max_time_h == 4
    assert job_limits(gpus()).max_time_h is None


@pytest.mark.parametrize(("options", "limit"), [([], "24 h 00 min"), (["--qos", "boost_qos_lprod"], "4 d 0 h")])
def test_the_jobs_of_a_run_are_as_long_as_the_chosen_qos_allows(capsys, options, limit):
    degrees = [arg for key in ("pp", "cp", "tp", "dp_replicate") for arg in ("--set", f"layout.{key}=1")]
    assert main(["plan", str(LLAMA_8B), "--machine", "leonardo-booster", "--nodes", "8", *degrees, *options]) == 0
    assert f"chained jobs of at most {limit}" in capsys.readouterr().out


def test_more_nodes_than_any_qos_gives_are_answered_with_the_widest():
    with pytest.raises(PlanError) as refused:
        check_nodes(load_machine("leonardo-booster"), 99_999)
    assert refused.value.do == "--nodes 64 or less, or --qos boost_qos_bprod (256 nodes, 24 h a job)"
