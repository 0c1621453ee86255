"""Axes dp_replicate, dp_shard and cp: FSDP2. Parameters, gradients and optimizer state live sharded in float32."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from aifactory_train.models.parts import DTYPES, ModelParts
from aifactory_train.parallel.mesh import Mesh
from aifactory_train.plan.contract import Layout


def apply_fsdp(parts: ModelParts, mesh: Mesh, layout: Layout) -> None:
    """Shard each block, then the rest as one group. Gradients are reduced in float32.

    With dp_replicate above 1 each group of shards has copies (HSDP). Inputs are not cast at the border of a block: the
    RoPE angles must stay float32.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[layout.precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    axes = mesh.weights["dp_replicate", "fsdp"] if layout.dp_replicate > 1 else mesh.weights["fsdp"]
    for block in parts.blocks:
        fully_shard(block, mesh=axes, mp_policy=policy, reshard_after_forward=layout.reshard_after_forward)
    # The root group is needed again as soon as forward ends, so it stays gathered.
    fully_shard(parts.root, mesh=axes, mp_policy=policy, reshard_after_forward=False)
