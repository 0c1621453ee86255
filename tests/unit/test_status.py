"""What `status` shows and `cancel` does. The lines of squeue and scancel are recorded from Slurm 22.05."""

import os
import shutil
import sys
import types

import pytest

from aifactory_train.errors import MachineError, RunFolderError
from aifactory_train.launch import squeue
from aifactory_train.launch.attempts import End, Job, write_part
from aifactory_train.launch.chain import note_job
from aifactory_train.launch.squeue import ask_squeue
from aifactory_train.launch.status import cancel, live_jobs, render_status
from aifactory_train.rundir import COMMIT, RunDir, hold, step_folder, write_atomic
from aifactory_train.units import format_seconds
from results_run import START_S, a_plan, event, line, start

WAITING = "2159001|PENDING|Resources|5:00|1|N/A|\n2159002|PENDING|JobHeldUser|5:00|2|2026-11-23T09:00:00|\n"
RUNNING = "2159000|RUNNING|None|4:58|2|2026-11-23T07:20:50|node[1-2]\n"
STEPS = "2159000.0\n2159000.batch\n"
UNKNOWN_ID = "slurm_load_jobs error: Invalid job id specified\n"


class FakeSlurm:
    """Answers to squeue and scancel, and what was asked."""

    def __init__(self):
        self.queue, self.steps, self.error, self.missing = "", "", {}, False
        self.scancelled = []

    def __call__(self, command):
        if self.missing:
            raise MachineError(f"{command[0]} is not on this node's PATH", do="do it on a login node")
        if command[0] == "scancel":
            self.scancelled.append(command[1:])
        said = self.error.get(command[0], "")
        text = "" if command[0] == "scancel" else self.steps if "--steps" in command else self.queue
        return types.SimpleNamespace(returncode=1 if said else 0, stdout=text, stderr=said)


@pytest.fixture
def slurm(monkeypatch):
    fake = FakeSlurm()
    monkeypatch.setattr(squeue, "run_command", fake)
    return fake


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(s=START_S)
    monkeypatch.setattr("time.time", lambda: now.s)
    return now


@pytest.fixture
def run(tmp_path):
    """Planned, and nothing more."""
    folder = RunDir(tmp_path / "run")
    write_atomic(folder.plan, a_plan().to_json())
    return folder


def attempt(run, number, at_s=0.0, job_id="2159000", first_step=0):
    job = Job(job_id, "node[1-2]", 2, START_S + at_s, START_S + at_s + 300, first_step)
    write_part(run.attempt(number) / "job.json", job)
    note_job(run, job_id)


def ended(run, number, at_s, verdict, reason, code=143, last_step=100):
    end = End(code, verdict, reason, last_step, "", START_S + at_s, 0, 0, 0, 0, 0)
    write_part(run.attempt(number) / "end.json", end)


def commit(run, step, at_s):
    path = step_folder(run.checkpoints, step) / COMMIT
    write_atomic(path, "{}")
    os.utime(path, (START_S + at_s, START_S + at_s))


def shown(run, name):
    """The text behind `name`, [] if there is no such line."""
    return [text[11:] for text in render_status(run).splitlines() if text.startswith(name.ljust(11))]


def test_a_run_that_nobody_started_says_so_and_what_is_predicted(run, slurm):
    assert shown(run, "state") == ["not started"]
    assert shown(run, "step")[0].startswith("0 of ") and shown(run, "commit") == ["none yet"]
    assert "unknown measured" in shown(run, "speed")[0] and "by the prediction" in shown(run, "left")[0]
    assert shown(run, "loss") == shown(run, "follow") == shown(run, "job") == []


def test_a_running_job_shows_step_loss_speed_commit_and_time(run, slurm, clock):
    slurm.queue = RUNNING
    attempt(run, 1)
    start(run, at_s=10)
    for step in (1, 10, 20, 30):
        line(run, step, at_s=10 + step, tokens_per_s=1000.0 * step, step_time_s=2.0, loss=step / 10)
    commit(run, 20, at_s=30)
    clock.s = START_S + 75
    plan = a_plan()
    n_steps, predicted = plan.recipe.n_steps, plan.predicted.tokens_per_s
    assert shown(run, "state") == ["running"]
    assert shown(run, "recipe") == [f"{plan.recipe.name} on 2 ranks of 1 node of local, fsdp2"]
    assert shown(run, "step")[0].startswith(f"30 of {n_steps} ({3000 / n_steps:.1f} %), 123 k of ")
    assert shown(run, "loss") == ["3.000 nats/token at step 30"]
    off = f"{(20_000 / predicted - 1) * 100:+.1f} %"
    assert shown(run, "speed")[0].startswith(f"20.0 k tokens/s measured ({off}), "), "median without the first line"
    assert shown(run, "left") == [f"{format_seconds((n_steps - 30) * 2.0)} of training"]
    assert shown(run, "commit") == ["step 20, 45 s ago"]
    assert shown(run, "job") == ["2159000 RUNNING on 2 nodes node[1-2], 4:58 left"]
    assert shown(run, "follow") == [f"tail -F {run.attempt(1)}/log.txt"]


