"""Ranks that cannot find each other end with a clear message in the stated time."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from training_runs import aifactory, free_port, write_recipe

TORCHRUN = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def two_ranks(words, tmp_path_factory):
    """A run folder with a plan for two ranks."""
    folder = tmp_path_factory.mktemp("two")
    done = aifactory("plan", write_recipe(folder, **words), "--cpu-ranks", 2, "--run", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def train(run, rank: int, world: int, port: int, timeout_s: float):
    env = {**TORCHRUN, "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    return aifactory("train", run, "--timeout-s", timeout_s, **env)


def assert_clear(done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "do: " in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_port_in_use_is_named(two_ranks):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert_clear(train(two_ranks, 0, 2, port, 20), 3, f"cannot listen on 127.0.0.1:{port}", "MASTER_PORT")


def test_a_missing_peer_is_named_within_the_time_out(two_ranks):
    t0_s = time.monotonic()
    assert_clear(train(two_ranks, 0, 2, free_port(), 3), 3, "1 of 2 ranks arrived within 3 s; missing: 1")
    assert time.monotonic() - t0_s < 30


def test_a_missing_rank_0_is_named_within_the_time_out(two_ranks):
    port = free_port()
    assert_clear(train(two_ranks, 1, 2, port, 3), 3, f"rank 0 did not answer at 127.0.0.1:{port} within 3 s")


def test_a_wrong_world_size_is_named(two_ranks):
    assert_clear(train(two_ranks, 0, 3, free_port(), 3), 2, "the plan is for 2 ranks, torchrun started 3")


def test_torchrun_trains_the_same_plan(two_ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["aifactory_train", "train", str(two_ranks)]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 20/20" in done.stdout


def test_a_rank_that_dies_ends_the_run_with_a_message_and_no_hang(words, tmp_path):
    recipe = write_recipe(tmp_path, **words, train__budget_tokens=10**8)
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "aifactory_train", "launch", str(recipe), "--run", str(run), "--cpu-ranks", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "step 3/" in line:
            break
    victims = subprocess.run(["pgrep", "-f", f"aifactory_train train {run}$"], capture_output=True, text=True).stdout
    os.kill(int(victims.split()[-1]), signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Traceback" not in output, output
