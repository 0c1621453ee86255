"""What a report compares: nodes with each other, sizes of a job, and energy beside throughput."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from aifactory_train import units
from aifactory_train.bench.cells import DASH, Read, host_of, labels, metric_of, short_name, short_names, words
from aifactory_train.bench.energy import joules_per_token
from aifactory_train.bench.plots import (
    MAX_LINES,
    Axis,
    BoxPlot,
    Curve,
    Plot,
    box_plot,
    build_plot,
    linear_axis,
    log_axis,
)
from aifactory_train.bench.record import Metric, Record
from aifactory_train.bench.scaling import (
    Efficiency,
    Scaling,
    estimate_scaling,
)
from aifactory_train.bench.statistics import outlier_nodes

TOKENS_PER_S = "aifactory_train_tokens_per_second"

MAX_BOX_PLOTS = 6
MAX_NODES_DRAWN = 24


class Nodes(NamedTuple):
    n_nodes: int
    n_cells: int
    outliers: list[tuple[str, str]]  # host, sentence
    plots: list[BoxPlot]
    rest: str


def build_nodes(records: Sequence[Record], read: Read) -> Nodes | None:
    """Every metric of every cell that more than one node has samples of; box plots of those with outliers first."""
    names = short_names(records)
    cells: dict[tuple[str, str], tuple[str, Metric, dict[str, list[float]]]] = {}
    for record in records:
        for metric in _telling(record):
            key = (f"{record.benchmark} {words(record.cell)}", metric.name)
            *_, by_host = cells.setdefault(key, (names[record.id], metric, {}))
            for rank, values in read(record).get(metric.name, {}).items():
                by_host.setdefault(host_of(record, rank), []).extend(values)
    compared = {key: cell for key, cell in cells.items() if len(cell[2]) > 1}
    if not compared:
        return None
    plots, found = [], dict[str, list[tuple[float, str]]]()
    for name, metric, by_host in compared.values():
        medians = {host: statistics.median(values) for host, values in by_host.items()}
        why = {host: _beside(host, medians, metric) for host in outlier_nodes(medians, metric.better)}
        for host, (by_frac, sentence) in why.items():
            found.setdefault(host, []).append((by_frac, f"{name}: {sentence}"))
        plot = box_plot(
            name,
            by_host,
            {host: sentence for host, (_, sentence) in why.items()},
            partial(units.format_quantity, unit=metric.unit),
            note=f"{short_name(metric.name)}, {metric.better} is better",
            max_rows=MAX_NODES_DRAWN,
        )
        plots.append((bool(why), plot))
    plots.sort(key=lambda pair: not pair[0])
    left = plots[MAX_BOX_PLOTS:]
    n_bad = sum(bad for bad, _ in left)
    rest = f"{len(left)} more are not drawn, {n_bad or 'none'} of them with an outlier." if left else ""
    outliers = [
        (host, f"in {len(all_of)} of {len(compared)} comparisons; most in {max(all_of)[1]}")
        for host, all_of in sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    hosts = {host for *_, by_host in compared.values() for host in by_host}
    return Nodes(len(hosts), len(compared), outliers, [plot for _, plot in plots[:MAX_BOX_PLOTS]], rest)


def _telling(record: Record) -> list[Metric]:
    """Without what says the same as a rate of the same record, and what nodes that wait for each other share."""
    together = len(set(record.hosts)) > 1 and record.protocol is not None and record.protocol.rank_reduction == "max"
    if together:
        return [metric for metric in record.metrics if metric.unit != "s" and not metric.unit.endswith("/s")]
    rates = {metric.name for metric in record.metrics if metric.unit.endswith("/s")}
    if not rates:
        return record.metrics
    return [
        metric
        for metric in record.metrics
        if "algorithm_bandwidth" not in metric.name
        and metric.name != TOKENS_PER_S
        and not (metric.name.endswith("_duration_seconds") and _rate_beside(metric.name, rates))
        and not metric.name.endswith(("mfu_ratio", "mamfu_ratio", "hfu_ratio", "flops_per_second_per_gpu"))
    ]


def _rate_beside(duration: str, rates: set[str]) -> bool:
    stem = duration.removesuffix("_duration_seconds")
    return any(rate.startswith((stem, stem.rpartition("_")[0])) for rate in rates)


def _beside(host: str, medians: Mapping[str, float], metric: Metric) -> tuple[float, str]:
    """How much worse a host is than the median of the others, as a fraction and as words."""
    others = statistics.median(value for other, value in medians.items() if other != host)
    by_frac = abs(medians[host] - others) / abs(others) if others else 0.0
    own, rest = (units.format_quantity(value, metric.unit) for value in (medians[host], others))
    return by_frac, f"{own}, {units.format_fraction(by_frac)} worse than the median of the other nodes, {rest}"


class ScalingPlot(NamedTuple):
    plot: Plot
    rows: list[tuple[int, str, str, str, int]]  # nodes, rate per device, efficiency, interval, samples
    base: str


def build_scaling(records: Sequence[Record], read: Read) -> list[ScalingPlot]:
    """Cells of the step that differ in the number of nodes only, as weak and as strong scaling."""
    return [_scaling_plot(scaling) for scaling in estimate_scaling(records, read)]


def _scaling_plot(scaling: Scaling) -> ScalingPlot:
    sizes, least = scaling.sizes, scaling.sizes[0].nodes
    x, y = log_axis([float(r.nodes) for r in sizes], 2, tight=True), _efficiency_axis(sizes)
    plot = build_plot(
        f"{scaling.mode.capitalize()} scaling",
        [Curve("measured", [(float(r.nodes), r.ratio) for r in sizes])],
        (x, lambda nodes: f"{nodes:g} node" + ("s" if nodes > 1 else "")),
        (y, units.format_fraction),
        note=scaling.cell,
        about="scaling efficiency over the number of nodes",
        levels={f"as on {least} node" + ("s" if least > 1 else ""): 1.0},
        dots=[(float(r.nodes), r.ratio, "", f"{r.nodes} nodes") for r in sizes],
        intervals=[(float(r.nodes), *r.interval) for r in sizes if r.interval],
    )
    base = f"Efficiency is the rate per device over that on {least} node{'s' if least > 1 else ''} (N0 = {least}); "
    base += "95 % intervals by block bootstrap over steps."
    return ScalingPlot(plot, [_scaling_row(r) for r in sizes], base)


def _efficiency_axis(results: Sequence[Efficiency]) -> Axis:
    return linear_axis([1.0, *(value for r in results for value in (r.ratio, *(r.interval or ())))], from_zero=True)


def _scaling_row(result: Efficiency) -> tuple[int, str, str, str, int]:
    spread = DASH if result.interval is None else " to ".join(units.format_fraction(end) for end in result.interval)
    rate = units.format_rate(result.rate_per_s, "tokens")
    return result.nodes, rate, units.format_fraction(result.ratio), spread, result.n


class EnergyRow(NamedTuple):
    cell: str
    rate: str
    scope: str
    power: str
    energy: str
    per_token: str


class Energy(NamedTuple):
    rows: list[EnergyRow]
    plots: list[Plot]
    n_unread: int


def build_energy(records: Sequence[Record]) -> Energy | None:
    """Rate and energy of the same window; cells without a reading stay listed. None where there is none at all."""
    trained = [record for record in records if metric_of(record, TOKENS_PER_S)]
    if not any(record.energy for record in trained):
        return None
    rows, points = [], dict[str, list[tuple[str, float, float]]]()
    for record, label in zip(trained, labels(trained), strict=True):
        metric = metric_of(record, TOKENS_PER_S)
        assert metric is not None
        rate = float(record.facts.get("window", {}).get("tokens_per_s", metric.median))
        shown = units.format_rate(rate, "tokens")
        for window in record.energy:
            power_w = window.joules / window.seconds
            energy, power = units.format_quantity(window.joules, "J"), units.format_watts(power_w)
            per_token = joules_per_token(record, window)
            told = DASH if per_token is None else units.format_quantity(per_token, "J/token")
            rows.append(EnergyRow(label, shown, f"{window.scope}, {window.method}", power, energy, told))
            if per_token is not None:
                points.setdefault(window.scope, []).append((label, rate, per_token))
        if not record.energy:
            rows.append(EnergyRow(label, shown, "not read", DASH, DASH, DASH))
    plots = [_energy_plot(scope, own) for scope, own in points.items() if len(own) > 1]
    return Energy(rows, plots, sum(not record.energy for record in trained))


def _energy_plot(scope: str, points: Sequence[tuple[str, float, float]]) -> Plot:
    x = linear_axis([rate for _, rate, _ in points], from_zero=True)
    y = linear_axis([energy for *_, energy in points], from_zero=True)
    drawn = points[:MAX_LINES]
    plot = build_plot(
        f"Energy beside throughput, {scope}",
        [],
        (x, units.format_count),
        (y, lambda energy: units.format_quantity(energy, "J/token").removesuffix("/token")),
        note="energy of a token over tokens per second; down and to the right is better",
        about="energy per token over tokens per second",
        dots=[(rate, energy, f"s{i}", label) for i, (label, rate, energy) in enumerate(drawn)],
    )
    return replace(plot, legend=[(f"s{i}", label) for i, (label, *_) in enumerate(drawn)])
