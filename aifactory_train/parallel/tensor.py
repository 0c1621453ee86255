"""Axis tp."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from aifactory_train.models.parts import ModelParts


def apply_tensor_parallel(parts: ModelParts, mesh: DeviceMesh) -> None:
    raise NotImplementedError
