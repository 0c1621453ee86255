"""The parts of plan.json. plan.py joins them; layout, memory and steptime fill them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


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
    remat: Literal["none", "full"]
    precision: Literal["fp32", "bf16"]
    threads_per_rank: int
    n_nodes: int = 1


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
