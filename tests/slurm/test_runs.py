"""Runs through the real template on a real Slurm: they train, stop, go on, and lose nothing."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from aifactory_train.launch.slurm import render_job
from aifactory_train.machine.load import load_machine, write_machine
from aifactory_train.machine.machine import Mpi
from slurm.chains import MACHINE, Chain
from slurm.cluster import Cluster, poll
from training_runs import write_recipe

# A few seconds of training; a save every tenth step.
STEPS = 120


pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture(scope="module")
def recipe(words: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, **words, train__budget_tokens=STEPS * 1024, checkpoint__every_steps=10)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A run that nobody disturbed, submitted as a user does it with a script of launchers/."""
    folder = tmp_path_factory.mktemp("whole")
    script = folder / "two-nodes.sbatch"
    script.write_text(render_job(load_machine(MACHINE)))
    chain = Chain(cluster, recipe, folder / "run")
    options = ("--nodes=2", "--time=10", f"--output={folder}/slurm-%j.out")
    job = cluster.sbatch(*options, script, recipe, chain.run.root, MACHINE, AIFACTORY_PYTHON=sys.executable)
    chain.wait_for_end()
    assert cluster.state(job) == "COMPLETED", (folder / f"slurm-{job}.out").read_text() + chain.story()
    return chain


def test_a_launcher_trains_on_two_nodes_from_sbatch_to_the_report(whole, tmp_path):
    hosts = whole.attempt(1, "job.json")["node_list"]
    assert hosts == "node[1-2]"
    assert whole.curve()[-1][0] == whole.committed() == STEPS
    assert whole.ends() == [(0, "done")]
    done = whole.verb("report", whole.run.root)
    assert done.returncode == 0, done.stderr
    assert whole.run.report.exists() and "node" in whole.run.result.read_text()


