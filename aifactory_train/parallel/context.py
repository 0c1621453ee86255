"""Axis cp: the tokens of a row are spread over ranks, and attention alone moves them.

Shapes: B rows, T tokens of a row, t tokens of this rank, N query heads, K key/value heads, H head width; P ranks of cp.
A chunk is 1/(2P) of a row. In the balanced forms rank r holds chunks r and 2P-1-r: a late query has many keys, so each
rank has a late chunk and an early one. Sources: ring attention (arXiv 2310.01889) in the order of
github.com/zhuzilin/ring-flash-attention, all-gather as for Llama 3 (arXiv 2407.21783, section 3.3.2), DeepSpeed-Ulysses
(arXiv 2309.14509).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from aifactory_train.errors import PlanError
from aifactory_train.models.attention import (
    LOCAL,
    Attention,
    Mask,
    attend_part,
    build_part_mask,
    merge_parts,
)
from aifactory_train.models.parts import ModelParts
from aifactory_train.plan.contract import Layout


class Axis(NamedTuple):
    """This rank on axis cp. `name` is that of the process group: the compiler knows groups by name."""

    name: str
    degree: int
    rank: int


class Part(NamedTuple):
    """One call of attention, by numbers of chunks.

    causal: the last query stands at the last key. Otherwise all keys lie before all queries.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool


def local_tokens(layout: Layout, seq_len_tokens: int, cp_rank: int) -> Tensor:
    """Which tokens of a row this rank holds: (t,), int64, on the CPU, ascending. PlanError where cp does not divide."""
    balanced = layout.cp_attention != "ulysses"
    n_chunks = layout.cp * (2 if balanced else 1)
    if seq_len_tokens % n_chunks:
        error = PlanError(
            f"rows of {seq_len_tokens} tokens cannot be cut into {n_chunks} equal chunks",
            where=f"plan.json: layout.cp {layout.cp}, layout.cp_attention {layout.cp_attention}",
            do=f"--set data.seq_len_tokens={max(1, seq_len_tokens // n_chunks) * n_chunks}, or another layout.cp",
        )
        error.on_every_rank = True  # all ranks read the same plan
        raise error
    held = held_chunks(layout.cp, cp_rank) if balanced else (cp_rank,)
    return torch.arange(seq_len_tokens).view(n_chunks, -1)[list(held)].flatten()


def held_chunks(cp: int, cp_rank: int) -> tuple[int, int]:
    return cp_rank, 2 * cp - 1 - cp_rank


def gathered_parts(cp: int, cp_rank: int) -> list[Part]:
    """Each chunk of queries against all keys up to its own."""
    return [Part((chunk,), tuple(range(chunk + 1)), causal=True) for chunk in held_chunks(cp, cp_rank)]


def ring_parts(cp: int, cp_rank: int) -> list[Part]:
    """In the order in which keys arrive: this rank's own, then those of the rank before it, and so on.

    Of two other chunks either the early one is seen by all queries, or both by the late queries: half of the scores.
    """
    own = held_chunks(cp, cp_rank)
    parts = [Part(own, own, causal=True)]
    for step in range(1, cp):
        sender = (cp_rank - step) % cp
        keys = held_chunks(cp, sender)
        parts.append(Part(own, keys[:1], False) if sender < cp_rank else Part(own[1:], keys, False))
    return parts


