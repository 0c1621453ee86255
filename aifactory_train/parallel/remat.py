"""Recompute activations in the backward pass in place of keeping them."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from aifactory_train.models.parts import ModelParts


def apply_full_remat(parts: ModelParts) -> None:
    """Each block keeps its input only and runs its forward once more in the backward pass.

    In place, without a wrapping module, so that the names of parameters stay. The blocks draw no random numbers.
    """
    for block in parts.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
