"""Seconds of what our own decoder with all its weights does not have: other code, adapters, weights in host memory."""

from __future__ import annotations

import dataclasses

import pytest

from aifactory_train.machine.machine import ByDtype
from aifactory_train.plan.constants import TRANSFORMERS_CODE_FACTOR
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.network import PCIE_BYTES_PER_S
from aifactory_train.plan.shape import n_parameters
from aifactory_train.plan.steptime import estimate_step_time_s
from aifactory_train.plan.traffic import traffic
from aifactory_train.plan.work import Work, work_of
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Lora
from plan_machines import LLAMA_8B, gpus

COMPUTE = ("matmul", "attention", "elementwise", "kernel_starts", "head_and_loss")
MACHINE = gpus(per_node=8)
MACHINE = MACHINE.model_copy(update={"measured": MACHINE.measured.model_copy(update={"matmul_flops_per_s": ByDtype()})})


def layout(**changes) -> Layout:
    given = {
        "engine": "fsdp2", "world_size": 8, "dp_shard": 8, "micro_batch_rows": 1, "accumulation": 64,
        "reshard_after_forward": True, "remat": "none", "precision": "bf16", "threads_per_rank": 1,
    }  # fmt: skip
    return Layout(**(given | changes))


@pytest.fixture(scope="module")
def work() -> Work:
    return work_of(load_recipe(LLAMA_8B))


def terms(work: Work, **changes) -> dict[str, float]:
    return estimate_step_time_s(work, MACHINE, layout(**changes))  # type: ignore[return-value]


def test_the_code_of_transformers_computes_longer_and_moves_as_much(work):
    own, theirs = terms(work), terms(work, model_code="transformers")
    for name in COMPUTE:
        assert theirs[name] == pytest.approx(own[name] * TRANSFORMERS_CODE_FACTOR)
    assert theirs["optimizer"] == own["optimizer"]


def test_with_adapters_frozen_weights_have_no_gradients_to_compute_and_reduce(work):
    lora = dataclasses.replace(work, lora=Lora(rank=8, alpha=16.0))
    whole, adapters = terms(work), terms(lora)
    # Forward, and of the two products of the backward pass one.
    assert adapters["matmul"] == pytest.approx(2 / 3 * whole["matmul"], rel=0.02)
    assert adapters["optimizer"] < 0.01 * whole["optimizer"]
    reduced = {
        name: sum(t.n_bytes * t.times for t in traffic(at, layout()) if t.kind == "reduce_scatter")
        for name, at in (("whole", work), ("adapters", lora))
    }
    # 20 971 520 adapter weights beside 8.03 billion.
    assert reduced["adapters"] == 4 * 20_971_520 and reduced["whole"] > 300 * reduced["adapters"]


def test_weights_in_host_memory_come_to_the_device_for_each_pass(work):
    found = terms(work, engine="deepspeed", offload="parameters", reduce_each_micro_batch=True)
    n_bytes = 2 * n_parameters(work.model) / 8
    assert found["weights_from_host"] == pytest.approx(2 * 64 * n_bytes / PCIE_BYTES_PER_S)
    assert "weights_from_host" not in terms(work, engine="deepspeed", offload="optimizer", reduce_each_micro_batch=True)


def test_experts_cost_the_time_of_those_at_work(work):
    experts = work.model.model_copy(update={"n_experts": 8, "n_active_experts": 1})
    one, of_eight = terms(work), terms(dataclasses.replace(work, model=experts))
    assert of_eight["matmul"] == one["matmul"]
    assert of_eight["optimizer"] > 5 * one["optimizer"]
