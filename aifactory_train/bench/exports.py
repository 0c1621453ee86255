"""Judged records for other programs: JUnit XML, Markdown, OpenMetrics text, Bencher Metric Format and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from aifactory_train.bench.energy import NO_INTERVAL, EnergyNumber, energy_numbers, joules_per_token
from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.record import Judgement, Metric, Record, cell_key
from aifactory_train.bench.references import nodes_of, sku_of
from aifactory_train.bench.scaling import METRIC as EFFICIENCY
from aifactory_train.bench.scaling import Scaling
from aifactory_train.units import format_fraction, format_quantity

_ERRORS = ("incomplete", "unstable")
_FAILURES = ("regression", "invalid", "degraded")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# Versions and the like that a dashboard groups by.
_INFO = ("torch", "cuda", "hip", "nccl", "driver", "python")
# Columns of CARAML's result.csv, then ours.
CSV_COLUMNS = (
    *("System", "Nodes", "Devices", "GBS", "PP", "TP", "DP", "Time/iteration", "Tokens/second", "Avg_TFLOPs/GPU"),
    *("EnergyJ", "JPerToken", "Benchmark", "Cell", "Metric", "Unit", "Median", "CILow", "CIHigh", "N", "Verdict", "Id"),
    *("Scope", "Method"),
)
_STEP = "aifactory_train_step_duration_seconds"
_RATE = "aifactory_train_tokens_per_second"
_FLOPS = "aifactory_train_model_flops_per_second_per_gpu"


def _rows(record: Record) -> Iterator[tuple[Metric | None, Judgement]]:
    """Each metric with its judgement; the judgement of a record without metrics alone."""
    metrics = {metric.name: metric for metric in record.metrics}
    for judgement in record.verdicts:
        yield metrics.get(judgement.metric), judgement


def render_junit(records: Sequence[Record]) -> str:
    """JUnit XML by the Windy Road schema: a suite of one case for each cell and metric.

    That schema has properties in suites only, so each case has a suite of its own, and its numbers there.
    """
    root = ET.Element("testsuites")
    cases = [(record, *row) for record in records for row in _rows(record)]
    for number, (record, metric, judgement) in enumerate(cases):
        started, ended = (datetime.fromisoformat(text) for text in (record.started, record.ended))
        seconds = f"{max(0.0, (ended - started).total_seconds()):.3f}"
        kind = "error" if judgement.verdict in _ERRORS else "failure" if judgement.verdict in _FAILURES else ""
        suite = ET.SubElement(root, "testsuite")
        suite.attrib |= {
            "package": f"{record.suite}.{record.benchmark}",
            "id": str(number),
            "name": cell_key(record),
            "timestamp": f"{started.astimezone(UTC):%Y-%m-%dT%H:%M:%S}",
            "hostname": nodes_of(record),
            "tests": "1",
            "failures": str(int(kind == "failure")),
            "errors": str(int(kind == "error")),
            "skipped": str(int(judgement.verdict == "skipped")),
            "time": seconds,
        }
        properties = ET.SubElement(suite, "properties")
        for name, value in _properties(record, metric, judgement).items():
            ET.SubElement(properties, "property", name=name, value=_xml_text(value))
        name = f"{judgement.metric or record.benchmark} {cell_key(record)}"
        classname = f"{record.suite}.{record.benchmark}"
        case = ET.SubElement(suite, "testcase", name=name, classname=classname, time=seconds)
        if kind:
            message = _xml_text(f"{judgement.verdict} on {nodes_of(record)}: {judgement.why}")
            ET.SubElement(case, kind, message=message, type=judgement.verdict).text = message
        elif judgement.verdict == "skipped":
            ET.SubElement(case, "skipped").text = _xml_text(judgement.why)
        ET.SubElement(suite, "system-out").text = _xml_text(judgement.why)
        ET.SubElement(suite, "system-err")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _properties(record: Record, metric: Metric | None, judgement: Judgement) -> dict[str, str]:
    """What is not known is left out."""
    values = {
        "verdict": judgement.verdict,
        "value": metric.median if metric else None,
        "unit": metric.unit if metric else None,
        "ci_low": metric.ci95[0] if metric and metric.ci95 else None,
        "ci_high": metric.ci95[1] if metric and metric.ci95 else None,
        "n": metric.n if metric else None,
        "reference": judgement.reference,
        "tolerance": judgement.tolerance_frac,
        "result_id": record.id,
        "hosts": nodes_of(record),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _xml_text(text: str) -> str:
    """A fault may quote bytes of a terminal, which XML cannot hold."""
    return _NOT_XML.sub("?", text)


def render_markdown(
    records: Sequence[Record], why: Mapping[str, str] | None = None, scalings: Sequence[Scaling] = ()
) -> str:
    """A summary for a merge request: verdicts first, then all numbers with n, interval and worst rank.

    Args:
        why: of each node that is not sound, a sentence.
    """
    counts: dict[str, int] = defaultdict(int)
    rows = []
    for record in records:
        for metric, judgement in _rows(record):
            counts[judgement.verdict] += 1
            cells = [record.benchmark, cell_key(record), nodes_of(record), *_numbers(metric)]
            rows.append([*cells, judgement.verdict, judgement.why])
        rows += [_energy_row(record, number) for number in energy_numbers(record)]
    total = ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())) or "no records"
    suites = " and ".join(sorted({f"{record.suite} on {record.machine}" for record in records}))
    head = ["Benchmark", "Cell", "Hosts", "Metric", "Median", "95 % interval", "n", "Worst rank", "Verdict", "Why"]
    lines = [f"# Benchmarks: {suites}" if suites else "# Benchmarks", "", f"{total}.", ""]
    if why:
        lines += [*(f"- {_one_line(f'{host}: {sentence}')}" for host, sentence in sorted(why.items())), ""]
    if scalings:
        columns = ["Scaling", "Cell", "Nodes", "Devices", "Rate per device", "Efficiency", "95 % interval", "n"]
        lines += [*_table(columns, [row for scaling in scalings for row in _scaling_rows(scaling)]), ""]
    return "\n".join([*lines, *_table(head, rows)]) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    every = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in every]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _scaling_rows(scaling: Scaling) -> Iterator[list[str]]:
    for size in scaling.sizes:
        rate = format_quantity(size.rate_per_s, "tokens/s")
        interval = " to ".join(map(format_fraction, size.interval)) if size.interval else "none"
        counts = [str(size.nodes), str(scaling.devices[size.nodes])]
        yield [scaling.mode, scaling.cell, *counts, rate, format_fraction(size.ratio), interval, str(size.n)]


def _energy_row(record: Record, number: EnergyNumber) -> list[str]:
    value = format_quantity(number.value, NAMES[number.name].unit)
    cells = [record.benchmark, cell_key(record), nodes_of(record), number.labelled, value, NO_INTERVAL, "1", "-"]
    return [*cells, "-", "; ".join(record.facts.get("warnings", [])) or "not judged"]


def _numbers(metric: Metric | None) -> list[str]:
    if metric is None:
        return ["-"] * 5
    interval = " to ".join(format_quantity(end, metric.unit) for end in metric.ci95) if metric.ci95 else "none"
    worst = metric.worst_rank
    shown = f"{format_quantity(worst.median, metric.unit)}, rank {worst.rank} on {worst.host}" if worst else "-"
    return [metric.name, format_quantity(metric.median, metric.unit), interval, str(metric.n), shown]


def render_openmetrics(records: Sequence[Record], scalings: Sequence[Scaling] = ()) -> str:
    """OpenMetrics text, for node-exporter's textfile collector: gauges of the median, interval, percentiles and n.

    A label `stat` tells them apart. Energy has one number for its whole window, and no interval.
    """
    families: dict[str, list[tuple[str, str, float]]] = defaultdict(list)
    verdicts, infos = [], []
    for record in records:
        labels = _labels(record)
        for metric in record.metrics:
            for stat, value in _stats(metric).items():
                families[metric.name].append((_label_text({**labels, "stat": stat}), "", value))
        for number in energy_numbers(record):
            own = {**labels, "scope": number.scope, "method": number.method}
            for stat, value in {"window": number.value, "n": 1.0}.items():
                families[number.name].append((_label_text({**own, "stat": stat}), "", value))
        for judgement in record.verdicts:
            own = {**labels, "metric": judgement.metric, "verdict": judgement.verdict}
            verdicts.append((_label_text(own), "", 1.0))
        infos.append((_label_text({**labels, **_info(record)}), "_info", 1.0))
    families |= {EFFICIENCY: [*_efficiencies(scalings)]} if scalings else {}
    lines: list[str] = []
    for name, samples in sorted(families.items()):
        # A counter has no statistics; ours are medians of windows.
        gauge = f"{name.removesuffix('_total')}_window" if name.endswith("_total") else name
        lines += _family(gauge, "gauge", NAMES[name].help, samples)
    lines += _family("aifactory_benchmark_verdict", "gauge", "1 for the verdict that a metric got", verdicts)
    lines += _family("aifactory_benchmark", "info", "what was measured with which versions", infos)
    return "\n".join([*lines, "# EOF"]) + "\n"


def _efficiencies(scalings: Sequence[Scaling]) -> Iterator[tuple[str, str, float]]:
    for scaling in scalings:
        own = {"mode": scaling.mode, "base_gpus": str(scaling.base_devices), "machine": scaling.machine}
        for size in scaling.sizes:
            labels = own | {"cell": scaling.cell, "nodes": str(size.nodes), "gpus": str(scaling.devices[size.nodes])}
            ends = {"ci_low": size.interval[0], "ci_high": size.interval[1]} if size.interval else {}
            for stat, value in {"ratio": size.ratio, **ends, "n": float(size.n)}.items():
                yield _label_text({**labels, "stat": stat}), "", value


def _family(name: str, kind: str, about: str, samples: Sequence[tuple[str, str, float]]) -> list[str]:
    lines = [f"# TYPE {name} {kind}", f"# HELP {name} {_escaped(about)}"]
    return [*lines, *(f"{name}{suffix}{{{labels}}} {value!r}" for labels, suffix, value in samples)]


def _labels(record: Record) -> dict[str, str]:
    cell = {re.sub(r"\W", "_", key): str(value) for key, value in record.cell.items() if value is not None}
    return cell | {"benchmark": record.benchmark, "machine": record.machine, "hosts": nodes_of(record), "id": record.id}


def _info(record: Record) -> dict[str, str]:
    versions = record.provenance.get("versions") or {}
    known = {"git": record.provenance.get("git_sha"), **{name: versions.get(name) for name in _INFO}}
    return {name: str(value) for name, value in (known | {"sku": sku_of(record)}).items() if value}


def _stats(metric: Metric) -> dict[str, float]:
    ends = {"ci_low": metric.ci95[0], "ci_high": metric.ci95[1]} if metric.ci95 else {}
    worst = {"worst_rank": metric.worst_rank.median} if metric.worst_rank else {}
    spread = {"p5": metric.p5, "p95": metric.p95, "p99": metric.p99, "min": metric.min, "max": metric.max}
    return {"median": metric.median, **ends, **spread, **worst, "n": float(metric.n)}


def _label_text(labels: dict[str, str]) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items()))


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def render_bmf(records: Sequence[Record]) -> str:
    """Bencher Metric Format: {machine/cell on hosts: {metric: {value, lower_value, upper_value}}}, base units."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        for metric in record.metrics:
            low, high = metric.ci95 or (metric.min, metric.max)
            value = {"value": metric.median, "lower_value": low, "upper_value": high}
            found.setdefault(f"{record.machine}/{cell_key(record)} on {nodes_of(record)}", {})[metric.name] = value
    return json.dumps(found, indent=1) + "\n"


