"""A plan as text for people: a short page, and all of it with `--explain`."""

from __future__ import annotations

import json
from typing import Any, Literal

from aifactory_train import units
from aifactory_train.plan.basis import measured_vs_assumed
from aifactory_train.plan.cost import render_run_cost, run_cost_of
from aifactory_train.plan.layout import describe
from aifactory_train.plan.memory import FIT_FRAC
from aifactory_train.plan.nodes import NodeTable, tokens_bought
from aifactory_train.plan.placement import place
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.search import Candidate, Ranking

Form = Literal["short", "explain", "json"]

# Layouts shown in the ranking, each of another cut than those above it.
N_SHOWN = 6
# Terms shown apart when two layouts are compared: what makes up so much of the difference.
NOTABLE_FRAC = 0.25


def render_answer(plan: Plan, ranking: Ranking, table: NodeTable | None, device_hours: float | None, form: Form) -> str:
    """All that `aifactory-train plan` says. `table` and `device_hours`: see nodes.choose_nodes."""
    if form == "json":
        return json.dumps(document(plan, ranking, table), indent=1)
    page = explain(plan, ranking) if form == "explain" else summarize(plan, ranking)
    return page if table is None else f"{render_nodes(table, device_hours)}\n\n{page}"


def summarize(plan: Plan, ranking: Ranking) -> str:
    """Layout, fit, speed, time, cost, runner-up and notes."""
    rows = [*_head_rows(plan), *_layout_rows(plan)[:2], _fit_row(plan, ranking), *_speed_rows(plan)]
    rows += [("cost", line) for line in _cost_lines(plan)]
    rows += _alternative_rows(ranking)
    return "\n\n".join([_table(rows), *_noted(plan.notes)])


def explain(plan: Plan, ranking: Ranking) -> str:
    """Everything: the layout and where its axes run, memory and time by term, what was compared and assumed."""
    basis = [(term, f"{source}: {text}") for term, source, text in measured_vs_assumed(plan.machine, plan.layout)]
    sections = [
        _table([*_head_rows(plan), ("counts", _counts(plan))]),
        _section(
            "layout", [*_layout_rows(plan), *[("placement", line) for line in place(plan.machine, plan.layout)[1]]]
        ),
        _memory(plan, ranking),
        _time(plan),
        _section("predicted", [*_speed_rows(plan), *[("cost", line) for line in _cost_lines(plan)]]),
        _ranked(ranking),
        _section("what it rests on", basis),
        *_noted([*plan.notes, *_cost_notes(plan)]),
    ]
    return "\n\n".join(sections)


def document(plan: Plan, ranking: Ranking, table: NodeTable | None) -> dict[str, Any]:
    """Plan and ranking as JSON values. Seconds and tokens/s of the ranking are null where they only order it."""
    return {
        "plan": plan.model_dump(mode="json"),
        "ranking": [_candidate(c, ranking.order_only) for c in distinct(ranking)],
        "dropped": ranking.dropped,
        "nodes": None if table is None else [
            {
                "n_nodes": row.n_nodes,
                "recommended": row.n_nodes == table.recommended,
                "efficiency_frac": row.efficiency_frac,
                **_candidate(row.chosen, table.order_only),
            }
            for row in table.rows
        ],
    }  # fmt: skip


