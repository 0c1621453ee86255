"""The JSON of DeepSpeed that a plan stands for, and where a user's own JSON contradicts it. No DeepSpeed needed."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from aifactory_train.errors import PlanError
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.memory import DEEPSPEED_BUCKET
from aifactory_train.recipe.schema import Recipe

if TYPE_CHECKING:
    from aifactory_train.plan.plan import Plan

Options = dict[str, Any]

# Hugging Face's word for "what the trainer says".
AUTO = "auto"

# Where the recipe says what a key of DeepSpeed says.
RECIPE_KEY = {
    "train_batch_size": "train.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_rows",
    "gradient_accumulation_steps": "train.micro_batch_rows",
    "gradient_clipping": "optim.grad_clip_norm",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "zero_optimization.stage": "layout.zero_stage",
    "zero_optimization.offload_optimizer.device": "layout.offload",
    "zero_optimization.offload_param.device": "layout.offload",
    "optimizer.type": "optim.name",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.beta1 and optim.beta2",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
# Of these the ones that take the same value.
SAME_VALUE = {
    *("train_micro_batch_size_per_gpu", "gradient_clipping", "zero_optimization.stage"),
    *("optimizer.params.lr", "optimizer.params.eps", "optimizer.params.weight_decay"),
}
# Sections that would do what the recipe or the launcher does, and where it is said.
NOT_THEIRS = {
    "scheduler": "schedule.shape, schedule.warmup_tokens and schedule.min_lr_frac",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "layout.remat",
    "compile": "train.compile",
    "tensor_parallel": "layout.tp",
    "sequence_parallel_size": "layout.cp",
    "data_parallel_size": "the number of nodes",
    "pipeline": "layout.pp",
    "checkpoint": "checkpoint.every_steps",
    "data_efficiency": "data",
    "curriculum_learning": "data",
}
# What the engine needs as it is: DeepSpeed's own default, and why.
NEEDED = {
    "bf16.bf16_master_weights_and_grads": (False, "checkpoints hold float32 weights"),
    "bf16.bf16_optimizer_states": (False, "checkpoints hold a float32 optimizer"),
    "fp16.fp16_master_weights_and_grads": (False, "checkpoints hold float32 weights"),
    "zero_optimization.compute_grad_norm": (True, "each logged row has the gradient norm"),
    "zero_optimization.zenflow": (None, "the optimizer is torch's own AdamW, which steps on all gradients"),
}
# The top level of the JSON, as runtime/config.py of DeepSpeed 0.19.8 reads it; it ignores any other name in silence.
TOP_LEVEL = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("managed_gradient_accumulation", "optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "data_types"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "aio", "compile"),
    *("communication_data_type", "seq_parallel_communication_data_type", "prescale_gradients", "disable_allgather"),
    *("gradient_predivide_factor", "gradient_allreduce_op", "activation_checkpointing", "pipeline", "hybrid_engine"),
    *("tensor_parallel", "expert_parallel", "use_data_before_expert_parallelism", "weight_quantization"),
    *("data_efficiency", "dataloader_drop_last", "checkpoint", "datastates_ckpt", "vocabulary_size", "autotuning"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
    *("comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "disable_python_gc"),
}


def ds_config(plan: Plan) -> Options:
    """What `deepspeed.initialize` gets: the plan, our defaults, and the user's own options for all else.

    Raises:
        PlanError: the user's options contradict the plan; names each key, both values and what to type.
    """
    refuse_conflicts(plan.recipe, plan.layout)
    ours, theirs = decided(plan.recipe, plan.layout), plan.recipe.layout.deepspeed or {}
    config = _merged(_merged(defaults(plan.shape.n_parameters), theirs), ours)
    zero = config["zero_optimization"]
    for key in ("offload_optimizer", "offload_param"):
        if zero[key]["device"] == "none":
            del zero[key]
    return config


def refuse_conflicts(recipe: Recipe, layout: Layout) -> None:
    """Raise PlanError where the user's options contradict recipe and layout, with each key and both values."""
    faults = conflicts(decided(recipe, layout), recipe.layout.deepspeed or {})
    if faults:
        error = PlanError(
            "these options of DeepSpeed cannot go with the plan:\n    " + "\n    ".join(faults),
            where="recipe: layout.deepspeed",
            do='change one of the two; "auto" is what the plan says',
        )
        error.on_every_rank = True  # all ranks read the same plan
        raise error


