"""Wishes of a recipe that contradict each other, the model or the machine, whatever the number of nodes."""

from __future__ import annotations

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.layout import fp8_fault, fp8_tokens_fault, model_code
from aifactory_train.plan.rates import Precision, device_rates, rate_key
from aifactory_train.plan.search import choose_precision
from aifactory_train.plan.shape import OUR_LINEARS
from aifactory_train.plan.stages import V_SCHEDULES
from aifactory_train.recipe.schema import Recipe

Fault = tuple[bool, str, str]  # whether it is one, what, do


def check_kind(recipe: Recipe, machine: Machine) -> None:
    """Refuse engine, ZeRO stage, offload, model code, adapters, precision, schedule and remat that do not go together.

    Raises:
        PlanError: with what to set instead. It holds for any number of nodes.
    """
    faults: list[Fault] = [
        *_engine_faults(recipe),
        *_model_faults(recipe),
        *_fp8_faults(recipe, machine, choose_precision(recipe, machine)),
        *_schedule_faults(recipe, machine),
    ]
    for is_fault, what, do in faults:
        if is_fault:
            raise PlanError(what, where=f"recipe {recipe.name} on machine {machine.name}", do=do)


def asks_for_deepspeed(recipe: Recipe) -> bool:
    """Whether the recipe names the engine, or what only it has."""
    wish = recipe.layout
    return wish.engine == "deepspeed" or wish.zero_stage in (1, 2) or wish.offload in ("optimizer", "parameters")


def _given_axes(recipe: Recipe, *axes: str) -> str:
    return ", ".join(axis for axis in axes if getattr(recipe.layout, axis) not in ("auto", 1))


def _engine_faults(recipe: Recipe) -> list[Fault]:
    wish, deepspeed = recipe.layout, asks_for_deepspeed(recipe)
    fsdp2, stage, precision = wish.engine == "fsdp2", wish.zero_stage, recipe.train.precision
    axes = _given_axes(recipe, "pp", "dp_replicate", "cp", "tp")
    to_fsdp2 = "--set layout.engine=fsdp2 --set layout.zero_stage=3 --set layout.offload=none"
    return [
        (
            fsdp2 and stage in (1, 2),
            f"layout.zero_stage {stage} is deepspeed's; engine fsdp2 splits parameters too, which is stage 3",
            "--set layout.engine=deepspeed, or --set layout.zero_stage=3",
        ),
        (
            fsdp2 and wish.offload not in ("auto", "none"),
            f"layout.offload {wish.offload} is deepspeed's; engine fsdp2 keeps weights and optimizer on the device",
            "--set layout.engine=deepspeed, or --set layout.offload=none",
        ),
        (
            wish.offload == "parameters" and stage in (1, 2),
            f"layout.offload parameters with zero_stage {stage}: only stage 3 splits parameters, so that they can wait "
            "in host memory",
            "--set layout.zero_stage=3, or --set layout.offload=optimizer",
        ),
        (
            deepspeed and bool(axes),
            f"layout.{axes} above 1 with deepspeed, which splits over dp_shard alone",
            f"{to_fsdp2}, or leave the axis at auto",
        ),
        (
            deepspeed and recipe.optim.name != "adamw",
            f"optim.name {recipe.optim.name} with deepspeed, which has adamw",
            f"--set optim.name=adamw, or {to_fsdp2}",
        ),
        (
            deepspeed and precision in ("fp8", "fp8_rowwise"),
            f"train.precision {precision} with deepspeed, which has bf16 and fp32",
            f"--set train.precision=bf16, or {to_fsdp2}",
        ),
        (
            deepspeed and wish.pipeline_schedule not in ("auto", "1f1b"),
            f"layout.pipeline_schedule {wish.pipeline_schedule} with deepspeed, which here has no pipeline",
            f"--set layout.pipeline_schedule=auto, or {to_fsdp2}",
        ),
        (
            stage in (1, 2) and wish.reshard_after_forward is True,
            f"layout.reshard_after_forward true with zero_stage {stage}: only stage 3 splits parameters, so that they "
            "can be given back after the forward pass",
            "--set layout.reshard_after_forward=auto, or --set layout.zero_stage=3",
        ),
        (
            deepspeed and (stage == 3 or wish.offload == "parameters") and wish.reshard_after_forward is False,
            "layout.reshard_after_forward false with deepspeed's stage 3, which gives each block back after its use",
            f"--set layout.reshard_after_forward=auto, or {to_fsdp2}",
        ),
        (
            wish.deepspeed is not None and not deepspeed,
            "layout.deepspeed holds options of deepspeed, and "
            + ("layout.engine is fsdp2" if fsdp2 else "layout.engine auto takes fsdp2"),
            "--set layout.engine=deepspeed, or --set layout.deepspeed=null",
        ),
    ]