def test_waiting_jobs_show_their_reason_and_when_they_may_start(run, slurm):
    slurm.queue = WAITING
    for job_id in ("2159001", "2159002"):
        note_job(run, job_id)
    assert shown(run, "state") == ["queued"] and live_jobs(run) == ["2159001", "2159002"]
    assert shown(run, "job") == [
        "2159001 PENDING for 1 node (Resources)",
        "2159002 PENDING for 2 nodes (JobHeldUser), expected to start at 2026-11-23T09:00:00",
    ]


def test_attempts_are_listed_with_how_they_ended_and_why(run, slurm, clock):
    slurm.queue = RUNNING.replace("2159000", "2159005")
    attempt(run, 1)
    start(run, at_s=10)
    line(run, 120, at_s=100)
    ended(run, 1, 130, "next", "the ranks were told to stop (exit code 143)")
    attempt(run, 2, at_s=500, job_id="2159005", first_step=100)
    start(run, attempt=2, step=100, at_s=510)
    line(run, 140, attempt=2, at_s=620)
    table = [text.split("  ") for text in render_status(run).split("\n\n")[1].splitlines()]
    table = [[cell.strip() for cell in row if cell.strip()] for row in table]
    assert table[0] == ["attempt", "job", "nodes", "steps", "time", "exit", "then"]
    why = "next: the ranks were told to stop (exit code 143)"
    assert table[1] == ["1", "2159000", "node[1-2]", "0-120", "2 min 10 s", "143", why]
    assert table[2] == ["2", "2159005", "node[1-2]", "100-140", "2 min 00 s", "-"]


def test_an_attempt_under_way_has_taken_until_now_and_one_that_is_gone_until_its_last_line(run, slurm, clock):
    attempt(run, 1)
    start(run, at_s=1)
    clock.s = START_S + 90
    assert "1 s" in render_status(run).splitlines()[-1]
    slurm.queue = RUNNING
    assert "90 s" in render_status(run).splitlines()[-1]


def test_ranks_that_stopped_as_the_time_is_nearly_over_need_no_launch(run, slurm, clock):
    slurm.queue = RUNNING
    attempt(run, 1)
    start(run, at_s=1)
    event(run, "stop", 80, step=55, signal="SIGXCPU")
    row = render_status(run).splitlines()[-1]
    assert row.endswith("after step 55, as the wall time was nearly over; should no job follow, launch again")


def test_a_resumed_attempt_without_a_line_yet_stands_at_its_commit(run, slurm):
    attempt(run, 1)
    start(run)
    line(run, 120, at_s=100)
    attempt(run, 2, at_s=500)
    start(run, attempt=2, step=100, at_s=510)
    assert shown(run, "step")[0].startswith("100 of ")


def test_a_chain_that_stopped_says_why(run, slurm):
    attempt(run, 1)
    ended(run, 1, 20, "stop", "no progress: training failed (exit code 4), and nothing was saved", code=4)
    assert shown(run, "state") == ["stopped: no progress: training failed (exit code 4), and nothing was saved"]


def test_a_chain_whose_next_job_is_missing_says_so(run, slurm):
    attempt(run, 1)
    ended(run, 1, 20, "next", "the ranks were told to stop")
    assert "the next job was not submitted" in shown(run, "state")[0]
    note_job(run, "2159009")
    assert "job 2159009 is gone and never began; see slurm-2159009.out" in shown(run, "state")[0]


def test_a_job_that_is_gone_without_a_word_is_not_shown_as_running(run, slurm):
    note_job(run, "2159000")
    assert "left no attempt" in shown(run, "state")[0] and "slurm-2159000.out" in shown(run, "state")[0]
    attempt(run, 1)
    assert shown(run, "state")[0].startswith("stopped: it went without a word")


def test_a_finished_run_says_so(run, slurm):
    n_steps = a_plan().recipe.n_steps
    attempt(run, 1)
    start(run)
    line(run, n_steps, at_s=100)
    event(run, "finish", 101, step=n_steps)
    commit(run, n_steps, at_s=101)
    ended(run, 1, 110, "done", "all steps are trained and saved", code=0)
    assert shown(run, "state") == ["finished"] and shown(run, "left") == []
    assert "(100.0 %)" in shown(run, "step")[0]


def test_without_squeue_status_tells_what_the_folder_tells(run, slurm, clock):
    slurm.missing = True
    attempt(run, 1)
    start(run, at_s=10)
    line(run, 20, at_s=40)
    clock.s = START_S + 100
    assert shown(run, "state") == ["unknown: last line 60 s ago, no end is noted"]
    assert shown(run, "jobs") == ["unknown: squeue is not on this node's PATH"]
    ended(run, 1, 50, "stop", "the job was told to end")
    assert shown(run, "state") == ["stopped: the job was told to end"]


