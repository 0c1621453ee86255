"""Axis dp_shard: FSDP2. Parameters, gradients and optimizer state live sharded in float32."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from aifactory_train.models.parts import ModelParts
from aifactory_train.plan.contract import Layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def apply_fsdp(parts: ModelParts, mesh: DeviceMesh, layout: Layout) -> None:
    """Shard each block, then the rest as one group. Gradients are reduced in float32.

    Inputs are not cast at the border of a block: the RoPE angles must stay float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[layout.precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in parts.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=layout.reshard_after_forward)
    # The root group is needed again as soon as forward ends, so it stays gathered.
    fully_shard(parts.root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
