"""The JSON that a plan becomes, and what a user's own JSON may not say. No DeepSpeed and no torch is needed for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import pytest

from aifactory_train.errors import PlanError
from aifactory_train.launch.env import set_local_rank
from aifactory_train.plan.deepspeed import NOT_THEIRS, RECIPE_KEY, TOP_LEVEL, conflicts, decided, ds_config
from aifactory_train.plan.plan import Plan, make_plan
from aifactory_train.recipe.load import load_recipe
from plan_machines import DEMO, LLAMA_8B, cpu, gpus

SMALL = ("layout.engine=deepspeed", "train.micro_batch_rows=4", "layout.zero_stage=3")

# What a demo on two CPU ranks becomes: 16 rows a step, 4 at a time.
GOLDEN = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 2_361_024},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1},
    },
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": None,
    "timers": {"throughput": {"enabled": False}},
}


def demo(*overrides: str, theirs: dict[str, Any] | None = None) -> Plan:
    """On two CPU ranks; `theirs` as if it had come with the recipe."""
    plan = make_plan(load_recipe(DEMO, [*SMALL, *overrides]), cpu(), n_nodes=1, cpu_ranks=2)
    layout = plan.recipe.layout.model_copy(update={"deepspeed": theirs})
    return plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"layout": layout})})


def faults_of(theirs: dict[str, Any], *overrides: str) -> list[str]:
    plan = demo(*overrides)
    return conflicts(decided(plan.recipe, plan.layout), theirs)


def test_a_plan_becomes_these_options() -> None:
    assert ds_config(demo()) == GOLDEN


def test_offload_and_fp32_and_other_stages_become_options() -> None:
    config = ds_config(demo("layout.zero_stage=2", "layout.offload=optimizer", "train.precision=fp32"))
    changed = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 2_361_024}
    assert config == GOLDEN | {"bf16": {"enabled": False}, "zero_optimization": changed}
    zero = ds_config(demo("layout.offload=parameters"))["zero_optimization"]
    assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}


def test_a_large_model_has_the_bucket_that_the_plan_counts_with() -> None:
    recipe = load_recipe(LLAMA_8B, ["layout.engine=deepspeed", "layout.zero_stage=3"])
    plan = make_plan(recipe, gpus(), n_nodes=2, cpu_ranks=1)
    config = ds_config(plan)
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 500_000_000}
    per_rank = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"]
    assert config["train_batch_size"] == per_rank * 8 == recipe.global_batch_rows


def test_auto_is_what_the_plan_says() -> None:
    theirs = {
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "auto"}},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
    }
    assert ds_config(demo(theirs=theirs)) == GOLDEN


def test_what_the_plan_does_not_say_the_user_says() -> None:
    theirs = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 5},
        "communication_data_type": "bf16",
        "wall_clock_breakdown": True,
    }
    zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 5}
    expected = GOLDEN | {"zero_optimization": zero, "communication_data_type": "bf16", "wall_clock_breakdown": True}
    assert ds_config(demo(theirs=theirs)) == expected


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu", "4", "8", "train.micro_batch_rows"]),
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage", "3", "2", "layout.zero_stage"]),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["offload_param.device", "'none'", "'nvme'"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "1.0", "0.5", "optim.grad_clip_norm"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled", "True", "False", "train.precision"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "False", "True", "train.precision"]),
        ({"bf16": True}, ["bf16", "{'enabled': True}", "True"]),
        ({"optimizer": {"type": "Lion"}}, ["optimizer.type", "'AdamW'", "'Lion'", "optim.name"]),
        ({"optimizer": {"params": {"lr": 1e-4}}}, ["optimizer.params.lr", "0.003", "0.0001", "optim.lr"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "schedule.shape"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["tensor_parallel", "layout.tp"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["weights_and_grads", "False", "True", "float32 weights"]),
        ({"bf16": {"bf16_optimizer_states": True}}, ["bf16_optimizer_states", "False", "True", "float32 optimizer"]),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, ["zero_optimization.zenflow", "None", "topk_ratio"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["compute_grad_norm", "True", "False", "gradient norm"]),
        ({"gradient_cliping": 3}, ["gradient_cliping", "no such key", "the nearest is gradient_clipping"]),
        ({"bfloat16": {"enabled": "auto"}}, ["bfloat16", "no such key", "the nearest is bf16"]),
        ({"progressive_layer_drop": {"enabled": True}}, ["progressive_layer_drop", "no such key"]),
        ({"qqq": "auto"}, ["qqq", "no such key; take it out"]),
    ],
)
def test_a_contradiction_names_the_key_both_values_and_what_to_type(theirs: dict[str, Any], words: list[str]) -> None:
    (fault,) = faults_of(theirs)
    assert all(word in fault for word in words), fault
    with pytest.raises(PlanError) as raised:
        ds_config(demo(theirs=theirs))
    assert fault in raised.value.what and raised.value.on_every_rank


def test_all_contradictions_are_told_at_once() -> None:
    theirs = {"gradient_clipping": 2.0, "zero_optimization": {"stage": 1}, "scheduler": {"type": "OneCycle"}}
    assert len(faults_of(theirs)) == 3


def test_what_the_engine_needs_as_it_is_may_be_said() -> None:
    theirs = {"bf16": {"bf16_optimizer_states": False}, "zero_optimization": {"compute_grad_norm": True}}
    assert faults_of(theirs) == []


class Read(dict[str, Any]):
    """Options that remember each key that was asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:  # for `key in options.keys()`
        return self


