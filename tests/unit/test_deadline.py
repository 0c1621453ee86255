"""When a run asks for a stop, on a clock that the test winds."""

import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from aifactory_train.faults.deadline import (
    EXIT_MARGIN_S,
    N_STEPS,
    SAVE_LATENCY_S,
    SAVE_SAFETY,
    Deadline,
    estimate_save_s,
    measured_saves_s,
    p95,
)
from aifactory_train.faults.signals import OUT_OF_TIME, build_interrupted

EPOCH_S = 1_790_000_000.0
NEVER = 10**9  # a save interval that no test reaches


class Clocks:
    """Wall clock and monotonic clock of a machine."""

    def __init__(self) -> None:
        self.up_s, self.wall_s = 5000.0, EPOCH_S

    def advance(self, seconds: float) -> None:
        self.up_s += seconds
        self.wall_s += seconds


class Job:
    """A deadline `left_s` ahead, and a training that asks it at each boundary."""

    def __init__(self, left_s: float | None, save_every: int = NEVER, first_save_s: float = 0.0, saves_s=()) -> None:
        self.clocks, self.step = Clocks(), 0
        end_time_s = None if left_s is None else EPOCH_S + left_s
        clocks = {"clock": lambda: self.clocks.wall_s, "monotonic": lambda: self.clocks.up_s}
        self.deadline = Deadline(end_time_s, save_every, first_save_s, saves_s, **clocks)

    def ask(self, under_way_s: float | None = None) -> bool:
        return self.deadline.is_near(self.step, under_way_s)

    def train(self, step_s: float, n_steps: int = 1, under_way_s: float | None = None) -> bool:
        """Steps of that many seconds; whether a stop was asked for after the last of them."""
        for _ in range(n_steps):
            self.clocks.advance(step_s)
            self.step += 1
            assert self.step < 10**6, "it never asks"
            near = self.ask(under_way_s)
        return near

    def lead_s(self, under_way_s: float | None = None) -> float:
        """The lead at this boundary."""
        self.ask(under_way_s)
        return self.deadline._lead(self.step, under_way_s).total_s


def test_a_job_without_an_end_is_never_stopped():
    job = Job(None, first_save_s=1e6)
    assert not job.ask() and not job.train(1e6, 50)
    assert job.deadline.remaining_s() is None and job.deadline.event_fields() == {}


def test_before_anything_is_measured_the_estimates_decide():
    for left_s, near in ((500.0, False), (2 * 7 + 100 * SAVE_SAFETY + EXIT_MARGIN_S + 0.1, False), (170.0, True)):
        job = Job(left_s, first_save_s=100.0)
        job.deadline.rehearsed(7.0)
        assert job.ask() is near, left_s


def test_an_end_that_has_passed_stops_before_the_first_step():
    assert Job(-5.0).ask() and Job(0.0).ask()


