"""What an engine is: it owns micro-batches, backward, clipping, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from aifactory_train.data.loader import Batch
from aifactory_train.errors import TrainingFault
from aifactory_train.plan.plan import Plan
from aifactory_train.units import format_bytes


@dataclass(frozen=True)
class StepStats:
    """Device tensors (scalars), so that a step needs no host sync.

    loss_sum: summed loss of this rank's valid tokens. n_valid_tokens: of all ranks. grad_norm: of all ranks,
    before clipping. lr: of the first parameter group.
    """

    loss_sum: Tensor
    n_valid_tokens: Tensor
    grad_norm: Tensor
    lr: float


class Engine(Protocol):
    """All methods are collective: every rank of the run arrives."""

    def rehearse(self, batch: Batch) -> None:
        """One forward and backward that changes nothing: compiles, and finds most of out-of-memory before step 1.

        The optimizer makes its state in step 1, so that step may still find more.
        """

    def train_step(self, batch: Batch, step: int) -> StepStats:
        """Optimizer step number `step` (from 1) on this rank's rows of the global batch."""

    def state_dict(self) -> dict[str, Any]:
        """Sharded tensors under "model" and "optim", keyed by parameter name."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def on_device(batch: Batch, rows: slice, device: torch.device) -> list[Tensor | None]:
    """(input, target, document, position) of some rows, (B, T) each, on the device; the copies may be under way."""
    tensors = (batch.input_BT, batch.target_BT, batch.document_BT, batch.position_BT)
    return [None if t is None else t[rows].to(device, non_blocking=True) for t in tensors]


@contextmanager
def memory_errors(plan: Plan, device: torch.device) -> Iterator[None]:
    """Turn out-of-memory on the device into a TrainingFault that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        predicted, rows = format_bytes(plan.predicted.peak_memory_bytes), plan.layout.micro_batch_rows
        remat = "" if plan.layout.remat == "full" else "--set layout.remat=full, or "
        raise TrainingFault(
            f"the step does not fit on {device}: {str(error).splitlines()[0]}",
            where=f"predicted peak {predicted} at train.micro_batch_rows={rows}",
            do=(f"--set train.micro_batch_rows={rows // 2}, or " if rows > 1 else remat) + "more nodes",
        ) from None