def decided(recipe: Recipe, layout: Layout) -> Options:
    """What recipe and layout say in the words of DeepSpeed, and nobody may say otherwise."""
    optim = recipe.optim
    return {
        "train_batch_size": layout.dp * layout.accumulation * layout.micro_batch_rows,
        "train_micro_batch_size_per_gpu": layout.micro_batch_rows,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": optim.grad_clip_norm,
        "bf16": {"enabled": layout.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": layout.zero_stage,
            "offload_optimizer": {"device": "none" if layout.offload == "none" else "cpu"},
            "offload_param": {"device": "cpu" if layout.offload == "parameters" else "none"},
        },
        "optimizer": {
            "type": "AdamW" if optim.name == "adamw" else "Muon",
            "params": {
                "lr": optim.lr,
                "betas": [optim.beta1, optim.beta2],
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
            },
        },
    }


def defaults(n_parameters: int) -> Options:
    """What we choose where the user does not: gradients are added up and reduced in float32, and nothing is printed."""
    return {
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "reduce_bucket_size": min(n_parameters, DEEPSPEED_BUCKET),
        },
        # The step is torch's own on either device, so that nothing has to be compiled.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device at each step
    }


def conflicts(ours: Options, theirs: Options) -> list[str]:
    """One line for each key of `theirs` that says something else than `ours` or that DeepSpeed does not know.

    Args:
        ours: of `decided`.
        theirs: DeepSpeed's JSON as a user wrote it.
    """
    return [
        *_differences(ours, theirs, ""),
        *(f"{key}: {_remove(where)}" for key, where in NOT_THEIRS.items() if not _is_auto(theirs.get(key, AUTO))),
        *(line for key, (value, why) in NEEDED.items() if (line := _not_as_needed(key, value, why, theirs))),
        *(_unknown(key) for key in theirs if key not in TOP_LEVEL and key not in NOT_THEIRS),
    ]


def _not_as_needed(key: str, value: object, why: str, theirs: Options) -> str | None:
    section, name = key.split(".")
    inner = theirs.get(section)
    given = inner.get(name, AUTO) if isinstance(inner, dict) else AUTO
    if _is_auto(given) or given == value:
        return None
    return f"{key}: the plan has {value!r}, layout.deepspeed has {given!r}; take the key out, because {why}"


def _unknown(key: str) -> str:
    near = get_close_matches(key, TOP_LEVEL, n=1, cutoff=0.5)
    return f"{key}: DeepSpeed reads no such key; " + (f"the nearest is {near[0]}" if near else "take it out")


def _differences(ours: Options, theirs: Options, prefix: str) -> list[str]:
    found = []
    for name, value in theirs.items():
        key = prefix + name
        if name not in ours or _is_auto(value):
            continue
        if isinstance(ours[name], dict) and isinstance(value, dict):
            found += _differences(ours[name], value, f"{key}.")
        elif ours[name] != value:
            where = RECIPE_KEY.get(key, "the recipe")
            do = f"--set {where}={value}, or take the key out of layout.deepspeed"
            do = do if key in SAME_VALUE else _remove(where)
            found.append(f"{key}: the plan has {ours[name]!r}, layout.deepspeed has {value!r}; {do}")
    return found


def _remove(where: str) -> str:
    return f"say it by {where}, and take the key out of layout.deepspeed"


def _is_auto(value: Any) -> bool:
    """Whether all that a user says is that we shall say it."""
    return all(map(_is_auto, value.values())) if isinstance(value, dict) else value == AUTO


def _merged(first: Options, second: Options) -> Options:
    """Both, with the second where they differ; "auto" says nothing."""
    both = dict(first)
    for key, value in second.items():
        if isinstance(value, dict):
            inner = _merged(first[key] if isinstance(first.get(key), dict) else {}, value)
            if inner or not value:
                both[key] = inner
        elif value != AUTO:
            both[key] = value
    return both
