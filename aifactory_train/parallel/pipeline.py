"""Axis pp."""

from __future__ import annotations

import torch
from torch import Tensor

from aifactory_train.models.parts import ModelParts
from aifactory_train.parallel.mesh import Mesh
from aifactory_train.plan.plan import Plan


class Pipeline:
    def forward_backward(self, tensors: tuple[Tensor | None, ...], scale: Tensor) -> Tensor:
        raise NotImplementedError

    def total_norm(self, norm: Tensor) -> Tensor:
        raise NotImplementedError


def build_pipeline(plan: Plan, stages: list[ModelParts], mesh: Mesh, device: torch.device) -> Pipeline:
    raise NotImplementedError
