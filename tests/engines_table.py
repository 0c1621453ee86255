"""The README's table of what each engine can do: asked of the function that training asks."""

from __future__ import annotations

from typing import Any

from aifactory_train.plan.contract import Layout
from aifactory_train.plan.support import why_not_trainable

BEGIN, END = "<!-- engines: begin, from plan/support.py -->", "<!-- engines: end -->"
ENGINES = ("fsdp2", "deepspeed")
# What is asked for, and the layouts that are it: an engine has it where it trains all of them.
WHAT: dict[str, list[dict[str, Any]]] = {
    "ZeRO 3: parameters, gradients and optimizer state split": [{"zero_stage": 3}],
    "ZeRO 1 and 2: parameters whole on each device": [{"zero_stage": 1}, {"zero_stage": 2}],
    "offload of the optimizer to the host": [{"offload": "optimizer"}],
    "offload of the parameters, too": [{"offload": "parameters"}],
    "tensor, context and pipeline parallel": [{"tp": 2}, {"cp": 2}, {"pp": 2}],
    "copies of sharded groups (HSDP)": [{"dp_replicate": 2}],
    "fp32, bf16": [{"precision": "fp32"}, {"precision": "bf16"}],
    "fp8, with our decoder": [{"precision": "fp8"}, {"precision": "fp8_rowwise"}],
    "remat none, selective, full": [{"remat": remat} for remat in ("none", "selective", "full")],
    "compiled blocks": [{"compile": True}],
    "remat by a memory budget": [{"compile": True, "remat": "budget", "remat_budget_frac": 0.5}],
    "our decoder": [{"model_code": "own"}],
    "any model's own code in `transformers`": [{"model_code": "transformers"}],
}


def render_engines() -> str:
    lines = [f"| | {' | '.join(f'`{engine}`' for engine in ENGINES)} |", "|---|---|---|"]
    for what, layouts in WHAT.items():
        cells = ["yes" if all(trains(engine, asked) for asked in layouts) else "" for engine in ENGINES]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trains(engine: str, asked: dict[str, Any]) -> bool:
    layout = Layout(
        **{
            "engine": engine,
            "world_size": 2,
            "dp_shard": 1 if any(asked.get(axis) == 2 for axis in ("pp", "dp_replicate", "cp", "tp")) else 2,
            "micro_batch_rows": 1,
            "accumulation": 1,
            "reshard_after_forward": True,
            "remat": "none",
            "precision": "bf16",
            "threads_per_rank": 1,
            **asked,
        }
    )
    return why_not_trainable(layout) is None
