"""Two benches, or two records, beside each other: B over A with an interval, a verdict, and what else has changed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aifactory_train.bench.fingerprints import SHOWN_DIGITS, odd_results
from aifactory_train.bench.judge import judge_whole
from aifactory_train.bench.paired import MIN_BLOCKS, RESAMPLES, Ratio, ratio_of_medians
from aifactory_train.bench.record import Metric, Record, Verdict, cell_key, read_record, read_samples
from aifactory_train.bench.references import Setting, default_tolerance_frac, nodes_of, setting_of
from aifactory_train.bench.store import load_records
from aifactory_train.errors import RunFolderError
from aifactory_train.units import format_difference, format_quantity

# Of provenance: what differs in every run and explains nothing.
VOLATILE = ("load_1min", "command", "started_by")
MAX_SHOWN = 60  # characters of a value


class Row(NamedTuple):
    """One metric of one cell. ratio: median of B over that of A; None where it is not compared, and `why` says it."""

    cell: str
    metric: str
    unit: str
    median_a: float
    median_b: float
    ratio: Ratio | None
    method: str
    verdict: Verdict
    why: str


class Change(NamedTuple):
    """A key of provenance, one or two levels deep, and its values on both sides."""

    key: str
    a: str
    b: str


class Comparison(NamedTuple):
    """fingerprints: a sentence for each cell that has one on both sides."""

    rows: list[Row]
    fingerprints: list[str]
    only_a: list[str]
    only_b: list[str]
    changed: list[Change]


class Side(NamedTuple):
    """Records of one cell, by start, with their samples: record id -> metric -> values, the worst rank's of each."""

    records: list[Record]
    samples: Mapping[str, Mapping[str, list[float]]]


def compare(a: Path, b: Path) -> str:
    """The comparison of two bench folders or two records as text. Raises RunFolderError where one is neither."""
    return render_comparison(build_comparison(a, b))


def build_comparison(a: Path, b: Path) -> Comparison:
    """Cells that both sides have, by their key; those of the same nodes where both sides have these alone."""
    all_a, all_b = _load(a), _load(b)
    by_host = {_key(r, True) for r, _ in all_a} & {_key(r, True) for r, _ in all_b}
    cells_by_host = {key.partition(" on ")[0] for key in by_host}
    side_a, side_b = _group(all_a, cells_by_host), _group(all_b, cells_by_host)
    odd = odd_results([*(r for r, _ in all_a), *(r for r, _ in all_b)])
    both = [(key, side_a[key], side_b[key]) for key in side_a if key in side_b]
    return Comparison(
        rows=[row for key, a_of_key, b_of_key in both for row in _compare_cell(key, a_of_key, b_of_key, odd)],
        fingerprints=[line for of_key in both for line in _compare_fingerprints(*of_key)],
        only_a=[key for key in side_a if key not in side_b],
        only_b=[key for key in side_b if key not in side_a],
        changed=changed_provenance([r for r, _ in all_a], [r for r, _ in all_b]),
    )


def _load(path: Path) -> list[tuple[Record, dict[str, list[float]]]]:
    """Records and their samples, by start."""
    folder = path.parent if path.is_file() else path / "records"
    records = [read_record(path)] if path.is_file() else load_records(path)
    if not records:
        raise RunFolderError("no records here", where=str(path), do="give a bench folder, or a file of its records/")
    return [(record, _samples(record, folder)) for record in records]


def _samples(record: Record, folder: Path) -> dict[str, list[float]]:
    if record.samples is None or record.protocol is None:
        return {}
    found = {}
    raw = read_samples(folder / record.samples)
    for metric in record.metrics:
        by_rank = raw.get(metric.name, {})
        worst = min if metric.better == "higher" else max
        if record.protocol.rank_reduction == "max":
            found[metric.name] = [worst(of_all) for of_all in zip(*by_rank.values(), strict=True)]
        else:
            found[metric.name] = [value for values in by_rank.values() for value in values]
    return found


def _key(record: Record, by_host: bool) -> str:
    return f"{cell_key(record)} on {nodes_of(record)}" if by_host else cell_key(record)


