"""Memory of a step with each remat, beside what the planner says of the same layout."""

from __future__ import annotations

from typing import Any

import torch

from aifactory_train.metrics.meter import peak_memory_bytes
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.memory import FIT_FRAC, estimate_memory
from aifactory_train.plan.work import work_of
from aifactory_train.recipe.schema import Recipe
from benchmarks.gpu_check.setting import Sizes, a_recipe, built, one_device, plan_of, random_batch, this_machine

REMATS = ("none", "selective", "full")
# torch's allocator counts what tensors take: not the context of the driver, not the buffers of communicators, not what
# is lost between blocks.
NOT_IN_TENSORS = ("runtime", "communicators", "fragmentation", "checkpoint_copy")
RATIO_LOW, RATIO_HIGH = 0.85, 1.15


def measure_memory(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Peak bytes of tensors in the second step, measured and predicted, for each remat of the same cut model."""
    recipe, rows = _what_fits(device, sizes)
    found = []
    for remat in REMATS:
        layout = one_device(rows, rows, "bf16", remat, True)
        found.append({"remat": remat, **_compare(recipe, layout, device)})
    peaks = [row["measured_bytes"] for row in found]
    near = all(RATIO_LOW <= row["measured_by_predicted"] <= RATIO_HIGH for row in found)
    return {
        "passed": near and peaks == sorted(peaks, reverse=True),
        "bounds": [RATIO_LOW, RATIO_HIGH],
        "n_layers": recipe.model.n_layers,
        "micro_batch_rows": rows,
        "seq_len_tokens": sizes.tokens,
        "remats": found,
    }


def _what_fits(device: torch.device, sizes: Sizes) -> tuple[Recipe, int]:
    """The first number of layers and rows whose step fits on the device without remat, by the planner."""
    machine = this_machine(device)
    for n_layers in sizes.memory_layers:
        for rows in sizes.memory_rows:
            model = sizes.wide.model_copy(update={"n_layers": n_layers})
            recipe = a_recipe(model, rows, sizes.tokens, "bf16", documents=False)
            layout = one_device(rows, rows, "bf16", "none", True)
            peak_bytes = estimate_memory(work_of(recipe), machine.device.kind, layout).peak_bytes
            if machine.device.memory_bytes and peak_bytes < FIT_FRAC * machine.device.memory_bytes:
                return recipe, rows
    raise MemoryError(f"{n_layers} layers with {rows} row(s) do not fit on {machine.device.name}")


def _compare(recipe: Recipe, layout: Layout, device: torch.device) -> dict[str, Any]:
    plan = plan_of(recipe, this_machine(device), layout)
    memory = estimate_memory(work_of(recipe), plan.machine.device.kind, layout)
    tensors_bytes = sum(n for name, n in memory.terms_bytes.items() if name not in NOT_IN_TENSORS)
    with built(plan, device) as engine:
        engine.rehearse(random_batch(0, recipe, device))
        engine.train_step(random_batch(1, recipe, device), 1).loss_sum.item()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        engine.train_step(random_batch(2, recipe, device), 2).loss_sum.item()
        reserved_bytes = peak_memory_bytes(device)
        measured_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else reserved_bytes
    return {
        "measured_bytes": measured_bytes,
        "reserved_bytes": reserved_bytes,
        "predicted_bytes": tensors_bytes,
        "predicted_peak_bytes": memory.peak_bytes,
        "predicted_terms_bytes": memory.terms_bytes,
        "peak_at": memory.peak_at,
        "measured_by_predicted": measured_bytes / tensors_bytes,
    }
