"""When the discarded calls end, when there are enough samples, and that all ranks make the same number of calls."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, repeat
from typing import NamedTuple

import pytest
import torch

from aifactory_train.measure import timing
from aifactory_train.measure.control import Control
from aifactory_train.measure.timing import Limits, sample, warm_up
from control_threads import run_ranks

CPU = torch.device("cpu")
LIMITS = Limits(soak_s=0.0, budget_s=30.0)


def script(monkeypatch: pytest.MonkeyPatch, times_s: Iterator[float]) -> None:
    """Calls take these times, without waiting for them."""
    monkeypatch.setattr(timing, "time_calls", lambda work, device, before, n: [next(times_s) for _ in range(n)])


class Clock:
    """In place of time.monotonic."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Samples(NamedTuple):
    seconds: list[float]
    warmup_steps: int
    steady: bool
    ci_reached: bool


def measure(work: timing.Work, limits: Limits, control: Control, timeout_s: float = 300.0) -> Samples:
    """As a program does it: warm up, then sample."""
    warmed = warm_up(work, CPU, limits, control, None, timeout_s)
    seconds, ci_reached = sample(work, CPU, limits, control, None, warmed, timeout_s)
    return Samples(seconds, warmed.calls, warmed.steady, ci_reached)


def measured(limits: Limits = LIMITS) -> Samples:
    return measure(lambda: None, limits, Control())


def test_calls_are_discarded_until_two_windows_agree(monkeypatch):
    script(monkeypatch, chain(repeat(9.0, 10), repeat(2.0, 10), repeat(1.0)))
    samples = measured()
    assert (samples.steady, samples.warmup_steps) == (True, 40)
    assert samples.seconds == [1.0] * 50 and samples.ci_reached


def test_what_never_gets_steady_is_sampled_all_the_same_and_says_so(monkeypatch):
    script(monkeypatch, (1.1 ** min(n, 200) for n in count()))
    samples = measured()
    assert (samples.steady, samples.warmup_steps) == (False, 100)
    assert len(samples.seconds) >= 50


def test_samples_are_taken_until_their_interval_is_narrow(monkeypatch):
    script(monkeypatch, chain(repeat(1.0, 20), (1.0 + 0.618034 * n % 1 for n in count())))
    monkeypatch.setattr(timing, "CHUNK_CALLS", 20)
    wide = measured(Limits(soak_s=0.0, budget_s=0.2, ci_half_width_frac=1e-9))
    assert not wide.ci_reached and len(wide.seconds) > 50
    script(monkeypatch, repeat(1.0))
    assert len(measured().seconds) == 60, "no chunk of 20 more than the 50 that are asked for"


def test_a_spent_budget_leaves_enough_samples_for_an_interval():
    calls = []
    samples = measure(lambda: calls.append(1), Limits(soak_s=0.0, budget_s=0.0), Control())
    assert len(samples.seconds) >= timing.FEWEST_SAMPLES
    assert len(calls) == samples.warmup_steps + len(samples.seconds)


def test_the_soak_lasts_as_long_as_asked_for_and_is_not_tested_for_being_steady():
    samples = measure(lambda: None, Limits(soak_s=0.3, budget_s=0.1), Control())
    assert samples.warmup_steps > 100


def test_what_runs_before_a_call_is_not_in_its_time():
    order = []
    times_s = timing.time_calls(lambda: order.append("work"), CPU, lambda: order.append("before"), 2)
    assert order == ["before", "work"] * 2 and len(times_s) == 2


def test_a_window_is_as_long_as_an_energy_counter_needs(monkeypatch):
    clock_s = count(step=0.5)
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(clock_s))
    script(monkeypatch, repeat(1.0))
    monkeypatch.setattr(timing, "CHUNK_CALLS", 10)
    short = len(measured(Limits(soak_s=0.0, budget_s=100.0)).seconds)
    assert len(measured(Limits(soak_s=0.0, budget_s=100.0, min_window_s=50.0)).seconds) > short


def test_all_ranks_make_as_many_calls_as_rank_0_decides(monkeypatch):
    def work_of(control: Control) -> tuple[int, int, bool]:
        limits = Limits(soak_s=0.0, budget_s=0.2)
        samples = measure(lambda: None, limits, control, timeout_s=20.0)
        return samples.warmup_steps, len(samples.seconds), samples.steady

    first, second = run_ranks(2, work_of)
    assert first == second


def test_a_budget_holds_four_windows_whatever_is_around_the_work(monkeypatch):
    monkeypatch.setattr(timing.time, "monotonic", clock := Clock())

    def time_calls(work, device, before, n):
        clock.now_s += n * 0.01
        return [1e-5] * n

    monkeypatch.setattr(timing, "time_calls", time_calls)
    assert measured(Limits(soak_s=0.0, budget_s=2.0)).warmup_steps == 10 + 2 * 50


def test_two_windows_get_the_budget_twice():
    limits = Limits(soak_s=0.0, budget_s=1.0)
    assert not limits.is_spent(1.5, windows=1.9) and limits.is_spent(1.5, windows=2.0)
    assert limits.is_spent(2.1, windows=1.9) and limits.is_spent(0.1, windows=limits.max_windows)


def test_windows_of_short_calls_last_a_tenth_of_a_second(monkeypatch):
    script(monkeypatch, repeat(1e-3))
    assert measured().warmup_steps == 10 + 200
    script(monkeypatch, repeat(1e-6))
    assert measured().warmup_steps == 10 + 2 * timing.CHUNK_CALLS
