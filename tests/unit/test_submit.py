"""What launch refuses before a queue slot is spent, and the command that it gives to sbatch."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from aifactory_train.errors import MachineError, PlanError
from aifactory_train.launch.checks import JobOptions, check_job, refuse_job_options
from aifactory_train.launch.env import submit_environment
from aifactory_train.launch.submit import launch_job, sbatch_command, submit
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.site import Accounting, Container, Internet, Partition, Qos, Slurm
from aifactory_train.plan.cost import estimate_cost, render_cost
from aifactory_train.plan.plan import Plan
from aifactory_train.rundir import RunDir
from results_run import a_plan

SLURM = Slurm(
    partitions=[Partition(name="gpu", max_nodes=4, max_time_h=2), Partition(name="dev", max_nodes=1, max_time_h=0.5)],
    qos=[Qos(name="normal"), Qos(name="big", min_nodes=8, max_nodes=64, max_time_h=24)],
    account_required=True,
    account_hint="as `groups` shows it",
)


def planned(n_nodes: int = 1, wandb: str = "off", **machine: object) -> Plan:
    plan = a_plan()
    site: Machine = plan.machine.model_copy(update={"name": "lab", "slurm": SLURM, **machine})
    metrics = plan.recipe.metrics.model_copy(update={"wandb": wandb})
    data = plan.recipe.data.model_copy(update={"prepared_dir": "/nowhere/prepared"})
    return plan.model_copy(
        update={
            "machine": site,
            "layout": plan.layout.model_copy(update={"n_nodes": n_nodes, "world_size": n_nodes}),
            "recipe": plan.recipe.model_copy(update={"metrics": metrics, "data": data}),
        }
    )


def faults(plan: Plan, **options: object) -> str:
    with pytest.raises(PlanError) as caught:
        check_job(plan, JobOptions(**options), Path("recipe.yaml"))
    return caught.value.render()


@pytest.mark.parametrize(
    ("plan", "options", "what", "do"),
    [
        (planned(), {}, "no account is given", "--account PROJECT: as `groups` shows it"),
        (planned(5), {}, "5 nodes; partition gpu allows 4", "--nodes 4 or less"),
        (planned(2), {"partition": "dev"}, "2 nodes; partition dev allows 1", "--nodes 1 or less"),
        (planned(), {"partition": "gpuu"}, "partition 'gpuu' is not in the machine file", "one of gpu, dev"),
        (planned(), {"time": "2:00:01"}, "is 02:00:01; partition gpu allows 02:00:00", "the next job by itself"),
        (planned(), {"time": "soon"}, "--time 'soon' is no wall time", "--time 12:00:00"),
        (planned(), {"time": "0"}, "--time '0' is no wall time", "--time 12:00:00"),
        (planned(65), {"qos": "big"}, "65 nodes; partition gpu with QoS big allows 64", "--nodes 64"),
        (planned(2), {"qos": "big"}, "2 node(s); partition gpu with QoS big wants 8", "--nodes 8"),
        (planned(8), {"qos": "big", "time": "25:00:00"}, "with QoS big allows 1-00:00:00", "--time 1-00:00:00 or less"),
        (planned(), {"container": "x.sif"}, "the machine file names no runtime", "leave out --container"),
        (
            planned(container=Container(runtime="apptainer")),
            {"container": "/no/x.sif"},
            "there is no image /no/x.sif",
            "--container none",
        ),
        (
            planned(wandb="online", internet=Internet(compute=False)),
            {},
            "metrics.wandb is online, and the compute nodes have no internet",
            "--set metrics.wandb=offline",
        ),
        (planned(), {}, "/nowhere/prepared", "aifactory-train prepare"),
    ],
)
def test_what_would_fail_in_the_queue_is_refused_with_what_to_type(plan, options, what, do):
    text = faults(plan, **options)
    assert what in text and do in text and "nothing was submitted" in text


def test_all_faults_are_told_at_once():
    text = faults(planned(9, wandb="online", internet=Internet(compute=False)), time="3:00:00")
    assert text.startswith("5 things would end this job") and text.count("    do: ") == 5


def test_more_ranks_than_the_script_starts_are_refused():
    plan = planned()
    plan = plan.model_copy(update={"layout": plan.layout.model_copy(update={"world_size": 2})})
    assert "2 ranks on 1 node(s); the batch script starts 1 on each" in faults(plan)


def test_what_is_unknown_is_not_refused():
    open_slurm = Slurm(partitions=[Partition(name="gpu")])
    text = faults(planned(4000, wandb="online", slurm=open_slurm), time="900:00:00")
    assert text.startswith("1 thing would end") and "prepare" in text


def test_a_python_for_another_architecture_is_refused():
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    plan = planned()
    plan = plan.model_copy(
        update={
            "machine": plan.machine.model_copy(
                update={"host": plan.machine.host.model_copy(update={"architecture": other})}
            )
        }
    )
    assert f"the compute nodes are {other}" in faults(plan)
    assert "compute nodes are" not in faults(plan, python="/opt/python3")


def test_options_of_a_batch_system_are_refused_where_there_is_none():
    refuse_job_options(JobOptions(dry_run=True))
    with pytest.raises(MachineError, match="--time, --account: the ranks are started on this node"):
        refuse_job_options(JobOptions(time="1:00:00", account="x"))


def test_every_value_of_a_user_is_one_word_of_the_command():
    nasty = "x; $(touch pwned) `id`\n#SBATCH --wrap=1 '\" %j"
    command = sbatch_command(planned(2), RunDir(Path("/runs") / nasty), JobOptions(account=nasty, time="1:00:00"))
    assert command[:2] == ["sbatch", "--parsable"] and f"--account={nasty}" in command
    assert "--nodes=2" in command and "--time=1:00:00" in command
    assert command[-3:] == [f"/runs/{nasty}/{name}".rstrip("/") for name in ("recipe.yaml", "", "machine.yaml")]
    assert f"--output=/runs/{nasty.replace('%', '%%')}/slurm-%j.out" in command


@pytest.mark.parametrize(
    ("options", "time"),
    [
        ({}, "02:00:00"),
        ({"partition": "dev"}, "00:30:00"),
        ({"qos": "short"}, "00:15:00"),
        ({"qos": "big"}, "02:00:00"),
        ({"partition": "dev", "time": "10"}, "10"),
    ],
)
def test_a_job_without_a_time_asks_for_no_more_than_its_partition_and_qos_allow(options, time):
    slurm = SLURM.model_copy(update={"qos": [*SLURM.qos, Qos(name="short", max_time_h=0.25)]})
    assert f"--time={time}" in sbatch_command(planned(slurm=slurm), RunDir("/run"), JobOptions(**options))


def sbatch_that(does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `submit` makes of an sbatch that runs these lines of bash."""
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\n{does}\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return submit(["sbatch", "--parsable"], planned().machine, JobOptions())


