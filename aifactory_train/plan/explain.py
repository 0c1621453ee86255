"""A plan as text for people: a short page, and all of it with `--explain`."""

from __future__ import annotations

import json
from typing import Literal

from aifactory_train import units
from aifactory_train.plan.basis import measured_vs_assumed
from aifactory_train.plan.constants import TRANSFORMERS_CODE_FACTOR, TRANSFORMERS_CODE_FACTOR_RANGE
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.cost import render_run_cost, run_cost_of, run_cost_range_of
from aifactory_train.plan.curve import render_nodes
from aifactory_train.plan.document import distinct, document, nearest_of
from aifactory_train.plan.failures import devices_per_package
from aifactory_train.plan.layout import describe, n_devices
from aifactory_train.plan.memory import FIT_FRAC, estimate_memory
from aifactory_train.plan.nodes import NodeTable
from aifactory_train.plan.placement import place
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.rates import family_rates, rate_key
from aifactory_train.plan.search import Candidate, Ranking
from aifactory_train.plan.shape import (
    n_active_block_matrix_parameters,
    n_block_matrix_parameters,
    n_trained_parameters,
)
from aifactory_train.plan.support import why_not_trainable
from aifactory_train.plan.work import work_of

Form = Literal["short", "explain", "json"]

_OFFLOADED = {
    "optimizer": "optimizer state in host memory",
    "parameters": "weights and optimizer state in host memory, weights on the device block by block",
}
# Layouts shown in the ranking, each of another cut than those above it.
N_SHOWN = 6
# A smaller difference would be printed as 0.0 %.
SHOWN_FRAC = 0.0005
# Terms shown apart when two layouts are compared: what makes up so much of the difference.
NOTABLE_FRAC = 0.25


def render_answer(
    plan: Plan,
    ranking: Ranking,
    table: NodeTable | None,
    device_hours: float | None,
    form: Form,
    job_time_s: float | None = None,
) -> str:
    """All that `aifactory-train plan` says.

    Args:
        table: with `device_hours`, see nodes.choose_nodes.
        job_time_s: the longest job of the chosen partition and QoS; None: of the default ones.
    """
    if form == "json":
        return json.dumps(document(plan, ranking, table, device_hours, job_time_s), indent=1)
    nodes = None if table is None else render_nodes(table, device_hours)
    render = explain if form == "explain" else summarize
    return render(plan, ranking, nodes, job_time_s)


def summarize(plan: Plan, ranking: Ranking, nodes: str | None = None, job_time_s: float | None = None) -> str:
    """Whether it can be trained, fit, speed, time, cost, layout, runner-up and notes. `nodes`: of render_nodes."""
    shown = {"layout", "batch", "pipeline", "attention", "offload"}
    if plan.recipe.model.hf is not None or plan.layout.model_code == "transformers":
        shown.add("model code")
    rows = [
        *_head_rows(plan),
        *_verdict_rows(plan, ranking, job_time_s),
        *[row for row in _layout_rows(plan) if row[0] in shown],
        *_alternative_rows(plan, ranking),
    ]
    return "\n\n".join([_table(rows), *([nodes] if nodes else []), *_noted(_notes_but(plan, ""))])


def explain(plan: Plan, ranking: Ranking, nodes: str | None = None, job_time_s: float | None = None) -> str:
    """Everything: the verdict, the layout and where its axes run, memory and time by term, what was compared and what
    it rests on. `nodes`: of render_nodes."""
    basis = [(term, f"{source}: {text}") for term, source, text in measured_vs_assumed(plan.machine, plan.layout)]
    what_it_rests_on = _section("what it rests on", basis)
    placement = [("placement", line) for line in place(plan.machine, plan.layout)[1]]
    sections = [
        _table([*_head_rows(plan), ("counts", _counts(plan)), *_verdict_rows(plan, ranking, job_time_s)]),
        *([nodes] if nodes else []),
        _section("layout", [*_layout_rows(plan), *placement]),
        _memory(plan),
        _time(plan),
        _ranked(plan, ranking),
        what_it_rests_on,
        *_noted(_notes_but(plan, what_it_rests_on)),
    ]
    return "\n\n".join(sections)


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


