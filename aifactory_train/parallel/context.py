"""Axis cp."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from aifactory_train.models.parts import ModelParts
from aifactory_train.plan.contract import Layout


def local_tokens(layout: Layout, seq_len_tokens: int, cp_rank: int) -> torch.Tensor:
    raise NotImplementedError


def apply_context_parallel(parts: ModelParts, mesh: DeviceMesh, layout: Layout, seq_len_tokens: int) -> None:
    raise NotImplementedError
