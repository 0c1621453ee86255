"""What a report lists: plan beside measured, all metrics, provenance and what parts it, what could not be read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from aifactory_train import units
from aifactory_train.bench.cells import DASH, labels, short_name, words
from aifactory_train.bench.record import Metric, Record

# These differ from one program to the next on the same node.
OF_ONE_PROGRAM = {"command", "load_1min", "hostname", "started_by"}
MAX_VALUE_CHARACTERS = 160


class Planned(NamedTuple):
    cell: str
    quantity: str
    predicted: str
    measured: str
    difference: str


def planned_rows(records: Sequence[Record]) -> list[Planned]:
    """Of each step record with a prediction: step time and memory, predicted and measured."""
    planned = [record for record in records if record.facts.get("predicted")]
    rows = []
    for record, label in zip(planned, labels(planned), strict=True):
        predicted, measured = record.facts["predicted"], record.facts.get("measured", {})
        for key, quantity, unit in (("step_duration_s", "step time", "s"), ("peak_memory_bytes", "memory peak", "B")):
            plan, found = predicted.get(key), measured.get(key)
            if plan is None and found is None:
                continue
            difference = units.format_difference(found / plan - 1) if plan and found is not None else DASH
            low, high = predicted.get(key.replace("_s", "_low_s")), predicted.get(key.replace("_s", "_high_s"))
            shown = units.format_quantity(plan, unit)
            if unit == "s" and low is not None and high is not None:
                shown += f" ({units.format_seconds(low)} to {units.format_seconds(high)})"
            rows.append(Planned(label, quantity, shown, units.format_quantity(found, unit), difference))
    return rows


class Row(NamedTuple):
    cell: str
    hosts: str
    metric: str
    median: str
    interval: str
    n: int
    worst: str
    verdict: str


def metric_rows(records: Sequence[Record]) -> dict[str, list[Row]]:
    """Benchmark -> all its metrics; the first of each cell names it and its nodes."""
    found: dict[str, list[Row]] = {}
    for record in records:
        verdicts = {judgement.metric: judgement.verdict for judgement in record.verdicts}
        hosts = some(list(dict.fromkeys(record.hosts)), 3)
        for metric in record.metrics:
            verdict = verdicts.get(metric.name, DASH).replace("_", " ")
            cell, nodes = (words(record.cell), hosts) if metric is record.metrics[0] else ("", "")
            row = Row(cell, nodes, short_name(metric.name), *_numbers(metric), verdict)
            found.setdefault(record.benchmark, []).append(row)
    return found


def _numbers(metric: Metric) -> tuple[str, str, int, str]:
    def show(value: float) -> str:
        return units.format_quantity(value, metric.unit)

    interval = DASH if metric.ci95 is None else " to ".join(map(show, metric.ci95))
    worst = metric.worst_rank
    told = DASH if worst is None else f"rank {worst.rank} on {worst.host}, {show(worst.median)}"
    return show(metric.median), interval, metric.n, told


def some(names: Sequence[str], most: int) -> str:
    """ "n1, n2 and 30 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def unread(records: Sequence[Record]) -> list[tuple[str, str, str]]:
    """(probe, reason, which records), the most frequent first."""
    counts = Counter((missed.probe, missed.reason) for record in records for missed in record.unavailable)
    total = len(records)
    return [
        (probe.replace("_", " "), reason, "all records" if n == total else f"{n} of {total} records")
        for (probe, reason), n in counts.most_common()
    ]


class Provenance(NamedTuple):
    """common: key and value; different: key, and each value with the hosts it was seen on."""

    common: list[tuple[str, str]]
    different: list[tuple[str, list[tuple[str, str]]]]


def build_provenance(records: Sequence[Record]) -> Provenance:
    """What all records say alike, and what differs among them; a value that one of them lacks is no difference.

    `drift` of a record says in what the ranks of that one job differ.
    """
    seen: dict[str, dict[str, list[str]]] = {}
    for record in records:
        for key, value in _flat(record.provenance):
            if key.split(".")[0] in OF_ONE_PROGRAM:
                continue
            hosts = seen.setdefault(key, {}).setdefault(value, [])
            hosts += [host for host in record.hosts[:1] if host not in hosts]
    alike = {key for key, values in seen.items() if len(values) == 1 and not key.startswith("drift.")}
    common = [(key, next(iter(values))) for key, values in seen.items() if key in alike]
    different = [
        (key, [(value, some(sorted(hosts), 8)) for value, hosts in values.items()])
        for key, values in seen.items()
        if key not in alike
    ]
    return Provenance(common, different)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and printed values; None is left out."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        elif inner is not None:
            text = inner if isinstance(inner, str) else json.dumps(inner)
            cut = len(text) > MAX_VALUE_CHARACTERS
            yield f"{prefix}{key}", f"{text[:MAX_VALUE_CHARACTERS]}..." if cut else text
