"""Preflight by real ranks: good nodes pass, a bad one is named, and nothing hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from aifactory_train.launch.fitness import judge, render_fitness
from aifactory_train.launch.mpi import mpirun_command
from aifactory_train.machine.load import write_machine
from aifactory_train.machine.machine import ByDtype, Device, Host, Machine, Measured
from broken_rank import run_rank
from training_runs import aifactory, write_corpus, write_recipe

ENV = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "OMPI_MCA_btl": "self,sm"}


def small_machine(cores: int = 2, fp32_flops_per_s: float | None = None) -> Machine:
    measured = Measured(matmul_flops_per_s=ByDtype(fp32=fp32_flops_per_s))
    return Machine(
        name="small", device=Device(kind="cpu", name="any", per_node=1), host=Host(cores=cores), measured=measured
    )


def plan_run(folder: Path, machine: Machine, *args: object) -> Path:
    """A run folder with a plan for this machine and an attempt of nodes n1, n2, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    write_machine(machine, folder / "machine.yaml")
    recipe = write_recipe(folder, folder / "prepared", write_corpus(folder, 3))
    run = folder / "run"
    done = aifactory("plan", recipe, "--machine", folder / "machine.yaml", "--run", run, *args)
    assert done.returncode == 0, done.stderr
    n_nodes = json.loads((run / "plan.json").read_text())["layout"]["n_nodes"]
    job = {"job_id": "1", "node_list": f"n[1-{n_nodes}]" if n_nodes > 1 else "n1", "n_nodes": n_nodes}
    (run / "attempts" / "001").mkdir(parents=True)
    (run / "attempts" / "001" / "job.json").write_text(json.dumps(job))
    return run


def mpirun(run: Path, machine: Machine, *bind_rank_1: str) -> subprocess.CompletedProcess[str]:
    rank = [sys.executable, "-m", "aifactory_train", "preflight", str(run / "attempts" / "001")]
    command = mpirun_command(machine, 2, rank)
    if bind_rank_1:
        command = [*mpirun_command(machine, 1, rank), ":", "-n", "1", *bind_rank_1, *rank]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **ENV}, check=False)