@pytest.mark.parametrize(
    ("zero", "words"),
    [({"mics_shard_size": 2}, "MiCS ZeRO-3 sharding has been removed"), ({"reduce_bucket": 5}, "reduce_bucket")],
)
def test_what_deepspeed_refuses_by_itself_is_an_error_of_the_recipe(zero: dict[str, Any], words: str) -> None:
    from aifactory_train.train import engine_deepspeed

    plan = demo(theirs={"zero_optimization": zero})
    with pytest.raises(PlanError, match=words) as raised, engine_deepspeed._refused_options(plan):
        engine_deepspeed.deepspeed.DeepSpeedConfig(ds_config(plan))
    assert raised.value.on_every_rank and "layout.deepspeed" in raised.value.where


def test_the_names_of_the_top_level_are_those_that_deepspeed_reads() -> None:
    from deepspeed.runtime import config

    options = Read({"train_batch_size": 1})
    config.DeepSpeedConfig(options)
    removed, old_name = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS), {"bfloat16"}  # only without bf16, which we give
    assert options.asked - removed - old_name == TOP_LEVEL


def test_every_key_that_the_plan_decides_says_where_the_recipe_says_it() -> None:
    def keys(options: dict[str, Any], prefix: str = "") -> set[str]:
        nested = {f"{prefix}{k}": v for k, v in options.items()}
        return {key for k, v in nested.items() for key in (keys(v, f"{k}.") if isinstance(v, dict) else {k})}

    plan = demo()
    assert keys(decided(plan.recipe, plan.layout)) == set(RECIPE_KEY)
    fields = {key for said in (*RECIPE_KEY.values(), *NOT_THEIRS.values()) for key in re.findall(r"\w+\.\w+", said)}
    recipe = plan.recipe.model_dump()
    for section, field in (key.split(".") for key in fields):
        assert field in recipe[section], f"{section}.{field}"


def test_the_options_need_neither_deepspeed_nor_torch() -> None:
    code = "import sys, aifactory_train.plan.deepspeed; sys.exit(bool({'torch', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "0"),
        ({"SLURM_LOCALID": "3"}, "3"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2", "SLURM_LOCALID": "0"}, "2"),
        ({"LOCAL_RANK": "1", "SLURM_LOCALID": "3"}, "1"),
    ],
)
def test_each_launcher_tells_deepspeed_the_local_rank(given: dict[str, str], expected: str) -> None:
    with patch.dict(os.environ, given):
        for name in {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"} - set(given):
            os.environ.pop(name, None)
        set_local_rank()
        assert os.environ["LOCAL_RANK"] == expected