def _model_faults(recipe: Recipe) -> list[Fault]:
    """Of the code that computes the model, and of adapters."""
    wish, model, lora = recipe.layout, recipe.model, recipe.lora is not None
    axes = _given_axes(recipe, "pp", "cp", "tp")
    named = str((model.hf_config or {}).get("model_type", model.family))
    targets = [] if recipe.lora is None or recipe.lora.targets == "all-linear" else recipe.lora.targets
    unknown = [name for name in targets if name.rpartition(".")[2] not in OUR_LINEARS]
    why_transformers = "layout.model_code transformers" if wish.model_code == "transformers" else f"model {named}"
    or_own = ", or --set layout.model_code=own" if model.family != "other" else ""
    one_each = " ".join(f"--set layout.{axis}=1" for axis in axes.split(", "))
    return [
        (
            wish.model_code == "own" and model.family == "other",
            f"layout.model_code own: our decoder has no {named} models; it has llama, mistral, qwen2 and qwen3",
            "--set layout.model_code=transformers, or leave it at auto",
        ),
        (
            model_code(recipe) == "transformers" and bool(axes),
            f"layout.{axes} above 1 with {why_transformers}: the code of transformers is not split over it, only our "
            "decoder is",
            one_each + or_own,
        ),
        (
            lora and model.init_from is None,
            "lora without model.init_from: adapters on random weights learn nothing of use",
            "--set model.init_from=FOLDER, one with the weights in safetensors, or --set lora=null",
        ),
        (
            lora and bool(axes),
            f"layout.{axes} above 1 with lora: adapters are split over dp_shard and dp_replicate alone",
            f"{one_each}, or --set lora=null",
        ),
        (
            lora and recipe.optim.name == "muon",
            "optim.name muon with lora: it wants whole matrices, and adapters are thin ones",
            "--set optim.name=adamw, or --set lora=null",
        ),
        (
            model_code(recipe) == "own" and bool(unknown),
            f"lora.targets names {', '.join(unknown)}, and no linear of our decoder is called so; there are: "
            f"{', '.join(OUR_LINEARS)}",
            "--set lora.targets=all-linear, or some of these names",
        ),
    ]


def _fp8_faults(recipe: Recipe, machine: Machine, precision: Precision) -> list[Fault]:
    """Linears that stay in bf16, no units for it, or sizes that they do not take.

    On auto tp, cp and micro-batch count as what divides best.
    """
    if rate_key(precision) != "fp8":
        return []
    foreign = model_code(recipe) == "transformers"
    or_own = ", or --set layout.model_code=own" if recipe.model.family != "other" else ""
    unknown = device_rates(machine, "fp8").peak_flops_per_s is None
    what = f"train.precision {precision}: {machine.device.name} has no fp8 units that its machine file knows"
    least = "9.0" if precision == "fp8_rowwise" else "8.9"
    needs = f"; fp8 matrix products need a GPU of compute capability {least} or an MI300"
    do = "--set train.precision=auto"
    if machine.device.kind != "cpu":
        do += ", or give the machine file its device.peak_flops_per_s.fp8"
    wish, rows = recipe.layout, recipe.train.micro_batch_rows
    tp, cp = (1 if degree == "auto" else degree for degree in (wish.tp, wish.cp))
    sides = fp8_fault(recipe.model, tp)
    tokens = fp8_tokens_fault(recipe.global_batch_rows if rows == "auto" else rows, recipe.data.seq_len_tokens, cp)
    return [
        (
            foreign,
            f"train.precision {precision} with the code of transformers: only the linears of our decoder go to fp8",
            "--set train.precision=bf16" + or_own,
        ),
        (
            recipe.lora is not None,
            f"train.precision {precision} with lora: adapters are too thin for fp8 units",
            "--set train.precision=bf16, or --set lora=null",
        ),
        (unknown, what + needs, do),
        (
            sides is not None,
            f"train.precision {precision}: {sides}",
            "--set train.precision=bf16" + ", or a smaller layout.tp" * (tp > 1),
        ),
        (
            tokens is not None,
            f"train.precision {precision}: {tokens}",
            "--set train.precision=bf16, or another train.micro_batch_rows or data.seq_len_tokens",
        ),
    ]


def _schedule_faults(recipe: Recipe, machine: Machine) -> list[Fault]:
    """zbv and dualpipev compute the gradients of weights after those of inputs, in two passes over autograd's graph."""
    wish, schedule = recipe.layout, recipe.layout.pipeline_schedule
    splits, alone = schedule in V_SCHEDULES, wish.pp == 1 or (wish.pp == "auto" and machine.device.kind == "cpu")
    named, do = f"layout.pipeline_schedule {schedule}", "or --set layout.pipeline_schedule=auto"
    return [
        (
            schedule not in ("auto", "1f1b") and alone,
            f"{named} with pp 1: there is no pipeline",
            f"--set layout.pp=2, {do}",
        ),
        (
            splits and recipe.train.compile is True,
            f"{named} splits the backward pass of a block, and train.compile true makes it one piece, to be run twice",
            f"--set train.compile=false, {do}",
        ),
        (
            splits and wish.remat not in ("auto", "none"),
            f"{named} with remat {wish.remat}: its split backward pass would compute a block again for each weight",
            f"--set layout.remat=none, {do}",
        ),
    ]
