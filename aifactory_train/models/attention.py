"""Causal attention, limited to documents when the batch says where they are.

Shapes: B rows, T tokens, N query heads, K key/value heads, H head width. Where queries meet other tokens than their
own, Q is the number of queries and S that of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import flex_attention as flex

from aifactory_train.plan.shape import CPU_CHUNKED_ROW_TOKENS

CPU_CHUNK_TOKENS = 64


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at its first call, as torch.compile imports the compiler: seconds of each rank's start on a CPU."""
    compile_once = cache(lambda: torch.compile(function, dynamic=False))

    def call(*args: Any, **kwargs: Any) -> Any:
        # A compiled block inlines it.
        return (function if torch.compiler.is_compiling() else compile_once())(*args, **kwargs)

    return call


# Uncompiled, the one holds all T x T scores and the other the dense mask.
_flex_attention = _compiled(flex.flex_attention)
_create_block_mask = _compiled(flex.create_block_mask)

# Of a key that a query may not see. Finite, so that a query that sees no key at all has weights and gradients that are
# numbers; its log-sum-exp stays so low that a merge gives it no weight.
UNSEEN_SCORE = -1e30

# None: plain causal. Tensor (B, 1, T, T), bool: dense mask. Otherwise a flex_attention BlockMask.
Mask = Any


@dataclass(frozen=True)
class Attention:
    """How the tokens of a row meet. Context parallelism puts its own in place of `LOCAL`.

    build_mask: called once per micro-batch with document_BT of whole rows, or None; what it returns goes to each layer.
    attend: (q_BNTH, k_BKTH, v_BKTH, mask) to (B, N, T, H), on the tokens of this rank.
    """

    build_mask: Callable[[torch.Tensor | None], Mask]
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask], torch.Tensor]


def build_mask(document_BT: torch.Tensor | None) -> Mask:
    """The attention mask of one micro-batch, made once and shared by all layers.

    Args:
        document_BT: index of the document of each token, or None for plain causal attention.
    """
    if document_BT is None:
        return None
    if document_BT.is_cuda:
        return block_mask(document_BT)
    n_tokens = document_BT.shape[1]
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    causal_TT = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=document_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]


def attend(q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor, mask: Mask) -> torch.Tensor:
    """softmax(q k^T / sqrt(H)) v under the mask; K divides N. Returns (B, N, T, H)."""
    grouped = q_BNTH.shape[1] != k_BKTH.shape[1]
    if mask is not None and not isinstance(mask, torch.Tensor):
        return _flex_attention(q_BNTH, k_BKTH, v_BKTH, block_mask=mask, enable_gqa=grouped)
    if q_BNTH.is_cuda:
        return F.scaled_dot_product_attention(q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=grouped)
    if q_BNTH.shape[2] <= CPU_CHUNKED_ROW_TOKENS:
        return _attend_in_chunks(q_BNTH, k_BKTH, v_BKTH, mask)
    # The CPU kernel has no grouped form; with enable_gqa it falls back to one that holds all T x T scores.
    groups = q_BNTH.shape[1] // k_BKTH.shape[1]
    k_BNTH, v_BNTH = (x.repeat_interleave(groups, dim=1) for x in (k_BKTH, v_BKTH))
    return F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, attn_mask=mask, is_causal=mask is None)


