"""Attention as axis cp cuts it, with its gradients, against plain softmax in float64.

One process computes what each rank of cp would; keys are taken from the whole row in place of the exchange. On a GPU
this is flex_attention, whose backward no CPU has.

Shapes: B rows, T tokens of a row, N query heads, K key/value heads, H head width; Q queries of one call, S its keys.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._dynamo

from aifactory_train.models.attention import UNSEEN_SCORE, attend_part, merge_parts
from aifactory_train.parallel.context import Part, build_masks, gathered_parts, held_chunks, ring_parts
from benchmarks.gpu_check.setting import Sizes, largest

B, N, K, H = 2, 4, 2, 64
FORMS = {"ring": ring_parts, "all_gather": gathered_parts}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Bounds:
    """norm: relative error of each tensor as a whole. element: error of an element, by the largest of its tensor."""

    norm: float
    element: float


# bf16: three times what it gives on a CPU (5.5e-3, 8.4e-3); q, k and v are rounded before both, so they have no part
# in it. fp32: a GPU sums in another order and takes exp2 for exp (a CPU: 4e-7, 7e-7); TF32 rounds by up to 5e-4.
BOUNDS = {"fp32": Bounds(1e-5, 1e-5), "bf16": Bounds(1.6e-2, 2.5e-2)}


@dataclass(frozen=True)
class ContextCase:
    form: Literal["ring", "all_gather"]
    documents: bool
    precision: Literal["bf16", "fp32"]
    cp: int

    @property
    def name(self) -> str:
        return f"{self.form} cp {self.cp} {self.precision} {'documents' if self.documents else 'plain'}"


# In the order of danger: only the ring differentiates the log-sum-exp, and has queries that see no key.
CONTEXT_CASES = tuple(
    ContextCase(*choice) for choice in itertools.product(("ring", "all_gather"), (True, False), DTYPES, (2, 4))
)


def measure_context(device: torch.device, sizes: Sizes, until_s: float) -> dict[str, Any]:
    """One row for each case. Those that would begin after `until_s` (time.monotonic) do not run, which is no pass.

    Chunks have one length for all degrees, so that cases share what is compiled. In one process it is more than torch
    allows; beyond that limit it would go on uncompiled, with other kernels than those of training.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        rows = [_row(case, device, sizes.cp_chunk_tokens, until_s) for case in CONTEXT_CASES]
    return {"passed": all(row["passed"] for row in rows), "chunk_tokens": sizes.cp_chunk_tokens, "cases": rows}


def _row(case: ContextCase, device: torch.device, chunk_tokens: int, until_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "passed": False}
    begin_s = time.monotonic()
    if begin_s > until_s:
        return row | {"fault": "not run: no time was left"}
    qkv, document_BT = _whole_row(case, device, 2 * case.cp * chunk_tokens)
    try:
        found, n_blind = _by_ranks(case, qkv, document_BT)
        right = _plain_softmax(qkv, document_BT)
    except Exception as error:  # each case is told, and the others go on
        return row | {"fault": f"{type(error).__name__}: {error}"[:2000]}
    bounds = BOUNDS[case.precision]
    off = {name: (found[name].double() - right[name], right[name]) for name in right}
    errors = {
        "norm": {name: float(wrong.norm() / whole.norm()) for name, (wrong, whole) in off.items()},
        "element": {name: float(wrong.abs().max() / whole.abs().max()) for name, (wrong, whole) in off.items()},
    }
    worst = {key: largest(by_tensor.values()) for key, by_tensor in errors.items()}
    faults = [f"{key} is off by {worst[key]:.2e}" for key in worst if not worst[key] <= getattr(bounds, key)]
    return row | {
        "passed": not faults, "fault": "; ".join(faults) or None, "errors": errors, "bounds": vars(bounds),
        "n_blind_queries": n_blind, "seconds": round(time.monotonic() - begin_s, 1),
    }  # fmt: skip