@pytest.mark.parametrize("step_s", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("save_s", [0.1, 20.0, 300.0])
def test_it_asks_at_the_last_boundary_from_which_two_steps_a_slow_save_and_leaving_fit(step_s, save_s):
    job = Job(2000.0, saves_s=[save_s])
    assert not job.ask()
    while not job.train(step_s):
        pass
    needed_s = 2 * step_s + save_s * SAVE_SAFETY + EXIT_MARGIN_S
    left_s = job.deadline.remaining_s()
    assert needed_s - step_s - 1e-6 <= left_s < needed_s + 1e-6, "not earlier by a step, not later at all"
    assert left_s - step_s - save_s * SAVE_SAFETY >= EXIT_MARGIN_S - 1e-6, "agreed a step later, the rest still fits"


def test_a_measured_save_replaces_the_estimate():
    job = Job(1000.0, first_save_s=900.0)
    assert job.ask()
    job.deadline.add_save(10.0)
    assert not job.ask()


def test_a_slow_save_lengthens_the_lead_and_is_forgotten_after_a_while():
    job = Job(1e6, saves_s=[10.0] * 5)
    usual_s = job.lead_s()
    job.deadline.add_save(100.0)
    assert job.lead_s() == pytest.approx(usual_s + 90 * SAVE_SAFETY)
    for _ in range(4):
        job.deadline.add_save(100.0)
    for _ in range(20):
        job.deadline.add_save(10.0)
    assert job.lead_s() == pytest.approx(usual_s)


def test_a_step_of_long_ago_is_forgotten_and_one_slow_step_of_many_is_no_rule():
    job = Job(1e6)
    job.ask()
    job.train(50.0)
    slow_s = job.deadline._lead(1, None).total_s
    assert slow_s == pytest.approx(100.0 + EXIT_MARGIN_S)
    job.train(1.0, 19)
    assert job.deadline._lead(1, None).total_s == pytest.approx(2.0 + EXIT_MARGIN_S), "1 of 20 is not the 95th"
    job.train(50.0, 10)
    job.train(1.0, N_STEPS)
    assert job.deadline._lead(1, None).total_s == pytest.approx(2.0 + EXIT_MARGIN_S)


def test_a_save_under_way_is_waited_for():
    job = Job(1e6, saves_s=[40.0])
    idle_s = job.lead_s()
    assert job.lead_s(under_way_s=0.0) == pytest.approx(idle_s + 40 * SAVE_SAFETY)
    assert job.lead_s(under_way_s=25.0) == pytest.approx(idle_s + 40 * SAVE_SAFETY - 25.0)


def test_a_save_under_way_that_takes_longer_than_any_before_is_a_measurement():
    job = Job(1e6, saves_s=[1.0])
    assert job.lead_s(under_way_s=200.0) >= 200 * SAVE_SAFETY + 200 * (SAVE_SAFETY - 1) + EXIT_MARGIN_S
    assert job.lead_s() < 20, "it is over: only its own seconds count from now on"


def test_a_save_that_begins_before_the_stop_is_counted():
    job = Job(1e6, save_every=10, saves_s=[40.0])
    leads_s = {}
    for step in range(25):
        job.step = step
        leads_s[step] = job.deadline._lead(step, None).total_s
    usual_s = leads_s[5]
    assert {s for s, lead_s in leads_s.items() if lead_s > usual_s} == {9, 10, 19, 20}, "none at step 0"
    assert leads_s[9] == leads_s[10] == pytest.approx(usual_s + 40 * SAVE_SAFETY)


@pytest.mark.parametrize("jump_s", [-86400.0, -3.0, 3.0, 86400.0])
def test_a_wall_clock_that_is_set_moves_nothing(jump_s):
    job = Job(1000.0)
    job.train(1.0, 10)
    before_s = job.deadline.remaining_s()
    job.clocks.wall_s += jump_s
    assert job.deadline.remaining_s() == before_s
    assert not job.train(1.0)
    while not job.train(1.0):
        pass
    assert EXIT_MARGIN_S + 1 <= job.deadline.remaining_s() < EXIT_MARGIN_S + 2


def test_steps_that_the_device_has_still_to_do_are_counted():
    """A host that runs ahead: 9 boundaries within a second, and a log line that waits for 10 steps of 5 s."""
    job = Job(1e6)
    job.ask()
    for _ in range(4):
        job.train(0.1, 9)
        job.train(49.1)
        job.deadline.synced(5.0)
    assert job.deadline._lead(40, None).total_s == pytest.approx(2 * 49.1 + EXIT_MARGIN_S, rel=1e-3)
    job.train(0.1, 9)
    assert job.deadline._lead(49, None).total_s == pytest.approx(2 * 49.1 + 9 * 4.9 + EXIT_MARGIN_S, rel=1e-3)


def test_between_rare_log_lines_a_step_is_taken_for_what_the_device_needs():
    job = Job(1e6)
    job.ask()
    job.train(0.001, 99)
    job.train(500.0)
    job.deadline.synced(5.0)
    assert job.deadline._lead(100, None).total_s == pytest.approx(2 * 5.0 + EXIT_MARGIN_S, rel=1e-3)


def test_every_small_job_ends_in_time():
    """Whatever steps and saves take, while they take what they took before: the commit is whole in time."""
    for left_s in (30.0, 47.5, 61.0, 100.0, 333.0):
        for step_s in (0.5, 1.0, 3.0, 7.0):
            for save_s in (0.2, 2.0, 11.0, 25.0):
                for save_every in (1, 2, 5, 1000):
                    assert _leaves_s_before_the_end(left_s, step_s, save_s, save_every) >= EXIT_MARGIN_S - 1e-6


def _leaves_s_before_the_end(left_s: float, step_s: float, save_s: float, save_every: int) -> float:
    """Seconds that are left when all is saved: training, with saves in the background, as train/loop.py does it."""
    job = Job(left_s, save_every, first_save_s=save_s)
    job.deadline.rehearsed(step_s)
    clocks, free_s = job.clocks, 0.0
    if job.ask():
        return EXIT_MARGIN_S
    agreed, asked = False, False
    while job.step < 10**4:
        clocks.advance(step_s)
        job.step += 1
        agreed = asked
        under_way_s = clocks.up_s - (free_s - save_s) if clocks.up_s < free_s else None
        asked = job.ask(under_way_s) or asked
        if agreed or job.step % save_every == 0:
            clocks.advance(max(0.0, free_s - clocks.up_s))
            if free_s:
                job.deadline.add_save(save_s)
            free_s = clocks.up_s + save_s
        if agreed:
            return job.deadline.remaining_s() - save_s
    raise AssertionError("it never asks")


@pytest.mark.parametrize(
    "samples, expected",
    [([], 0.0), ([3.0], 3.0), ([1.0, 9.0], 9.0), ([9.0] + [1.0] * 18, 9.0), ([9.0] + [1.0] * 19, 1.0)],
)
def test_p95_is_the_largest_of_few_and_the_19th_of_20(samples, expected):
    assert p95(samples) == expected


def test_an_unmeasured_save_is_estimated_from_bytes_cautiously():
    gib = 1024**3
    sizes = [estimate_save_s(n, 8) for n in (0, gib, 10 * gib, 60 * gib)]
    assert sizes[0] == SAVE_LATENCY_S and all(a < b for a, b in pairwise(sizes))
    assert estimate_save_s(6e9, 16) == pytest.approx(SAVE_LATENCY_S + 6 + 60), "16 ranks of 100 MB/s each"
    assert estimate_save_s(1e9, 1000) > 500, "a thousand ranks share the file system"


def test_saves_of_earlier_attempts_count_where_as_many_ranks_wrote():
    events = [
        {"event": "commit", "seconds": 99.0},
        {"event": "start", "world_size": 4},
        {"event": "commit", "seconds": 1.0},
        {"event": "stop"},
        {"event": "start", "world_size": 8},
        {"event": "commit", "seconds": 2.0},
        {"event": "start", "world_size": 4},
        {"event": "commit", "seconds": 3},
    ]
    assert measured_saves_s(events, 4) == [1.0, 3.0]
    assert measured_saves_s(events, 2) == [] == measured_saves_s([], 4)


def test_the_message_says_how_early_and_why():
    job = Job(130.0, saves_s=[60.0])
    job.deadline.rehearsed(2.0)
    job.ask()
    while not job.train(2.0):
        pass
    job.clocks.advance(2.0 + 60.0)
    error = build_interrupted(OUT_OF_TIME, 7, True, job.deadline, Path("run/checkpoints"))
    left_s = job.deadline.remaining_s()
    assert error.exit_code == 143 and error.on_every_rank
    assert error.what.startswith(f"stopped {left_s:.0f} s before the time limit after step 7; everything is saved")
    assert "lead:  109 s for two steps of 2 s, a save of 60 s (p95), and leaving" in error.what
    assert "XCPU" not in error.render()
    fields = job.deadline.event_fields()
    assert fields == {"left_s": left_s, "lead_s": 109.0, "save_p95_s": 60.0, "step_p95_s": 2.0}


def test_a_job_too_short_for_one_step_says_so():
    job = Job(10.0, first_save_s=8.0)
    assert job.ask()
    error = build_interrupted(OUT_OF_TIME, 40, False, job.deadline, Path("c"))
    assert "stopped 10 s before the time limit, before the first step; nothing is new to save" in error.what
    assert "(estimated)" in error.what and "--time" in error.do
    late = Job(-10.0)
    late.ask()
    assert "stopped 10 s after the time limit" in build_interrupted(OUT_OF_TIME, 1, True, late.deadline, Path("c")).what


def test_a_signal_is_named_and_other_ranks_have_a_message_too():
    asked = build_interrupted(signal.SIGTERM, 7, True, Job(None).deadline, Path("c"))
    assert asked.what == "stopped by SIGTERM after step 7; everything up to there is saved"
    assert "before its first step" in build_interrupted(signal.SIGUSR2, 0, False, Job(None).deadline, Path("c")).what
    assert "before the time limit" in build_interrupted(OUT_OF_TIME, 7, True, Job(None).deadline, Path("c")).what


def test_the_deadline_needs_no_torch():
    program = "import sys, aifactory_train.faults.deadline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
