"""The one order in which the axes are applied to a model that stands on the meta device."""

from __future__ import annotations

from aifactory_train.models.parts import ModelParts
from aifactory_train.parallel.context import apply_context_parallel
from aifactory_train.parallel.mesh import Mesh
from aifactory_train.parallel.remat import apply_remat
from aifactory_train.parallel.shard import apply_fsdp
from aifactory_train.parallel.tensor import apply_tensor_parallel
from aifactory_train.plan.contract import Layout


def apply_parallelism(parts: ModelParts, mesh: Mesh, layout: Layout, seq_len_tokens: int) -> None:
    """All axes but pp, which has cut the model into `parts` already. Changes `parts` in place.

    Linears change before they are split, split ones are recomputed, and all of that is compiled; FSDP's hooks stay
    outside of the compiled region.
    """
    if layout.tp > 1:
        apply_tensor_parallel(parts, mesh.weights["tp"])
    if layout.cp > 1:
        apply_context_parallel(parts, mesh.rows["cp"], layout, seq_len_tokens)
    apply_remat(parts, layout)
    if layout.compile:
        for module in (*parts.blocks, parts.root.get_submodule("chunk_loss")):
            module.compile(dynamic=False)
    apply_fsdp(parts, mesh, layout)
