"""Cross entropy straight from hidden states, in chunks, so that the full logits are never held.

Shapes: N tokens, D width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from aifactory_train.plan.shape import LOSS_CHUNK_TOKENS

IGNORE = -100


class ChunkLoss(nn.Module):
    """Logits (C, V) and targets (C,) to the summed loss (float32) and its gradient in the dtype of the logits.

    A module so that it can be compiled in place: the pointwise passes over (C, V) then become two.
    """

    def forward(self, logits_CV: torch.Tensor, target_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        valid_C = target_C != IGNORE
        index_C1 = target_C.clamp(min=0)[:, None]
        logp_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
        loss = torch.where(valid_C, -logp_CV.gather(1, index_C1).squeeze(1), 0.0).sum()
        columns_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
        p_CV = logp_CV.exp()
        grad_CV = torch.where(columns_V == index_C1, p_CV - 1, p_CV)
        return loss, (grad_CV * valid_C[:, None]).to(logits_CV.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in forward, chunk by chunk, so that no logits wait for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, chunk_loss: nn.Module
    ) -> torch.Tensor:
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_grad else None
        # bf16 would lose the small terms of later chunks, so chunks are summed in float32.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_grad else None
        for start in range(0, hidden_ND.shape[0], LOSS_CHUNK_TOKENS):
            rows = slice(start, start + LOSS_CHUNK_TOKENS)
            logits_CV = hidden_ND[rows] @ weight_VD.T
            part, grad_CV = chunk_loss(logits_CV, target_N[rows])
            loss += part
            if grad_hidden_ND is not None and grad_weight_VD is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[rows])
                grad_weight_VD += grad_CV.T @ hidden_ND[rows]
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grad_outputs
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        # A scale rounded to bf16 would give the blocks other gradients than the head, by up to 0.4 %.
        grad_hidden_ND = (grad_hidden_ND.float() * scale).to(grad_hidden_ND.dtype)
        return grad_hidden_ND, (grad_weight_VD * scale).to(ctx.weight_dtype), None, None


def cross_entropy_sum(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, chunk_loss: nn.Module
) -> torch.Tensor:
    """Sum over valid tokens of -log p(target): a float32 scalar. `chunk_loss` is a ChunkLoss, compiled or not."""
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, chunk_loss)