def reports(run: Path) -> list[dict]:
    files = sorted((run / "attempts" / "001" / "preflight").glob("rank-*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_two_good_ranks_pass_and_leave_their_reports(tmp_path: Path) -> None:
    machine = small_machine()
    run = plan_run(tmp_path, machine, "--cpu-ranks", 2)
    done = mpirun(run, machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight: all ranks are fit" in done.stdout and done.stderr == ""
    found = reports(run)
    assert [(r["rank"], r["local_rank"], r["host"], r["ok"], r["phase"]) for r in found] == [
        (0, 0, "n1", True, "together"),
        (1, 1, "n1", True, "together"),
    ]
    assert all(r["facts"]["all_reduce_bytes_per_s"] > 0 and r["facts"]["matmul_flops_per_s"] > 0 for r in found)
    assert render_fitness(judge(run / "attempts" / "001", ["n1"], 2)) == "the node is fit"


def test_one_rank_bound_to_too_few_cores_is_the_one_named(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores to give one rank fewer than the other")
    machine = small_machine(cores=4)
    run = plan_run(tmp_path, machine, "--cpu-ranks", 2)
    core = min(os.sched_getaffinity(0))
    done = mpirun(run, machine, "taskset", "-c", str(core))
    assert done.returncode == 5, done.stdout + done.stderr
    assert f"number of cores to use is 1 ({core}), the plan counts on 2" in done.stderr
    assert "rank 1 (local rank 1) on host n1" in done.stderr and "do: " in done.stderr
    assert "rank 0 (local" not in done.stderr and "Traceback" not in done.stderr
    assert [r["ok"] for r in reports(run)] == [True, False]
    assert list(judge(run / "attempts" / "001", ["n1", "n2"], 1).failing) == ["n2"]


def test_a_machine_far_slower_than_its_file_is_not_fit(tmp_path: Path) -> None:
    machine = small_machine(fp32_flops_per_s=1e16)
    run = plan_run(tmp_path, machine, "--cpu-ranks", 2)
    done = mpirun(run, machine)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "of the 5.00 PFLOP/s in the machine file" in done.stderr, "half of the node's rate is each rank's"
    assert all("matrix products (fp32) at" in r["faults"][0] for r in reports(run))


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two nodes, n1 and n2, with one rank each."""
    return plan_run(tmp_path_factory.mktemp("two"), small_machine(), "--nodes", 2)


def run_pair(run: Path, victim: int, where: str, how: str) -> list[tuple[int, str]]:
    """Exit code and words of two ranks that nobody kills when the other dies, as srun leaves them by default."""
    for old in (run / "attempts" / "001" / "preflight").glob("*"):
        old.unlink()
    (run / "in-collectives").unlink(missing_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # Forks of one process that has imported the heavy part: a rank is there at once.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["aifactory_train.train.preflight"])
    common = {**ENV, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    attempt, said = run / "attempts" / "001", [run / f"rank-{rank}.txt" for rank in range(2)]
    pair = [
        forks.Process(
            target=run_rank, args=({**common, "RANK": str(r)}, attempt, victim, where, how, said[r]), daemon=True
        )
        for r in range(2)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
        assert process.exitcode is not None, "a rank does not end"
    told = [file.read_text() for file in said]
    assert not any("Traceback" in words for words in told), told
    return [(process.exitcode, words) for process, words in zip(pair, told, strict=True)]


@pytest.mark.parametrize(
    ("victim", "where", "how", "codes", "said"),
    [
        (1, "check", "dies", [5, -9], "1 of 2 ranks did not come: rank 1 on n2"),
        (1, "check", "hangs", [5, 5], "1 of 2 ranks did not come: rank 1 on n2"),
        (0, "check", "dies", [-9, 5], "1 of 2 ranks did not answer: rank 0 on n1"),
        (1, "collectives", "dies", [5, -9], "1 of 2 ranks went away during the collectives: rank 1 on n2"),
        (0, "collectives", "dies", [-9, 5], "1 of 2 ranks went away during the collectives: rank 0 on n1"),
    ],
)
def test_a_lost_rank_is_named_with_its_host_and_is_the_one_to_blame(
    two_nodes: Path, victim: int, where: str, how: str, codes: list[int], said: str
) -> None:
    ends = run_pair(two_nodes, victim, where, how)
    assert [code for code, _ in ends] == codes, ends
    assert said in ends[1 - victim][1], ends
    if how == "hangs":
        assert "did not end within 3 s: stuck at a broken device" in ends[victim][1], ends
    fitness = judge(two_nodes / "attempts" / "001", ["n1", "n2"], 1)
    assert list(fitness.failing) == [f"n{victim + 1}"], fitness


def test_a_check_that_raises_is_a_fault_of_its_node_and_the_other_does_not_wait(two_nodes: Path) -> None:
    ends = run_pair(two_nodes, 1, "check", "fails")
    assert [code for code, _ in ends] == [0, 5], ends
    assert "a broken device: RuntimeError: CUDA error: uncorrectable ECC error encountered" in ends[1][1]
    assert list(judge(two_nodes / "attempts" / "001", ["n1", "n2"], 1).failing) == ["n2"]


def test_a_device_that_breaks_in_the_collectives_is_blamed_and_not_the_one_that_waited(two_nodes: Path) -> None:
    ends = run_pair(two_nodes, 1, "collectives", "fails")
    assert [code for code, _ in ends] == [5, 5], ends
    assert "rank 1 (local rank 0) on host n2" in ends[1][1] and "uncorrectable ECC" in ends[1][1], ends
    assert list(judge(two_nodes / "attempts" / "001", ["n1", "n2"], 1).failing) == ["n2"]


def test_a_collective_that_hangs_on_one_rank_ends_in_time_and_blames_no_one(two_nodes: Path) -> None:
    ends = run_pair(two_nodes, 1, "collectives", "hangs")
    assert [code for code, _ in ends] == [5, 5], ends
    assert "all-gather and all-reduce of 2 ranks: it did not end within 5 s" in ends[0][1], ends
    fitness = judge(two_nodes / "attempts" / "001", ["n1", "n2"], 1)
    assert fitness.failing == {} and "did not end within 5 s" in render_fitness(fitness)
