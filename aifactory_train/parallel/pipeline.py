"""Axis pp: the stages of this rank, run by a schedule of torch.distributed.pipelining.

Shapes: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from aifactory_train.models.parts import DTYPES, ModelParts, local_tensor
from aifactory_train.parallel.mesh import Mesh
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.stages import stages_of_rank

_MULTI = {
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Pipeline:
    """Runs forward and backward of all micro-batches of a step. All methods are collective over axis pp.

    Args:
        schedule: of torch.distributed.pipelining, which drives FSDP too: gradients are reduced once, at the end.
        tables: with tied embeddings this rank's copies of the table: one on the first and one on the last rank, or
            both where a V brings the last stage back to the first rank.
        counted: parameters of this rank whose gradients make the norm: of copies of a table one in the whole pipeline.
    """

    def __init__(
        self, schedule: Any, group: dist.ProcessGroup, tables: list[Tensor], counted: list[Tensor], device: torch.device
    ) -> None:
        self.schedule, self.group, self.tables, self.counted = schedule, group, tables, counted
        self.device = device

    def forward_backward(self, tensors: tuple[Tensor | None, ...], scale: Tensor) -> Tensor:
        """Gradients of loss * scale, summed over the micro-batches.

        Args:
            tensors: (input, target, document, position) of this rank's whole share of the batch, (B, T) each. All
                ranks of pp have the same rows.

        Returns:
            The summed loss without `scale` (float32 scalar); 0 on a rank without the last stage.
        """
        input_BT, target_BT, document_BT, position_BT = tensors
        given = {"target_BT": target_BT, "document_BT": document_BT, "position_BT": position_BT}
        loss_sum = torch.zeros((), device=self.device)
        # Axis pp: every rank arrives, and the schedule pairs each send with a receive.
        self.schedule.step(
            input_BT,
            target=target_BT,
            return_outputs=False,
            loss_kwargs={"scale": scale, "loss_sum": loss_sum},
            **{name: tensor for name, tensor in given.items() if tensor is not None},
        )
        self._sum_table_gradients()
        return loss_sum

    def _sum_table_gradients(self) -> None:
        """Both copies of a tied table get the same sum, bit for bit (a + b is b + a), so they stay equal."""
        gradients = [local_tensor(table.grad) for table in self.tables if table.grad is not None]
        if len(gradients) == 2:
            gradients[0].add_(gradients[1])
            gradients[1].copy_(gradients[0])
        elif gradients:
            rank, n_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
            theirs = torch.empty_like(gradients[0])
            peer = {"group": self.group, "group_peer": n_ranks - 1 - rank}
            ops = [dist.P2POp(dist.isend, gradients[0], **peer), dist.P2POp(dist.irecv, theirs, **peer)]
            # Axis pp: the first and the last rank arrive, the others have no table.
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            gradients[0].add_(theirs)


def build_pipeline(plan: Plan, stages: list[ModelParts], mesh: Mesh, device: torch.device) -> Pipeline:
    """The schedule of `plan.layout` over the stages of this rank, which have been through `apply_parallelism`.

    Collective over axis pp: every rank arrives.
    """
    layout, group = plan.layout, mesh.rows.get_group("pp")
    rank, n_stages = mesh.rows.get_local_rank("pp"), layout.pp * layout.stages_per_rank
    numbers = stages_of_rank(layout, rank)
    built = []
    for number, parts in zip(numbers, stages, strict=True):
        input_args, output_args = _borders(plan, number, n_stages)
        built.append(
            PipelineStage(
                parts.root, number, n_stages, device, input_args=input_args, output_args=output_args, group=group
            )
        )
    schedule: Any
    if layout.pipeline_schedule == "1f1b":
        schedule = Schedule1F1B(built[0], layout.accumulation, loss_fn=_scaled_loss, scale_grads=False)
    else:
        multi = _MULTI[layout.pipeline_schedule]
        schedule = multi(built, layout.accumulation, loss_fn=_scaled_loss, scale_grads=False)  # type: ignore[arg-type]
    # NCCL makes a group's communicator in the first collective, which all ranks must reach together; in a schedule they
    # come one after the other. Axis pp: every rank arrives.
    dist.all_reduce(torch.zeros((), device=device), group=group)
    tied = plan.recipe.model.tied_embeddings
    tables = [p for parts in stages if tied and parts.embed is not None for p in parts.embed.parameters()]
    # Where both copies are on one rank or this is the first rank, the first one counts.
    twice = {id(table) for table in (tables[1:] if rank == 0 else tables)}
    counted = [p for parts in stages for p in parts.root.parameters() if id(p) not in twice]
    return Pipeline(schedule, group, tables, counted, device)


def _borders(plan: Plan, number: int, n_stages: int) -> tuple[Tensor, Tensor]:
    """Shapes of what one micro-batch brings into a stage and what leaves it; with both known, no forward is run to see.

    Between stages hidden states have T / (cp * tp) tokens: sequence parallelism splits them over tp.
    """
    layout, recipe = plan.layout, plan.recipe
    rows, n_tokens = layout.micro_batch_rows, recipe.data.seq_len_tokens // layout.cp
    tokens_BT = torch.empty(rows, n_tokens, dtype=torch.int64, device="meta")
    hidden = (rows, n_tokens // layout.tp, recipe.model.hidden_size)
    hidden_BTD = torch.empty(hidden, dtype=DTYPES[layout.precision], device="meta", requires_grad=True)
    loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
    return hidden_BTD if number else tokens_BT, hidden_BTD if number < n_stages - 1 else loss


def _scaled_loss(loss: Tensor, _target_BT: Tensor, *, scale: Tensor, loss_sum: Tensor) -> Tensor:
    """What backward starts from; the loss itself is added to `loss_sum` on the device."""
    loss_sum += loss.detach()
    return loss * scale
