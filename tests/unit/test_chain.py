"""What a batch script is told before the ranks start and after they ended."""

import json
import types

import pytest

from aifactory_train.errors import MachineError, RunFolderError, TrainingFault
from aifactory_train.hostlist import expand
from aifactory_train.launch import chain, squeue
from aifactory_train.launch.attempts import account, read_attempts
from aifactory_train.launch.chain import job_ids, note_job
from aifactory_train.plan.plan import load_plan
from aifactory_train.rundir import COMMIT, RunDir, append_jsonl, committed_steps, step_folder, write_atomic
from aifactory_train.strictyaml import configs_dir

DEMO = configs_dir() / "recipes" / "demo.yaml"
MACHINE = """
name: lab
device: {kind: cuda, name: GPU, per_node: 2, memory_bytes: 68719476736, native_bf16: true}
host: {cores: 16}
slurm: {partitions: [{name: batch}]}
"""


@pytest.fixture
def machine(tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(MACHINE)
    return path


@pytest.fixture
def clock(monkeypatch):
    """The time of day for chain and events; moved by hand."""
    now = types.SimpleNamespace(s=1_790_000_000.0)
    monkeypatch.setattr("time.time", lambda: now.s)
    return now


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    """squeue knows of no job, unless a test says otherwise."""
    told = {}

    def run_command(command):
        return types.SimpleNamespace(returncode=0, stdout=told.get(command[0], ""), stderr="")

    monkeypatch.setattr(squeue, "run_command", run_command)
    return told


def begin(run, machine, job_id="101", nodes="n[1-2]", end_time_s=None, recipe=DEMO):
    return chain.begin(recipe, machine, min(2, len(expand(nodes))), run, job_id, nodes, end_time_s)


def commit(run, step):
    write_atomic(step_folder(RunDir(run).checkpoints, step) / COMMIT, "{}")


def row(run, step, clock, stall_s=0.0, step_time_s=2.0):
    line = {"step": step, "time_s": clock.s, "attempt": 1, "loss": 3.0, "step_time_s": step_time_s}
    append_jsonl(RunDir(run).metrics, {**line, "save_stall_s": stall_s})


def event(run, kind, clock, **fields):
    append_jsonl(RunDir(run).events, {"time_s": clock.s, "event": kind, **fields})


def test_begin_writes_the_folder_that_the_ranks_and_the_end_need(tmp_path, machine, clock):
    run = tmp_path / "run"
    attempt = begin(run, machine, end_time_s=clock.s + 3600)
    assert attempt == run / "attempts" / "001"
    assert json.loads((attempt / "job.json").read_text()) == {
        "job_id": "101", "node_list": "n[1-2]", "n_nodes": 2, "begin_s": clock.s, "end_time_s": clock.s + 3600,
        "first_step": 0,
    }  # fmt: skip
    assert all((run / name).exists() for name in ("recipe.yaml", "machine.yaml", "plan.json"))
    assert json.loads((run / "plan.json").read_text())["layout"]["world_size"] == 4
    assert job_ids(RunDir(run)) == ["101"]
    assert '"event": "attempt"' in RunDir(run).events.read_text()


def test_a_requeued_job_gets_another_folder_and_resumes_at_the_newest_commit(tmp_path, machine, clock):
    begin(tmp_path / "run", machine)
    commit(tmp_path / "run", 20)
    commit(tmp_path / "run", 100)
    (step_folder(RunDir(tmp_path / "run").checkpoints, 120)).mkdir()  # no COMMIT: it does not exist
    clock.s += 60
    attempt = begin(tmp_path / "run", machine, nodes="n[3-4]")
    assert attempt.name == "002" and json.loads((attempt / "job.json").read_text())["first_step"] == 100
    assert job_ids(RunDir(tmp_path / "run")) == ["101"]


def test_slurm_cannot_start_a_job_for_ever_that_kills_its_nodes(tmp_path, machine, clock):
    run = tmp_path / "run"
    begin(run, machine, "101")
    commit(run, 40)
    for _ in range(5):
        begin(run, machine, "101")
        clock.s += 60
    with pytest.raises(TrainingFault, match="the last 5 attempts have saved nothing; job 101"):
        begin(run, machine, "101")
    assert begin(run, machine, "102").name == "007", "somebody has launched it again"
    commit(run, 60)
    assert begin(run, machine, "102").name == "008"


def test_attempts_in_vain_count_since_the_last_launch_and_the_last_commit(tmp_path, machine, clock):
    run = tmp_path / "run"

    def chain_of(job_ids, then):
        codes = []
        for job_id in job_ids:
            attempt = begin(run, machine, job_id, nodes=f"n[{job_id},{job_id}0]")
            clock.s += 60
            codes.append(chain.end(attempt, 137, f"n{job_id}", False))
        assert codes == then

    chain_of(["1", "2", "3", "4", "5"], [75, 75, 75, 75, 137])
    chain_of(["6", "7"], [75, 75])
    commit(run, 10)
    chain_of(["8", "9", "10", "11", "12"], [75, 75, 75, 75, 137])


def test_a_job_that_another_has_taken_over_does_nothing(tmp_path, machine, capsys):
    begin(tmp_path / "run", machine, "101")
    note_job(RunDir(tmp_path / "run"), "102")
    assert begin(tmp_path / "run", machine, "101") is None
    assert "job 102 has taken over" in capsys.readouterr().err
    assert begin(tmp_path / "run", machine, "102").name == "002"


def test_a_second_job_leaves_a_run_alone_that_another_is_training(tmp_path, machine, no_slurm, capsys):
    begin(tmp_path / "run", machine, "101")
    note_job(RunDir(tmp_path / "run"), "102")
    no_slurm["squeue"] = "101|RUNNING|None|4:58|2|2026-11-23T07:20:50|n[1-2]\n"
    assert begin(tmp_path / "run", machine, "102") is None
    assert "job 101 is training" in capsys.readouterr().err
    assert begin(tmp_path / "run", machine, "101").name == "002", "Slurm has started it again: the run is its own"
    no_slurm["squeue"] = "101|COMPLETING|None|0:00|2|2026-11-23T07:20:50|n[1-2]\n"
    assert begin(tmp_path / "run", machine, "103").name == "003", "a job that is ending trains no more"


def test_the_next_job_begins_although_the_one_before_is_still_leaving(tmp_path, machine, no_slurm):
    first = begin(tmp_path / "run", machine, "101")
    commit(tmp_path / "run", 20)
    assert chain.end(first, 143, "", False) == 75
    no_slurm["squeue"] = "101|RUNNING|None|0:20|2|2026-11-23T07:20:50|n[1-2]\n"
    assert begin(tmp_path / "run", machine, "102").name == "002"


def test_where_slurm_cannot_be_asked_the_job_begins(tmp_path, machine, monkeypatch):
    def gone(command):
        raise MachineError("squeue is not on this node's PATH")

    begin(tmp_path / "run", machine, "101")
    monkeypatch.setattr(squeue, "run_command", gone)
    assert begin(tmp_path / "run", machine, "102") is not None


def test_a_cancelled_run_does_not_begin_again(tmp_path, machine, capsys):
    begin(tmp_path / "run", machine)
    RunDir(tmp_path / "run").cancelled.touch()
    assert begin(tmp_path / "run", machine, "102") is None
    assert f"rm {tmp_path}/run/cancelled" in capsys.readouterr().err


def test_a_finished_run_does_not_begin_again(tmp_path, machine, clock, capsys):
    attempt = begin(tmp_path / "run", machine)
    n_steps = finish(tmp_path / "run", clock)
    assert begin(tmp_path / "run", machine, "102") is None
    assert f"finished at step {n_steps}" in capsys.readouterr().err
    assert chain.end(attempt, 0, "", False) == 0


def test_another_recipe_in_the_same_folder_is_refused(tmp_path, machine):
    begin(tmp_path / "run", machine)
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {DEMO}\noptim: {{lr: 0.5}}\n")
    with pytest.raises(RunFolderError, match=r"optim\.lr"):
        begin(tmp_path / "run", machine, recipe=other)


def finish(run, clock):
    n_steps = load_plan(RunDir(run).plan).recipe.n_steps
    event(run, "finish", clock, step=n_steps)
    commit(run, n_steps)
    return n_steps


def ended(attempt):
    return json.loads((attempt / "end.json").read_text())


def test_an_attempt_stopped_by_its_deadline_says_where_its_time_went(tmp_path, machine, clock, capsys):
    run, t0_s = tmp_path / "run", clock.s
    attempt = begin(run, machine, end_time_s=t0_s + 140)
    clock.s = t0_s + 12
    event(run, "start", clock, attempt=1, step=0)
    clock.s = t0_s + 62
    row(run, 25, clock)
    clock.s = t0_s + 125
    row(run, 55, clock, stall_s=3.0)
    commit(run, 55)
    event(run, "stop", clock, step=55, signal="SIGXCPU")
    clock.s = t0_s + 132
    assert chain.end(attempt, 143, "", False) == 75
    record = ended(attempt)
    assert record["verdict"] == "next" and record["last_step"] == 55 and record["excluded"] == ""
    assert record["reason"].startswith("the wall time was nearly over")
    times = [record[k] for k in ("in_job_s", "startup_s", "training_s", "unused_s", "redone_steps")]
    assert times == [132, 12, 110, 8, 0]
    out, err = capsys.readouterr()
    assert out == "" and "2 min 12 s in the job, 110 s of it training, start-up 12 s, 8 s unused at the end" in err
    assert "wasted so far, in 1 attempt: 30 s of 2 min 20 s (21.4 %)" in err and "next: " in err


def test_a_stop_by_a_signal_leaves_no_time_unused(tmp_path, machine, clock):
    attempt = begin(tmp_path / "run", machine, end_time_s=clock.s + 3600)
    clock.s += 20
    event(tmp_path / "run", "stop", clock, step=5, signal="SIGUSR2")
    commit(tmp_path / "run", 5)
    assert chain.end(attempt, 143, "", False) == 75 and ended(attempt)["unused_s"] == 0


def test_steps_beyond_the_commit_are_redone_by_the_next_attempt_that_trains(tmp_path, machine, clock, capsys):
    run = tmp_path / "run"
    first = begin(run, machine)
    event(run, "start", clock, attempt=1, step=0)
    commit(run, 100)
    clock.s += 60
    row(run, 130, clock, step_time_s=0.5)
    assert chain.end(first, 137, "", False) == 75
    clock.s += 1000
    second = begin(run, machine, "102")
    clock.s += 10
    assert chain.end(second, 3, "n1", False) == 75 and ended(second)["redone_steps"] == 0, "it trained nothing"
    assert ended(second)["startup_s"] == 10
    clock.s += 1000
    third = begin(run, machine, "103")
    event(run, "start", clock, attempt=2, step=100)
    clock.s += 60
    row(run, 150, clock)
    commit(run, 150)
    capsys.readouterr()
    assert chain.end(third, 143, "", False) == 75 and ended(third)["redone_steps"] == 30
    err = capsys.readouterr().err
    assert "30 steps had to be redone" in err
    # 10 s of the second attempt and 30 steps of 0.5 s, of 60 + 10 + 60 s in jobs; the queue does not count.
    assert "in 3 attempts: 25 s of 2 min 10 s (19.2 %)" in err


def test_lost_nodes_are_left_out_of_the_next_jobs_for_good(tmp_path, machine, clock, capsys):
    run = tmp_path / "run"
    first = begin(run, machine, nodes="n[1-4]")
    assert chain.end(first, 137, "n2,n2,x9", False) == 75
    assert capsys.readouterr().out == "n2\n", "x9 is not of this job"
    clock.s += 100
    second = begin(run, machine, "102", nodes="n[1,3-5]")
    commit(run, 40)
    assert chain.end(second, 1, "n3", False) == 75
    assert capsys.readouterr().out == "n[2-3]\n" and ended(second)["excluded"] == "n[2-3]"
    clock.s += 100
    third = begin(run, machine, "103", nodes="n[1-5]")
    assert chain.end(third, 1, "n3", False) == 1, "n3 is no news, and nothing was saved"
    assert capsys.readouterr().out == "" and ended(third)["verdict"] == "stop"


def preflight(attempt, hosts, unfit):
    """The reports of two ranks on each host, as train/preflight.py leaves them."""
    for rank in range(2 * len(hosts)):
        host = hosts[rank // 2]
        faults = ["1 GPU of 2 is there"] if host in unfit else []
        report = {"rank": rank, "local_rank": rank % 2, "host": host, "ok": not faults, "faults": faults, "facts": {}}
        write_atomic(attempt / "preflight" / f"rank-{rank:05d}.json", json.dumps(report))


def test_nodes_that_failed_the_preflight_are_left_out(tmp_path, machine, capsys):
    attempt = begin(tmp_path / "run", machine)
    preflight(attempt, ["n1", "n2"], ["n2"])
    assert chain.end(attempt, 1, "", False) == 1, "it is asked only where the preflight said so"
    assert not (attempt / "preflight.json").exists()
    capsys.readouterr()
    assert chain.end(attempt, 5, "", False) == 75
    out, err = capsys.readouterr()
    assert out == "n2\n" and "1 GPU of 2 is there" in err and "1 of 2 nodes not fit: n2" in err
    assert json.loads((attempt / "preflight.json").read_text())["failing"] == "n2"


@pytest.mark.parametrize("code", (137, 139, 142))
def test_a_node_that_kills_its_ranks_in_the_preflight_is_left_out_too(tmp_path, machine, clock, capsys, code):
    attempt = begin(tmp_path / "run", machine)
    preflight(attempt, ["n1", "n2"], [])
    (attempt / "preflight" / "rank-00003.json").unlink()
    assert chain.end(attempt, code, "", True) == 143, "ranks that were told to end have no report either"
    assert chain.end(attempt, code, "", False) == 75
    assert capsys.readouterr().out == "n2\n" and "no report of rank 3" in ended(attempt)["reason"]
    event(tmp_path / "run", "start", clock, attempt=1, step=0)
    assert chain.end(attempt, code, "", False) == code, "it was killed in training: the preflight is no witness"


def test_where_no_node_is_fit_the_nodes_are_not_blamed(tmp_path, machine, capsys):
    attempt = begin(tmp_path / "run", machine)
    preflight(attempt, ["n1", "n2"], ["n1", "n2"])
    assert chain.end(attempt, 5, "", False) == 5, "or the whole machine would be left out, two nodes at a time"
    assert capsys.readouterr().out == "" and "none of the 2 nodes is fit" in ended(attempt)["reason"]


def test_a_single_unfit_node_is_left_out_and_the_second_ends_the_chain(tmp_path, machine, clock, capsys):
    first = begin(tmp_path / "run", machine, nodes="n1")
    preflight(first, ["n1"], ["n1"])
    assert chain.end(first, 5, "", False) == 75 and capsys.readouterr().out == "n1\n"
    clock.s += 100
    second = begin(tmp_path / "run", machine, "102", nodes="n2")
    preflight(second, ["n2"], ["n2"])
    assert chain.end(second, 5, "", False) == 5 and "n2: rank 0: 1 GPU of 2" in ended(second)["reason"]


def test_only_a_fault_of_this_attempt_counts(tmp_path, machine, clock):
    run = tmp_path / "run"
    begin(run, machine)
    event(run, "fault", clock, message="loss is nan at step 3; nothing of this state was saved")
    clock.s += 10
    second = begin(run, machine)
    event(run, "fault", clock, message="another rank went away")
    commit(run, 20)
    assert chain.end(second, 1, "", False) == 75
    event(run, "fault", clock, message="loss is nan at step 30; nothing of this state was saved")
    assert chain.end(second, 4, "", False) == 4 and "loss is nan at step 30" in ended(second)["reason"]


def test_a_cancelled_run_ends_with_143(tmp_path, machine):
    attempt = begin(tmp_path / "run", machine)
    commit(tmp_path / "run", 20)
    RunDir(tmp_path / "run").cancelled.touch()
    assert chain.end(attempt, 143, "n1", False) == 143 and ended(attempt)["verdict"] == "stop"


def test_a_folder_that_is_no_attempt_is_refused(tmp_path, machine):
    attempt = begin(tmp_path / "run", machine)
    with pytest.raises(RunFolderError, match=r"no job\.json"):
        chain.end(attempt.with_name("007"), 0, "", False)
    (attempt / "job.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"job\.json cannot be read"):
        chain.end(attempt, 0, "", False)


def test_a_run_that_began_without_slurm_has_attempts_too(tmp_path, clock):
    run = RunDir(tmp_path)
    write_atomic(run.attempt(1) / "command.sh", "mpirun\n")
    attempts = read_attempts(run)
    assert [(a.number, a.job, a.end) for a in attempts] == [(1, None, None)]
    assert account(attempts, 0, attempts[0].begin_s + 5).in_job_s == 5


def test_commits_are_found_without_torch_and_in_order(tmp_path):
    commit(tmp_path, 100)
    commit(tmp_path, 20)
    (tmp_path / "checkpoints" / "step-00000300.tmp").mkdir()
    (tmp_path / "checkpoints" / "step-00000300.tmp" / COMMIT).touch()
    assert committed_steps(tmp_path / "checkpoints") == [20, 100]