def render_nodes(table: NodeTable, budget_device_hours: float | None = None) -> str:
    """The efficiency curve as a table; with a budget also what it buys."""
    head = ["", "nodes", "devices", "tokens/s", "efficiency", "days", "device-hours"]
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
        if budget_device_hours is not None:
            cells.append(units.format_count(tokens_bought(row, budget_device_hours)))
        layout = describe(row.chosen.layout) + ("" if row.chosen.why_not is None else "  (not trainable yet)")
        lines.append([*cells, layout])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    text = ["  ".join([*(c.rjust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
    return "\n".join([*text, f"-> {table.recommended} node(s): {table.why}"])


def distinct(ranking: Ranking) -> list[Candidate]:
    """The fastest of each cut, fastest first; the chosen one stands for its own."""
    seen: dict[tuple[Any, ...], Candidate] = {}
    for candidate in (*([ranking.chosen] if ranking.chosen else []), *ranking.candidates):
        seen.setdefault(candidate.cut, candidate)
    return sorted(seen.values(), key=lambda c: c.step_time_s)


def _candidate(candidate: Candidate, order_only: bool) -> dict[str, Any]:
    layout = candidate.layout
    return {
        "layout": layout.model_dump(mode="json"),
        "peak_memory_bytes": candidate.memory.peak_bytes,
        "step_time_s": None if order_only else candidate.step_time_s,
        "tokens_per_s": None if order_only else candidate.tokens_per_s,
        "why_not_trainable": candidate.why_not,
    }


def _table(rows: list[tuple[str, str]]) -> str:
    """Names in a column, each once."""
    lines, last, width = [], "", max(12, *(len(name) for name, _ in rows)) + 2
    for name, text in rows:
        lines.append(f"  {'' if name == last else name:<{width}}{text}")
        last = name
    return "\n".join(lines)


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    return f"{title}\n{_table(rows)}"


def _noted(notes: list[str]) -> list[str]:
    """A section for them, where there are any."""
    return ["\n".join(["notes", *(f"  - {note}" for note in notes)])] if notes else []


def _head_rows(plan: Plan) -> list[tuple[str, str]]:
    recipe, layout, device = plan.recipe, plan.layout, plan.machine.device
    what = f"{units.format_count(plan.shape.n_parameters)} parameters, {units.format_count(recipe.train.budget_tokens)}"
    n_devices = layout.n_nodes if device.kind == "cpu" else layout.world_size
    ranks = f", {layout.world_size} ranks" if n_devices != layout.world_size else ""
    return [
        ("recipe", f"{recipe.name}: {what} tokens in {recipe.n_steps} steps"),
        ("machine", f"{plan.machine.name}: {layout.n_nodes} node(s), {n_devices} x {device.name}{ranks}"),
    ]


def _counts(plan: Plan) -> str:
    shape = plan.shape
    return f"{units.format_count(shape.model_flops_per_token)} FLOP/token ({shape.flops_convention})"


def _layout_rows(plan: Plan) -> list[tuple[str, str]]:
    layout, recipe = plan.layout, plan.recipe
    rows, seq = recipe.global_batch_rows, recipe.data.seq_len_tokens
    axes = " x ".join(f"{a} {getattr(layout, a)}" for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))
    kept = {
        "none": "kept",
        "selective": "in part computed again in the backward pass",
        "full": "of each block computed again in the backward pass",
    }
    gathered = "block by block" if layout.reshard_after_forward else "once for forward and backward"
    if layout.engine == "deepspeed":
        gathered = {1: "never split", 2: "never split, gradients are", 3: "block by block"}[layout.zero_stage]
    summed = "reduced in each micro-batch" if layout.reduce_each_micro_batch else "added up whole, reduced once a step"
    batch = f"{layout.dp} replica{'s' * (layout.dp > 1)} x {layout.accumulation} x {layout.micro_batch_rows} rows"
    return [
        ("layout", f"{axes}, {layout.engine}, {layout.precision}{', compiled' if layout.compile else ''}"),
        ("batch", f"{rows} rows of {seq} tokens = {batch}, remat {layout.remat}"),
        ("parameters", f"gathered {gathered}" if layout.shard_degree > 1 else "whole on each rank"),
        ("activations", kept[layout.remat]),
        *([("gradients", summed)] if layout.accumulation > 1 and layout.shard_degree > 1 else []),
        *([("pipeline", f"{layout.stages_per_rank} stage(s) on each rank")] if layout.pp > 1 else []),
        *([("offload", "optimizer state in host memory")] if layout.offload == "optimizer" else []),
        ("host", f"{layout.threads_per_rank} thread(s) a rank"),
    ]


def _fit_row(plan: Plan, ranking: Ranking) -> tuple[str, str]:
    peak, limit = plan.predicted.peak_memory_bytes, ranking.limit_bytes
    if limit is None:
        return "memory", f"{units.format_bytes(peak)} per rank; how much there is, is unknown"
    margin = FIT_FRAC * limit - peak
    return (
        "memory",
        f"fits: {units.format_bytes(peak)} of {units.format_bytes(limit)} per rank, {units.format_bytes(margin)} below "
        f"the {units.format_fraction(FIT_FRAC)} that may be planned",
    )


def _speed_rows(plan: Plan) -> list[tuple[str, str]]:
    predicted = plan.predicted
    if predicted.tokens_per_s is None or predicted.total_step_time_s is None:
        return [("speed", "unknown")]
    batch, per_device = plan.recipe.train.global_batch_tokens, predicted.tokens_per_s / plan.layout.world_size
    text = units.format_rate(predicted.tokens_per_s, "tokens")
    if predicted.step_time_low_s is not None and predicted.step_time_high_s is not None:
        low, high = batch / predicted.step_time_high_s, batch / predicted.step_time_low_s
        text += f" ({units.format_count(low)} to {units.format_count(high)})"
    text += f", {units.format_rate(per_device, 'tokens')} a rank, MFU {units.format_fraction(predicted.mfu_frac)}"
    return [
        ("speed", text),
        ("step", units.format_seconds(predicted.total_step_time_s)),
        ("training", f"{units.format_seconds(predicted.run_time_s)} for all steps"),
    ]


def _cost_lines(plan: Plan) -> list[str]:
    cost = run_cost_of(plan)
    return [] if cost is None else render_run_cost(cost)


def _cost_notes(plan: Plan) -> list[str]:
    cost = run_cost_of(plan)
    return [] if cost is None else list(cost.assumed)


def _alternative_rows(ranking: Ranking) -> list[tuple[str, str]]:
    chosen, second = ranking.chosen, ranking.runner_up
    if chosen is None or second is None:
        return [("runner-up", "none: no other cut is legal and fits")]
    slower = units.format_fraction(second.step_time_s / chosen.step_time_s - 1)
    text = f"{describe(second.layout)}: {slower} slower{_difference(chosen, second, ranking.order_only)}"
    return [("runner-up", text + ("" if second.why_not is None else " (not trainable yet)"))]


def _difference(chosen: Candidate, other: Candidate, order_only: bool) -> str:
    """The terms that make most of the difference: ": 310 ms more in tensor parallel, 40 ms less in optimizer"."""
    if order_only:
        return ""
    names = dict.fromkeys((*chosen.terms_s, *other.terms_s))
    more = {n: (other.terms_s.get(n) or 0.0) - (chosen.terms_s.get(n) or 0.0) for n in names}
    total = sum(abs(s) for s in more.values())
    notable = sorted((n for n in names if abs(more[n]) > NOTABLE_FRAC * total), key=lambda n: -more[n])
    parts = [
        f"{units.format_seconds(abs(more[n]))} {'more' if more[n] > 0 else 'less'} in {n.replace('_', ' ')}"
        for n in notable
    ]
    return f": {', '.join(parts)} per step" if parts else ""


def _memory(plan: Plan, ranking: Ranking) -> str:
    predicted = plan.predicted
    terms, peak = predicted.memory_bytes, predicted.peak_memory_bytes
    lines = [_term(name, units.format_bytes(value), value / peak) for name, value in terms.items() if value]
    lines.append(
        _term("peak", units.format_bytes(peak), None) + (f"   {predicted.peak_at}" if predicted.peak_at else "")
    )
    lines.append(_table([_fit_row(plan, ranking)]))
    if predicted.host_bytes:
        lines.append("memory of a node's host")
        lines += [_term(name, units.format_bytes(value), None) for name, value in predicted.host_bytes.items() if value]
    return "\n".join(["memory per rank", *lines])


def _time(plan: Plan) -> str:
    total = plan.predicted.total_step_time_s
    lines = []
    for name, value in plan.predicted.step_time_s.items():
        lines.append(_term(name, units.format_seconds(value), value / total if total and value is not None else None))
    return "\n".join(["time per step", *lines, _term("total", units.format_seconds(total), None)])


def _term(name: str, value: str, share_frac: float | None) -> str:
    share = "" if share_frac is None else f"{units.format_fraction(share_frac):>9}"
    return f"  {name.replace('_', ' '):<22}{value:>14}{share}".rstrip()


def _ranked(ranking: Ranking) -> str:
    """The best of each cut, against the chosen one; then what was dropped and why."""
    chosen = ranking.chosen
    assert chosen is not None
    lines = ["layouts compared"]
    shown = distinct(ranking)[:N_SHOWN]
    # With the chosen one and the next after it, however many that cannot be trained are faster.
    shown += [c for c in (chosen, ranking.runner_up) if c is not None and c not in shown]
    for candidate in shown:
        mark = "->" if candidate is chosen else "  "
        slower = "" if candidate is chosen else units.format_difference(candidate.step_time_s / chosen.step_time_s - 1)
        memory, why = (
            units.format_bytes(candidate.memory.peak_bytes),
            "" if candidate.why_not is None else "  not trainable",
        )
        lines.append(f"  {mark} {slower:>9}{memory:>12}  {describe(candidate.layout)}{why}")
        if candidate is not chosen and (difference := _difference(chosen, candidate, ranking.order_only)):
            lines.append(f"               {difference.removeprefix(': ')}")
    lines.append(f"  {len(ranking.candidates)} that fit were timed")
    for reason, n in ranking.dropped.items():
        closest = ""
        if reason == "does not fit" and ranking.least is not None:
            needs, limit = ranking.least[1].peak_bytes, FIT_FRAC * (ranking.limit_bytes or 0)
            closest = f", the closest needs {units.format_bytes(needs)} of {units.format_bytes(limit)}"
        lines.append(f"  dropped, {reason}: {n} layout(s){closest}")
    return "\n".join(lines)
