"""Recompute activations in the backward pass in place of keeping them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from aifactory_train.models.parts import ModelParts
from aifactory_train.plan.contract import Layout

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default}
# One for each kernel behind F.scaled_dot_product_attention, and that of the document masks.
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
}
# What a sum over tp leaves is split over tp, so it is cheap to keep and dear to make again.
_SUMS = {torch.ops._c10d_functional.reduce_scatter_tensor.default, torch.ops._c10d_functional.all_reduce.default}
# Of fp8: a number per matrix or row, for which the whole matrix is read.
_SCALES = {_ATEN.max.default, _ATEN.amax.default}


class SelectivePolicy:
    """What one forward of one block keeps: attention, and every second matrix product in the order of their calls.

    Of q, k, v, o, gate, up, down these are q, v, gate and down, as plan/shape.py counts. A product that tp still has
    to sum up is as large as on one rank, so it is not kept and the sum is.
    """

    def __init__(self) -> None:
        self._n_products = 0

    def __call__(self, ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in _ATTENTION or op in _SUMS or op in _SCALES
        if op in _PRODUCTS:
            keep = self._n_products % 2 == 0 and not _is_partial(ctx.op_output)
            self._n_products += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def apply_remat(parts: ModelParts, layout: Layout) -> None:
    """Make the blocks keep what `layout.remat` says, in place; before compile, whose partitioner reads the same policy.

    none: all that autograd saves. full: the input of a block, whose forward runs once more in the backward pass.
    selective: also what `SelectivePolicy` keeps. budget: the compiler keeps what is dearest to make again, up to
    `remat_budget_frac` of the way from the inputs of a block (0) to all that it would keep by itself (1).
    No module wraps a block, so the names of parameters stay. The blocks draw no random numbers.
    """
    # One setting for all that is compiled in this process, so a layout without a budget has to take it back.
    budget_frac = layout.remat_budget_frac if layout.remat == "budget" else None
    torch._functorch.config.activation_memory_budget = 1.0 if budget_frac is None else budget_frac
    # The mesh of a split block is an object without bytes; torch 2.13 weighs it only when told so.
    torch._functorch.config.unsafe_treat_script_objects_as_zero_size = budget_frac is not None
    if layout.remat not in ("full", "selective"):
        return
    for block in parts.blocks:
        block.forward = _checkpointed(block.forward, layout.remat)


def _checkpointed(forward: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`forward` under torch's checkpoint.

    A function and not a partial of `checkpoint`: the compiler takes functions of ours and passes over those of torch,
    and then nothing of a block would be compiled.
    """
    contexts = {"context_fn": _selective_contexts} if remat == "selective" else {}

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts, **kwargs)

    return checkpointed


def _selective_contexts() -> tuple[Any, Any]:
    """For one forward and its recomputation; the policy counts, so each forward has its own."""
    return create_selective_checkpoint_contexts(SelectivePolicy())


def _is_partial(output: Any) -> bool:
    return isinstance(output, DTensor) and any(placement.is_partial() for placement in output.placements)
