"""A stop signal sets a flag; all ranks agree on it at a step boundary."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.faults.stopflag import StopFlag


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

    def at_step_boundary(self) -> int:
        """Number of the signal that any rank had got by the last boundary, 0 if none. All ranks arrive."""
        agreed = 0
        if self._pending is not None:
            self._pending.wait()
            agreed = int(self._flag.item())
        self._flag.fill_(self._stop_flag.signal_number)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def close(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
