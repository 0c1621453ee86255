"""Seconds per optimizer step by named term. A term is None where the rate behind it is not known."""

from __future__ import annotations

from aifactory_train.machine.machine import Machine
from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.layout import n_devices
from aifactory_train.recipe.schema import Recipe

# AdamW reads weight, gradient and two moments and writes weight and two moments, each fp32.
OPTIMIZER_BYTES_PER_PARAMETER = 7 * 4


def estimate_step_time_s(recipe: Recipe, machine: Machine, layout: Layout) -> dict[str, float | None]:
    """Seconds of one step on one rank, a lower bound. On a CPU the ranks of a node share its rates.

    Rates are measured ones; where there are none, the vendor's peaks, which no device passes.
    """
    model, seq = recipe.model, recipe.data.seq_len_tokens
    share = n_devices(machine, layout) / layout.world_size
    tokens_per_rank = recipe.train.global_batch_tokens / layout.world_size
    flops = shape.model_flops_per_token(model, seq) * tokens_per_rank
    again_flops = shape.recomputed_flops_per_token(model, seq, layout.remat) * tokens_per_rank
    moved_bytes = shape.elementwise_bytes_per_token(model, layout.precision) * tokens_per_rank
    optimizer_bytes = OPTIMIZER_BYTES_PER_PARAMETER * shape.n_parameters(model) / layout.dp_shard
    matmul_rate, memory_rate = matmul_flops_per_s(machine, layout), memory_bytes_per_s(machine)
    return {
        "matmul": _seconds(flops, matmul_rate, share),
        **({"recomputation": _seconds(again_flops, matmul_rate, share)} if layout.remat != "none" else {}),
        "elementwise": _seconds(moved_bytes, memory_rate, share),
        "optimizer": _seconds(optimizer_bytes, memory_rate, share),
        "communication": 0.0 if layout.world_size == 1 else None,
    }


def matmul_flops_per_s(machine: Machine, layout: Layout) -> float | None:
    measured = getattr(machine.measured.matmul_flops_per_s, layout.precision)
    return measured or getattr(machine.device.peak_flops_per_s, layout.precision)


def memory_bytes_per_s(machine: Machine) -> float | None:
    return machine.measured.memory_bytes_per_s or machine.device.memory_bytes_per_s


def total_step_time_s(terms: dict[str, float | None]) -> float | None:
    """Sum of the known terms; None without the matmuls, because the rest alone says nothing."""
    if terms["matmul"] is None:
        return None
    return sum(t for t in terms.values() if t is not None)


def _seconds(work: float, rate_per_s: float | None, share: float) -> float | None:
    return None if rate_per_s is None else work / (rate_per_s * share)