@pytest.mark.parametrize("said", ["17", "17;lab", "Welcome; to the lab\n17;lab\n"])
def test_the_id_of_the_new_job_is_found_in_what_sbatch_says(tmp_path, monkeypatch, said):
    assert sbatch_that(f"cat << 'end'\n{said}\nend", tmp_path, monkeypatch) == "17"


def test_an_sbatch_that_refuses_or_hangs_is_a_message(tmp_path, monkeypatch):
    with pytest.raises(MachineError, match="Slurm refused the job: no such account"):
        sbatch_that("echo no such account >&2; exit 1", tmp_path, monkeypatch)
    monkeypatch.setattr("aifactory_train.launch.submit._SBATCH_SECONDS", 0.1)
    with pytest.raises(MachineError, match="may be in the queue all the same"):
        sbatch_that("exec sleep 5", tmp_path, monkeypatch)


def test_a_job_inherits_nothing_of_the_job_that_submits_it(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    monkeypatch.setenv("SBATCH_PARTITION", "dev")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    env = submit_environment("/opt/python3", None)
    assert not any(name.startswith(("SLURM_", "SBATCH_")) for name in env)
    assert env["AIFACTORY_PYTHON"] == "/opt/python3" and env["WANDB_API_KEY"] == "secret"
    assert "AIFACTORY_CONTAINER" not in env and submit_environment(None, "")["AIFACTORY_CONTAINER"] == ""


def test_what_the_user_has_set_for_sbatch_is_heard(monkeypatch):
    plan = planned()
    monkeypatch.setenv("SBATCH_ACCOUNT", "ours")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "9:00:00")
    with pytest.raises(PlanError) as caught:
        launch_job(plan, RunDir("/nowhere/run"), JobOptions(), Path("recipe.yaml"))
    text = caught.value.render()
    assert "no account" not in text and "partition gpu allows 02:00:00" in text
    with pytest.raises(PlanError) as caught:
        launch_job(plan, RunDir("/nowhere/run"), JobOptions(time="1:00:00"), Path("recipe.yaml"))
    assert "02:00:00" not in caught.value.render(), "the command line wins"


def test_the_cost_is_in_the_unit_of_the_grant():
    gpu_hours = Accounting(unit="GPU-hours", units_per_node_hour=4)
    assert estimate_cost(planned(accounting=gpu_hours).machine, 16, 7200) == (128, "GPU-hours")
    assert estimate_cost(planned().machine, 16, 7200) == (32, "node-hours")
    run, *_, job = render_cost(planned(2, accounting=gpu_hours), 3600, "01:00:00")
    assert run.startswith("the run: about ") and "GPU-hours" in run
    assert job == "one job: at most 8 GPU-hours (2 node(s) for 01:00:00)"