def _whole_row(
    case: ContextCase, device: torch.device, n_tokens: int
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """q, k, v, the same in all precisions but for rounding, and documents that are shorter than most chunks."""
    random = torch.Generator().manual_seed(0)
    heads = (N, K, K)
    qkv = [torch.randn(B, n, n_tokens, H, generator=random).to(device, DTYPES[case.precision]) for n in heads]
    starts_BT = torch.rand(B, n_tokens, generator=random) < 6 * case.cp / n_tokens
    return qkv, starts_BT.cumsum(1).int().to(device) if case.documents else None


def _by_ranks(
    case: ContextCase, qkv: list[torch.Tensor], document_BT: torch.Tensor | None
) -> tuple[dict[str, torch.Tensor], int]:
    """Result and gradients of all ranks, and how many queries of all calls saw no key of their call."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    done: dict[int, torch.Tensor] = {}
    n_blind = 0
    for rank in range(case.cp):
        out_of_chunk, blind = _one_rank(FORMS[case.form](case.cp, rank), leaves, 2 * case.cp, document_BT)
        done |= {chunk: out_of_chunk[chunk] for chunk in held_chunks(case.cp, rank)}
        n_blind += blind
    return _differentiated(torch.cat([done[chunk] for chunk in sorted(done)], dim=2), leaves), n_blind


def _one_rank(
    calls: list[Part], qkv: list[torch.Tensor], n_chunks: int, document_BT: torch.Tensor | None
) -> tuple[dict[int, torch.Tensor], int]:
    """The result of each chunk of this rank (B, N, chunk, H), and its blind queries."""
    pieces = [x.chunk(n_chunks, dim=2) for x in qkv]
    masks = build_masks(calls, n_chunks, pieces[0][0].shape[2], qkv[0].device.type, document_BT)
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    n_blind = 0
    for call, mask in zip(calls, masks, strict=True):
        q_BNQH, k_BKSH, v_BKSH = (
            torch.cat([piece[i] for i in chunks], dim=2)
            for piece, chunks in zip(pieces, (call.queries, call.keys, call.keys), strict=True)
        )
        out_BNQH, lse_BNQ = attend_part(q_BNQH, k_BKSH, v_BKSH, mask, call.causal)
        n_blind += int((lse_BNQ <= UNSEEN_SCORE / 2).sum())
        n = len(call.queries)
        for chunk, *part in zip(call.queries, out_BNQH.chunk(n, 2), lse_BNQ.chunk(n, 2), strict=True):
            new = (part[0], part[1])
            found[chunk] = merge_parts(found[chunk], new) if chunk in found else new
    return {chunk: out.to(qkv[0].dtype) for chunk, (out, _) in found.items()}, n_blind


def _plain_softmax(qkv: list[torch.Tensor], document_BT: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """In float64, with all T x T scores."""
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    q_BNTH, k_BNTH, v_BNTH = leaves[0], *(x.repeat_interleave(N // K, dim=1) for x in leaves[1:])
    n_tokens = q_BNTH.shape[2]
    seen = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=q_BNTH.device).tril()
    if document_BT is not None:
        seen = (seen & (document_BT[:, :, None] == document_BT[:, None, :]))[:, None]
    score_BNTT = (q_BNTH @ k_BNTH.transpose(2, 3) / H**0.5).masked_fill(~seen, float("-inf"))
    return _differentiated(score_BNTT.softmax(-1) @ v_BNTH, leaves)


def _differentiated(out: torch.Tensor, leaves: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """With a gradient of `out` that differs from place to place, rounded as bf16 would be."""
    pattern = torch.linspace(-1000, 1000, out.numel(), dtype=torch.float64).sin().view(out.shape)
    grads = torch.autograd.grad(out, leaves, pattern.bfloat16().to(out.device, out.dtype))
    return {"out": out.detach(), **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))}
