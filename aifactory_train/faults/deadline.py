"""When to ask for a stop so that the last save is whole before the job's time is up. Needs no torch.

The lead is computed from what was measured, never fixed. It is the sum of
    the rest of the save that is under way: the next one waits for it
    the saves that begin before the stop, and the last one, each p95 * SAVE_SAFETY
    two steps: the next question comes one step later, and the ranks agree one step after it
    what the device has still to do of the steps that the host has handed to it
    EXIT_MARGIN_S
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aifactory_train.units import format_seconds

# The last save is one more draw from a shared file system: this much slower than 19 of 20 before it. A save that
# is cut off costs all steps since the last commit on every device, this factor half a save.
SAVE_SAFETY = 1.5
# After the commit: sinks, the ranks' exit and srun's clean-up (some 5 s), then the batch script starts Python, asks
# Slurm and submits the next job (some 10 s on a busy controller). Slurm's KillWait (30 s) is left untouched.
EXIT_MARGIN_S = 15.0

# Before a save was measured. A rank writes one file, syncs it and reads it back for its checksum: a stream to one
# storage target of a busy parallel file system. All ranks together: the share that such a system leaves to one job.
RANK_SAVE_BYTES_PER_S = 100e6
JOB_SAVE_BYTES_PER_S = 2e9
# Agreeing on the plan, one file a rank in the metadata server, the commit: of any size.
SAVE_LATENCY_S = 5.0
# Into host memory that is being allocated and pinned, as it is for the first save.
STAGE_BYTES_PER_S = 1e9

# A 95th percentile means something from 20 samples on; with fewer, nearest rank takes the largest. Older samples
# than these speak of another load of the machine.
N_STEPS = 100
N_SAVES = 20


@dataclass(frozen=True)
class Lead:
    """Seconds that a stop needs, and what they consist of. `save_s`: one save, SAVE_SAFETY not applied."""

    total_s: float
    save_s: float
    step_s: float
    save_measured: bool


class Deadline:
    """Knows the end of the job and how long steps and saves take. Only rank 0's is asked: clocks of nodes differ.

    Args:
        end_time_s: when the job is cut off, seconds since the epoch; None: never.
        save_every_steps: a save begins after each so many steps.
        first_save_s: what a save takes as long as none was measured.
        saves_s: what saves took in earlier attempts.
    """

    def __init__(
        self,
        end_time_s: float | None,
        save_every_steps: int,
        first_save_s: float,
        saves_s: Sequence[float] = (),
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        # From here on a clock that is set moves nothing: the batch system counts elapsed time too.
        self._end_s = None if end_time_s is None else monotonic() + end_time_s - clock()
        self._save_every_steps = save_every_steps
        self._first_save_s, self._first_step_s = first_save_s, 0.0
        self._saves_s = tuple(saves_s)[-N_SAVES:]
        self._steps_s: list[float] = []
        self._boundary_s: float | None = None
        self._synced_s = monotonic()
        self._steps_since_sync = 0
        self._synced_step_s = 0.0
        self.asked: Lead | None = None

    def rehearsed(self, seconds: float) -> None:
        """What a step takes as long as none was measured: forward and backward, with compiling on top."""
        self._first_step_s = seconds

    def add_save(self, seconds: float) -> None:
        """One save took so long, staging included. The writing thread calls this: it replaces, never changes."""
        self._saves_s = (*self._saves_s, seconds)[-N_SAVES:]

    def synced(self, step_time_s: float) -> None:
        """The host has waited for the device: nothing is outstanding, and steps took so long on average."""
        self._synced_s, self._steps_since_sync, self._synced_step_s = self._monotonic(), 0, step_time_s

    def is_near(self, step: int, save_under_way_s: float | None) -> bool:
        """Ask after each step, and once before the first: whether to stop now. Reads the clock, syncs nothing.

        Host time between two questions is what a step takes. A GPU may be behind the host, by no more than the
        steps since the last log line, because that one syncs: they are counted in.

        Args:
            step: steps that are done.
            save_under_way_s: for how long a save has been at it in the background; None if there is none.
        """
        now_s = self._monotonic()
        if self._boundary_s is not None:
            self._steps_s = [*self._steps_s, now_s - self._boundary_s][-N_STEPS:]
            self._steps_since_sync += 1
        self._boundary_s = now_s
        if self._end_s is None:
            return False
        lead = self._lead(step, save_under_way_s)
        if self._end_s - now_s >= lead.total_s:
            return False
        self.asked = lead
        return True

    def remaining_s(self) -> float | None:
        """Seconds to the end of the job, negative after it; None if it has none."""
        return None if self._end_s is None else self._end_s - self._monotonic()

    def _lead(self, step: int, save_under_way_s: float | None) -> Lead:
        save_s = p95(self._saves_s) if self._saves_s else self._first_save_s
        step_s = max(p95(self._steps_s), self._synced_step_s) if self._steps_s else self._first_step_s
        rest_s = 0.0
        if save_under_way_s is not None:
            save_s = max(save_s, save_under_way_s)
            rest_s = save_s * SAVE_SAFETY - save_under_way_s
        # A save of this step begins right after the question, one of the next step before the stop.
        n_saves = 1 + sum(s > 0 and s % self._save_every_steps == 0 for s in (step, step + 1))
        behind_s = max(0.0, self._steps_since_sync * self._synced_step_s - (self._monotonic() - self._synced_s))
        total_s = rest_s + n_saves * save_s * SAVE_SAFETY + 2 * step_s + behind_s + EXIT_MARGIN_S
        return Lead(total_s, save_s, step_s, bool(self._saves_s))

    def event_fields(self) -> dict[str, float]:
        """For the stop event: what was left and what the lead had been, in seconds."""
        if self.asked is None or self._end_s is None:
            return {}
        found = {"left_s": self._end_s - self._monotonic(), "lead_s": self.asked.total_s}
        found |= {"save_p95_s": self.asked.save_s, "step_p95_s": self.asked.step_s}
        return {name: round(seconds, 3) for name, seconds in found.items()}

    def render_stop(self, step: int, trained: bool) -> str:
        """Why a run out of time has stopped after `step`, and how its lead came about."""
        left_s = self.remaining_s()
        when, how = "before the time limit", "estimated"
        if left_s is not None:  # as on rank 0, which alone prints
            when = f"{format_seconds(abs(left_s))} {'before' if left_s >= 0 else 'after'} the time limit"
        stopped = f"stopped {when} after step {step}; everything is saved"
        if not trained:
            stopped = f"stopped {when}, before the first step; nothing is new to save"
        if self.asked is None:
            return stopped
        if self.asked.save_measured:
            how = "p95"
        return (
            f"{stopped}\n"
            f"  lead:  {format_seconds(self.asked.total_s)} for two steps of {format_seconds(self.asked.step_s)}, "
            f"a save of {format_seconds(self.asked.save_s)} ({how}), and leaving"
        )


def p95(samples: Iterable[float]) -> float:
    """95th percentile by nearest rank: the largest of fewer than 20, 0 of none."""
    ordered = sorted(samples)
    return ordered[math.ceil(0.95 * len(ordered)) - 1] if ordered else 0.0


def estimate_save_s(rank_bytes: float, world_size: int) -> float:
    """Seconds of a save that nobody has measured, cautiously: `rank_bytes` of state on each rank."""
    write_bytes_per_s = min(RANK_SAVE_BYTES_PER_S, JOB_SAVE_BYTES_PER_S / world_size)
    return SAVE_LATENCY_S + rank_bytes / STAGE_BYTES_PER_S + rank_bytes / write_bytes_per_s


def measured_saves_s(events: Iterable[Mapping[str, Any]], world_size: int) -> list[float]:
    """Seconds of the commits in events.jsonl that this many ranks made: another number writes at another rate."""
    found: list[float] = []
    writers = None
    for event in events:
        if event.get("event") == "start":
            writers = event.get("world_size")
        elif event.get("event") == "commit" and writers == world_size:
            found.append(float(event["seconds"]))
    return found
