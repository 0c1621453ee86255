"""The engine on plain torch: every axis of the mesh, gradient accumulation, global clipping, AdamW or Muon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from aifactory_train.data.loader import Batch
from aifactory_train.models.parts import DTYPES, ModelParts, is_on_each_rank, local_tensor
from aifactory_train.parallel.context import local_tokens
from aifactory_train.parallel.mesh import Mesh
from aifactory_train.plan.plan import Plan
from aifactory_train.train.engine import StepStats, memory_errors, on_device
from aifactory_train.train.optim import build_optimizers, build_state, lr_factor, set_lr

if TYPE_CHECKING:
    from aifactory_train.parallel.pipeline import Pipeline


class TorchEngine:
    """Steps a sharded model. `stages` must have been through `apply_parallelism` and hold their weights.

    Args:
        stages: the pipeline stages of this rank in their order; without a pipeline the whole model.
    """

    def __init__(self, plan: Plan, stages: list[ModelParts], mesh: Mesh, device: torch.device) -> None:
        self.plan, self.stages, self.mesh, self.device = plan, stages, mesh, device
        self.optimizers = build_optimizers(stages, plan.recipe.optim, DTYPES[plan.layout.precision])
        self.pipeline = _pipeline(plan, stages, mesh, device) if plan.layout.pp > 1 else None
        rank, n_tokens = mesh.rows.get_local_rank("cp"), plan.recipe.data.seq_len_tokens
        self.tokens_T = local_tokens(plan.layout, n_tokens, rank).to(device) if plan.layout.cp > 1 else None
        # Weights below adapters do not train: they are in no norm, no optimizer and no checkpoint.
        named = [named for stage in stages for named in stage.root.named_parameters()]
        self.named_parameters = {name: p for name, p in named if p.requires_grad}
        # What makes the gradient norm, and on how many ranks of tp the same weight is.
        self.counted = self.pipeline.counted if self.pipeline else list(self.named_parameters.values())
        copies = [float(plan.layout.tp) if is_on_each_rank(p, "tp") else 1.0 for p in self.counted]
        self.tp_copies = torch.tensor(copies, device=device)

    def rehearse(self, batch: Batch) -> None:
        with memory_errors(self.plan, self.device):
            self._forward_backward(batch)
        self._zero_grad()

    def train_step(self, batch: Batch, step: int) -> StepStats:
        with memory_errors(self.plan, self.device):
            return self._train_step(batch, step)

    def _train_step(self, batch: Batch, step: int) -> StepStats:
        loss_sum, n_valid_tokens = self._forward_backward(batch)
        grad_norm = self._clip_gradients()
        train = self.plan.recipe.train
        tokens = step * train.global_batch_tokens
        factor = lr_factor(self.plan.recipe.schedule, tokens, train.budget_tokens)
        set_lr(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
        self._zero_grad()
        return StepStats(loss_sum, n_valid_tokens, grad_norm, self.plan.recipe.optim.lr * factor)

    def _forward_backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Gradients of (sum of losses / global count of valid tokens), reduced as the layout says."""
        layout = self.plan.layout
        n_valid_tokens = torch.full((), float(batch.n_valid_tokens), device=self.device)  # no copy, so no sync
        # Axis dp: every rank has a batch at every step. Ranks that differ in pp, cp or tp alone have the same rows.
        dist.all_reduce(n_valid_tokens, group=self.mesh.rows.get_group("dp"))
        # FSDP averages over its ranks; times their number makes it the sum that the count divides.
        # Where no token of the whole batch counts, as chats may have it, the sums are 0 and any scale will do.
        scale = layout.dp_replicate * layout.shard_degree / n_valid_tokens.clamp(min=1)
        if self.pipeline is not None:
            loss_sum = self.pipeline.forward_backward(self._tensors(batch, slice(None)), scale)
        else:
            loss_sum = self._accumulate(batch, scale)
        if self.mesh.rows.get_local_rank("tp") > 0:
            loss_sum.zero_()  # all ranks of tp have the same loss, which counts once
        return loss_sum, n_valid_tokens

    def _accumulate(self, batch: Batch, scale: Tensor) -> Tensor:
        """Forward and backward of one micro-batch after the other. Returns this rank's summed loss."""
        root = self.stages[0].root
        loss_sum = torch.zeros((), device=self.device)
        n_rows, rows = batch.input_BT.shape[0], self.plan.layout.micro_batch_rows
        for start in range(0, n_rows, rows):
            self._reduce_gradients(root, is_last=start + rows >= n_rows)
            loss = root(*self._tensors(batch, slice(start, start + rows)))
            (loss * scale).backward()
            loss_sum += loss.detach()
        return loss_sum

    def _reduce_gradients(self, root: FSDPModule, is_last: bool) -> None:
        """Copies of shards (dp_replicate) exchange sums in the last micro-batch, however often shards are made.

        Weights that stay gathered after forward stay so until the last backward pass: one gather per step.
        """
        root.set_requires_gradient_sync(is_last or self.plan.layout.reduce_each_micro_batch)
        root.set_requires_all_reduce(is_last)
        root.set_reshard_after_backward(is_last or self.plan.layout.reshard_after_forward)

    def _tensors(self, batch: Batch, rows: slice) -> tuple[Tensor | None, ...]:
        """(input, target, document, position) of some rows on the device; where cp splits rows, of this rank's tokens.

        Documents stay whole: a mask needs those of the keys, too. A stage of a pipeline that does not see token numbers
        needs positions.
        """
        input_BT, target_BT, document_BT, position_BT = on_device(batch, rows, self.device)
        if position_BT is None and (self.plan.layout.cp > 1 or self.pipeline is not None):
            position_BT = torch.arange(input_BT.shape[1], device=self.device).expand_as(input_BT)
        if self.plan.layout.cp > 1:
            input_BT, target_BT, position_BT = (t[:, self.tokens_T] for t in (input_BT, target_BT, position_BT))
        return input_BT, target_BT, document_BT, position_BT

    def _clip_gradients(self) -> Tensor:
        """Scale gradients down to the norm that the recipe allows. Returns the norm before it, of the whole model."""
        norm = self._gradient_norm()
        for stage in self.stages:
            parameters = stage.root.parameters()
            torch.nn.utils.clip_grads_with_norm_(parameters, self.plan.recipe.optim.grad_clip_norm, norm, foreach=True)
        return norm

    def _gradient_norm(self) -> Tensor:
        """Each weight counts once, however many ranks hold it. Copies of dp_replicate are equal already."""
        gradients = [local_tensor(p.grad) for p in self.counted]
        squares = torch.stack(torch._foreach_norm(gradients)).square() / self.tp_copies
        # Axis fsdp, then tp and pp: every rank arrives, each of tp and pp with as many weights as its group.
        dist.all_reduce(squares, group=self.mesh.weights.get_group("fsdp"))
        norm = torch.linalg.vector_norm(squares.sqrt())
        for axis in ("tp", "pp"):
            if getattr(self.plan.layout, axis) > 1:
                square = norm.square()
                dist.all_reduce(square, group=self.mesh.weights.get_group(axis))
                norm = square.sqrt()
        return norm

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The tensors themselves, not copies. A layer has the same names in every layout."""
        of = self._optimizer_state()
        return {
            "model": {name: p.detach() for name, p in self.named_parameters.items()},
            "optim": {name: of[p] for name, p in self.named_parameters.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        of = self._optimizer_state()
        # Not by name alone: first and last stage may both be here, each with a tied table of one name.
        for name, parameter in (named for stage in self.stages for named in stage.root.named_parameters()):
            if not parameter.requires_grad:
                continue
            parameter.copy_(state["model"][name])
            for key, moment in of[parameter].items():
                moment.copy_(state["optim"][name][key])

    def _optimizer_state(self) -> dict[Tensor, dict[str, Tensor]]:
        build_state(self.optimizers)
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    def close(self) -> None:
        self.optimizers.clear()


def _pipeline(plan: Plan, stages: list[ModelParts], mesh: Mesh, device: torch.device) -> Pipeline:
    # Here, because a torch that is too old for some of the schedules trains without a pipeline.
    from aifactory_train.parallel.pipeline import build_pipeline

    return build_pipeline(plan, stages, mesh, device)
