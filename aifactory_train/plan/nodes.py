"""How many nodes: the limits of a job, the efficiency curve, and what a deadline or a budget asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.calibrate import correct_step_time
from aifactory_train.plan.contradictions import check_kind
from aifactory_train.plan.cost import estimate_cost, hours_of
from aifactory_train.plan.layout import describe
from aifactory_train.plan.limits import job_limits
from aifactory_train.plan.refuse import check_wishes, nothing_left, shorter_run
from aifactory_train.plan.search import Candidate, search
from aifactory_train.recipe.schema import Recipe
from aifactory_train.units import format_count, format_hours, format_seconds, parse_duration_s

# Nodes that work at less than this share of the best tokens/s per node are not worth their cost.
EFFICIENT_FRAC = 0.8
# Of a budget of device-hours: this share of the tokens that it could buy at most is kept, to be done sooner.
BUDGET_FRAC = 0.95
# The curve ends here where no limit is known.
MOST_NODES = 4096


@dataclass(frozen=True)
class NodeRow:
    """One number of nodes with the layout that a plan would take there.

    efficiency_frac: tokens/s per node over the best of the comparable rows, so that others can be above 1.
    run_time_s: of all steps.
    """

    n_nodes: int
    chosen: Candidate
    tokens_per_s: float
    efficiency_frac: float
    run_time_s: float
    device_hours: float


@dataclass(frozen=True)
class NodeTable:
    """`recommended` is one of the rows' n_nodes; `why` says by which rule. order_only: see search.Ranking.

    wider: options of Slurm that give a job more nodes than the last row.
    """

    rows: list[NodeRow]
    recommended: int
    why: str
    order_only: bool
    wider: tuple[str, ...] = ()

    @property
    def base(self) -> NodeRow:
        """The row whose tokens/s per node are an efficiency of 1."""
        return max(comparable(self.rows), key=lambda row: row.tokens_per_s / row.n_nodes)


def check_nodes(machine: Machine, n_nodes: int, partition: str | None = None, qos: str | None = None) -> None:
    """Raise PlanError where a job may not have so many nodes, with the partition or QoS that gives them."""
    limits = job_limits(machine, partition, qos)
    if limits.min_nodes is not None and n_nodes < limits.min_nodes:
        raise PlanError(
            f"{n_nodes} node(s); {limits.named} wants {limits.min_nodes} or more",
            where=f"machine {machine.name}",
            do=f"--nodes {limits.min_nodes}, or another --qos",
        )
    if limits.max_nodes is None or n_nodes <= limits.max_nodes or machine.slurm is None:
        return
    wider = wider_limits(machine, n_nodes, partition) or wider_limits(machine, limits.max_nodes + 1, partition)
    do = f"--nodes {limits.max_nodes} or less"
    raise PlanError(
        f"{n_nodes} nodes; {limits.named} allows {limits.max_nodes}",
        where=f"machine {machine.name}",
        do=f"{do}, or {' or '.join(wider)}" if wider else f"{do}: no partition or QoS of this machine gives a job more",
    )


def wider_limits(machine: Machine, n_nodes: int, partition: str | None = None) -> tuple[str, ...]:
    """Options that give a job `n_nodes`: "--qos big (256 nodes, 24 h a job)"."""
    if machine.slurm is None:
        return ()
    ways = [("--partition", p.name) for p in machine.slurm.partitions]
    ways += [("--qos", q.name) for q in machine.slurm.qos]
    wider = []
    for option, name in ways:
        other = job_limits(machine, *(name, None) if option == "--partition" else (partition, name))
        if other.max_nodes is not None and other.max_nodes >= n_nodes:
            time = "" if other.max_time_h is None else f", {format_hours(other.max_time_h)} a job"
            wider.append(f"{option} {name} ({other.max_nodes} nodes{time})")
    return tuple(wider)


def choose_nodes(
    recipe: Recipe,
    machine: Machine,
    n_nodes: int | None = None,
    partition: str | None = None,
    qos: str | None = None,
    device_hours: float | None = None,
    deadline: str | None = None,
) -> tuple[int, NodeTable | None]:
    """(number of nodes to plan for, the curve that it was chosen on). No curve where the number is given, or is 1.

    Args:
        device_hours: a budget; deadline: a time as text, such as "10d". At most one of n_nodes and these is given.

    Raises:
        PlanError: beyond the limits of a job, or not possible.
    """
    if n_nodes is not None:
        check_nodes(machine, n_nodes, partition, qos)
        return n_nodes, None
    if device_hours is not None and not 0 < device_hours < 1e12:
        raise PlanError(f"--gpu-hours is {device_hours:g}", where="command line", do="such as --gpu-hours 50000")
    deadline_s = None if deadline is None else parse_duration_s(deadline)
    if deadline is not None and not deadline_s:
        raise PlanError(
            f"--deadline {deadline!r} is no time", where="command line", do="such as 10d, 36h, 90min or 10-00:00:00"
        )
    limits = job_limits(machine, partition, qos)
    if machine.slurm is None and device_hours is None and deadline_s is None:
        return 1, None
    table = build_node_table(recipe, machine, min(limits.max_nodes or MOST_NODES, MOST_NODES), limits.min_nodes or 1)
    if device_hours is not None:
        table = nodes_for_budget(machine, table, device_hours)
    if deadline_s is not None:
        table = nodes_for_deadline(recipe, machine, table, deadline_s)
    if limits.max_nodes is not None:
        table = replace(table, wider=wider_limits(machine, limits.max_nodes + 1, partition))
    return table.recommended, table


def build_node_table(recipe: Recipe, machine: Machine, most_nodes: int, least_nodes: int = 1) -> NodeTable:
    """The efficiency curve over 1, 2, 4, ... nodes, from `least_nodes` to `most_nodes`.

    Recommended: the most nodes that this version can train on with an efficiency of EFFICIENT_FRAC or more.

    Raises:
        PlanError: nothing fits on so many nodes.
    """
    counts = [n for n in (2**k for k in range(most_nodes.bit_length())) if n >= least_nodes] or [most_nodes]
    check_kind(recipe, machine)
    found = [row for row in (_row(recipe, machine, n_nodes) for n_nodes in counts) if row is not None]
    if not found:
        check_wishes(recipe, machine, counts[-1], 1)
        raise nothing_left(recipe, machine, counts[-1], 1, search(recipe, machine, counts[-1]))
    rows = _with_efficiency([row for row, _ in found])
    trained = comparable(rows)
    recommended = max(row.n_nodes for row in trained if row.efficiency_frac >= EFFICIENT_FRAC)
    why = f"the most with {EFFICIENT_FRAC:.0%} or more of the best tokens/s per node"
    if len(trained) < len(rows) and trained[0].chosen.why_not is None:
        why += ", among those that this version can train on"
    return NodeTable(rows, recommended, why, any(order_only for _, order_only in found))


def comparable(rows: list[NodeRow]) -> list[NodeRow]:
    """The rows that this version can train on, else those without offload, which is a last resort, else all."""
    trained = [row for row in rows if row.chosen.why_not is None]
    return trained or [row for row in rows if row.chosen.layout.offload == "none"] or rows


def _with_efficiency(rows: list[NodeRow]) -> list[NodeRow]:
    best = max(row.tokens_per_s / row.n_nodes for row in comparable(rows))
    return [replace(row, efficiency_frac=row.tokens_per_s / row.n_nodes / best) for row in rows]


def _row(recipe: Recipe, machine: Machine, n_nodes: int) -> tuple[NodeRow, bool] | None:
    """The row without its efficiency, and whether its seconds are for the order alone."""
    ranking = search(recipe, machine, n_nodes)
    chosen = ranking.chosen
    if chosen is None:
        return None
    run_time_s = recipe.n_steps * chosen.step_time_s
    device_hours = chosen.layout.world_size * run_time_s / 3600
    return NodeRow(n_nodes, chosen, chosen.tokens_per_s, 1.0, run_time_s, device_hours), ranking.order_only


def nodes_for_deadline(recipe: Recipe, machine: Machine, table: NodeTable, deadline_s: float) -> NodeTable:
    """The table with the fewest nodes whose steps are done in `deadline_s` seconds; waiting in the queue not counted.

    The middle of the predicted range meets it; `why` says whether the slow end does. Between two powers of two,
    eighths are tried.

    Raises:
        PlanError: no number of nodes is fast enough, or no time can be predicted.
    """
    _check_has_times(machine, table, "--deadline")
    rows = comparable(table.rows)
    upper = next((row for row in rows if row.run_time_s <= deadline_s), None)
    if upper is None:
        fastest = min(rows, key=lambda row: row.run_time_s)
        refused = next((row for row in table.rows if row.run_time_s <= deadline_s), None)
        later = "" if refused is None else f"; {refused.n_nodes} nodes would do it, but {refused.chosen.why_not}"
        shorter = shorter_run(recipe, 0.99 * deadline_s / fastest.run_time_s)
        raise PlanError(
            f"the run cannot be done in {format_seconds(deadline_s)}: the fastest, {fastest.n_nodes} node(s), takes "
            f"{format_seconds(fastest.run_time_s)} ({describe(fastest.chosen.layout)}){later}",
            where=f"recipe {recipe.name} on machine {machine.name}, --deadline",
            do=f"--deadline {fastest.run_time_s / 86400 + 0.1:.1f}d" + (f", or {shorter}" if shorter else ""),
        )
    added = list(table.rows)
    best = upper
    for eighths in (5, 6, 7):
        n_nodes = upper.n_nodes * eighths // 8
        if upper.n_nodes < 8 or not table.rows[0].n_nodes < n_nodes:
            continue
        found = _row(recipe, machine, n_nodes)
        if found is not None and found[0].chosen.why_not == upper.chosen.why_not:
            added.append(found[0])
            if found[0].run_time_s <= deadline_s:
                best = found[0]
                break
    why = f"the fewest whose steps are done within {format_seconds(deadline_s)}; waiting in the queue not counted"
    why += _slow_end(machine, best, deadline_s)
    rows = _with_efficiency(sorted(added, key=lambda row: row.n_nodes))
    return NodeTable(rows, best.n_nodes, why, table.order_only)


def _slow_end(machine: Machine, row: NodeRow, deadline_s: float) -> str:
    within = correct_step_time(machine, row.chosen.layout.precision, 1.0)
    if within.high_s is None:
        return ""
    slow_s = row.run_time_s * within.high_s / within.expected_s
    if slow_s <= deadline_s:
        return f"; the slow end of the predicted range, {format_seconds(slow_s)}, meets it too"
    return (
        f"; warning: only the middle of the predicted range meets it, the slow end, {format_seconds(slow_s)}, does not"
    )


def nodes_for_budget(machine: Machine, table: NodeTable, device_hours: float) -> NodeTable:
    """The table with the most nodes that still buy BUDGET_FRAC of what `device_hours` can buy at most.

    Raises:
        PlanError: no time can be predicted.
    """
    _check_has_times(machine, table, "--gpu-hours")
    rows = comparable(table.rows)
    most = max(tokens_bought(row, device_hours) for row in rows)
    best = max(row.n_nodes for row in rows if tokens_bought(row, device_hours) >= BUDGET_FRAC * most)
    # Where a device is half of what the site counts as a GPU, the two hours differ by two.
    amount, unit = estimate_cost(machine, 1, device_hours / machine.device.per_node * 3600)
    why = (
        f"the most that buy {BUDGET_FRAC:.0%} or more of the tokens that this budget can buy; "
        f"{format_count(device_hours)} device-hours are {format_count(amount)} {hours_of(unit)}"
    )
    return NodeTable(table.rows, best, why, table.order_only)


def tokens_bought(row: NodeRow, device_hours: float) -> float:
    return row.tokens_per_s * 3600 * device_hours / row.chosen.layout.world_size


def _check_has_times(machine: Machine, table: NodeTable, option: str) -> None:
    if table.order_only:
        raise PlanError(
            f"{option} needs predicted times, and not every rate of the devices is known",
            where=f"machine {machine.name}: device.peak_flops_per_s, device.memory_bytes_per_s",
            do="measure them on a node: aifactory-train probe --out FILE, then --machine FILE; or give --nodes",
        )
