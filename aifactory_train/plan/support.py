"""Which layouts the training core of this version runs. The plan and the training ask the same function."""

from __future__ import annotations

from aifactory_train.errors import PlanError
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.stages import V_SCHEDULES

_NOT_YET = "this version does not train with"


def why_not_trainable(layout: Layout) -> str | None:
    """One sentence where training refuses the layout, None where it runs."""
    if layout.engine != "fsdp2":
        return f"{_NOT_YET} engine {layout.engine}; it has fsdp2"
    if layout.zero_stage != 3:
        return f"{_NOT_YET} zero_stage {layout.zero_stage}; fsdp2 splits parameters too, which is stage 3"
    if layout.offload != "none":
        return f"{_NOT_YET} offload {layout.offload}; it keeps the optimizer's state on the device"
    if layout.remat == "budget" and not (layout.compile and layout.remat_budget_frac):
        return "remat budget needs compile and remat_budget_frac: the compiler chooses what it computes again"
    if layout.pp > 1 and layout.pipeline_schedule in V_SCHEDULES:
        return _why_no_split_backward(layout)
    return None


def _why_no_split_backward(layout: Layout) -> str | None:
    """The V schedules cut the backward pass of a block in two (pipelining/_backward.py of torch 2.13)."""
    if layout.reshard_after_forward:
        return (
            f"{layout.pipeline_schedule} with reshard_after_forward: its split backward pass makes no gradients of "
            "weights that forward gave back"
        )
    if layout.compile:
        return f"{layout.pipeline_schedule} with compile: a compiled block has one backward pass, which it cannot split"
    if layout.remat != "none":
        return f"{layout.pipeline_schedule} with remat {layout.remat}: it would compute a block again for each weight"
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
