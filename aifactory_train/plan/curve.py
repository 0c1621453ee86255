"""The efficiency curve over the number of nodes as a table for people."""

from __future__ import annotations

from aifactory_train import units
from aifactory_train.plan.layout import describe
from aifactory_train.plan.nodes import NodeTable, tokens_bought


def render_nodes(table: NodeTable, budget_device_hours: float | None = None) -> str:
    """The efficiency curve as a table; with a budget also what it buys."""
    head = ["", "nodes", "devices", "tokens/s", "efficiency", "days", "device-hours", "trains"]
    head += [] if budget_device_hours is None else ["tokens bought"]
    lines = [[*head, "layout"]]
    for row in table.rows:
        unknown = table.order_only
        cells = [
            "->" if row.n_nodes == table.recommended else "",
            str(row.n_nodes),
            str(row.chosen.layout.world_size),
            "unknown" if unknown else units.format_count(row.tokens_per_s),
            units.format_fraction(row.efficiency_frac),
            "unknown" if unknown else units.format_days(row.run_time_s),
            "unknown" if unknown else units.format_count(row.device_hours),
        ]
        cells.append("yes" if row.chosen.why_not is None else "no")
        if budget_device_hours is not None:
            cells.append(units.format_count(tokens_bought(row, budget_device_hours)))
        lines.append([*cells, describe(row.chosen.layout)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    text = ["  ".join([*(c.rjust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "\n".join([*text, f"-> {table.recommended} node(s): {table.why}", *_node_remarks(table)])


def _node_remarks(table: NodeTable) -> list[str]:
    """What an efficiency is a share of, which rows are only for comparison, and how a job has more nodes."""
    base, refused = table.base, [row for row in table.rows if row.chosen.why_not is not None]
    trained = base.chosen.why_not is None
    best = "the best trainable tokens/s per node" if trained else "the best tokens/s per node"
    remarks = [f"efficiency: 100 % = {best}, of {base.n_nodes} node(s)"]
    if refused and trained:
        above = any(row.efficiency_frac > 1 for row in refused)
        more = "; above 100 % is what a layout would reach that this version cannot train" if above else ""
        remarks.append(f"trains no: launch refuses these rows{more}")
    elif refused:
        remarks.append("trains no: launch refuses these rows, as this version cannot train their layouts")
    if table.wider:
        remarks.append(f"more nodes: {' or '.join(table.wider)}")
    return remarks
