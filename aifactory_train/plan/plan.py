"""plan.json: the only thing that training reads.

`make_plan` joins a recipe and a machine; the plan is frozen and round-trips through JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.recipe.schema import Recipe

PLAN_SCHEMA = "aifactory-plan/1"


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layout(Part):
    """Degrees in nesting order, and how one rank's share of the batch is cut.

    global_batch_rows = world_size * accumulation * micro_batch_rows
    """

    engine: Literal["fsdp2"]
    world_size: int
    dp_shard: int
    micro_batch_rows: int
    accumulation: int
    reshard_after_forward: bool
    precision: Literal["fp32", "bf16"]
    threads_per_rank: int


class Shape(Part):
    """Counts from the model's shapes alone; plan/shape.py says how each is defined."""

    n_parameters: int
    n_matmul_parameters: int
    model_flops_per_token: float
    flops_convention: Literal["model_causal_v1"] = "model_causal_v1"


class Prediction(Part):
    """Predicted by model: bytes per device by term, seconds per step by term. None where a rate is unknown."""

    memory_bytes: dict[str, int]
    peak_memory_bytes: int
    step_time_s: dict[str, float | None]
    total_step_time_s: float | None
    tokens_per_s: float | None
    mfu_frac: float | None
    run_time_s: float | None
    device_hours: float | None


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
        raise PlanError(f"not a plan of this version: {key}: {first['msg']}", where=str(path), do=do) from None
