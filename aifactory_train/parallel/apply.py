"""The one order in which the axes are applied to a model that stands on the meta device."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from aifactory_train.models.parts import ModelParts
from aifactory_train.parallel.remat import apply_full_remat
from aifactory_train.parallel.shard import apply_fsdp
from aifactory_train.plan.contract import Layout


def apply_parallelism(parts: ModelParts, mesh: DeviceMesh, layout: Layout) -> None:
    """Remat, compile, shard: FSDP's hooks stay outside of the compiled region. Changes `parts` in place."""
    if layout.remat == "full":
        apply_full_remat(parts)
    if layout.compile:
        for module in (*parts.blocks, parts.chunk_loss):
            module.compile(dynamic=False)
    apply_fsdp(parts, mesh, layout)