def _group(loaded: Sequence[tuple[Record, dict[str, list[float]]]], cells_by_host: set[str]) -> dict[str, Side]:
    sides: dict[str, tuple[list[Record], dict[str, dict[str, list[float]]]]] = {}
    for record, samples in loaded:
        records, by_id = sides.setdefault(_key(record, cell_key(record) in cells_by_host), ([], {}))
        records.append(record)
        by_id[record.id] = samples
    return {key: Side(records, by_id) for key, (records, by_id) in sides.items()}


def _compare_cell(key: str, a: Side, b: Side, odd: Mapping[str, str]) -> list[Row]:
    whole = _whole(a, b, odd)
    rows = []
    metrics_b = {metric.name: metric for record in b.records for metric in record.metrics}
    for metric in {m.name: m for record in a.records for m in record.metrics}.values():
        blocks_a, blocks_b = _blocks(a, metric.name), _blocks(b, metric.name)
        other = metrics_b.get(metric.name)
        if other is None:
            continue
        if whole or not blocks_a or not blocks_b:
            verdict, why = whole or ("incomplete", "its samples are not there")
            rows.append(Row(key, metric.name, metric.unit, metric.median, other.median, None, "", verdict, why))
            continue
        median_a, median_b = (float(np.median(np.concatenate(blocks))) for blocks in (blocks_a, blocks_b))
        ratio, method = _ratio(a, b, blocks_a, blocks_b)
        verdict, why = _verdict(ratio, metric, default_tolerance_frac(a.records[0]))
        rows.append(Row(key, metric.name, metric.unit, median_a, median_b, ratio, method, verdict, why))
    if whole and not rows:
        rows.append(Row(key, "", "", 0.0, 0.0, None, "", *whole))
    return rows


def _whole(a: Side, b: Side, odd: Mapping[str, str]) -> tuple[Verdict, str] | None:
    """What keeps two sides from being compared at all; a wrong result before one that is not steady."""
    for name, side in (("A", a), ("B", b)):
        for record in side.records:
            if record.id in odd:
                return "invalid", f"{name}: {odd[record.id]}"
    for name, side in (("A", a), ("B", b)):
        for record in side.records:
            found = judge_whole(record)
            if found is not None:
                return found[0], f"{name}: {found[1]}"
    counts = {r.validity.n_parameters for side in (a, b) for r in side.records} - {None}
    if len(counts) > 1:
        return "invalid", f"models of {' and '.join(str(n) for n in sorted(n for n in counts if n))} parameters"
    return None


def _compare_fingerprints(key: str, a: Side, b: Side) -> list[str]:
    """Whether both sides compute the same, and whether they should. Nodes that are wrong have a row of their own."""
    values = [{record.validity.fingerprint for record in side.records} for side in (a, b)]
    if {None} in values:
        return []
    told = [" and ".join(sorted(str(value)[:SHOWN_DIGITS] for value in of_side)) for of_side in values]
    if values[0] == values[1]:
        return [f"fingerprint of {key}: {told[0]} in A and B"]
    settings = [[setting_of(record) for record in side.records] for side in (a, b)]
    differ = [name for name in ("sku", "stack", "recipe", "code") if _differ(settings, name)]
    why = f"{', '.join(differ)} differ, so they may" if differ else "nothing else differs, so that is silent corruption"
    return [f"fingerprint of {key}: A {told[0]}, B {told[1]}; {why}"]


def _differ(settings: Sequence[Collection[Setting]], name: str) -> bool:
    first, second = ({getattr(setting, name) for setting in of_side} for of_side in settings)
    return first != second


def _blocks(side: Side, metric: str) -> list[list[float]]:
    found = [side.samples[record.id].get(metric, []) for record in side.records]
    return [block for block in found if block]


def _ratio(
    a: Side, b: Side, blocks_a: Sequence[Sequence[float]], blocks_b: Sequence[Sequence[float]]
) -> tuple[Ratio | None, str]:
    if min(value for blocks in (blocks_a, blocks_b) for block in blocks for value in block) <= 0:
        return None, "values that are not positive have no ratio"
    if taken_in_turns(a.records, b.records):
        return ratio_of_medians(blocks_b, blocks_a), f"paired, {len(blocks_a)} blocks in turns"
    counts = f"{sum(map(len, blocks_a))} and {sum(map(len, blocks_b))} samples"
    return _two_samples(blocks_a, blocks_b), f"not paired, {counts} of {len(blocks_a)} and {len(blocks_b)} record(s)"


