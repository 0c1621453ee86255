"""The one order in which the axes are applied to a model that stands on the meta device."""

from __future__ import annotations

import torch

from aifactory_train.errors import PlanError
from aifactory_train.models.parts import ModelParts
from aifactory_train.parallel.context import apply_context_parallel
from aifactory_train.parallel.mesh import Mesh
from aifactory_train.parallel.precision import apply_precision
from aifactory_train.parallel.remat import apply_remat
from aifactory_train.parallel.shard import apply_fsdp
from aifactory_train.parallel.tensor import apply_tensor_parallel
from aifactory_train.plan.contract import Layout

# The first whose pipelines, DTensors, flex_attention and selective checkpoints do what is asked of them here; older
# ones were never tried.
NEEDED_TORCH = (2, 13)


def refuse_old_torch(layout: Layout) -> None:
    """Raise PlanError where the layout has something that the torch of this environment is too old for."""
    parts = [f"{axis} {getattr(layout, axis)}" for axis in ("pp", "cp", "tp") if getattr(layout, axis) > 1]
    parts += ["remat selective"] if layout.remat == "selective" else []
    if parts and tuple(map(int, torch.__version__.split(".")[:2])) < NEEDED_TORCH:
        least = ".".join(map(str, NEEDED_TORCH))
        error = PlanError(
            f"{', '.join(parts)}: needs torch {least} or newer, this is {torch.__version__}",
            where="plan.json: layout",
            do="--set layout.pp=1 --set layout.cp=1 --set layout.tp=1 --set layout.remat=full, or a newer torch",
        )
        error.on_every_rank = True
        raise error


def apply_parallelism(parts: ModelParts, mesh: Mesh, layout: Layout, seq_len_tokens: int) -> None:
    """All axes but pp, which has cut the model into `parts` already. Changes `parts` in place.

    Linears change before they are split, split ones are recomputed, and all of that is compiled; FSDP's hooks stay
    outside of the compiled region.
    """
    apply_precision(parts, layout)
    if layout.tp > 1:
        apply_tensor_parallel(parts, mesh.weights["tp"])
    if layout.cp > 1:
        apply_context_parallel(parts, mesh.rows["cp"], layout, seq_len_tokens)
    apply_remat(parts, layout)
    if layout.compile:
        for module in (*parts.blocks, parts.root.get_submodule("chunk_loss")):
            module.compile(dynamic=False)
    apply_fsdp(parts, mesh, layout)
