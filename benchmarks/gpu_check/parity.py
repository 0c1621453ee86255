"""Three steps of a tiny model on the device, against the same steps in float32 on the CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._dynamo.utils import counters

from aifactory_train.errors import PlanError
from aifactory_train.models.parts import copy_into, local_tensor
from aifactory_train.parallel.precision import refuse_fp8
from aifactory_train.train.engine_torch import TorchEngine
from benchmarks.gpu_check.setting import (
    Sizes,
    a_recipe,
    built,
    largest,
    one_device,
    plan_of,
    random_batch,
    this_machine,
)

STEPS = 3


@dataclass(frozen=True)
class Bounds:
    """Largest relative error of the loss of a step, of a gradient norm, and of what all steps changed of a weight."""

    loss: float
    grad_norm: float
    change: float


# fp32, with TF32 off: sums in another order. The others: some three times what the same rounding gives on a CPU, where
# fp8 is emulated (4e-5, 3e-3, 1.4e-2 in bf16; 4e-4, 1.1e-2, 0.15 in fp8).
BOUNDS = {
    "fp32": Bounds(1e-5, 1e-4, 1e-4),
    "bf16": Bounds(2e-4, 1e-2, 4e-2),
    "fp8": Bounds(1.2e-3, 3e-2, 0.4),
    "fp8_rowwise": Bounds(1.2e-3, 3e-2, 0.4),
}


@dataclass(frozen=True)
class Case:
    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"]
    documents: bool
    compiled: bool
    remat: str

    @property
    def name(self) -> str:
        words = ["documents" if self.documents else "plain", "compiled" if self.compiled else "eager"]
        return " ".join([self.precision, *words, f"remat {self.remat}"])


CASES = (
    Case("fp32", False, False, "none"),
    Case("fp32", False, False, "selective"),
    Case("fp32", True, False, "none"),
    Case("fp32", True, False, "selective"),
    Case("fp32", True, True, "none"),
    Case("fp32", True, True, "selective"),
    Case("fp32", True, True, "full"),
    Case("bf16", False, True, "none"),
    Case("bf16", True, True, "none"),
    Case("bf16", True, True, "selective"),
    Case("bf16", True, True, "full"),
    Case("fp8", True, True, "none"),
    Case("fp8", True, True, "selective"),
    Case("fp8_rowwise", True, True, "none"),
)


@dataclass(frozen=True)
class Curve:
    loss: list[float]
    grad_norm: list[float]
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    n_recompiled: int
    n_fp8: int


def measure_parity(device: torch.device, sizes: Sizes, until_s: float) -> dict[str, Any]:
    """One row for each case. Those that would begin after `until_s` (time.monotonic) do not run, which is no pass."""
    cpu = torch.device("cpu")
    right = {documents: _curve(Case("fp32", documents, False, "none"), cpu, sizes) for documents in (False, True)}
    rows = [_row(case, device, sizes, right[case.documents], until_s) for case in CASES]
    return {"passed": all(row["passed"] for row in rows), "steps": STEPS, "cases": rows}


def _row(case: Case, device: torch.device, sizes: Sizes, right: Curve, until_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "passed": False}
    if time.monotonic() > until_s:
        return row | {"fault": "not run: no time was left"}
    begin_s = time.monotonic()
    try:
        refuse_fp8(one_device(1, 1, case.precision, case.remat, case.compiled), device)
    except PlanError as refused:
        return row | {"passed": True, "refused": refused.what}
    try:
        found = _curve(case, device, sizes, right.start)
    except Exception as error:  # each case is told, and the others go on
        return row | {"fault": f"{type(error).__name__}: {error}"[:2000]}
    bounds = BOUNDS[case.precision]
    errors = {
        "loss": _worst(found.loss, right.loss),
        "grad_norm": _worst(found.grad_norm, right.grad_norm),
        "change": largest(_distance(found.end[n] - found.start[n], right.end[n] - right.start[n]) for n in right.end),
    }
    faults = [f"{key} is off by {off:.2e}" for key, off in errors.items() if not off <= getattr(bounds, key)]
    if found.n_recompiled:
        faults.append(f"{found.n_recompiled} graph(s) compiled after the first step")
    if case.precision.startswith("fp8") and not found.n_fp8:
        faults.append("no linear is in fp8")
    seconds = round(time.monotonic() - begin_s, 1)
    return row | {
        "passed": not faults, "fault": "; ".join(faults) or None, "errors": errors, "bounds": vars(bounds),
        "seconds": seconds,
    }  # fmt: skip


def _curve(case: Case, device: torch.device, sizes: Sizes, start: dict[str, torch.Tensor] | None = None) -> Curve:
    """start: weights to begin with. A GPU draws other random numbers than a CPU, so it takes those of the CPU."""
    precision = "fp32" if case.precision == "fp32" else "bf16"
    recipe = a_recipe(sizes.parity, sizes.parity_rows, sizes.parity_tokens, precision, case.documents)
    layout = one_device(sizes.parity_rows, sizes.parity_rows // 2, case.precision, case.remat, case.compiled)
    losses, norms, n_graphs = [], [], 0
    with built(plan_of(recipe, this_machine(device), layout), device) as engine:
        for name, whole in (start or {}).items():
            copy_into(engine.named_parameters[name], whole.to(device))
        first = _weights(engine)
        engine.rehearse(random_batch(0, recipe, device))
        for step in range(1, STEPS + 1):
            stats = engine.train_step(random_batch(step, recipe, device), step)
            losses.append((stats.loss_sum / stats.n_valid_tokens).item())
            norms.append(stats.grad_norm.item())
            if step == 1:
                n_graphs = counters["stats"]["unique_graphs"]
        last = _weights(engine)
        modules = [module for parts in engine.stages for module in parts.root.modules()]
    n_fp8 = sum(type(module).__name__ == "Float8Linear" for module in modules)
    return Curve(losses, norms, first, last, counters["stats"]["unique_graphs"] - n_graphs, n_fp8)


def _weights(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """A copy of each weight; in a run of one rank its part is the whole."""
    return {n: local_tensor(p.detach()).cpu().clone() for n, p in engine.named_parameters.items()}


def _worst(found: list[float], right: list[float]) -> float:
    return largest(abs(a / b - 1) for a, b in zip(found, right, strict=True))


def _distance(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())
