"""Deliberate faults, at least one for each axis: a missing reduction, a wrong scale, a wrong mask.

Each is made in the ranks of one case, which the comparison with one process must then refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from aifactory_train.parallel import context, pipeline, tensor
from aifactory_train.train import engine_torch


def _not_for_scalars(all_reduce: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return all_reduce(x, *args, **kwargs) if x.ndim else None


def _own_shard(output: Tensor, input: Tensor, group: Any, **_: Any) -> None:
    output.copy_(input.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view_as(output))


def _own_gradient_only(original: Callable[..., Tensor], x: Tensor, dim: int, group: str) -> Tensor:
    """The keys of other ranks, without the gradients that should go back to them."""
    whole = original(x.detach(), dim, group)
    where = [i for i, part in enumerate(whole.chunk(whole.shape[0] // x.shape[0])) if torch.equal(part, x)]
    return torch.cat([x if i in where else p for i, p in enumerate(whole.chunk(whole.shape[0] // x.shape[0]))])


def _twice_backward(original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    y = original(x, *args, **kwargs)
    return 2 * y - y.detach()


def _only_forward(original: Callable[..., Tensor], x: Tensor, axis: Any, by: int) -> Tensor:
    passed = original(x, axis, by)
    return passed if by > 0 else torch.zeros_like(passed)


def _only_scalars(all_reduce: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    return None if x.ndim else all_reduce(x, *args, **kwargs)


def _in_order(layout: Any, seq_len_tokens: int, cp_rank: int) -> Tensor:
    return torch.arange(seq_len_tokens).chunk(layout.cp)[cp_rank]


def _local_gradient(norm: Any, args: Any, output: Any) -> Tensor:
    return output.full_tensor()


def _halved(loss: Tensor, target_BT: Tensor, *, scale: Tensor, loss_sum: Tensor) -> Tensor:
    loss_sum += loss.detach()
    return loss * scale / 2


def _replaced(target: Any, name: str, fault: Callable[..., Any]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(target, name, partial(fault, getattr(target, name)))


def _own_rows_in_deepspeed() -> AbstractContextManager[Any]:
    from aifactory_train.train import engine_deepspeed

    alone = SimpleNamespace(all_reduce=lambda count: None, get_rank=dist.get_rank)
    return patch.object(engine_deepspeed, "dist", alone)


def _micro_batches_averaged() -> AbstractContextManager[Any]:
    """DeepSpeed divides each loss by the number of micro-batches unless told not to."""
    import deepspeed

    backward = deepspeed.DeepSpeedEngine.backward
    return patch.object(
        deepspeed.DeepSpeedEngine, "backward", lambda engine, loss, scale_wrt_gas: backward(engine, loss)
    )


def _gradients_not_finite() -> AbstractContextManager[Any]:
    import deepspeed

    backward = deepspeed.DeepSpeedEngine.backward
    return patch.object(
        deepspeed.DeepSpeedEngine,
        "backward",
        lambda engine, loss, scale_wrt_gas: backward(engine, loss * math.inf, scale_wrt_gas=scale_wrt_gas),
    )


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "tokens_of_own_rows_counted": _replaced(engine_torch.dist, "all_reduce", _not_for_scalars),
    "shards_not_summed": lambda: patch.object(dist, "reduce_scatter_single", _own_shard),
    "copies_not_summed": _replaced(dist, "all_reduce", _only_scalars),
    "gradients_of_keys_stay": _replaced(context.funcol, "all_gather_single_autograd", _own_gradient_only),
    "gradients_lost_in_the_ring": _replaced(context, "_pass_on", _only_forward),
    "heads_return_gradients_twice": _replaced(context, "_exchange", _twice_backward),
    "tokens_in_order_under_a_balanced_mask": lambda: patch.object(engine_torch, "local_tokens", _in_order),
    "hidden_gradient_of_own_words": lambda: patch.object(tensor, "_gather_output", _local_gradient),
    "words_of_own_rank_summed": lambda: patch("aifactory_train.models.loss.all_reduce", lambda x, op, group: x),
    "norm_of_own_stage": _replaced(engine_torch.dist, "all_reduce", _not_for_scalars),
    "half_of_the_loss": lambda: patch.object(pipeline, "_scaled_loss", _halved),
    "own_rows_in_deepspeed": _own_rows_in_deepspeed,
    "micro_batches_averaged": _micro_batches_averaged,
    "gradients_not_finite": _gradients_not_finite,
    "tables_not_summed": lambda: patch.object(pipeline.Pipeline, "_sum_table_gradients", lambda self: None),
}