def test_mpirun_starts_the_ranks_where_the_machine_file_says_so(cluster, recipe, whole, tmp_path):
    machine = load_machine(MACHINE)
    site = Mpi(kind="site", mpirun=str(Path(sys.executable).parent / "mpirun"))
    slurm = machine.slurm.model_copy(update={"starter": "mpirun"})
    write_machine(machine.model_copy(update={"slurm": slurm, "mpi": site}), tmp_path / "machine.yaml")
    chain = Chain(cluster, recipe, tmp_path / "run", tmp_path / "machine.yaml")
    script = tmp_path / "mpirun.sbatch"
    script.write_text(render_job(load_machine(tmp_path / "machine.yaml")))
    as_root = {f"{part}_ALLOW_RUN_AS_ROOT{end}": "1" for part in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    options = ("--nodes=2", "--time=10", f"--output={tmp_path}/slurm-%j.out")
    job = (script, recipe, chain.run.root, tmp_path / "machine.yaml")
    cluster.sbatch(*options, *job, AIFACTORY_PYTHON=sys.executable, **as_root)
    chain.wait_for_end()
    assert chain.ends() == [(0, "done")], chain.story()
    assert chain.curve() == whole.curve()


def test_a_time_limit_shorter_than_the_run_costs_a_save_and_no_step(cluster, recipe, whole, tmp_path, capsys):
    """The ranks are slowed down after some steps, so that the limit comes before the end on any machine."""
    chain = Chain(cluster, recipe, tmp_path / "run")
    startup_s = whole.attempt(1, "end.json")["startup_s"]
    chain.launch("--time", math.ceil((startup_s + 35) / 60))
    chain.wait_for_step(15)
    end_s = chain.attempt(1, "job.json")["end_time_s"]
    chain.slow_down(1.0, until=lambda: chain.events("stop") or time.time() > end_s)
    chain.wait_for_end()
    assert chain.ends()[0] == (143, "next") and chain.ends()[-1] == (0, "done")
    assert chain.attempt(1, "end.json")["end_s"] < end_s, "it left before Slurm would have killed it"
    assert "time limit" in (chain.run.attempt(1) / "log.txt").read_text()
    assert len(set(chain.job_ids())) == len(chain.ends()) and cluster.state(chain.job_ids()[0]) != "TIMEOUT"
    assert chain.attempt(2, "end.json")["redone_steps"] == 0
    assert chain.curve() == whole.curve()
    with capsys.disabled():
        print(f"\n{chain.wasted()}", end="")


def test_usr2_by_scancel_and_sigterm_of_one_rank_end_in_the_next_job(cluster, recipe, whole, tmp_path):
    chain = Chain(cluster, recipe, tmp_path / "run")
    job = chain.launch()
    chain.wait_for_step(25)
    cluster.ask("scancel", "--signal=USR2", job)
    chain.wait_for_step(chain.last_step() + 25, attempt=2)
    chain.signal_ranks(signal.SIGTERM, chain.attempt_nodes()[-1])
    chain.wait_for_end()
    assert chain.ends() == [(143, "next"), (143, "next"), (0, "done")]
    assert [e["signal"] for e in chain.events("stop")] == ["SIGUSR2", "SIGTERM"]
    assert chain.curve() == whole.curve()
    assert [chain.attempt(n, "end.json")["redone_steps"] for n in (2, 3)] == [0, 0]


def test_nodes_that_die_cost_the_steps_since_the_last_commit_and_no_line_of_a_log(cluster, recipe, whole, tmp_path):
    """First the node that has a rank only, then the one with the batch script.

    Slurm starts the job again; on a slow host the batch script may be sooner, and the next job goes on.
    """
    chain = Chain(cluster, recipe, tmp_path / "run")
    chain.launch()
    chain.wait_for_step(25)
    lose_node(chain, chain.attempt_nodes()[-1], 3)
    chain.wait_for_step(chain.committed() + 25, attempt=2)
    said, log, metrics = chain.said(), chain.log(2), chain.run.metrics.read_text()
    lose_node(chain, chain.attempt_nodes()[0], 4)
    chain.wait_for_end()
    jobs = set(chain.job_ids())
    assert sum(int(cluster.job(job)["Restarts"]) for job in jobs) + len(jobs) - 1 == 2
    assert chain.ends()[1:] == [(0, ""), (0, "done")], "nothing was left to write end.json of the second"
    assert chain.said().startswith(said) and all(f"attempts/00{n}" in chain.said() for n in (1, 2, 3))
    assert chain.log(2).startswith(log), "the log of an attempt stays"
    assert chain.run.metrics.read_text().startswith(metrics), "what was logged before stays"
    assert chain.curve() == whole.curve()


def lose_node(chain: Chain, node: str, least: int) -> None:
    """Kill all on a node, wait until Slurm has seen it, and let the node come back."""
    assert chain.cluster.kill_node(node) >= least, "slurmd, the batch script if there, slurmstepd and the rank"
    poll(lambda: down(chain.cluster) == node, f"{node} down", 90, chain.story)
    chain.cluster.start_node(node)


def test_scancel_ends_the_chain(cluster, recipe, tmp_path):
    chain = Chain(cluster, recipe, tmp_path / "run")
    job = chain.launch()
    chain.wait_for_step(5)
    cluster.ask("scancel", job)
    chain.wait_for_end()
    assert cluster.state(job) == "CANCELLED" and chain.job_ids() == [job]
    assert "stopped" in chain.verb("status", chain.run.root).stdout


def test_cancel_saves_and_ends_a_run_whatever_its_name(cluster, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a \"b\" 'c' $(touch pwned) `touch pwned`;touch pwned\n%j touch pwned\n"
    chain = Chain(cluster, recipe, tmp_path / name)
    job = chain.launch()
    chain.wait_for_step(5)
    assert "running" in chain.verb("status", chain.run.root).stdout
    done = chain.verb("cancel", chain.run.root)
    assert done.returncode == 0 and str(job) in done.stdout, done.stdout + done.stderr
    chain.wait_for_end()
    assert chain.ends() == [(143, "stop")] and chain.job_ids() == [job]
    assert chain.committed() == chain.last_step() > 0, "saved where it stopped"
    assert "cancelled" in chain.verb("status", chain.run.root).stdout
    assert not list(tmp_path.rglob("pwned*")) and not Path("pwned").exists()


def test_an_attempt_without_progress_ends_the_chain_with_the_reason(cluster, recipe, tmp_path):
    chain = Chain(cluster, recipe, tmp_path / "run")
    job = chain.launch()
    poll(lambda: len(cluster.ranks("train", chain.run.root)) == 2, "the ranks", 90, chain.story)
    chain.signal_ranks(signal.SIGKILL)
    chain.wait_for_end()
    assert chain.ends() == [(137, "stop")] and chain.job_ids() == [job]
    assert "no progress" in chain.said() and "SIGKILL" in chain.said()
    assert "no progress" in chain.verb("status", chain.run.root).stdout


def test_a_node_that_fails_the_preflight_is_left_out_of_the_next_attempt(cluster, words, tmp_path):
    """Its daemon may use one core only, and so may the rank there, which the plan counts on two."""
    machine = tmp_path / "two-cores.yaml"
    facts = yaml.safe_load(MACHINE.read_text())
    facts["host"]["cores"] = facts["slurm"]["cpus_per_task"] = 2
    machine.write_text(yaml.safe_dump(facts))
    chain = Chain(cluster, write_recipe(tmp_path, **words), tmp_path / "run", machine)
    with cluster.confined("node1"):
        chain.launch()
        chain.wait_for_end()
    assert chain.ends() == [(5, "next"), (0, "done")]
    assert [chain.attempt(n, "job.json")["node_list"] for n in (1, 2)] == ["node[1-2]", "node[2-3]"]
    fitness = json.loads((chain.run.attempt(1) / "preflight.json").read_text())
    assert fitness["passing"] == "node2" and fitness["failing"] == "node1"
    assert "cores" in fitness["faults"]["node1"][0]


def down(cluster: Cluster) -> str:
    return cluster.ask("sinfo", "-h", "-t", "down", "-o", "%N")