def _notes_but(plan: Plan, said: str) -> list[str]:
    """Notes of the plan that the page has not said: neither in `said` nor as its warning."""
    notes = [note for note in plan.notes if not note.startswith("not trainable: ")]
    return [note for note in notes if note.removeprefix("assumed: ") not in said]


def _head_rows(plan: Plan) -> list[tuple[str, str]]:
    recipe, layout, device = plan.recipe, plan.layout, plan.machine.device
    what = f"{units.format_count(plan.shape.n_parameters)} parameters"
    if recipe.model.n_experts > 1:
        model = recipe.model
        idle = model.n_layers * (n_block_matrix_parameters(model) - n_active_block_matrix_parameters(model))
        what += f" ({units.format_count(plan.shape.n_parameters - idle)} at work for each token)"
    if recipe.lora is not None:
        what += f" ({units.format_count(n_trained_parameters(recipe.model, recipe.lora))} in adapters are trained)"
    what += f", {units.format_count(recipe.train.budget_tokens)}"
    n = n_devices(plan.machine, layout)
    devices = f"{n} x {device.name}" + (f", {layout.world_size} ranks" if n != layout.world_size else "")
    if devices_per_package(device) > 1:
        devices = f"{n} devices ({device.name}, one GCD each)"
    return [
        ("recipe", f"{recipe.name}: {what} tokens in {recipe.n_steps} steps"),
        ("machine", f"{plan.machine.name}: {layout.n_nodes} node(s), {devices}"),
    ]


def _verdict_rows(plan: Plan, ranking: Ranking, job_time_s: float | None) -> list[tuple[str, str]]:
    """Whether launch takes it, whether it fits, how fast it is and what it costs."""
    why, rows = why_not_trainable(plan.layout), []
    if why is not None:
        near = nearest_of(plan)
        rows.append(("warning", f"launch refuses this plan: {why}"))
        rows.append(
            ("warning", "no number of nodes or batch near these is trainable" if near is None else f"trainable: {near}")
        )
    costs = [("cost", line) for line in _cost_lines(plan, job_time_s)]
    return [*rows, _fit_row(plan, ranking), *_speed_rows(plan), *costs]


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
        "budget": f"{layout.remat_budget_frac or 1:.2g} of them kept, the rest computed again as the compiler chooses",
    }
    remat = f"{layout.remat_budget_frac:g}" if layout.remat == "budget" else layout.remat
    gathered = "block by block" if layout.reshard_after_forward else "once for forward and backward"
    engine: str = layout.engine
    if layout.engine == "deepspeed":
        engine = f"deepspeed zero_stage {layout.zero_stage}"
        gathered = {1: "never split", 2: "never split, gradients are", 3: "block by block"}[layout.zero_stage]
    summed = "reduced in each micro-batch" if layout.reduce_each_micro_batch else "added up whole, reduced once a step"
    who = _plural(layout.dp, "rank" if layout.dp == layout.world_size else "replica")
    micro = f"{layout.accumulation} micro-batch{'es' * (layout.accumulation > 1)} of"
    batch = f"{who} x {micro} {_plural(layout.micro_batch_rows, 'row')}"
    return [
        ("layout", f"{axes}, {engine}, {layout.precision}{', compiled' if layout.compile else ''}"),
        ("batch", f"{rows} rows of {seq} tokens = {batch}, remat {remat}"),
        ("parameters", f"gathered {gathered}" if layout.shard_degree > 1 else "whole on each rank"),
        ("activations", kept[layout.remat]),
        *([("gradients", summed)] if layout.accumulation > 1 and layout.shard_degree > 1 else []),
        *([("pipeline", _pipeline(layout))] if layout.pp > 1 else []),
        *([("attention", f"over the ranks of cp by {layout.cp_attention.replace('_', '-')}")] if layout.cp > 1 else []),
        *([("offload", _OFFLOADED[layout.offload])] if layout.offload != "none" else []),
        ("model code", _model_code(plan)),
        ("host", f"{layout.threads_per_rank} thread(s) a rank"),
    ]


