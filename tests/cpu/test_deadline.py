"""A job that is about to run out of time: real ranks, a real clock."""

import time

from aifactory_train.checkpoint.manager import committed_steps
from aifactory_train.faults.deadline import EXIT_MARGIN_S, SAVE_LATENCY_S, SAVE_SAFETY
from aifactory_train.results.record import read_metrics
from aifactory_train.rundir import RunDir, read_jsonl
from training_runs import aifactory, launched, write_recipe

EXACT = ("step", "tokens", "loss", "grad_norm", "lr")
N_STEPS = 100


def curve(rows):
    return [tuple(row[name] for name in EXACT) for row in rows]


def launch_until(end_time_s: float, recipe, run: RunDir) -> tuple[dict, str]:
    """A job that must end by itself before that time: its stop event and its output."""
    done = aifactory("launch", recipe, "--run", run.root, "--cpu-ranks", 2, SLURM_JOB_END_TIME=f"{end_time_s:.3f}")
    left_s = end_time_s - time.time()
    assert done.returncode == 143 and "Traceback" not in done.stdout, done.stdout + done.stderr
    stop = read_jsonl(run.events)[-1]
    print(f"left {left_s:.1f} s before the end, of which {EXIT_MARGIN_S:.0f} s are for the batch script: {stop}")
    assert (stop["event"], stop["signal"]) == ("stop", "SIGXCPU") and "XCPU" not in done.stdout
    return stop, done.stdout


def test_a_run_stops_itself_before_its_job_ends_and_goes_on_bit_for_bit(words, tmp_path):
    # Steps of some tenths of a second, so that the run is longer than the jobs whatever else this machine does.
    big = {"train__global_batch_tokens": 1 << 14, "train__budget_tokens": N_STEPS << 14}
    recipe = write_recipe(tmp_path, **words, **big, checkpoint__every_steps=20)
    t0_s = time.time()
    whole = launched(recipe, tmp_path / "whole", 2)
    start = next(e for e in read_jsonl(RunDir(tmp_path / "whole").events) if e["event"] == "start")
    start_up_s, train_s = start["time_s"] - t0_s, whole[-1]["time_s"] - start["time_s"]
    assert t0_s < start["time_s"] < whole[0]["time_s"], "when the first step was done can be told"

    run, done_steps = RunDir(tmp_path / "run"), 0
    # The first job has no save measured yet, the second has that of the first.
    for save_s in (SAVE_LATENCY_S, 0.0):
        end_time_s = time.time() + 1.5 * start_up_s + EXIT_MARGIN_S + SAVE_SAFETY * save_s + train_s / 4
        stop, output = launch_until(end_time_s, recipe, run)
        assert done_steps < stop["step"] < N_STEPS, "it got somewhere"
        done_steps = stop["step"]
        assert committed_steps(run.checkpoints)[-1] == done_steps == read_metrics(run)[-1]["step"]
        assert f"the time limit after step {done_steps}; everything is saved\n  lead: " in output, output
        assert 0 < stop["left_s"] <= stop["lead_s"], "what was left is what the lead was for"
        assert (stop["save_p95_s"] >= SAVE_LATENCY_S) == (save_s > 0), "measured where it could be"
        # At most the saves of two steps, the last one, and the one in the background.
        assert stop["lead_s"] < EXIT_MARGIN_S + 4 * SAVE_SAFETY * stop["save_p95_s"] + 3 * stop["step_p95_s"]

    # A job without time for a single step leaves as it came.
    before = committed_steps(run.checkpoints), read_metrics(run)
    stop, output = launch_until(time.time() + 5, recipe, run)
    assert "before the first step; nothing is new to save" in output and "--time" in output, output
    assert stop["step"] == done_steps and (committed_steps(run.checkpoints), read_metrics(run)) == before

    launched(recipe, run.root, 2)
    assert curve(read_metrics(run)) == curve(whole)
    assert read_jsonl(run.events)[-1]["event"] == "finish"
