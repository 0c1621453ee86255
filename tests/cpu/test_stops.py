"""Whichever rank is told to stop or dies, all leave, with the exit code that says why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aifactory_train.checkpoint.manager import committed_steps
from aifactory_train.rundir import RunDir, read_jsonl
from training_runs import aifactory, free_port, kill_ranks, pids, start_launch, wait_until, write_recipe

# With the slowest start that a busy machine has shown, and far below the time-out of a collective.
BOUND_S = 60


@pytest.fixture
def planned(words, tmp_path):
    """A run folder with a plan for two ranks and more steps than they will make."""
    recipe = write_recipe(tmp_path, **words, train__budget_tokens=10**8)
    done = aifactory("plan", recipe, "--cpu-ranks", 2, "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


@pytest.fixture
def start_rank():
    """Start one rank without a launcher above it, as srun does; what still runs is killed at the end."""
    started = []

    def start(run: Path, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "aifactory_train", "train", str(run)]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **env}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def torchrun_rank(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}


def slurm_rank(rank: int, port: int, job: int) -> dict[str, str]:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(job), "MASTER_PORT": str(port)}
    return {**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_jsonl(RunDir(run).metrics)), default=0)


def mpi_rank(pid: int) -> str | None:
    for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if word.startswith(b"OMPI_COMM_WORLD_RANK="):
            return word.partition(b"=")[2].decode()
    return None


@pytest.mark.parametrize("number, ranks", [(signal.SIGTERM, "0"), (signal.SIGTERM, "1"), (signal.SIGUSR2, "01")])
def test_a_signal_to_any_rank_stops_all_with_a_save(words, tmp_path, number, ranks):
    recipe, run = write_recipe(tmp_path, **words, train__budget_tokens=10**8), tmp_path / "run"
    process = start_launch(recipe, run, 2)
    wait_until(lambda: last_step(run) >= 2, "step 2")
    for pid in pids(run):
        rank = mpi_rank(pid)
        if rank is not None and rank in ranks:
            os.kill(pid, number)
    try:
        assert process.wait(timeout=BOUND_S) == 143
    finally:
        kill_ranks(run)
    stop = read_jsonl(RunDir(run).events)[-1]
    assert (stop["event"], stop["signal"]) == ("stop", number.name)
    assert committed_steps(RunDir(run).checkpoints)[-1] == stop["step"] == last_step(run)


@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_of_a_killed_rank_end_by_themselves_with_code_4(planned, start_rank, victim):
    port = free_port()
    ranks = [start_rank(planned, **torchrun_rank(rank, port)) for rank in range(2)]
    wait_until(lambda: last_step(planned) >= 3, "step 3")
    ranks[victim].kill()
    t0_s = time.monotonic()
    output = ranks[1 - victim].communicate(timeout=BOUND_S)[0]
    print(f"left after {time.monotonic() - t0_s:.1f} s")
    assert ranks[1 - victim].returncode == 4, output
    assert "another rank went away" in output and "Traceback" not in output, output


def test_two_jobs_do_not_train_one_run(planned, start_rank):
    port = free_port()
    first = [start_rank(planned, **slurm_rank(rank, port, 11)) for rank in range(2)]
    wait_until(lambda: last_step(planned) >= 2, "step 2")
    port = free_port()
    second = [start_rank(planned, **slurm_rank(rank, port, 12)) for rank in range(2)]
    outputs = [rank.communicate(timeout=BOUND_S)[0] for rank in second]
    assert [rank.returncode for rank in second] == [2, 2], outputs
    assert "another job trains this run" in outputs[0] and "cancel" in outputs[0], outputs[0]
    assert "Traceback" not in outputs[0] + outputs[1], outputs
    assert outputs[1].strip() == "", "told once"
    assert [rank.poll() for rank in first] == [None, None], "the first goes on"
    first[1].terminate()
    assert [rank.wait(timeout=BOUND_S) for rank in first] == [143, 143]
    assert [e["event"] for e in read_jsonl(RunDir(planned).events)].count("start") == 1
    # What has ended holds nothing.
    port = free_port()
    third = [start_rank(planned, **slurm_rank(rank, port, 13)) for rank in range(2)]
    stopped_at = last_step(planned)
    wait_until(lambda: last_step(planned) > stopped_at, "another step")
    third[0].terminate()
    assert [rank.wait(timeout=BOUND_S) for rank in third] == [143, 143]
