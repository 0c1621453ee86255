"""A step of the wide model as the planner would run it on this device: how fast, how large, how often waited for."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from typing import Any

import torch

from aifactory_train.data.loader import Batch
from aifactory_train.errors import PlanError, TrainingFault
from aifactory_train.machine.machine import ByDtype, Machine, Measured
from aifactory_train.metrics.meter import Meter
from aifactory_train.metrics.rates import measure_matmul_flops_per_s, measure_memory_bytes_per_s
from aifactory_train.plan.plan import Plan, make_plan
from aifactory_train.train.engine_torch import TorchEngine
from benchmarks.gpu_check.setting import Sizes, a_recipe, built, random_batch, synchronize, this_machine

WARMUP_STEPS, STEPS = 3, 10
LOG_EVERY_STEPS = 10
SYNC = "called a synchronizing"  # in the words of torch.cuda.set_sync_debug_mode


def measure_step(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Speed and host syncs of as many layers as fit. The planner knows the rates that are measured here first."""
    rates = {
        "gemm_flops_per_s": measure_matmul_flops_per_s(device, torch.bfloat16),
        "memory_bytes_per_s": measure_memory_bytes_per_s(device),
    }
    measured = Measured(
        matmul_flops_per_s=ByDtype(bf16=rates["gemm_flops_per_s"]), memory_bytes_per_s=rates["memory_bytes_per_s"]
    )
    machine = this_machine(device).model_copy(update={"measured": measured})
    too_large = []
    for n_layers in sizes.speed_layers:
        try:
            plan = _plan(machine, sizes, n_layers)
        except PlanError:
            continue  # which the planner says at once
        try:
            found = _run(plan, device, rates["gemm_flops_per_s"])
        except (TrainingFault, torch.OutOfMemoryError) as error:
            peak_bytes = plan.predicted.peak_memory_bytes
            too_large.append({"n_layers": n_layers, "predicted_peak_bytes": peak_bytes, "why": str(error)[:500]})
            continue
        return {"passed": found["syncs"]["passed"], "n_layers": n_layers, **rates, **found, "too_large": too_large}
    return {"passed": False, **rates, "fault": "no number of layers fits", "too_large": too_large}


def _plan(machine: Machine, sizes: Sizes, n_layers: int) -> Plan:
    """The planner's own layout. Raises PlanError where nothing fits."""
    model = sizes.wide.model_copy(update={"n_layers": n_layers})
    return make_plan(a_recipe(model, sizes.speed_rows, sizes.tokens, "bf16", documents=False), machine)


def _run(plan: Plan, device: torch.device, gemm_flops_per_s: float) -> dict[str, Any]:
    batches = [random_batch(step, plan.recipe, device) for step in range(4)]
    with built(plan, device) as engine:
        engine.rehearse(batches[0])
        step_s, loss = _timed_steps(engine, batches, device)
        peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        syncs = _count_syncs(engine, plan, device, batches, done=WARMUP_STEPS + STEPS)
    median_s = statistics.median(step_s)
    tokens_per_s = plan.recipe.train.global_batch_tokens / median_s
    flops_per_s = tokens_per_s * plan.shape.model_flops_per_token
    return {
        "layout": plan.layout.model_dump(mode="json"),
        "n_parameters": plan.shape.n_parameters,
        "seq_len_tokens": plan.recipe.data.seq_len_tokens,
        "global_batch_tokens": plan.recipe.train.global_batch_tokens,
        "step_s": {"median": median_s, "min": min(step_s), "max": max(step_s), "all": step_s},
        "tokens_per_s": tokens_per_s,
        "model_flops_per_s": flops_per_s,
        "share_of_gemm_frac": flops_per_s / gemm_flops_per_s,
        "loss": loss,
        "peak_memory_bytes": peak_bytes,
        "predicted": {
            "step_s": plan.predicted.total_step_time_s,
            "low_s": plan.predicted.step_time_low_s,
            "high_s": plan.predicted.step_time_high_s,
            "peak_memory_bytes": plan.predicted.peak_memory_bytes,
        },
        "syncs": syncs,
    }


def _timed_steps(engine: TorchEngine, batches: list[Batch], device: torch.device) -> tuple[list[float], float]:
    """Seconds of each step after the warm-up, and the loss of the last."""
    step_s = []
    for step in range(1, WARMUP_STEPS + STEPS + 1):
        synchronize(device)
        begin_s = time.perf_counter()
        stats = engine.train_step(batches[step % len(batches)], step)
        synchronize(device)
        step_s.append(time.perf_counter() - begin_s)
    return step_s[WARMUP_STEPS:], (stats.loss_sum / stats.n_valid_tokens).item()


def _count_syncs(
    engine: TorchEngine, plan: Plan, device: torch.device, batches: list[Batch], done: int
) -> dict[str, Any]:
    """How often the host waits for the device in one log interval of the loop: the steps, and the row after them."""
    meter = Meter(plan, device, attempt=1)
    with _recorded_syncs(device) as found:
        for step in range(done + 1, done + 1 + LOG_EVERY_STEPS):
            stats = engine.train_step(batches[step % len(batches)], step)
            meter.add(stats.loss_sum, stats.n_valid_tokens)
        meter.row(step, stats.grad_norm, stats.lr, data_wait_s=0.0)
    n = sum(found.values())
    return {"passed": n == 1, "n": n, "steps": LOG_EVERY_STEPS, "expected": 1, "where": dict(found)}


class _recorded_syncs:
    """Counts torch's warnings about waits of the host, by the line of Python that waited."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._caught = warnings.catch_warnings(record=True)
        self._found: Counter[str] = Counter()

    def __enter__(self) -> Counter[str]:
        self._list = self._caught.__enter__()
        warnings.simplefilter("always")
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        return self._found

    def __exit__(self, *error: object) -> None:
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("default")
        for said in self._list or ():
            if SYNC in str(said.message):
                self._found["/".join(said.filename.split("/")[-3:]) + f":{said.lineno}"] += 1
        self._caught.__exit__(*error)
