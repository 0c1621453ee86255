"""AdamW, Muon on sharded matrices, and the learning rate as a pure function of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from aifactory_train.models.parts import ModelParts, local_part, local_tensor
from aifactory_train.recipe.schema import Optim, Schedule

# Keller Jordan's quintic, as in torch.optim.Muon.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_EPS = 1e-7


def lr_factor(schedule: Schedule, tokens: int, budget_tokens: int) -> float:
    """Share of the peak learning rate after `tokens` of `budget_tokens`, in [0, 1]."""
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    floor = schedule.min_lr_frac
    start = schedule.warmup_tokens
    if schedule.decay_tokens is not None:
        start = budget_tokens - schedule.decay_tokens
    done = min(1.0, max(0.0, (tokens - start) / max(1, budget_tokens - start)))
    if schedule.shape == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * (1 - done)


def build_optimizers(stages: list[ModelParts], optim: Optim, precision: torch.dtype) -> list[Optimizer]:
    """AdamW over what trains of this rank's stages, or Muon over the block matrices and AdamW over the rest.

    Each group carries `peak_lr`, from which `set_lr` makes `lr` at every step. Vectors are not decayed.
    """
    matrices = [p for parts in stages for p in parts.block_matrices()] if optim.name == "muon" else []
    taken = {id(p) for p in matrices}
    rest = [p for parts in stages for p in parts.root.parameters() if p.requires_grad and id(p) not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if n_dims(p) >= 2], "weight_decay": optim.weight_decay, "peak_lr": optim.lr},
        {"params": [p for p in rest if n_dims(p) < 2], "weight_decay": 0.0, "peak_lr": optim.lr},
    ]
    groups = [group for group in groups if group["params"]]  # all adapters are matrices
    adamw = AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    if not matrices:
        return [adamw]
    muon = Muon(matrices, optim.muon_lr, optim.muon_momentum, optim.weight_decay, precision)
    return [adamw, muon]


def n_dims(weight: Tensor) -> int:
    """Of the whole weight: what ZeRO has split is flat, and remembers its shape."""
    return len(getattr(weight, "ds_shape", weight.shape))


@torch.no_grad()
def build_state(optimizers: list[Optimizer]) -> None:
    """Make the state that the first step would make, before it: zeros. Nothing where it is there already.

    A step of size 0 changes no weight; gradients that are there are lost.
    """
    for optimizer in optimizers:
        if optimizer.state:
            continue
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for state in optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()


def set_lr(optimizers: list[Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class Muon(Optimizer):
    """Momentum made orthogonal by Newton-Schulz (kellerjordan.github.io/posts/muon), for sharded matrices.

    torch.optim.Muon works on whole matrices; here the momentum is gathered, so every rank computes the same
    update and keeps its part. `precision` is the dtype of the iteration: float32 keeps 1 and N ranks equal.
    """

    def __init__(
        self, params: list[Any], lr: float, momentum: float, weight_decay: float, precision: torch.dtype
    ) -> None:
        group = {"params": params, "peak_lr": lr}
        super().__init__([group], {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Collective over the mesh of each parameter: all its ranks arrive, in parameter order."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                nesterov = p.grad.lerp(momentum, group["momentum"])
                full = nesterov.full_tensor() if isinstance(nesterov, DTensor) else nesterov
                update = orthogonalize(full, self.precision)
                rows, columns = full.shape
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                local = local_tensor(p)
                local.mul_(1 - group["lr"] * group["weight_decay"])
                local.add_(local_part(p, update).to(local.dtype), alpha=-scale)


def orthogonalize(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(precision)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=NEWTON_SCHULZ_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        # addmm rounds once where `+` and `@` would round twice, which in bf16 is seen.
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
