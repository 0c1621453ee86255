"""The engine on plain torch: FSDP2, gradient accumulation, global clipping, AdamW or Muon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from aifactory_train.data.loader import Batch
from aifactory_train.errors import TrainingFault
from aifactory_train.models.parts import ModelParts
from aifactory_train.parallel.shard import DTYPES
from aifactory_train.plan.plan import Plan
from aifactory_train.train.engine import StepStats
from aifactory_train.train.optim import build_optimizers, lr_factor, set_lr
from aifactory_train.units import format_bytes


class TorchEngine:
    """Steps a sharded model. `parts` must have been through `apply_parallelism` and hold its weights."""

    def __init__(self, plan: Plan, parts: ModelParts, device: torch.device) -> None:
        self.plan, self.parts, self.device = plan, parts, device
        self.root = cast(FSDPModule, parts.root)
        self.world_size = plan.layout.world_size
        self.optimizers = build_optimizers(parts, plan.recipe.optim, DTYPES[plan.layout.precision])

    def rehearse(self, batch: Batch) -> None:
        with self._memory_errors():
            self._forward_backward(batch)
        self._zero_grad()

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            predicted = format_bytes(self.plan.predicted.peak_memory_bytes)
            rows = self.plan.layout.micro_batch_rows
            raise TrainingFault(
                f"the step does not fit on {self.device}: {str(error).splitlines()[0]}",
                where=f"predicted peak {predicted} at train.micro_batch_rows={rows}",
                do=f"--set train.micro_batch_rows={max(1, rows // 2)}, or more nodes",
            ) from None

    def train_step(self, batch: Batch, step: int) -> StepStats:
        with self._memory_errors():
            return self._train_step(batch, step)

    def _train_step(self, batch: Batch, step: int) -> StepStats:
        loss_sum, n_valid_tokens = self._forward_backward(batch)
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.parts.root.parameters(), self.plan.recipe.optim.grad_clip_norm, foreach=True
        )
        train = self.plan.recipe.train
        tokens = step * train.global_batch_tokens
        factor = lr_factor(self.plan.recipe.schedule, tokens, train.budget_tokens)
        set_lr(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
        self._zero_grad()
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        return StepStats(loss_sum, n_valid_tokens, norm, self.plan.recipe.optim.lr * factor)

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of (sum of losses / global count of valid tokens), reduced as the layout says."""
        n_valid_tokens = torch.full((), float(batch.n_valid_tokens), device=self.device)  # no copy, so no sync
        dist.all_reduce(n_valid_tokens)  # axis dp_shard: every rank has a batch at every step
        loss_sum = torch.zeros((), device=self.device)
        rows, each = self.plan.layout.micro_batch_rows, self.plan.layout.reduce_each_micro_batch
        for start in range(0, batch.input_BT.shape[0], rows):
            self.root.set_requires_gradient_sync(each or start + rows >= batch.input_BT.shape[0])
            tensors = (batch.input_BT, batch.target_BT, batch.document_BT, batch.position_BT)
            micro = [None if t is None else t[start : start + rows].to(self.device, non_blocking=True) for t in tensors]
            micro_loss = self.parts.root(*micro)
            # FSDP averages over ranks; times world_size makes it the sum that the count divides.
            (micro_loss * (self.world_size / n_valid_tokens)).backward()
            loss_sum += micro_loss.detach()
        return loss_sum, n_valid_tokens

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.parts.root, self.optimizers)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.parts.root, self.optimizers, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )

    def close(self) -> None:
        self.optimizers.clear()
