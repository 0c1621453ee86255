"""What follows an attempt: done, the next job, or stop."""

import pytest

from aifactory_train.launch.chain import Outcome, decide


def outcome(**changes):
    usual = {
        "exit_code": 143, "finished": False, "cancelled": False, "terminated": False, "left_s": 3000.0,
        "first_step": 100, "last_step": 100, "n_steps": 300, "fault": "", "newly_bad": [],
        "log": "attempts/002/log.txt",
    }  # fmt: skip
    return Outcome(**{**usual, **changes})


def decided(**changes):
    decision = decide(outcome(**changes))
    return decision.verdict, decision.code


FAILURES = (1, 3, 4, 5, 134, 137, 139, 255)


def test_a_finished_run_is_done_whatever_else_happened():
    assert decided(exit_code=0, finished=True, last_step=300) == ("done", 0)
    assert decided(exit_code=0, finished=True, cancelled=True, terminated=True) == ("done", 0)
    late = decide(outcome(exit_code=139, finished=True, last_step=300))
    assert (late.verdict, late.code) == ("done", 0), "another job would find nothing to train"
    assert "afterwards the ranks were ended by SIGSEGV" in late.reason


@pytest.mark.parametrize("code", (0, 143, *FAILURES))
def test_progress_goes_on_in_the_next_job_however_the_ranks_ended(code):
    assert decided(exit_code=code, last_step=120) == ("next", 75)


@pytest.mark.parametrize("code", (143, *FAILURES))
def test_no_progress_stops_with_the_ranks_own_code_and_what_to_look_at(code):
    decision = decide(outcome(exit_code=code))
    assert (decision.verdict, decision.code) == ("stop", code)
    assert decision.reason.startswith("no progress: ") and "attempts/002/log.txt" in decision.reason
    assert "launch again" in decision.reason and "step 100 of 300 is saved" in decision.reason


def test_ranks_that_ran_out_of_time_were_not_told_to_stop():
    reason = decide(outcome(last_step=120, out_of_time=True)).reason
    assert reason.startswith("the wall time was nearly over") and "told to stop" not in reason
    assert "told to stop" in decide(outcome(last_step=120)).reason
    assert decide(outcome(exit_code=139, last_step=120, out_of_time=True)).reason.startswith("the ranks were ended by")


def test_ranks_that_ended_well_and_early_without_progress_do_not_pass_for_success():
    assert decided(exit_code=0) == ("stop", 1)
    assert decided(exit_code=75) == ("stop", 1), "the batch script would submit the next job"
    assert decided(exit_code=0, finished=False, first_step=0, last_step=0) == ("stop", 1)


@pytest.mark.parametrize("code", FAILURES)
def test_a_node_newly_found_bad_is_worth_another_try(code):
    decision = decide(outcome(exit_code=code, newly_bad=["n3", "n4"]))
    assert (decision.verdict, decision.code) == ("next", 75) and "without n[3-4]" in decision.reason


def test_a_job_that_breaks_its_nodes_does_not_go_through_the_whole_machine():
    assert decided(exit_code=137, newly_bad=["n9"], in_vain=3) == ("next", 75)
    decision = decide(outcome(exit_code=137, newly_bad=["n9"], in_vain=4))
    assert (decision.verdict, decision.code) == ("stop", 137) and "4 attempts before it" in decision.reason
    assert decided(exit_code=137, newly_bad=["n9"], in_vain=9, last_step=120) == ("next", 75), "it saved something"


def test_both_progress_and_a_bad_node_are_told():
    reason = decide(outcome(exit_code=137, last_step=120, newly_bad=["n3"])).reason
    assert "SIGKILL" in reason and "step 120 of 300 is saved" in reason and "without n3" in reason


@pytest.mark.parametrize("changes", [{}, {"last_step": 200}, {"newly_bad": ["n1"]}, {"terminated": True}])
def test_a_mistake_of_the_user_stops(changes):
    assert decided(exit_code=2, **changes) == ("stop", 2)


@pytest.mark.parametrize("fault", ["loss is nan at step 150", "grad_norm is inf at step 150"])
@pytest.mark.parametrize("changes", [{}, {"last_step": 200}, {"newly_bad": ["n1"]}, {"exit_code": 137}])
def test_a_loss_that_is_no_number_stops_although_there_was_progress(fault, changes):
    decision = decide(outcome(**{"exit_code": 4, "fault": fault, **changes}))
    assert decision.verdict == "stop" and decision.code in (4, 137)
    assert fault in decision.reason and "optim.lr" in decision.reason


def test_another_fault_with_progress_goes_on_and_its_words_are_kept():
    decision = decide(outcome(exit_code=4, last_step=120, fault="another rank went away: the loss is gone"))
    assert decision.verdict == "next" and "another rank went away" in decision.reason


@pytest.mark.parametrize("code", (0, 143, *FAILURES))
def test_a_cancelled_run_stops_with_143(code):
    decision = decide(outcome(exit_code=code, cancelled=True, last_step=120, newly_bad=["n1"]))
    assert (decision.verdict, decision.code) == ("stop", 143) and "cancelled" in decision.reason


@pytest.mark.parametrize(("left_s", "verdict"), [(None, "stop"), (61.0, "stop"), (60.0, "next"), (-5.0, "next")])
def test_a_job_that_is_ended_long_before_its_limit_was_ended_by_somebody(left_s, verdict):
    decision = decide(outcome(terminated=True, left_s=left_s, last_step=120))
    assert decision.verdict == verdict and decision.code == (143 if verdict == "stop" else 75)
