"""report.html of one bench folder: all that its records and samples say, on one page without any outside link."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jinja2

from aifactory_train import hostlist, units
from aifactory_train.bench.cells import DASH, Read, Samples, short_name, short_names
from aifactory_train.bench.comparisons import build_energy, build_nodes, build_scaling
from aifactory_train.bench.figures import build_collectives, build_steps
from aifactory_train.bench.page import PAGE
from aifactory_train.bench.record import GREEN, Record, read_samples
from aifactory_train.bench.store import BenchDir, load_records
from aifactory_train.bench.tables import Provenance, build_provenance, metric_rows, planned_rows, some, unread
from aifactory_train.errors import RunFolderError

# More of one kind make a list that nobody reads.
MAX_FINDINGS = 12


class Finding(NamedTuple):
    """kind: a class of the page's style, `bad` or `odd`."""

    kind: str
    head: str
    text: str


def render_report(folder: BenchDir) -> str:
    """One HTML page; sections without data are left out.

    Raises:
        RunFolderError: a record that cannot be read. Samples that cannot be read are named on the page.
    """
    records = load_records(folder.root)
    read, lost = build_reader(folder)
    steps, nodes = build_steps(records, read), build_nodes(records, read)
    scaling, provenance = build_scaling(records, read), build_provenance(records)
    findings = [
        *_findings(folder.root, records, provenance),
        *(Finding("bad", f"{host} is slow", sentence) for host, sentence in (nodes.outliers if nodes else [])),
        *(Finding("odd", "Spikes", sentence) for sentence in (steps.spikes if steps else [])),
    ]
    missed = [*unread(records), *((f"samples {name}", why, "one record") for name, why in lost.items())]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return page.from_string(PAGE).render(
        title=_title(records),
        subtitle=_subtitle(records),
        tiles=_tiles(records),
        findings=_cut(findings),
        unread=missed,
        steps=steps,
        nodes=nodes,
        collectives=build_collectives(records),
        scaling=scaling,
        planned=planned_rows(records),
        energy=build_energy(records),
        metrics=metric_rows(records),
        provenance=provenance,
    )


def build_reader(folder: BenchDir) -> tuple[Read, dict[str, str]]:
    """The samples of a record, and the names of those that could not be read, with the reason, as they come up."""
    lost: dict[str, str] = {}

    # Two sections read the samples of a record, one after the other.
    @lru_cache(maxsize=8)
    def samples_of(name: str) -> Samples:
        try:
            return read_samples(folder.records / name)
        except RunFolderError as error:
            lost[name] = error.what
            return {}

    def read(record: Record) -> Samples:
        return samples_of(record.samples) if record.samples else {}

    return read, lost


def _title(records: Sequence[Record]) -> str:
    if not records:
        return "No records"
    return " and ".join(sorted({f"{record.suite} on {record.machine}" for record in records}))


def _hosts(records: Sequence[Record]) -> list[str]:
    return sorted({host for record in records for host in record.hosts})


def _subtitle(records: Sequence[Record]) -> str:
    if not records:
        return "This bench folder has no record: nothing was measured, and nothing said why."
    hosts = _hosts(records)
    day = datetime.fromisoformat(min(record.started for record in records)).strftime("%d %B %Y")
    nodes = "1 node" if len(hosts) == 1 else f"{len(hosts)} nodes"
    return f"{nodes} · {hostlist.compress(hosts)} · {day}"


def _tiles(records: Sequence[Record]) -> list[tuple[str, tuple[str, str], str]]:
    if not records:
        return []
    counts = Counter(judgement.verdict for record in records for judgement in record.verdicts)
    total, passed = counts.total(), counts["pass"]
    others = [f"{n} {verdict.replace('_', ' ')}" for verdict, n in counts.most_common() if verdict != "pass"]
    faults = sum(record.fault is not None for record in records)
    seconds = (
        max(datetime.fromisoformat(record.ended) for record in records)
        - min(datetime.fromisoformat(record.started) for record in records)
    ).total_seconds()
    metrics = [metric for record in records for metric in record.metrics]
    benchmarks = len({record.benchmark for record in records})
    wall = units.format_seconds(seconds)
    verdict = (str(passed), f"of {total} pass") if total else (DASH, "")
    return [
        ("Verdicts", verdict, ", ".join(others) or ("nothing else" if total else "not judged yet")),
        ("Cells", (str(len(records) - faults), "measured"), f"{faults} ended with a fault" if faults else "no faults"),
        ("Benchmarks", (str(benchmarks), ""), f"{len(metrics)} metrics"),
        ("Samples", (units.format_count(sum(m.n for m in metrics)), ""), "all kept beside the records"),
        ("Nodes", (str(len(_hosts(records))), ""), _ranks(records)),
        ("Wall time", (wall, ""), "from the first cell to the last"),
    ]


def _ranks(records: Sequence[Record]) -> str:
    most = max(len(record.hosts) for record in records)
    return "one rank at a time" if most == 1 else f"at most {most} ranks in one cell"


def _findings(root: Path, records: Sequence[Record], provenance: Provenance) -> list[Finding]:
    found = [
        Finding("bad", f"{name.capitalize()} nodes", text)
        for name in ("failing", "missing")
        if (text := _node_list(root / f"{name}_nodes.txt"))
    ]
    names = short_names(records)
    for record in records:
        where = f"{names[record.id]} on {some(_hosts([record]), 4)}"
        if record.fault is not None:
            found.append(Finding("bad", "Fault", f"{where}: {record.fault}"))
        found += [Finding("odd", "Energy disagrees", f"{where}: {text}") for text in record.facts.get("warnings", [])]
        for judgement in record.verdicts:
            if judgement.verdict not in GREEN:
                text = f"{where}, {short_name(judgement.metric)}: {judgement.why}"
                found.append(Finding("bad", judgement.verdict.capitalize(), text))
    for key, values in provenance.different:
        told = "; ".join(f"{value} on {hosts}" for value, hosts in values)
        found.append(Finding("odd", f"{key.split('.')[-1]} differs", told))
    unsure = [record for record in records if record.protocol and not record.protocol.steady]
    if unsure:
        found.append(Finding("odd", "Not steady", f"{len(unsure)} of {len(records)} cells when their warm-up ended"))
    wide = [record for record in records if record.protocol and not record.protocol.ci_reached]
    if wide:
        text = f"{len(wide)} of {len(records)} cells spent their budget before it was as narrow as asked for"
        found.append(Finding("odd", "Wide interval", text))
    return found


def _node_list(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:  # not judged yet
        return ""


def _cut(findings: Sequence[Finding]) -> list[Finding]:
    """The bad ones first; of many with the same head, the first ones and how many more there are."""
    kept: list[Finding] = []
    counts = Counter(finding.head for finding in findings)
    shown: Counter[str] = Counter()
    for finding in sorted(findings, key=lambda finding: finding.kind != "bad"):
        shown[finding.head] += 1
        if shown[finding.head] <= MAX_FINDINGS:
            kept.append(finding)
        elif shown[finding.head] == MAX_FINDINGS + 1:
            kept.append(Finding(finding.kind, finding.head, f"{counts[finding.head] - MAX_FINDINGS} more like these"))
    return kept