def render_csv(records: Sequence[Record]) -> str:
    """A row for each metric. The first columns are those of CARAML, empty for what is no training step."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        verdicts = {judgement.metric: judgement.verdict for judgement in record.verdicts}
        for metric in record.metrics:
            low, high = metric.ci95 or ("", "")
            own = {"Metric": metric.name, "Unit": metric.unit, "Median": metric.median, "CILow": low, "CIHigh": high}
            own |= {"N": metric.n, "Verdict": verdicts.get(metric.name, ""), "Id": record.id}
            writer.writerow(_caraml(record) | own | {"Benchmark": record.benchmark, "Cell": cell_key(record)})
        for number in energy_numbers(record):
            own = {"Metric": number.name, "Unit": NAMES[number.name].unit, "Median": number.value, "N": 1}
            own |= {"Id": record.id, "Scope": number.scope, "Method": number.method}
            writer.writerow(_caraml(record) | own | {"Benchmark": record.benchmark, "Cell": cell_key(record)})
    return out.getvalue()


def _caraml(record: Record) -> dict[str, object]:
    """CARAML's names for a step: batch in rows or tokens as the cell has it, rates in TFLOP/s, energy of one scope."""
    medians = {metric.name: metric.median for metric in record.metrics}
    # As plan/layout.py describes one: "pp 2, dp_shard 8, 2 x 1 rows"; an axis of degree 1 is left out.
    axes = re.findall(r"\b(pp|dp_replicate|dp_shard|tp) (\d+)", str(record.cell.get("layout") or ""))
    layout = {name: int(degree) for name, degree in axes}
    flops = medians.get(_FLOPS)
    energy = record.energy[0] if record.energy else None
    values = {
        "System": record.machine,
        "Nodes": len(set(record.hosts)),
        "Devices": record.cell.get("devices", record.cell.get("ranks", len(record.hosts))),
        "GBS": record.cell.get("gbs_tokens"),
        "PP": layout.get("pp", 1) if _STEP in medians else None,
        "TP": layout.get("tp", 1) if _STEP in medians else None,
        "DP": layout.get("dp_replicate", 1) * layout.get("dp_shard", 1) if _STEP in medians else None,
        "Time/iteration": medians.get(_STEP),
        "Tokens/second": medians.get(_RATE),
        "Avg_TFLOPs/GPU": None if flops is None else flops / 1e12,
        "EnergyJ": energy and energy.joules,
        "JPerToken": energy and joules_per_token(record, energy),
    }
    return {name: value for name, value in values.items() if value is not None}
