"""What a run costs the grant, in the unit that the site counts."""

from __future__ import annotations

from aifactory_train.machine.machine import Machine
from aifactory_train.plan.plan import Plan
from aifactory_train.units import format_count


def estimate_cost(machine: Machine, n_nodes: int, seconds: float) -> tuple[float, str]:
    """(amount, unit) of so many nodes for so long; node-hours where the site's unit is not known."""
    node_hours = n_nodes * seconds / 3600
    if machine.accounting is None:
        return node_hours, "node-hours"
    return node_hours * machine.accounting.units_per_node_hour, machine.accounting.unit


def render_cost(plan: Plan, job_time_s: float, job_time: str) -> list[str]:
    """Lines for people: the whole run as predicted, and the most that one job of `job_time_s` can take."""
    n_nodes = plan.layout.n_nodes
    amount, unit = estimate_cost(plan.machine, n_nodes, job_time_s)
    lines = [f"one job: at most {_shown(amount)} {unit} ({n_nodes} node(s) for {job_time})"]
    run_time_s = plan.predicted.run_time_s
    if run_time_s is None:
        return ["the run: not predicted, no rate of the devices is known", *lines]
    amount, unit = estimate_cost(plan.machine, n_nodes, run_time_s)
    bound = "at least " if None in plan.predicted.step_time_s.values() else "about "
    return [f"the run: {bound}{_shown(amount)} {unit}", *lines]


def _shown(amount: float) -> str:
    return format_count(amount).replace(" ", "\N{NO-BREAK SPACE}") if amount >= 1 else f"{amount:.3g}"