def apply_context_parallel(parts: ModelParts, mesh: DeviceMesh, layout: Layout, seq_len_tokens: int) -> None:
    """Give each attention host the exchange over cp that `layout.cp_attention` names. `mesh` is the axis cp alone."""
    axis = Axis(mesh.get_group().group_name, layout.cp, mesh.get_local_rank())
    n_local_tokens = local_tokens(layout, seq_len_tokens, axis.rank).numel()
    if layout.cp_attention == "ulysses":
        attention = Attention(LOCAL.build_mask, partial(_attend_ulysses, axis))
    else:
        ring = layout.cp_attention == "ring"
        calls = (ring_parts if ring else gathered_parts)(axis.degree, axis.rank)
        build_mask = partial(build_masks, calls, 2 * axis.degree, n_local_tokens // 2, mesh.device_type)
        attention = Attention(build_mask, partial(_attend_ring if ring else _attend_gathered, axis, calls))
    for host in parts.attention_hosts:
        host.attention = attention


def build_masks(
    calls: list[Part], n_chunks: int, chunk_tokens: int, device_type: str, document_BT: Tensor | None
) -> tuple[Mask, ...]:
    """A mask for each call of attention."""
    chunks = None if document_BT is None else document_BT.chunk(n_chunks, dim=1)
    masks = []
    for call in calls:
        documents = None
        if chunks is not None:
            documents = (torch.cat([chunks[i] for i in call.queries], 1), torch.cat([chunks[i] for i in call.keys], 1))
        n_queries, n_keys = len(call.queries) * chunk_tokens, len(call.keys) * chunk_tokens
        masks.append(build_part_mask(documents, n_queries, n_keys, call.causal, device_type))
    return tuple(masks)


def _attend_gathered(
    axis: Axis, calls: list[Part], q_BNtH: Tensor, k_BKtH: Tensor, v_BKtH: Tensor, masks: tuple[Mask, ...]
) -> Tensor:
    # Axis cp, at each layer, forward and backward (a reduce_scatter): all its ranks arrive.
    kv = funcol.all_gather_single_autograd(torch.stack((k_BKtH, v_BKtH)), 0, axis.name)
    # Each rank sent an early and a late chunk, and the late ones run backwards.
    halves = [both.chunk(2, dim=-2) for both in kv.unflatten(0, (axis.degree, 2)).unbind(0)]
    in_order = [early for early, _ in halves] + [late for _, late in reversed(halves)]
    k_BKTH, v_BKTH = torch.cat(in_order, dim=-2).unbind(0)
    chunk_tokens = q_BNtH.shape[2] // 2
    outs = []
    for call, mask, q_BNQH in zip(calls, masks, q_BNtH.chunk(2, dim=2), strict=True):
        seen = slice(len(call.keys) * chunk_tokens)
        outs.append(attend_part(q_BNQH, k_BKTH[:, :, seen], v_BKTH[:, :, seen], mask, call.causal)[0])
    return torch.cat(outs, dim=2)


def _attend_ring(
    axis: Axis, calls: list[Part], q_BNtH: Tensor, k_BKtH: Tensor, v_BKtH: Tensor, masks: tuple[Mask, ...]
) -> Tensor:
    own = calls[0].queries
    kv = torch.stack((k_BKtH, v_BKtH))
    merged: list[tuple[Tensor, Tensor]] = []
    for step, (call, mask) in enumerate(zip(calls, masks, strict=True)):
        if step + 1 < axis.degree:
            following = _Send.apply(kv, axis)  # before attention, which hides it
        k_BKSH, v_BKSH = kv.chunk(2, dim=-2)[0].unbind(0) if len(call.keys) == 1 else kv.unbind(0)
        q_BNQH = q_BNtH if call.queries == own else q_BNtH.chunk(2, dim=2)[1]
        out_BNQH, lse_BNQ = attend_part(q_BNQH, k_BKSH, v_BKSH, mask, call.causal)
        n = len(call.queries)
        halves = list(zip(out_BNQH.chunk(n, dim=2), lse_BNQ.chunk(n, dim=2), strict=True))
        if merged:
            first = len(own) - n
            merged[first:] = [merge_parts(a, b) for a, b in zip(merged[first:], halves, strict=True)]
        else:
            merged = halves
        if step + 1 < axis.degree:
            kv = _Receive.apply(following, axis)
    return torch.cat([out_BNQH.to(q_BNtH.dtype) for out_BNQH, _ in merged], dim=2)


class _Send(torch.autograd.Function):
    """To the next rank of the ring what this one holds. What the one before held is there after `_Receive`.

    Two halves of one transfer, so that work can stand between them, also in backward and in a compiled graph: there
    the gradient starts back in `_Receive` and has arrived in `_Send`.
    """

    @staticmethod
    def forward(ctx: Any, kv: Tensor, axis: Axis) -> Tensor:
        return _pass_on(kv, axis, by=1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return funcol.wait_tensor(grad_outputs[0]), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return funcol.wait_tensor(kv)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _pass_on(grad_outputs[0], ctx.axis, by=-1), None


def _pass_on(x: Tensor, axis: Axis, by: int) -> Tensor:
    """To the rank that is `by` further in the ring. The result must go through wait_tensor."""
    to, source = [0] * axis.degree, [0] * axis.degree
    to[(axis.rank + by) % axis.degree] = source[(axis.rank - by) % axis.degree] = x.shape[0]
    # Axis cp, degree - 1 times at each layer, forward and backward: all its ranks arrive.
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), source, to, axis.name)


def _attend_ulysses(axis: Axis, q_BNtH: Tensor, k_BKtH: Tensor, v_BKtH: Tensor, mask: Mask) -> Tensor:
    """All tokens of 1/P of the heads are here between the two exchanges."""
    n_kv_heads, p = k_BKtH.shape[1], axis.degree
    if n_kv_heads % p:
        # Not on_every_rank: in a pipeline the ranks of later stages wait for tokens, and never come here.
        raise PlanError(
            f"ulysses gives each rank of cp its own heads: {n_kv_heads} key/value heads for {p} ranks",
            where=f"plan.json: layout.cp {p}, layout.cp_attention ulysses; heads are those of one rank of tp",
            do="--set layout.cp_attention=all_gather, or a layout.cp that divides them",
        )
    split = [x.unflatten(1, (p, -1)) for x in (q_BNtH, k_BKtH, v_BKtH)]  # (B, P, heads, t, H)
    sent = torch.cat(split, dim=2).transpose(0, 1).contiguous()
    here = _exchange(sent, axis)  # (P, B, heads, t, H), by tokens
    q_BNTH, k_BKTH, v_BKTH = here.permute(1, 2, 0, 3, 4).flatten(2, 3).split([x.shape[2] for x in split], dim=1)
    out_BNTH = LOCAL.attend(q_BNTH, k_BKTH, v_BKTH, mask)
    back = _exchange(out_BNTH.unflatten(2, (p, -1)).permute(2, 0, 1, 3, 4).contiguous(), axis)  # by heads
    return back.transpose(0, 1).flatten(1, 2)


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    """Slice i of dim 0 goes to rank i. Axis cp, twice at each layer, forward and backward: all its ranks arrive."""
    equal = [1] * axis.degree
    return funcol.all_to_all_single_autograd(x, equal, equal, axis.name)
