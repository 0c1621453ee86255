"""A stop signal sets a flag; all ranks agree on it at a step boundary. So they do on the end of the job's time."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.errors import Interrupted
from aifactory_train.faults.deadline import Deadline
from aifactory_train.faults.stopflag import StopFlag

# The system's own signal for "time is used up". Nobody sends it here: it is the reason in the agreement.
OUT_OF_TIME = signal.SIGXCPU


class StopAgreement:
    """Asks all ranks once a step whether one of them was told to stop.

    The question travels over gloo while the step computes and is answered at the next boundary: no rank waits
    and no GPU is synchronised. So a run stops one step after the signal.
    """

    def __init__(self, stop_flag: StopFlag) -> None:
        """Collective: makes a group of its own, so that these messages meet no others."""
        self._stop_flag = stop_flag
        self._group = dist.new_group(backend="gloo")
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None

    def before_first_step(self, out_of_time: bool) -> int:
        """The same question, answered at once: no step is computing yet. All ranks arrive."""
        self.at_step_boundary(out_of_time)
        self._pending.wait()
        return int(self._flag.item())

    def at_step_boundary(self, out_of_time: bool) -> int:
        """Number of the signal that any rank had got by the last boundary, 0 if none. All ranks arrive.

        Args:
            out_of_time: this rank's job is about to end; rank 0 decides for all, since clocks of nodes differ.
        """
        agreed = 0
        if self._pending is not None:
            self._pending.wait()
            agreed = int(self._flag.item())
        self._flag.fill_(self._stop_flag.signal_number or OUT_OF_TIME * out_of_time)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None


def build_interrupted(number: int, step: int, trained: bool, deadline: Deadline, checkpoints: Path) -> Interrupted:
    """What every rank raises once the run has stopped and all is saved.

    Args:
        number: what `StopAgreement` gave.
        trained: False if this attempt made no step; then its first state is a commit already, or step 0.
    """
    do = "launch again: it resumes at that step"
    if number == OUT_OF_TIME:
        what = deadline.render_stop(step, trained)
        do = do if trained else "ask for a longer job: --time TIME"
    else:
        done = f"after step {step}; everything up to there is saved" if trained else "before its first step"
        what = f"stopped by {signal.Signals(number).name} {done}"
    stopped = Interrupted(what, where=str(checkpoints), do=do)
    stopped.on_every_rank = True
    return stopped