def _model_code(plan: Plan) -> str:
    """Which, why, and what it costs."""
    model = plan.recipe.model
    low, high = (units.format_difference(factor - 1) for factor in TRANSFORMERS_CODE_FACTOR_RANGE)
    counted = f"counted with {units.format_difference(TRANSFORMERS_CODE_FACTOR - 1)} of computing time"
    measured = f"a Llama on a CPU had {low} to {high}"
    named = str((model.hf_config or {}).get("model_type", model.family))
    if plan.layout.model_code == "own":
        return (
            f"our decoder computes {named} models and alone has every axis and fp8; that of transformers is {counted}, "
            f"but {measured}: no difference is shown"
        )
    why = f"our decoder has no {named} models" if model.family == "other" else "as asked"
    return f"that of transformers: {why}; {counted}; {measured}"


def _pipeline(layout: Layout) -> str:
    return f"{layout.pipeline_schedule}, {_plural(layout.stages_per_rank, 'stage')} on each rank"


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
    text += f", {units.format_rate(per_device, 'tokens')} a rank, {_mfu(plan, predicted.tokens_per_s)}"
    return [
        ("speed", text),
        ("step", units.format_seconds(predicted.total_step_time_s)),
        ("training", f"{units.format_seconds(predicted.run_time_s)} for all steps, saves and failures not counted"),
    ]


def _mfu(plan: Plan, tokens_per_s: float) -> str:
    """Against the published peak, else against the one that is assumed for the family."""
    device, layout = plan.machine.device, plan.layout
    family = None if device.kind == "cpu" else family_rates(device.name)
    peak = None if family is None else getattr(family, f"{rate_key(layout.precision)}_flops_per_s")
    if plan.predicted.mfu_frac is not None or family is None or peak is None:
        return f"MFU {units.format_fraction(plan.predicted.mfu_frac)}"
    mfu_frac = tokens_per_s * plan.shape.model_flops_per_token / (peak * n_devices(plan.machine, layout))
    return f"MFU {units.format_fraction(mfu_frac)} of the assumed peak, that of {family.name}"


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _cost_lines(plan: Plan, job_time_s: float | None) -> list[str]:
    cost = run_cost_of(plan, job_time_s)
    return [] if cost is None else render_run_cost(cost, run_cost_range_of(plan, job_time_s))


def _alternative_rows(plan: Plan, ranking: Ranking) -> list[tuple[str, str]]:
    chosen, second = ranking.chosen, runner_up(ranking)
    without = _without_remat(plan, ranking)
    if chosen is None or second is None:
        return [("runner-up", "none: no other cut is legal and fits"), *without]
    text = f"{_described(second, chosen)}: step time {_slower(second, chosen)}"
    text += _difference(chosen, second, ranking.order_only) + ("" if second.why_not is None else " (not trainable)")
    return [("runner-up", text), *without]


def runner_up(ranking: Ranking) -> Candidate | None:
    """The next that can be trained and differs by more than its micro-batch; the next of another cut where none can."""
    chosen = ranking.chosen
    if chosen is None or chosen.why_not is not None:
        return ranking.runner_up

    def differs(other: Candidate) -> bool:
        kept = other.layout.reshard_after_forward != chosen.layout.reshard_after_forward
        return other.cut != chosen.cut or kept

    slower = (c for c in ranking.candidates if c.why_not is None and c.step_time_s >= chosen.step_time_s)
    return next((c for c in slower if differs(c)), ranking.runner_up)


