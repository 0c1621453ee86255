"""Which layouts the training core of this version runs. The plan and the training ask the same function."""

from __future__ import annotations

from aifactory_train.errors import PlanError
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.stages import V_SCHEDULES


def why_not_trainable(layout: Layout) -> str | None:
    """One sentence where training refuses the layout, None where it runs."""
    sentence = _why_not_deepspeed(layout) if layout.engine == "deepspeed" else _why_not_fsdp2(layout)
    if sentence is not None:
        return sentence
    if layout.model_code == "transformers" and (axes := split_axes(layout)):
        return f"{axes} with model_code transformers: its own code is not split over it, only our decoder is"
    if layout.model_code == "transformers" and layout.precision in ("fp8", "fp8_rowwise"):
        return f"precision {layout.precision} with model_code transformers: only the linears of our decoder go to fp8"
    if layout.remat == "budget" and not (layout.compile and layout.remat_budget_frac):
        return "remat budget needs compile and remat_budget_frac: the compiler chooses what it computes again"
    if layout.pp > 1 and layout.pipeline_schedule in V_SCHEDULES:
        return _why_no_split_backward(layout)
    return None


def split_axes(layout: Layout, axes: tuple[str, ...] = ("pp", "cp", "tp")) -> str:
    """Those of them that have more than one rank: "pp 2, tp 4"."""
    return ", ".join(f"{axis} {degree}" for axis in axes if (degree := getattr(layout, axis)) > 1)


def _why_not_fsdp2(layout: Layout) -> str | None:
    if layout.zero_stage != 3:
        return f"fsdp2 with zero_stage {layout.zero_stage}: it splits parameters too, which is stage 3"
    if layout.offload != "none":
        return f"fsdp2 with offload {layout.offload}: it keeps the optimizer's state on the device, deepspeed does not"
    return None


def _why_not_deepspeed(layout: Layout) -> str | None:
    if axes := split_axes(layout, ("pp", "dp_replicate", "cp", "tp")):
        return f"deepspeed with {axes}: it splits over dp_shard alone"
    if layout.precision in ("fp8", "fp8_rowwise"):
        return f"deepspeed with precision {layout.precision}: it has bf16 and fp32"
    if layout.offload == "parameters" and layout.zero_stage != 3:
        return f"deepspeed with offload parameters and zero_stage {layout.zero_stage}: only stage 3 splits parameters"
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