def _attend_in_chunks(q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Queries in chunks, each against the keys up to its own end: half of the scores are never made.

    Faster than torch's CPU kernel on short rows (benchmarks/attention_cpu.py): the query heads of a group share one
    matrix product, and the scores of a chunk stay in the cache. B * N * T * T / 2 weights are kept for backward.
    """
    (n_rows, n_heads, n_tokens, head), n_kv_heads = q_BNTH.shape, k_BKTH.shape[1]
    groups = n_heads // n_kv_heads
    q_BKGTH = (q_BNTH * head**-0.5).view(n_rows, n_kv_heads, groups, n_tokens, head)
    k_BKHT = k_BKTH.transpose(2, 3)
    out = []
    for start in range(0, n_tokens, CPU_CHUNK_TOKENS):
        end = min(start + CPU_CHUNK_TOKENS, n_tokens)
        n = end - start
        q_BKXH = q_BKGTH[:, :, :, start:end].reshape(n_rows, n_kv_heads, groups * n, head)
        score = (q_BKXH @ k_BKHT[..., :end]).view(n_rows, n_kv_heads, groups, n, end).float()
        if mask is None:
            score = score + _later_keys(n, start, score.device)
        else:
            score = score.masked_fill(~mask[:, None, :, start:end, :end], float("-inf"))
        weight = score.softmax(-1).to(v_BKTH.dtype).view(n_rows, n_kv_heads, groups * n, end)
        out.append((weight @ v_BKTH[:, :, :end]).view(n_rows, n_heads, n, head))
    return torch.cat(out, dim=2)


def _later_keys(n_queries: int, start: int, device: torch.device) -> torch.Tensor:
    """-inf where a key lies after its query, else 0; (n_queries, start + n_queries)."""
    later = torch.full((n_queries, n_queries), float("-inf"), device=device).triu(1)
    return F.pad(later, (start, 0))


def block_mask(document_BT: torch.Tensor) -> Any:
    def same_document_and_causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (document_BT[b, q] == document_BT[b, k])

    n_rows, n_tokens = document_BT.shape
    return _create_block_mask(same_document_and_causal, n_rows, None, n_tokens, n_tokens, device=document_BT.device)


def build_part_mask(
    documents: tuple[torch.Tensor, torch.Tensor] | None, n_queries: int, n_keys: int, causal: bool, device_type: str
) -> Mask:
    """The mask of `attend_part`.

    Args:
        documents: document_BQ of the queries and document_BS of the keys.
    """
    if device_type == "cuda":
        return part_block_mask(documents, n_queries, n_keys, causal, device_type)
    if documents is None:
        return None
    same_BQS = documents[0][:, :, None] == documents[1][:, None, :]
    return (same_BQS.tril(n_keys - n_queries) if causal else same_BQS)[:, None]


def part_block_mask(
    documents: tuple[torch.Tensor, torch.Tensor] | None, n_queries: int, n_keys: int, causal: bool, device_type: str
) -> Any:
    """A BlockMask, or None where all keys are seen."""
    before = n_keys - n_queries

    def reached(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q + before >= k

    if documents is None:
        # One mask for all rows.
        return _create_block_mask(reached, None, None, n_queries, n_keys, device=device_type) if causal else None
    document_BQ, document_BS = documents

    def same_document(b: Any, h: Any, q: Any, k: Any) -> Any:
        return document_BQ[b, q] == document_BS[b, k]

    sees = flex.and_masks(same_document, reached) if causal else same_document
    return _create_block_mask(sees, document_BQ.shape[0], None, n_queries, n_keys, device=document_BQ.device)


def attend_part(
    q_BNQH: torch.Tensor, k_BKSH: torch.Tensor, v_BKSH: torch.Tensor, mask: Mask, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some queries to some of their keys, to be merged by `merge_parts`.

    Args:
        mask: of `build_part_mask`.
        causal: the last query stands at the last key. Otherwise all keys may be seen.

    Returns:
        out (B, N, Q, H) and the log-sum-exp of the scores (B, N, Q), float32. Where a query sees no key, out is some
        number and the log-sum-exp about UNSEEN_SCORE.
    """
    if q_BNQH.is_cuda:
        return _attend_part_flex(q_BNQH, k_BKSH, v_BKSH, mask)
    (n_rows, n_heads, n_queries, head), (n_kv_heads, n_keys) = q_BNQH.shape, k_BKSH.shape[1:3]
    groups = n_heads // n_kv_heads
    q_BKGQH = (q_BNQH * head**-0.5).view(n_rows, n_kv_heads, groups, n_queries, head)
    k_BKHS = k_BKSH.transpose(2, 3)
    outs, lses = [], []
    for start in range(0, n_queries, CPU_CHUNK_TOKENS):
        stop = min(start + CPU_CHUNK_TOKENS, n_queries)
        n, end = stop - start, (n_keys - n_queries + stop if causal else n_keys)
        q_BKXH = q_BKGQH[:, :, :, start:stop].reshape(n_rows, n_kv_heads, groups * n, head)
        score = (q_BKXH @ k_BKHS[..., :end]).view(n_rows, n_kv_heads, groups, n, end).float()
        if mask is not None:
            score = score.masked_fill(~mask[:, None, :, start:stop, :end], UNSEEN_SCORE)
        elif causal:
            score = score + _later_keys(n, end - n, score.device)
        weight = score.softmax(-1).to(v_BKSH.dtype).view(n_rows, n_kv_heads, groups * n, end)
        outs.append((weight @ v_BKSH[:, :, :end]).view(n_rows, n_heads, n, head))
        lses.append(score.logsumexp(-1).view(n_rows, n_heads, n))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _attend_part_flex(
    q_BNQH: torch.Tensor, k_BKSH: torch.Tensor, v_BKSH: torch.Tensor, mask: Mask
) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = q_BNQH.shape[1] != k_BKSH.shape[1]
    out_BNQH, aux = _flex_attention(
        q_BNQH, k_BKSH, v_BKSH, block_mask=mask, enable_gqa=grouped, return_aux=flex.AuxRequest(lse=True)
    )
    return out_BNQH, aux.lse.float().clamp(min=UNSEEN_SCORE)  # -inf where no key is seen


def merge_parts(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two results of `attend_part` for the same queries and other keys as one, in float32."""
    (out_a_BNQH, lse_a_BNQ), (out_b_BNQH, lse_b_BNQ) = one, other
    share_BNQ1 = torch.sigmoid(lse_b_BNQ - lse_a_BNQ)[..., None]
    return torch.lerp(out_a_BNQH.float(), out_b_BNQH.float(), share_BNQ1), torch.logaddexp(lse_a_BNQ, lse_b_BNQ)


LOCAL = Attention(build_mask, attend)