def test_a_run_started_here_is_shown_without_asking_slurm(run, slurm, clock):
    slurm.missing = True
    write_atomic(run.attempt(1) / "command.sh", "mpirun\n")
    os.utime(run.attempt(1) / "command.sh", (START_S, START_S))
    with hold(run.root, RunFolderError("busy")):
        assert shown(run, "state") == ["running"]
    start(run, at_s=1)
    line(run, 20, at_s=30)
    event(run, "stop", 31, step=20, signal="SIGINT")
    assert shown(run, "state") == ["stopped: after step 20 by SIGINT; launch again to go on"]
    assert "1        here  1      0-20   31 s  -     after step 20 by SIGINT" in render_status(run)
    assert shown(run, "jobs") == []


def test_a_damaged_file_of_an_attempt_is_named(run, slurm):
    attempt(run, 1)
    (run.attempt(1) / "end.json").write_text('{"exit_code": 1}')
    with pytest.raises(RunFolderError, match=r"end\.json cannot be read"):
        render_status(run)


def test_jobs_that_are_over_are_not_live(run, slurm):
    assert live_jobs(run) == []
    note_job(run, "2159000")
    slurm.queue = RUNNING.replace("RUNNING", "COMPLETING")
    assert live_jobs(run) == []
    slurm.error["squeue"] = UNKNOWN_ID
    assert live_jobs(run) == [], "Slurm has forgotten the only job"
    slurm.error["squeue"] = "squeue: error: tried\nslurm_load_jobs error: Unable to contact slurm controller\n"
    with pytest.raises(MachineError, match="squeue failed: slurm_load_jobs error: Unable to contact") as caught:
        live_jobs(run)
    assert "squeue --noheader --jobs=2159000" in caught.value.where and caught.value.do


def test_cancel_asks_ranks_to_save_and_takes_waiting_jobs_out(run, slurm):
    slurm.queue, slurm.steps = WAITING + RUNNING, STEPS
    note_job(run, "2159000")
    text = cancel(run, now=False)
    assert run.cancelled.exists()
    assert slurm.scancelled == [["2159001"], ["2159002"], ["--signal=USR2", "2159000"]]
    assert "job 2159000 is running: told to save and end" in text and "job 2159001 was waiting" in text
    assert shown(run, "state") == ["running, told to save and end"]
    slurm.queue = ""
    assert shown(run, "state") == ["cancelled; to go on, launch it again"]


def test_cancel_now_does_not_wait_for_a_save(run, slurm):
    slurm.queue, slurm.steps = RUNNING, STEPS
    note_job(run, "2159000")
    assert "told to end at once" in cancel(run, now=True)
    assert slurm.scancelled == [["2159000"]] and run.cancelled.exists()


def test_a_job_without_ranks_yet_has_nothing_to_save_and_is_ended(run, slurm):
    slurm.queue, slurm.steps = RUNNING, "2159000.batch\n2159000.extern\n"
    note_job(run, "2159000")
    text = cancel(run, now=False)
    assert slurm.scancelled == [["2159000"]], "the signal would reach nobody"
    assert "none of its ranks" in text and "lost" not in text, "also where the ranks have just saved and ended"


def test_cancel_without_a_live_job_leaves_no_mark(run, slurm):
    note_job(run, "2159000")
    assert "nothing to cancel" in cancel(run, now=False)
    assert not run.cancelled.exists() and not slurm.scancelled


def test_cancel_of_a_run_started_here_names_the_process(run, slurm):
    slurm.missing = True
    with hold(run.root, RunFolderError("busy")):
        text = cancel(run, now=False)
    assert "Ctrl-C" in text and not run.cancelled.exists()
    if shutil.which("lslocks"):  # then this kernel lists locks
        assert f"kill -USR2 {os.getpid()};" in text


@pytest.mark.parametrize("which", ["squeue", "scancel"])
def test_slurm_that_refuses_is_told_with_what_to_type(run, slurm, which):
    slurm.queue, slurm.steps = RUNNING, STEPS
    note_job(run, "2159000")
    slurm.error[which] = f"{which}: error: Access/permission denied\n"
    with pytest.raises(MachineError, match="permission denied") as caught:
        cancel(run, now=False)
    assert caught.value.where.startswith(which) and caught.value.do
    assert run.cancelled.exists() == (which == "scancel"), "no other job may follow one that is live"


def test_a_missing_or_silent_command_is_a_message(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MachineError, match="squeue is not on this node's PATH"):
        ask_squeue(["1"])
    monkeypatch.setattr(squeue, "_ANSWER_S", 0.05)
    with pytest.raises(MachineError, match=r"has not answered in 0\.05 s"):
        squeue.run_command([sys.executable, "-c", "import time; time.sleep(9)"])
