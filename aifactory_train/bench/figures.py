"""What a report draws of one cell or op each: step times with their spikes, and collectives over message size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from aifactory_train import units
from aifactory_train.bench.cells import Read, host_of, labels, metric_of, words
from aifactory_train.bench.plots import MAX_LINES, Curve, Plot, build_plot, ecdf, linear_axis, log_axis
from aifactory_train.bench.record import Record
from aifactory_train.bench.statistics import SPIKE_FACTOR, Spike, dips, spikes

STEP_S = "aifactory_train_step_duration_seconds"
BUS_BYTES_PER_S = "aifactory_collective_bus_bandwidth_bytes_per_second"

MAX_CELLS = 6
MAX_DOTS = 40


class Steps(NamedTuple):
    plots: list[Plot]  # two of each record: distribution and series
    spikes: list[str]  # a sentence for each record that has some
    rest: str


def build_steps(records: Sequence[Record], read: Read) -> Steps | None:
    """Step times of each cell, a step as long as on its slowest rank: their distribution, and their series."""
    timed = [(record, read(record)[STEP_S]) for record in records if read(record).get(STEP_S)]
    if not timed:
        return None
    plots: list[Plot] = []
    told = []
    for (record, by_rank), name in zip(timed, labels([record for record, _ in timed]), strict=True):
        values = [max(of_all) for of_all in zip(*by_rank.values(), strict=False)]
        found = [spike for spike in spikes(by_rank) if spike.index < len(values)]
        if found:
            told.append(f"{name}: {_spike_sentence(record, found)}")
        if len(plots) < 2 * MAX_CELLS:
            plots += [_distribution(name, values), _series(record, name, values, found)]
    left_out = len(timed) - len(plots) // 2
    return Steps(plots, told, f"{left_out} more cells are not drawn." if left_out else "")


def _distribution(name: str, values: list[float]) -> Plot:
    """Up to SPIKE_FACTOR medians: the few steps beyond would press all others into one line."""
    median = statistics.median(values)
    limit = SPIKE_FACTOR * median
    stairs = [(value, share) for value, share in ecdf(values) if value <= limit]
    beyond = sum(value > limit for value in values)
    x = linear_axis([value for value, _ in stairs])
    plot = build_plot(
        name,
        [Curve("share of steps that took at most so long", stairs)],
        (x, units.format_seconds),
        (linear_axis([0.0, 1.0]), units.format_fraction),
        note=f"distribution, median {units.format_seconds(median)}",
        about="share of steps over step time",
    )
    far = f"{beyond} of {len(values)} steps lie farther right, up to {units.format_seconds(max(values))}."
    return replace(plot, remarks=[far] if beyond else [])


def _series(record: Record, name: str, values: list[float], found: list[Spike]) -> Plot:
    most = sorted(found, key=lambda spike: -values[spike.index])[:MAX_DOTS]
    plot = build_plot(
        name,
        [Curve("slowest rank of each step", [(i, value) for i, value in enumerate(values, 1)])],
        (linear_axis([0, len(values)]), lambda step: f"{step:,.0f}" if step else "step 0"),
        (linear_axis(values, from_zero=True), units.format_seconds),
        note=f"series of {len(values)} timed steps",
        about="step time over timed steps",
        dots=[(s.index + 1, values[s.index], s.kind, f"step {s.index + 1}: {_who(record, s)}") for s in most],
    )
    kinds = {"system": "spike on most ranks", "straggler": "spike on few ranks"}
    legend = [(kind, text) for kind, text in kinds.items() if any(spike.kind == kind for spike in found)]
    sentence = _spike_sentence(record, found) if found else ""
    return replace(plot, legend=legend, remarks=[f"{sentence[0].upper()}{sentence[1:]}."] if found else [])


def _who(record: Record, spike: Spike) -> str:
    if spike.kind == "system":
        return f"{len(spike.ranks)} ranks"
    return ", ".join(f"rank {rank} on {host_of(record, rank)}" for rank in spike.ranks[:4])


def _spike_sentence(record: Record, found: Sequence[Spike]) -> str:
    system = [spike.index + 1 for spike in found if spike.kind == "system"]
    parts = [f"{_times(len(system))} on most ranks (step {_some(system)})"] if system else []
    by_ranks: dict[str, list[int]] = {}
    for spike in found:
        if spike.kind == "straggler":
            by_ranks.setdefault(_who(record, spike), []).append(spike.index + 1)
    parts += [f"{_times(len(steps))} on {who} (step {_some(steps)})" for who, steps in sorted(by_ranks.items())[:4]]
    if len(by_ranks) > 4:
        parts.append(f"and on {len(by_ranks) - 4} more groups of ranks")
    return "longer than 1.5 medians: " + "; ".join(parts)


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _some(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")


def build_collectives(records: Sequence[Record]) -> list[Plot]:
    """One plot for each op: bus bandwidth over bytes of the op, both logarithmic, with the ceiling of the wire."""
    by_op: dict[str, list[Record]] = {}
    for record in records:
        if metric_of(record, BUS_BYTES_PER_S) and record.cell.get("bytes"):
            by_op.setdefault(str(record.cell.get("op")), []).append(record)
    return [_collective(op, own) for op, own in by_op.items()]


def _collective(op: str, records: Sequence[Record]) -> Plot:
    lines: dict[str, dict[float, list[Record]]] = {}
    keys = [key for key in dict.fromkeys(k for r in records for k in r.cell) if key not in ("op", "bytes")]
    telling = [key for key in keys if len({record.cell.get(key) for record in records}) > 1]
    for record in records:
        size = float(record.cell["bytes"] or 0)
        lines.setdefault(words(record.cell, telling) or "measured", {}).setdefault(size, []).append(record)
    curves, dots, rates = [], [], []
    for label, by_size in lines.items():
        points, bands = [], []
        for size, of_size in sorted(by_size.items()):
            metrics = [metric for record in of_size if (metric := metric_of(record, BUS_BYTES_PER_S))]
            points.append((size, statistics.median(metric.median for metric in metrics)))
            bands.append((min(metric.p5 for metric in metrics), max(metric.p95 for metric in metrics)))
        curves.append(Curve(label, points, bands if min(low for low, _ in bands) > 0 else []))
        rates += [value for band in bands for value in band]
        if len(curves) <= MAX_LINES:
            dots += [
                (float(dip.size_bytes), dip.rate_per_s, "straggler", f"dip at {units.format_bytes(dip.size_bytes)}")
                for dip in dips([(round(size), rate) for size, rate in points])
            ]
    wires = [record.facts.get("wire", {}) for record in records]
    ceilings = {wire.get("ceiling_bytes_per_s") for wire in wires}
    known = sorted(value for value in ceilings if value)
    names = {f"wire ceiling {units.format_bytes_per_s(value)}": value for value in known}
    x = log_axis([size for by_size in lines.values() for size in by_size], 2, tight=True)
    plot = build_plot(
        op.replace("_", " "),
        curves,
        (x, units.format_bytes),
        (log_axis([*rates, *known], 10), units.format_bytes_per_s),
        note="bus bandwidth, median; band from the 5th to the 95th percentile",
        about=f"bus bandwidth of {op} over message size, both logarithmic",
        levels=names,
        dots=dots,
    )
    remarks = list(plot.remarks)
    if None in ceilings or not known:
        why = {str(wire["why_unknown"]) for wire in wires if wire.get("why_unknown")}
        remarks.append("No wire ceiling: " + ("; ".join(sorted(why)) or "the records do not tell it") + ".")
    above = sum(rate > max(known) for curve in curves for _, rate in curve.points) if known else 0
    if above:
        n_points = sum(len(curve.points) for curve in curves)
        remarks.append(f"{above} of {n_points} medians lie above the wire ceiling, which is that of a ring.")
    return replace(plot, legend=[("straggler", "slower than a smaller message")] if dots else [], remarks=remarks)
