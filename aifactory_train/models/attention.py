"""Causal attention, limited to documents when the batch says where they are.

Shapes: B rows, T tokens, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

# None: plain causal. Tensor (B, 1, T, T), bool: dense mask. Otherwise a flex_attention BlockMask.
Mask = Any


def build_mask(document_BT: torch.Tensor | None) -> Mask:
    """The attention mask of one micro-batch, made once and shared by all layers.

    Args:
        document_BT: index of the document of each token, or None for plain causal attention.
    """
    if document_BT is None:
        return None
    if document_BT.is_cuda:
        return _block_mask(document_BT)
    n_tokens = document_BT.shape[1]
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    causal_TT = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=document_BT.device).tril()
    return (same_BTT & causal_TT)[:, None]


def attend(q_BNTH: torch.Tensor, k_BKTH: torch.Tensor, v_BKTH: torch.Tensor, mask: Mask) -> torch.Tensor:
    """softmax(q k^T / sqrt(H)) v under the mask; K divides N. Returns (B, N, T, H)."""
    grouped = q_BNTH.shape[1] != k_BKTH.shape[1]
    if mask is not None and not isinstance(mask, torch.Tensor):
        return _flex()(q_BNTH, k_BKTH, v_BKTH, block_mask=mask, enable_gqa=grouped)
    if grouped and not q_BNTH.is_cuda:
        # The CPU kernel has no grouped form; with enable_gqa it falls back to one that holds all T x T scores.
        groups = q_BNTH.shape[1] // k_BKTH.shape[1]
        k_BKTH, v_BKTH = (x.repeat_interleave(groups, dim=1) for x in (k_BKTH, v_BKTH))
        grouped = False
    return F.scaled_dot_product_attention(
        q_BNTH, k_BKTH, v_BKTH, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


@lru_cache(maxsize=1)
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, flex_attention holds all T x T scores; inside a compiled block this is inlined.
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(document_BT: torch.Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def same_document_and_causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (document_BT[b, q] == document_BT[b, k])

    n_rows, n_tokens = document_BT.shape
    return create_block_mask(same_document_and_causal, n_rows, None, n_tokens, n_tokens, device=document_BT.device)
