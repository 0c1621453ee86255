import json
import subprocess

import pytest

from aifactory_train.errors import PlanError, RunFolderError
from aifactory_train.results.provenance import diff_sha256, git_sha, provenance
from aifactory_train.results.record import Result, build_result, quantile, read_metrics, write_result
from aifactory_train.rundir import RunDir, write_atomic
from results_run import ENTROPY_NATS, ORIGIN, a_plan, a_run, event, line, start


def an_unstarted_run(tmp_path):
    run = RunDir(tmp_path)
    write_atomic(run.plan, a_plan().to_json())
    return run


def test_rows_beyond_the_step_from_which_a_newer_attempt_resumed_do_not_count(tmp_path):
    run = an_unstarted_run(tmp_path)
    start(run)
    for step in (1, 10, 20, 30):
        line(run, step, attempt=1)
    start(run, attempt=2, step=20, at_s=50)
    line(run, 40, attempt=2)
    assert [(r["step"], r["attempt"]) for r in read_metrics(run)] == [(1, 1), (10, 1), (20, 1), (40, 2)]


def test_of_a_step_that_two_attempts_logged_the_newer_counts(tmp_path):
    run = an_unstarted_run(tmp_path)
    start(run)
    line(run, 20, attempt=1, loss=9.0)
    start(run, attempt=2, step=20, at_s=50)
    line(run, 20, attempt=2, loss=3.0)
    assert [r["loss"] for r in read_metrics(run)] == [3.0]


def test_an_attempt_that_began_afresh_puts_all_older_rows_aside(tmp_path):
    run = an_unstarted_run(tmp_path)
    start(run)
    line(run, 10, attempt=1)
    start(run, attempt=2, step=0, at_s=50)
    line(run, 5, attempt=2)
    assert [r["step"] for r in read_metrics(run)] == [5]


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path):
    run = a_run(tmp_path, [1, 10, 20])
    with open(run.metrics, "a") as f:
        f.write('{"step": 30, "lo')
    assert [r["step"] for r in read_metrics(run)] == [1, 10, 20]


def test_a_result_states_the_steady_rates_and_both_ends_of_the_loss(tmp_path):
    run = an_unstarted_run(tmp_path)
    start(run)
    for step, rate in ((1, 1.0), (10, 100.0), (20, 300.0), (30, 200.0)):
        line(run, step, tokens_per_s=rate, step_time_s=1 / rate, loss=float(40 - step), at_s=step)
    result = build_result(run)
    assert result.tokens_per_s.measured == 200.0, "the first line, with its warm-up, must not count"
    assert result.tokens_per_s.predicted == a_plan().predicted.tokens_per_s
    assert result.step_time_s.measured == 1 / 200
    assert result.loss_first_nats == 39.0 and result.first_step == 1
    assert (result.loss_final_nats, result.loss_final_from_step) == (10.0, 21)
    assert result.unigram_entropy_nats == ENTROPY_NATS
    assert result.tokens == 30 * 4096 and result.steady_lines == 3
    assert result.mfu_frac.measured is None


def test_the_final_loss_is_the_mean_of_the_last_tenth_of_the_lines(tmp_path):
    run = an_unstarted_run(tmp_path)
    start(run)
    for step in range(1, 31):
        line(run, step, loss=float(step))
    result = build_result(run)
    assert (result.loss_final_nats, result.loss_final_from_step) == (29.0, 28)


def test_the_first_line_of_each_attempt_is_not_steady(tmp_path):
    run = a_run(tmp_path, range(10, 210, 10), resumed_from=100)
    assert build_result(run).steady_lines == 20 - 2


def test_one_line_is_enough_for_a_result(tmp_path):
    result = build_result(a_run(tmp_path, [1]))
    assert result.steady_lines == 0 and result.tokens_per_s.measured > 0


def test_the_time_between_attempts_is_not_wall_time(tmp_path):
    run = an_unstarted_run(tmp_path)
    start(run, at_s=0)
    line(run, 10, at_s=100)
    event(run, "attempt", 4990, number=2, job_id="102")
    start(run, attempt=2, step=10, at_s=5000)
    line(run, 20, attempt=2, at_s=5030)
    event(run, "finish", 5040, step=20, wall_s=40)
    assert build_result(run).wall_time_s == pytest.approx(140)


def test_a_result_reads_back_equal_from_its_file(tmp_path):
    run = a_run(tmp_path, range(10, 250, 10), resumed_from=100)
    result = write_result(run)
    assert Result.model_validate_json(run.result.read_text()) == result
    assert json.loads(run.result.read_text())["tokens_per_s"]["predicted"] > 0
    assert [a.from_step for a in result.attempts] == [0, 100] and result.finished


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"provenance": {**ORIGIN, "git_sha": None}}, "git sha"),
        ({"provenance": {**ORIGIN, "versions": {}}}, "versions"),
        ({"provenance": None}, "git sha, versions"),
        ({"hosts": []}, "node list"),
    ],
)
def test_a_result_without_provenance_is_refused(tmp_path, changes, named):
    run = an_unstarted_run(tmp_path)
    start(run, **changes)
    line(run, 1)
    with pytest.raises(RunFolderError, match=f"no result without {named}") as caught:
        build_result(run)
    assert caught.value.exit_code == 2


def test_a_result_without_a_start_event_is_refused(tmp_path):
    run = an_unstarted_run(tmp_path)
    line(run, 1)
    with pytest.raises(RunFolderError, match="node list"):
        build_result(run)


def test_a_result_without_metrics_or_without_a_plan_is_refused(tmp_path):
    run = an_unstarted_run(tmp_path)
    start(run)
    with pytest.raises(RunFolderError, match="no metrics"):
        build_result(run)
    with pytest.raises(PlanError, match="cannot read the plan"):
        build_result(RunDir(tmp_path / "elsewhere"))


def test_quantiles_lie_between_the_nearest_values():
    assert quantile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5
    assert quantile([1.0], 0.95) == 1.0 and quantile([1.0, 2.0], 1.0) == 2.0


def test_provenance_tells_versions_and_the_host_without_torch():
    here = provenance()
    assert here["versions"]["torch"][0].isdigit() and here["versions"]["python"].startswith("3.")
    assert here["hostname"] and here["cpu"] and here["platform"]


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_the_checkout_and_says_when_the_code_was_changed(tmp_path):
    package = tmp_path / "aifactory_train"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    (tmp_path / "README.md").write_text("1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    sha = git_sha(package)
    assert len(sha) == 40
    (tmp_path / "README.md").write_text("2\n")
    assert git_sha(package) == sha and diff_sha256(package) is None
    sums = []
    for text in (b"2\n", b"3\xff\n", b"2\n"):
        (package / "a.py").write_bytes(text)
        assert git_sha(package) == f"{sha}+dirty"
        sums.append(diff_sha256(package))
    assert sums[0] == sums[2] != sums[1] and len(sums[0]) == 64
    git(tmp_path, "checkout", "--", "aifactory_train")
    for text in ("3\n", "4\n"):
        (package / "new.py").write_text(text)
        assert git_sha(package) == f"{sha}+dirty"
        sums.append(diff_sha256(package))
    assert len(set(sums)) == 4


def test_an_installed_wheel_tells_the_commit_it_was_built_from_and_not_that_of_a_repository_around_it(tmp_path):
    package = tmp_path / "venv" / "aifactory_train"
    package.mkdir(parents=True)
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "not ours")
    assert git_sha(package) is None and diff_sha256(package) is None
    (package / "_commit.txt").write_text("abc123\n")
    assert git_sha(package) == "abc123"
