"""plan.json: the only thing that training reads.

`make_plan` joins a recipe and a machine; the plan is frozen and round-trips through JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.contract import Layout, Part, Prediction, Shape
from aifactory_train.plan.layout import choose_layout, n_devices
from aifactory_train.plan.memory import estimate_memory_bytes
from aifactory_train.plan.shape import build_shape
from aifactory_train.plan.steptime import estimate_step_time_s, total_step_time_s
from aifactory_train.recipe.schema import Recipe, fingerprint

PLAN_SCHEMA: Final = "aifactory-plan/1"


class Plan(Part):
    schema_: Literal["aifactory-plan/1"] = PLAN_SCHEMA
    recipe: Recipe
    recipe_hash: str
    machine: Machine
    machine_hash: str
    layout: Layout
    shape: Shape
    predicted: Prediction
    notes: list[str] = []

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def load_plan(path: Path) -> Plan:
    """Read plan.json. Raises PlanError where it is missing, damaged or of another version."""
    do = "aifactory-train launch RECIPE --run RUN  writes it anew"
    try:
        return Plan.model_validate_json(path.read_text())
    except OSError as error:
        raise PlanError(f"cannot read the plan: {error.strerror}", where=str(path), do=do) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        fault = f"{key}: {first['msg']}" if key else first["msg"]
        raise PlanError(f"not a plan of this version: {fault}", where=str(path), do=do) from None


def make_plan(recipe: Recipe, machine: Machine, n_nodes: int = 1, cpu_ranks: int = 1) -> Plan:
    """Join recipe and machine: layout, counts and predictions.

    Args:
        n_nodes: nodes of the machine that take part.
        cpu_ranks: ranks per node on a machine without GPUs; on others there is one rank per device.

    Raises:
        PlanError: the batch cannot be cut evenly, or nothing fits into the memory.
    """
    for option, value in (("--nodes", n_nodes), ("--cpu-ranks", cpu_ranks)):
        if value < 1:
            raise PlanError(f"{option} is {value}", where="command line", do=f"give 1 or more, such as {option} 1")
    notes: list[str] = []
    layout = choose_layout(recipe, machine, n_nodes, cpu_ranks, notes)
    shape = build_shape(recipe.model, recipe.data.seq_len_tokens)
    predicted = _predict(recipe, machine, layout, shape, notes)
    return Plan(
        recipe=recipe,
        recipe_hash=fingerprint(recipe),
        machine=machine,
        # Facts alone: the same machine has the same hash whenever it was read.
        machine_hash=fingerprint(machine.model_copy(update={"sources": [], "unseen": {}})),
        layout=layout,
        shape=shape,
        predicted=predicted,
        notes=notes,
    )


def peak_flops_per_s(plan: Plan) -> float | None:
    """Peak of all devices of the plan together in its precision: what MFU is a share of. None if not known."""
    peak = getattr(plan.machine.device.peak_flops_per_s, plan.layout.precision)
    return None if peak is None else peak * n_devices(plan.machine, plan.layout)


def _predict(recipe: Recipe, machine: Machine, layout: Layout, shape: Shape, notes: list[str]) -> Prediction:
    memory_bytes = estimate_memory_bytes(recipe, machine, layout)
    terms_s = estimate_step_time_s(recipe, machine, layout)
    total_s = total_step_time_s(terms_s)
    unknown = [name for name, seconds in terms_s.items() if seconds is None]
    if total_s is None:
        notes.append("the matmul rate is unknown, so no time is predicted; measure with: aifactory-train probe")
    elif unknown:
        notes.append(f"the predicted time is a lower bound: no rate is known for {', '.join(unknown)}")
    is_measured = getattr(machine.measured.matmul_flops_per_s, layout.precision) is not None
    if total_s is not None and not is_measured:
        notes.append("the predicted time is at the vendor's peak, a lower bound; measure with: aifactory-train probe")
    tokens_per_s = run_time_s = mfu_frac = None
    if total_s is not None:
        tokens_per_s = recipe.train.global_batch_tokens / total_s
        run_time_s = recipe.n_steps * total_s
        peak = getattr(machine.device.peak_flops_per_s, layout.precision)
        if peak is not None and is_measured:
            mfu_frac = tokens_per_s * shape.model_flops_per_token / (peak * n_devices(machine, layout))
    return Prediction(
        memory_bytes=memory_bytes,
        peak_memory_bytes=sum(memory_bytes.values()),
        step_time_s=terms_s,
        total_step_time_s=total_s,
        tokens_per_s=tokens_per_s,
        mfu_frac=mfu_frac,
        run_time_s=run_time_s,
        device_hours=None if run_time_s is None else layout.world_size * run_time_s / 3600,
    )
