"""Timing of one piece of work: calls that are discarded, then samples until their median is known well enough.

With several ranks the work may be a collective, so all make the same number of calls: between chunks of calls rank 0
looks at the slowest rank of each call and decides for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aifactory_train.bench.statistics import median_interval, steady_from
from aifactory_train.measure.control import Control

Work = Callable[[], object]

# The smallest number of samples whose median has a 95 % interval by order statistics.
FEWEST_SAMPLES = 6
# More than the last-level caches of today's devices and sockets.
FLUSH_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# A chunk on a device is queued as a whole; so long it may take until the ranks speak again.
CHUNK_S = 2.0
CHUNK_CALLS = 1000


@dataclass(frozen=True)
class Limits:
    """How long to warm up and to measure.

    At least `min_warmup` calls and `soak_s` of them are discarded, then more until the medians of two successive
    windows differ by less than `change_frac`, `max_windows` at most. A window has `window` calls, and of short ones as
    many as fill `window_s`: the median of ten calls of microseconds changes by more than that for ever. Samples are
    taken until there are `min_samples` over `min_window_s`, and half of the 95 % interval of the median is below
    `ci_half_width_frac` of it, or `budget_s` are over.
    The budget holds for the samples, and once more for the calls after the soak that are discarded; where it is over
    before there are two windows, these get it a second time.
    """

    soak_s: float
    budget_s: float
    min_window_s: float = 0.0
    min_warmup: int = 10
    window: int = 10
    window_s: float = 0.1
    change_frac: float = 0.01
    max_windows: int = 10
    min_samples: int = 50
    ci_half_width_frac: float = 0.01

    def warmup_rule(self) -> str:
        """In words, for the record."""
        return (
            f"at least {self.min_warmup} calls and {self.soak_s:g} s; then until the medians of two successive windows "
            f"of {self.window} calls, or of {self.window_s:g} s where that is more, differ by less than "
            f"{self.change_frac:.1%}, {self.max_windows} windows or {self.budget_s:g} s at most, "
            f"{2 * self.budget_s:g} s for the first two"
        )

    def window_calls(self, work_s: float, call_s: float) -> int:
        """Calls of a window, where the work of one takes `work_s`, and `call_s` with all that is around it.

        What is around it, a flush of the caches say, may take far longer: four windows shall fit into the budget.
        """
        fill, room = self.window_s / max(work_s, 1e-9), self.budget_s / 4 / max(call_s, 1e-9)
        return max(self.window, min(CHUNK_CALLS, int(fill), int(room)))

    def is_spent(self, seconds: float, windows: float) -> bool:
        """Whether no more calls are discarded: after so many seconds and windows."""
        budget_s = self.budget_s if windows >= 2 else 2 * self.budget_s
        return seconds > budget_s or windows >= self.max_windows


@dataclass(frozen=True)
class WarmUp:
    """calls: discarded ones. steady: two windows agreed. call_s: what a call takes with all that is around it."""

    calls: int
    steady: bool
    call_s: float


def warm_up(
    work: Work, device: torch.device, limits: Limits, control: Control, before: Work | None, timeout_s: float
) -> WarmUp:
    """Discarded calls, by the rule of `limits`."""
    begin_s = time.monotonic()
    series: list[float] = []  # of the slowest rank, on rank 0
    tested_from = window = 0
    n_calls, steady, more = 0, False, limits.min_warmup
    soaked_s = None if limits.soak_s else begin_s
    call_s = 0.0
    while more:
        chunk_s = time.monotonic()
        chunk = time_calls(work, device, before, more)
        n_calls += more
        slowest = _slowest(control.gather(chunk, timeout_s))
        if control.rank == 0:
            series += slowest
            now_s = time.monotonic()
            call_s = (now_s - chunk_s) / more
            if soaked_s is None and now_s - begin_s >= limits.soak_s:
                soaked_s, tested_from = now_s, len(series) - more
            if soaked_s is None:
                more = _chunk_calls(call_s, limits.soak_s - (now_s - begin_s))
            else:
                tail, window = series[tested_from:], window or limits.window_calls(statistics.median(slowest), call_s)
                steady = steady_from(tail, window, limits.change_frac) is not None
                more = 0 if steady or limits.is_spent(now_s - soaked_s, len(tail) / window) else window
        more, steady, call_s = control.broadcast([more, steady, call_s], timeout_s)
    return WarmUp(n_calls, steady, call_s)


def sample(
    work: Work,
    device: torch.device,
    limits: Limits,
    control: Control,
    before: Work | None,
    warmed: WarmUp,
    timeout_s: float,
) -> tuple[list[float], bool]:
    """Seconds of each call on this rank, and whether the interval of the slowest rank's median got narrow enough."""
    begin_s = time.monotonic()
    own: list[float] = []
    series: list[float] = []
    reached = False
    more = _first_chunk(warmed.call_s, limits)
    while more:
        chunk_s = time.monotonic()
        chunk = time_calls(work, device, before, more)
        own += chunk
        slowest = _slowest(control.gather(chunk, timeout_s))
        if control.rank == 0:
            series += slowest
            reached = len(series) >= limits.min_samples and _is_narrow(series, limits.ci_half_width_frac)
            now_s = time.monotonic()
            left_s = limits.budget_s - (now_s - begin_s)
            enough = reached and now_s - begin_s >= limits.min_window_s
            more = 0 if enough or left_s <= 0 else _chunk_calls((now_s - chunk_s) / more, left_s)
            if not reached and len(series) < FEWEST_SAMPLES:
                more = max(more, FEWEST_SAMPLES - len(series))
        more, reached = control.broadcast([more, reached], timeout_s)
    return own, reached


def time_calls(work: Work, device: torch.device, before: Work | None, n: int) -> list[float]:
    """Seconds of each of `n` calls: between events of the device where it has them, else by the clock of the host."""
    if device.type == "cuda":
        return _time_on_device(work, device, before, n)
    seconds = []
    for _ in range(n):
        if before is not None:
            before()
        t0_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - t0_s)
    return seconds


def build_cache_flush(device: torch.device) -> Work:
    """A call that leaves none of a benchmark's data in the caches: it writes more memory than they hold."""
    scratch = torch.empty(FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
    return scratch.zero_


def _time_on_device(work: Work, device: torch.device, before: Work | None, n: int) -> list[float]:
    """Calls are queued without waiting, so that the device does not idle between them."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for start, end in events:
        if before is not None:
            before()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _slowest(by_rank: list[list[float]] | None) -> list[float]:
    """Of each call the longest time over the ranks; nothing where there is nothing to look at."""
    return [] if by_rank is None else [max(times) for times in zip(*by_rank, strict=True)]


def _is_narrow(series: list[float], half_width_frac: float) -> bool:
    interval = median_interval(series)
    return interval is not None and (interval[1] - interval[0]) / 2 <= half_width_frac * statistics.median(series)


def _chunk_calls(call_s: float, room_s: float) -> int:
    """As many calls as fit into the room that is left, and at most into CHUNK_S."""
    return max(1, min(CHUNK_CALLS, int(min(room_s, CHUNK_S) / max(call_s, 1e-9))))


def _first_chunk(call_s: float, limits: Limits) -> int:
    fitting = _chunk_calls(call_s, limits.budget_s)
    return min(limits.min_samples, max(FEWEST_SAMPLES, fitting))
