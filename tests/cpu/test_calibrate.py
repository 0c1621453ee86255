"""The loop is closed: a plan, its run on this machine, what was measured, and a better plan."""

import json
import math

from aifactory_train.rundir import RunDir
from training_runs import aifactory, aifactory_here, assert_refused, launched, write_recipe


def ok(*args):
    """What a verb prints."""
    done = aifactory_here(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def predicted(run):
    return json.loads(RunDir(run).plan.read_text())["predicted"]


def measured_s(run):
    ok("report", run)
    return json.loads(RunDir(run).result.read_text())["step_time_s"]["measured"]


def test_a_run_corrects_the_plans_of_its_machine(words, tmp_path):
    here, better = tmp_path / "here.yaml", tmp_path / "better.yaml"
    recipe = write_recipe(tmp_path, **words)
    assert aifactory("probe", "--out", here).returncode == 0
    launched(recipe, tmp_path / "first", 1, "--machine", here)
    first_s = measured_s(tmp_path / "first")
    told = ok("calibrate", here, tmp_path / "first", "--out", better)
    assert "step_time_ratio.fp32" in told and "checkpoint_bytes_per_s" in told and f"--machine {better}" in told
    ok("machines", "check", better)

    explained = ok("plan", recipe, "--machine", better, "--run", tmp_path / "planned", "--explain")
    assert "as measured in 1 fp32 run" in explained
    # The same work again, so the plan gives back what was measured. Other work is as good as the model of the step.
    corrected = predicted(tmp_path / "planned")
    assert math.isclose(corrected["total_step_time_s"], first_s, rel_tol=1e-6)
    assert corrected["step_time_low_s"] < first_s < corrected["step_time_high_s"]
    assert math.isclose(corrected["step_time_low_s"], 0.9 * first_s, rel_tol=1e-6), "the range that is stated: a tenth"
    assert predicted(tmp_path / "first")["step_time_low_s"] is None, "nothing was known of the first plan's range"


def test_what_is_no_result_of_this_machine_is_refused_on_the_command_line(tmp_path):
    assert_refused(aifactory("calibrate", "lumi-g", tmp_path, "--out", tmp_path / "out.yaml"), "no result here")
    assert not (tmp_path / "out.yaml").exists()
