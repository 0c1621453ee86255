"""A plan as a JSON document, for programs."""

from __future__ import annotations

from typing import Any

from aifactory_train.plan.basis import measured_vs_assumed
from aifactory_train.plan.cost import RunCost, run_cost_of, run_cost_range_of, tokens_for_device_hours
from aifactory_train.plan.nearest import what_works
from aifactory_train.plan.nodes import NodeTable, tokens_bought
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.search import Candidate, Ranking
from aifactory_train.plan.support import why_not_trainable


def document(
    plan: Plan,
    ranking: Ranking,
    table: NodeTable | None,
    device_hours: float | None = None,
    job_time_s: float | None = None,
) -> dict[str, Any]:
    """Plan and ranking as JSON values. Seconds and tokens/s of the ranking are null where they only order it."""
    cost = run_cost_of(plan, job_time_s)
    basis = measured_vs_assumed(plan.machine, plan.layout)
    bought = None if cost is None or device_hours is None else tokens_for_device_hours(cost, device_hours)
    return {
        "plan": plan.model_dump(mode="json"),
        "why_not_trainable": why_not_trainable(plan.layout),
        "nearest_trainable": nearest_of(plan),
        **_cost_values(plan, cost, job_time_s),
        "tokens_bought": bought,
        "basis": [{"term": term, "source": source, "text": text} for term, source, text in basis],
        "ranking": [_candidate(c, ranking.order_only) for c in distinct(ranking)],
        "dropped": ranking.dropped,
        "nodes": None if table is None else [
            {
                "n_nodes": row.n_nodes,
                "recommended": row.n_nodes == table.recommended,
                "efficiency_frac": row.efficiency_frac,
                "tokens_bought": None if device_hours is None else tokens_bought(row, device_hours),
                **_candidate(row.chosen, table.order_only),
            }
            for row in table.rows
        ],
    }  # fmt: skip


def _cost_values(plan: Plan, cost: RunCost | None, job_time_s: float | None) -> dict[str, Any]:
    """Of the whole run: the middle of the predicted range, and its ends where one is known."""
    if cost is None or not cost.makes_progress:
        return {"cost": None, "jobs": None, "energy_kwh": None}
    fast, slow = run_cost_range_of(plan, job_time_s) or (cost, cost)
    energy_kwh = None
    if fast.energy_kwh is not None and slow.energy_kwh is not None:
        energy_kwh = {"low": fast.energy_kwh[0], "high": slow.energy_kwh[1]}
    return {
        "cost": {
            "amount": cost.grant_amount,
            "unit": cost.grant_unit,
            "low": fast.grant_amount,
            "high": slow.grant_amount,
        },
        "jobs": {"number": cost.n_jobs, "low": fast.n_jobs, "high": slow.n_jobs},
        "energy_kwh": energy_kwh,
    }


def distinct(ranking: Ranking) -> list[Candidate]:
    """The fastest of each cut, fastest first; the chosen one stands for its own."""
    seen: dict[tuple[Any, ...], Candidate] = {}
    for candidate in (*([ranking.chosen] if ranking.chosen else []), *ranking.candidates):
        seen.setdefault(candidate.cut, candidate)
    return sorted(seen.values(), key=lambda c: c.step_time_s)


def nearest_of(plan: Plan) -> str | None:
    layout = plan.layout
    if why_not_trainable(layout) is None:
        return None
    per_node = layout.world_size // layout.n_nodes
    return what_works(plan.recipe, plan.machine, layout.n_nodes, per_node, to_train=True) or None


def _candidate(candidate: Candidate, order_only: bool) -> dict[str, Any]:
    layout = candidate.layout
    return {
        "layout": layout.model_dump(mode="json"),
        "peak_memory_bytes": candidate.memory.peak_bytes,
        "step_time_s": None if order_only else candidate.step_time_s,
        "tokens_per_s": None if order_only else candidate.tokens_per_s,
        "why_not_trainable": candidate.why_not,
    }