def taken_in_turns(a: Sequence[Record], b: Sequence[Record]) -> bool:
    """Block i of A ran next to block i of B (A B B A ...), and there are enough of them."""
    order = sorted([*((r.started, "a") for r in a), *((r.started, "b") for r in b)])
    pairs = [{order[i][1], order[i + 1][1]} for i in range(0, len(order) - 1, 2)]
    return len(a) == len(b) >= MIN_BLOCKS and all(pair == {"a", "b"} for pair in pairs)


def _two_samples(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0) -> Ratio:
    """Median of B over that of A, with a 95 % percentile bootstrap of records, then of samples within each."""
    draw = np.random.default_rng(seed)

    def resampled(blocks: Sequence[Sequence[float]]) -> float:
        chosen = [np.asarray(blocks[i]) for i in draw.integers(len(blocks), size=len(blocks))]
        return float(np.median(np.concatenate([block[draw.integers(len(block), size=len(block))] for block in chosen])))

    ratios = [resampled(b) / resampled(a) for _ in range(RESAMPLES)]
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(np.median(np.concatenate(b)) / np.median(np.concatenate(a))), float(low), float(high))


def _verdict(ratio: Ratio | None, metric: Metric, tolerance_frac: float) -> tuple[Verdict, str]:
    """A difference counts when its interval excludes 1 and it is larger than the tolerance."""
    if ratio is None:
        return "no_reference", "no ratio"
    if ratio.low <= 1 <= ratio.high:
        return "pass", "no difference shown"
    if abs(ratio.ratio - 1) <= tolerance_frac:
        return "pass", f"within {tolerance_frac * 100:g} %"
    better = (ratio.ratio > 1) == (metric.better == "higher")
    return ("improvement" if better else "regression"), f"more than {tolerance_frac * 100:g} %"


def changed_provenance(a: Sequence[Record], b: Sequence[Record]) -> list[Change]:
    """Keys whose sets of values differ between the sides; a mapping is looked into one level deep."""
    flat_a, flat_b = _values(a), _values(b)
    keys = [key for key in sorted({*flat_a, *flat_b}) if flat_a.get(key) != flat_b.get(key)]
    return [Change(key, _shown(flat_a.get(key, set())), _shown(flat_b.get(key, set()))) for key in keys]


def _values(records: Sequence[Record]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        own: dict[str, Any] = {**record.provenance, "machine": record.machine, "hosts": sorted(set(record.hosts))}
        for key, value in own.items():
            inner = {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
            for name, one in inner.items():
                if key not in VOLATILE:
                    found.setdefault(name, set()).add(one if isinstance(one, str) else json.dumps(one, default=str))
    return found


def _shown(values: set[str]) -> str:
    text = "; ".join(sorted(values)) or "not there"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def render_comparison(comparison: Comparison) -> str:
    """Plain text: each cell with its metrics, what only one side has, what changed, and a last line with counts."""
    lines: list[str] = []
    cell = ""
    for row in comparison.rows:
        if row.cell != cell:
            cell = row.cell
            lines.append(cell)
        lines += [f"  {line}" for line in _row_lines(row)]
    for name, keys in (("A", comparison.only_a), ("B", comparison.only_b)):
        lines += [f"only in {name}: {key}" for key in keys]
    lines += comparison.fingerprints
    lines += [f"changed {change.key}: A {change.a} | B {change.b}" for change in comparison.changed]
    counts: dict[str, int] = {}
    for row in comparison.rows:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
    lines.append(", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) or "no cell in common")
    return "\n".join(lines)


def _row_lines(row: Row) -> list[str]:
    if not row.metric:
        return [f"{row.verdict}: {row.why}"]
    a, b = (format_quantity(value, row.unit) for value in (row.median_a, row.median_b))
    if row.ratio is None:
        return [f"{row.metric}: A {a}, B {b}: {row.verdict}, {row.why}; {row.method}".rstrip("; ")]
    low, middle, high = (format_difference(r - 1) for r in (row.ratio.low, row.ratio.ratio, row.ratio.high))
    return [
        f"{row.metric}: A {a}, B {b}",
        f"  B beside A {middle}, 95 % interval {low} to {high} ({row.method}): {row.verdict}, {row.why}",
    ]
