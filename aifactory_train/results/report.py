"""report.html and the closing lines in the terminal."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml

from aifactory_train import units
from aifactory_train.plan.plan import Plan, load_plan
from aifactory_train.results.chart import Chart, Point, build_chart
from aifactory_train.results.page import PAGE
from aifactory_train.results.record import Pair, Result, Row, read_metrics, write_result
from aifactory_train.rundir import RunDir, read_jsonl, write_atomic

# A long run commits thousands of times; the first events tell the start, the last the end.
FIRST_EVENTS, LAST_EVENTS = 20, 80


def write_report(run: RunDir) -> Path:
    """Write result.json and report.html of a run, finished or not; returns the path of the page.

    Raises:
        RunFolderError, PlanError: as `build_result`.
    """
    result, plan = write_result(run), load_plan(run.plan)
    rows, events = read_metrics(run), read_jsonl(run.events)
    page = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    html = page.from_string(PAGE).render(
        title=result.name,
        subtitle=_subtitle(result, plan),
        tiles=_tiles(result),
        charts=_charts(result, rows, events),
        compared=[_compared(*row) for row in _pairs(result) if row[1] != Pair(predicted=None, measured=None)],
        notes=plan.notes,
        memory=_bars(plan.predicted.memory_bytes, units.format_bytes),
        memory_total=("peak", units.format_bytes(plan.predicted.peak_memory_bytes)),
        times=_bars(plan.predicted.step_time_s, units.format_seconds),
        times_total=("known terms together", units.format_seconds(plan.predicted.total_step_time_s)),
        provenance=_provenance(result, plan),
        events=_events(events),
        recipe=yaml.safe_dump(plan.recipe.model_dump(mode="json"), sort_keys=False),
    )
    write_atomic(run.report, html)
    return run.report


def summary(run: RunDir) -> str:
    """The closing lines of a run for the terminal. Writes result.json; raises as `build_result`."""
    result = write_result(run)
    rows = [
        ("loss", f"{units.format_nats(result.loss_final_nats)}, {_loss_beside(result)}"),
        ("throughput", f"{_rate(result.tokens_per_s.measured)} measured, {_predicted(result.tokens_per_s, _rate)}"),
        ("steps", f"{result.last_step} of {result.planned_steps}, {units.format_count(result.tokens)} tokens"),
        ("report", str(run.report) if run.report.exists() else "not written yet"),
        ("model", str(run.export) if run.export.is_dir() else "not exported yet"),
    ]
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def _loss_beside(result: Result) -> str:
    entropy = result.unigram_entropy_nats
    text = f"mean of steps {result.loss_final_from_step}-{result.last_step}; "
    text += f"{result.loss_first_nats:.3f} at step {result.first_step}"
    return text if entropy is None else f"{text}, unigram entropy of the corpus {entropy:.3f}"


def _subtitle(result: Result, plan: Plan) -> str:
    day = datetime.datetime.fromtimestamp(result.attempts[-1].time_s, datetime.UTC).strftime("%d %B %Y")
    ranks = f"{plan.layout.world_size} rank" + ("s" if plan.layout.world_size > 1 else "")
    state = "" if result.finished else f" · stopped at step {result.last_step} of {result.planned_steps}"
    parameters = units.format_count(plan.shape.n_parameters)
    device = plan.machine.device.name
    return f"{parameters} parameters · {ranks} on {device} · {plan.layout.precision} · {day}{state}"


def _tiles(result: Result) -> list[tuple[str, tuple[str, str], str]]:
    wait = units.format_fraction(result.data_wait_frac)
    attempts = f"{len(result.attempts)} attempt" + ("s" if len(result.attempts) > 1 else "")
    mfu, peak = result.mfu_frac.measured, result.memory_peak_bytes
    unknown_peak = "per device; MFU unknown, the machine file has no peak"
    tiles = [
        ("Final loss", units.format_nats(result.loss_final_nats), _loss_beside(result)),
        ("Throughput", _rate(result.tokens_per_s.measured), _predicted(result.tokens_per_s, _rate)),
        (
            "Model FLOP rate",
            units.format_flops_per_s(result.model_flops_per_s),
            unknown_peak if mfu is None else f"per device, MFU {units.format_fraction(mfu)}",
        ),
        ("Memory peak per rank", units.format_bytes(peak.measured), _predicted(peak, units.format_bytes)),
        ("Tokens", units.format_count(result.tokens), f"{result.last_step:,} of {result.planned_steps:,} steps"),
        ("Wall time", units.format_seconds(result.wall_time_s), f"{attempts}, {wait} of it waiting for data"),
    ]
    return [(name, _number_and_unit(value), under) for name, value, under in tiles]


def _number_and_unit(printed: str) -> tuple[str, str]:
    """ "12.0 k tokens/s" -> ("12.0", "k tokens/s"); what holds two numbers stays whole."""
    number, _, unit = printed.partition(" ")
    return (printed, "") if any(c.isdigit() for c in unit) else (number, unit)


def _rate(tokens_per_s: float | None) -> str:
    return units.format_rate(tokens_per_s, "tokens")


def _predicted(pair: Pair, show: Any) -> str:
    return "not predicted" if pair.predicted is None else f"{show(pair.predicted)} predicted"


def _charts(result: Result, rows: list[Row], events: list[Row]) -> list[Chart]:
    context: dict[str, Any] = {
        "resumes": {a.attempt: a.from_step for a in result.attempts[1:]},
        "commits": [e["step"] for e in events if e.get("event") == "commit"],
    }
    entropy = {"unigram entropy of the corpus": result.unigram_entropy_nats}
    wanted: list[tuple[str, str, Any, dict[str, Any]]] = [
        ("loss", "Loss", _plain, {"note": "nats per token", "levels": entropy, "from_zero": False, **context}),
        ("tokens_per_s", "Throughput", units.format_count, _beside("tokens/s", result.tokens_per_s)),
        ("step_time_s", "Step time", units.format_seconds, _beside("seconds per step", result.step_time_s)),
        ("memory_peak_bytes", "Memory peak", units.format_bytes, _beside("largest rank", result.memory_peak_bytes)),
        ("grad_norm", "Gradient norm", _plain, {"note": "before clipping"}),
    ]
    charts = []
    for key, title, show, more in wanted:
        points: list[Point] = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            charts.append(build_chart(title, points, show, base=2 if key == "memory_peak_bytes" else 10, **more))
    return charts


def _beside(note: str, pair: Pair) -> dict[str, Any]:
    return {"note": note, "levels": {"planned": pair.predicted}}


def _plain(value: float) -> str:
    return f"{value:g}"


def _pairs(result: Result) -> list[tuple[str, Pair, Any]]:
    def alone(measured: float | None) -> Pair:
        return Pair(predicted=None, measured=measured)

    return [
        ("tokens per second", result.tokens_per_s, _rate),
        ("step time, median", result.step_time_s, units.format_seconds),
        ("step time, 95th percentile", alone(result.step_time_p95_s), units.format_seconds),
        ("memory peak per rank", result.memory_peak_bytes, units.format_bytes),
        ("MFU", result.mfu_frac, units.format_fraction),
        ("share of time waiting for data", alone(result.data_wait_frac), units.format_fraction),
    ]


def _compared(name: str, pair: Pair, show: Any) -> tuple[str, str, str, str]:
    difference = pair.difference_frac
    dash = "\N{EN DASH}"
    return (
        name,
        dash if pair.predicted is None else show(pair.predicted),
        dash if pair.measured is None else show(pair.measured),
        dash if difference is None else units.format_difference(difference),
    )


def _bars(terms: dict[str, Any], show: Any) -> list[tuple[str, str, float]]:
    """Name, printed value and percent of the largest term, largest first; unknown terms last."""
    most = max((v for v in terms.values() if v is not None), default=0) or 1
    ordered = sorted(terms.items(), key=lambda kv: -1 if kv[1] is None else kv[1], reverse=True)
    return [(name.replace("_", " "), show(value), round(100 * (value or 0) / most, 1)) for name, value in ordered]


def _provenance(result: Result, plan: Plan) -> list[tuple[str, str]]:
    origin = result.provenance
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items() if version)
    hosts = sorted({host for a in result.attempts for host in a.hosts})
    rows = [
        ("commit", origin["git_sha"]),
        ("recipe", f"{result.name}  sha256 {result.recipe_hash}"),
        ("machine", f"{result.machine}  sha256 {result.machine_hash}"),
        ("nodes", ", ".join(hosts)),
        ("platform", " · ".join(str(origin[key]) for key in ("platform", "cpu") if origin.get(key))),
        ("versions", versions),
        ("FLOP convention", plan.shape.flops_convention),
    ]
    for fact in plan.machine.sources:
        rows.append((f"machine: {', '.join(fact.facts)}", f"{fact.by}: {fact.source} ({fact.date})"))
    return rows


def _events(events: list[Row]) -> list[tuple[str, str, str]]:
    printed = [_event(event) for event in events]
    left_out = len(printed) - FIRST_EVENTS - LAST_EVENTS
    if left_out <= 0:
        return printed
    return [*printed[:FIRST_EVENTS], ("", "…", f"{left_out} more in events.jsonl"), *printed[-LAST_EVENTS:]]


def _event(event: Row) -> tuple[str, str, str]:
    moment = datetime.datetime.fromtimestamp(event["time_s"], datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    details = []
    for key, value in event.items():
        if key in ("time_s", "event", "provenance") or value is None:
            continue
        name, text = key, f"{value:g}" if isinstance(value, float) else str(value)
        if isinstance(value, list):
            text = ", ".join(map(str, value))
        elif key == "bytes":
            name, text = "size", units.format_bytes(value)
        elif key in ("seconds", "wall_s"):
            name, text = "took", units.format_seconds(value)
        details.append(f"{name.replace('_', ' ')} {text}" if key != "message" else text)
    return moment, event["event"], " · ".join(details)
