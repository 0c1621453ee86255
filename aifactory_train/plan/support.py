"""Which layouts the training core of this version runs. The plan and the training ask the same function."""

from __future__ import annotations

from collections.abc import Collection

from aifactory_train.errors import PlanError
from aifactory_train.plan.contract import Layout

_NOT_YET = "this version does not train with"


def why_not_trainable(layout: Layout, given: Collection[str] = ()) -> str | None:
    """One sentence where training refuses the layout, None where it runs.

    Args:
        given: axes that the user set, which are named before those that the plan chose around them.
    """
    if layout.engine != "fsdp2":
        return f"{_NOT_YET} engine {layout.engine}; it has fsdp2"
    axes = ("pp", "dp_replicate", "cp", "tp")
    for axis in sorted(axes, key=lambda axis: axis not in given) if given else axes:
        if getattr(layout, axis) != 1:
            return f"{_NOT_YET} {axis} {getattr(layout, axis)}; the only axis that it splits over is dp_shard"
    if layout.dp_shard != layout.world_size:
        return f"{_NOT_YET} dp_shard {layout.dp_shard} on {layout.world_size} ranks; FSDP spans all ranks"
    if layout.stages_per_rank != 1:
        return f"{_NOT_YET} stages_per_rank {layout.stages_per_rank}; it has no pipeline"
    if layout.zero_stage != 3:
        return f"{_NOT_YET} zero_stage {layout.zero_stage}; fsdp2 splits parameters too, which is stage 3"
    if layout.remat == "selective":
        return f"{_NOT_YET} remat selective; it has none and full"
    if layout.precision == "fp8":
        return f"{_NOT_YET} precision fp8; it has fp32 and bf16"
    if layout.offload != "none":
        return f"{_NOT_YET} offload {layout.offload}; it keeps the optimizer's state on the device"
    return None


def refuse_untrainable(layout: Layout, where: str) -> None:
    """Raise PlanError with the sentence of `why_not_trainable`, where there is one."""
    sentence = why_not_trainable(layout)
    if sentence is not None:
        error = PlanError(
            sentence,
            where=where,
            do="aifactory-train launch RECIPE --run RUN  writes one that this version trains, or says what to change",
        )
        error.on_every_rank = True  # all ranks read the same plan
        raise error
