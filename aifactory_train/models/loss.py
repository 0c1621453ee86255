"""Cross entropy straight from hidden states, in chunks, so that the full logits are never held.

Shapes: N tokens, D width, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_reduce

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


class VocabularyParallelChunkLoss(nn.Module):
    """ChunkLoss where each rank of axis tp has the logits of some words: (C, V of this rank), targets of all words.

    All ranks return the loss over the whole vocabulary, and each the gradient of its own logits.

    Args:
        first_word: number of the word in column 0.
        group: of axis tp.
    """

    def __init__(self, first_word: int, group: ProcessGroup) -> None:
        super().__init__()
        self.first_word, self.group = first_word, group

    def forward(self, logits_CV: torch.Tensor, target_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shifted_CV = logits_CV.float()
        # Axis tp, twice in each chunk: all its ranks have the same tokens, so all arrive.
        shifted_CV = shifted_CV - all_reduce(shifted_CV.amax(1), "max", self.group)[:, None]
        exp_CV = shifted_CV.exp()
        column_C1 = (target_C - self.first_word)[:, None]
        columns_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
        picked_C1 = shifted_CV.gather(1, column_C1.clamp(0, logits_CV.shape[1] - 1))
        is_here_C1 = (column_C1 >= 0) & (column_C1 < logits_CV.shape[1])
        own_2C = torch.stack((exp_CV.sum(1), torch.where(is_here_C1, picked_C1, 0.0).squeeze(1)))
        sum_C, picked_C = all_reduce(own_2C, "sum", self.group).unbind()
        valid_C = target_C != IGNORE
        loss = torch.where(valid_C, sum_C.log() - picked_C, 0.0).sum()
        p_CV = exp_CV / sum_C[:, None]
        grad_CV = torch.where(columns_V == column_C1, p_CV - 1, p_CV)
        return loss, (grad_CV * valid_C[:, None]).to(logits_CV.dtype)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are made in forward, chunk by chunk, so that no logits wait for backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, chunk_loss: nn.Module
    ) -> torch.Tensor:
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        trains_head = ctx.needs_input_grad[1]  # not below adapters
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if wants_grad else None
        # bf16 would lose the small terms of later chunks, so chunks are summed in float32.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if trains_head else None
        for start in range(0, hidden_ND.shape[0], LOSS_CHUNK_TOKENS):
            rows = slice(start, start + LOSS_CHUNK_TOKENS)
            logits_CV = hidden_ND[rows] @ weight_VD.T
            part, grad_CV = chunk_loss(logits_CV, target_N[rows])
            loss += part
            if grad_hidden_ND is not None:
                torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[rows])
            if grad_weight_VD is not None:
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
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * scale).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_VD, None, None


def cross_entropy_sum(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, chunk_loss: nn.Module
) -> torch.Tensor:
    """Sum over valid tokens of -log p(target): a float32 scalar.

    Args:
        weight_VD: the rows that `chunk_loss` has columns for. Where these are a part of the vocabulary, the gradient of
            hidden_ND is that part's share of the whole.
        chunk_loss: a ChunkLoss or a VocabularyParallelChunkLoss, compiled or not.
    """
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, target_N, chunk_loss)
