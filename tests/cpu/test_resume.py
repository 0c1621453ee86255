"""A run never loses work: stopped, killed, killed while saving, resumed on another number of ranks."""

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from aifactory_train.checkpoint.manager import COMMIT, committed_steps
from aifactory_train.results.record import read_metrics
from aifactory_train.rundir import RunDir, read_jsonl
from training_runs import assert_refused, kill_ranks, launch, launched, pids, start_launch, wait_until, write_recipe

EXACT = ("step", "tokens", "loss", "grad_norm", "lr")


def curve(rows):
    return [tuple(row[name] for name in EXACT) for row in rows]


@pytest.fixture(scope="module")
def whole_run(words, tmp_path_factory):
    """A run that nobody disturbed, on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, **words, train__budget_tokens=40 * 1024, checkpoint__every_steps=5)
    launched(recipe, folder / "run", 2)
    return folder / "run"


@pytest.fixture(scope="module")
def whole(whole_run):
    """Its curve."""
    return curve(read_jsonl(RunDir(whole_run).metrics))


@pytest.fixture
def recipe(words, tmp_path):
    return write_recipe(tmp_path, **words, train__budget_tokens=40 * 1024, checkpoint__every_steps=5)


def last_step(run) -> int:
    return max((row["step"] for row in read_jsonl(RunDir(run).metrics)), default=0)


def stop_after(recipe, run, step: int, ranks: int) -> int:
    """Launch, ask to stop (as Ctrl-C or scancel would) once `step` is logged; returns the step it stopped at."""
    process = start_launch(recipe, run, ranks)
    wait_until(lambda: last_step(run) >= step, f"step {step}")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    return committed_steps(RunDir(run).checkpoints)[-1]


def test_a_stopped_run_saves_and_continues_bit_for_bit(recipe, whole, tmp_path):
    run = tmp_path / "run"
    stopped_at = stop_after(recipe, run, 7, 2)
    assert last_step(run) == stopped_at < 40, "it saves the very step that it stopped at"
    launched(recipe, run, 2)
    assert curve(read_metrics(RunDir(run))) == whole
    kinds = [e["event"] for e in read_jsonl(RunDir(run).events)]
    assert kinds.count("start") == 2 and "stop" in kinds and kinds[-1] == "finish"


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_resume_on_another_number_of_ranks_reads_the_same_samples(recipe, whole, tmp_path, ranks):
    run = tmp_path / "run"
    stopped_at = stop_after(recipe, run, 7, 2)
    launched(recipe, run, ranks)
    rows = curve(read_metrics(RunDir(run)))
    assert [r[:2] for r in rows] == [r[:2] for r in whole]
    assert rows[:stopped_at] == whole[:stopped_at]
    # Sums in another order differ in the last bits, and Adam lets such differences grow with the steps; the
    # first steps after the resume are as near as one step of 1 and N ranks, any other row would be far off.
    for ours, theirs in zip(rows[stopped_at : stopped_at + 3], whole[stopped_at : stopped_at + 3], strict=True):
        assert ours[2:] == pytest.approx(theirs[2:], rel=5e-6), ours[0]
    for ours, theirs in zip(rows, whole, strict=True):
        assert ours[2] == pytest.approx(theirs[2], rel=2e-5), ours[0]


def test_a_kill_loses_at_most_the_steps_since_the_last_commit(recipe, whole, tmp_path):
    run = tmp_path / "run"
    process = start_launch(recipe, run, 2)
    wait_until(lambda: last_step(run) >= 13, "step 13")
    assert kill_ranks(run) >= 2
    process.wait(timeout=60)
    reached, committed = last_step(run), committed_steps(RunDir(run).checkpoints)
    assert committed and reached - committed[-1] <= 2 * 5, "one interval, and the one that was being written"
    launched(recipe, run, 2)
    starts = [e["step"] for e in read_jsonl(RunDir(run).events) if e["event"] == "start"]
    assert starts == [0, committed[-1]]
    assert curve(read_metrics(RunDir(run))) == whole


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.02])
def test_a_kill_during_a_save_leaves_the_commit_before_it(words, whole, tmp_path, delay_s):
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path, **words, train__budget_tokens=40 * 1024, checkpoint__every_steps=1)
    folder = RunDir(run).checkpoints
    process = start_launch(recipe, run, 2)
    wait_until(lambda: last_step(run) >= 6, "step 6")
    wait_until(lambda: any(folder.glob("step-*.tmp")), "a save under way")
    time.sleep(delay_s)
    assert kill_ranks(run) >= 2
    process.wait(timeout=60)
    committed = committed_steps(folder)
    assert committed and last_step(run) - committed[-1] <= 2
    for step in committed:
        commit = json.loads((folder / f"step-{step:08d}" / COMMIT).read_text())
        for name, (size, _) in commit["files"].items():
            assert (folder / f"step-{step:08d}" / name).stat().st_size == size
    launched(recipe, run, 2)
    assert not list(folder.glob("*.tmp")), "what was never committed is gone"
    assert len(committed_steps(folder)) == 2, "retention keeps two"
    assert curve(read_metrics(RunDir(run))) == whole


def test_a_finished_run_is_left_alone(recipe, whole_run, tmp_path):
    run = shutil.copytree(whole_run, tmp_path / "run")
    before = RunDir(run).events.read_text()
    again = launch(recipe, run, 2)
    assert again.returncode == 0 and "nothing to train" in again.stdout
    assert RunDir(run).events.read_text() == before


def test_a_synchronous_save_gives_the_same_state(words, whole, tmp_path):
    recipe = write_recipe(
        tmp_path,
        **words,
        train__budget_tokens=40 * 1024,
        checkpoint__every_steps=5,
        checkpoint__asynchronous=False,
    )
    assert curve(launched(recipe, tmp_path / "run", 2)) == whole


def test_the_second_signal_kills(words, tmp_path):
    recipe, run = write_recipe(tmp_path, **words, train__budget_tokens=10**9), tmp_path / "run"
    process = start_launch(recipe, run, 1)
    wait_until(lambda: last_step(run) >= 2, "step 2")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=30) != 0
    except subprocess.TimeoutExpired:
        kill_ranks(run)
        raise


def test_a_signal_during_start_up_is_heeded_before_the_first_step(words, tmp_path):
    recipe, run = write_recipe(tmp_path, **words, train__budget_tokens=10**8), tmp_path / "run"
    process = start_launch(recipe, run, 2)
    wait_until(lambda: len(pids(run)) >= 2, "the ranks")
    time.sleep(0.7)  # torch is being loaded
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert read_jsonl(RunDir(run).metrics) == [] == committed_steps(RunDir(run).checkpoints)
    stop = read_jsonl(RunDir(run).events)[-1]
    assert (stop["event"], stop["step"], stop["signal"]) == ("stop", 0, "SIGUSR2")


def test_a_run_whose_launcher_died_is_not_started_a_second_time(words, tmp_path):
    recipe, run = write_recipe(tmp_path, **words, train__budget_tokens=10**8), tmp_path / "run"
    process = start_launch(recipe, run, 2)
    wait_until(lambda: last_step(run) >= 2, "step 2")
    # mpirun ends at the first line that it cannot pass on to a dead launcher, and then the run may be started.
    for pid in pids(run):
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    try:
        assert len(pids(run)) == 3, "mpirun and the two ranks live on"
        assert_refused(launch(recipe, run, 2), "being trained already")
    finally:
        kill_ranks(run)


def test_a_hang_up_saves_and_stops(words, tmp_path):
    recipe, run = write_recipe(tmp_path, **words, train__budget_tokens=10**8), tmp_path / "run"
    process = start_launch(recipe, run, 2)
    wait_until(lambda: last_step(run) >= 2, "step 2")
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 143
    assert committed_steps(RunDir(run).checkpoints) == [last_step(run)]


def test_a_terminal_gets_a_progress_bar(words, tmp_path):
    recipe = write_recipe(tmp_path, **words)
    command = [sys.executable, "-m", "aifactory_train", "launch", str(recipe), "--run", str(tmp_path / "run")]
    leader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal)
    os.close(terminal)
    output = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the terminal has no writer left
            break
        output += chunk
    assert process.wait() == 0, output
    assert b"100%" in output and b"20/20" in output and b"tokens/s" in output
    assert b"step 2/20" not in output