def _described(candidate: Candidate, chosen: Candidate) -> str:
    text, layout = describe(candidate.layout), candidate.layout
    if layout.reshard_after_forward == chosen.layout.reshard_after_forward or layout.engine != "fsdp2":
        return text
    return text + (", parameters gathered block by block" if layout.reshard_after_forward else ", gathered once")


def _without_remat(plan: Plan, ranking: Ranking) -> list[tuple[str, str]]:
    """Why full recomputation was taken, where the planner chose it."""
    layout, limit = plan.layout, ranking.limit_bytes
    if layout.remat != "full" or plan.recipe.layout.remat != "auto" or limit is None:
        return []
    rows = layout.accumulation * layout.micro_batch_rows
    # The least that kept activations need, whatever the chosen layout does with its gradients.
    least = {"remat": "none", "micro_batch_rows": 1, "accumulation": rows, "reduce_each_micro_batch": rows > 1}
    kept: Layout = layout.model_copy(update=least | {"reshard_after_forward": True})
    peak = estimate_memory(work_of(plan.recipe), plan.machine.device.kind, kept).peak_bytes
    lacks = peak - FIT_FRAC * limit
    if lacks > 0:
        text = f"lacks {units.format_bytes(lacks)}: {units.format_bytes(peak)} per rank even with 1 row a micro-batch"
    else:
        text = f"fits with 1 row a micro-batch ({units.format_bytes(peak)} per rank), and is predicted to be no faster"
    return [("remat none", text)]


def _slower(candidate: Candidate, chosen: Candidate) -> str:
    difference = candidate.step_time_s / chosen.step_time_s - 1
    return "the same" if abs(difference) < SHOWN_FRAC else units.format_difference(difference)


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


def _memory(plan: Plan) -> str:
    predicted = plan.predicted
    terms, peak = predicted.memory_bytes, predicted.peak_memory_bytes
    lines = [_term(name, units.format_bytes(value), value / peak) for name, value in terms.items() if value]
    lines.append(
        _term("peak", units.format_bytes(peak), None) + (f"   {predicted.peak_at}" if predicted.peak_at else "")
    )
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


def _ranked(plan: Plan, ranking: Ranking) -> str:
    """The best of each cut, against the chosen one; then what was dropped and why."""
    chosen = ranking.chosen
    assert chosen is not None
    second = runner_up(ranking)
    lines = ["layouts compared: step time against the chosen one (+ slower, \N{MINUS SIGN} faster) and memory per rank"]
    shown = distinct(ranking)[:N_SHOWN]
    # With the chosen one and the next after it, however many that cannot be trained are faster.
    shown += [c for c in (chosen, second) if c is not None and c not in shown]
    for candidate in shown:
        mark = "->" if candidate is chosen else "  "
        slower = "" if candidate is chosen else _slower(candidate, chosen)
        memory, why = (
            units.format_bytes(candidate.memory.peak_bytes),
            "  not trainable"
            if candidate.why_not is not None
            else "  where asked for"
            if candidate.layout.engine != chosen.layout.engine
            else "",
        )
        lines.append(f"  {mark} {slower:>9}{memory:>12}  {_described(candidate, chosen)}{why}")
        if candidate is not chosen and (difference := _difference(chosen, candidate, ranking.order_only)):
            lines.append(f"               {difference.removeprefix(': ')}")
    lines += [f"  {name}: {text}" for name, text in _without_remat(plan, ranking)]
    lines.append(f"  {len(ranking.candidates)} layouts that fit were timed")
    for reason, n in ranking.dropped.items():
        what = f"  {n} more way(s) to share out the ranks: {reason}"
        if reason == "does not fit" and ranking.least is not None:
            needs, limit = ranking.least[1].peak_bytes, FIT_FRAC * (ranking.limit_bytes or 0)
            what += (
                f" with any micro-batch; the closest needs {units.format_bytes(needs)} of {units.format_bytes(limit)}"
            )
        lines.append(what)
    return "\n".join(lines)
