"""Records against references: a verdict for each metric, and the nodes that passed, failed or are missing.

What nobody measured on this kind of device has no reference; it never passes for that.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple

from aifactory_train.bench.fingerprints import SHOWN_DIGITS, odd_results
from aifactory_train.bench.record import GREEN, Better, Judgement, Metric, Record, Verdict, cell_key
from aifactory_train.bench.references import Reference, References, load_references, nodes_of, power_cap_w_of, sku_of
from aifactory_train.bench.statistics import outlier_nodes
from aifactory_train.bench.store import BenchDir, load_records
from aifactory_train.bench.suites import load_asked
from aifactory_train.errors import storage_errors
from aifactory_train.hostlist import compress
from aifactory_train.rundir import write_atomic
from aifactory_train.units import format_difference, format_fraction

EXIT_GREEN, EXIT_REGRESSION, EXIT_INCOMPLETE = 0, 1, 2
_UNFINISHED: tuple[Verdict, ...] = ("incomplete", "unstable")


class NodeVerdict(NamedTuple):
    """passing, failing, missing: hosts, sorted. why: of each failing or missing host, a sentence."""

    passing: list[str]
    failing: list[str]
    missing: list[str]
    why: dict[str, str]


def judge(
    record: Record, references: References | None, today: date, odd: Mapping[str, str] | None = None
) -> list[Judgement]:
    """One judgement for each metric; one for the whole record, its metric "", where it has none.

    Args:
        references: of the record's machine; None where there are none.
        odd: record id -> why it computes something else than its peers; see odd_results.
    """
    whole = judge_whole(record)
    if whole is None or whole[0] in ("unstable", "degraded"):  # a wrong result is worse than a slow one
        whole = _judge_result(record, references, odd or {}) or whole
    if whole is not None:
        names = [metric.name for metric in record.metrics] or [""]
        return [Judgement(metric=n, verdict=whole[0], reference=None, tolerance_frac=None, why=whole[1]) for n in names]
    return [judge_metric(record, metric, references, today) for metric in record.metrics]


def judge_whole(record: Record) -> tuple[Verdict, str] | None:
    """What makes the numbers of a record worthless, whatever they are."""
    validity = record.validity
    if record.fault:
        return "incomplete", record.fault
    if validity.wrong_values:
        return "invalid", f"{validity.wrong_values} values came out wrong"
    if validity.loss_finite is False:
        return "invalid", "the loss was not finite"
    if not record.metrics:
        return "skipped", str(record.facts.get("skipped") or "nothing was measured")
    if validity.device_errors:
        return "degraded", f"a device reported errors meanwhile: {'; '.join(validity.device_errors)}"
    if validity.throttled:
        return "degraded", "the device slowed its clock down for heat, power or a fault meanwhile"
    if record.protocol is None or not record.protocol.steady:
        calls = record.protocol.warmup_steps if record.protocol else 0
        return "unstable", f"not steady after {calls} warm-up calls"
    return None


def _judge_result(record: Record, references: References | None, odd: Mapping[str, str]) -> tuple[Verdict, str] | None:
    """What the record computed, beside the reference, which is of a sound node, and beside its peers."""
    own, known = record.validity.fingerprint, references.find_fingerprint(record) if references else None
    if own is not None and known is not None:
        if own == known.fingerprint:
            return None
        sound = f"{known.n_nodes} node(s) computed {known.fingerprint[:SHOWN_DIGITS]} on {known.measured_on}"
        return "invalid", f"fingerprint is {own[:SHOWN_DIGITS]} on {nodes_of(record)}, {sound} with the same steps"
    return ("invalid", odd[record.id]) if record.id in odd else None


def judge_metric(record: Record, metric: Metric, references: References | None, today: date) -> Judgement:
    """One metric of a record that is sound as a whole."""
    reference = references.find(record, metric.name) if references else None
    if reference is None:
        return _judgement(metric, "no_reference", None, _why_none(record, metric, references))
    late = f"; the reference expired on {reference.expires_on}" if _expired(reference, today) else ""
    beside = format_difference(metric.median / reference.value - 1) if reference.value else "nothing"
    shown = f"{metric.median:.6g} {metric.unit} is {beside} beside {reference.value:.6g} of {reference.n_nodes} node(s)"
    if reference.kind == "info":
        why = f"; {reference.why_info}" if reference.why_info else ""
        return _judgement(metric, "no_reference", reference, f"{shown}, which is no limit{why}{late}")
    low, high = metric.ci95 or (metric.min, metric.max)
    limit_low, limit_high = sorted(reference.value * (1 + sign * reference.tolerance_frac) for sign in (-1, 1))
    side = "below" if high < limit_low else "above" if low > limit_high else ""
    verdict = _verdict(side, reference.kind, metric.better)
    interval = f"interval {low:.6g} to {high:.6g}" if metric.ci95 else f"all {metric.n} samples {low:.6g} to {high:.6g}"
    allowed = f"tolerance {format_fraction(reference.tolerance_frac)}"
    advice = "; learn the reference anew" if verdict == "improvement" else ""
    return _judgement(metric, verdict, reference, f"{shown}, {interval}, {allowed}{late}{advice}")


def _verdict(side: str, kind: Literal["min", "max", "band", "info"], better: Better) -> Verdict:
    """side: where the whole interval lies beside reference and tolerance; "" where it does not."""
    if not side:
        return "pass"
    if kind == "band":
        return "regression"
    return "improvement" if (side == "above") == (better == "higher") else "regression"


def _judgement(metric: Metric, verdict: Verdict, reference: Reference | None, why: str) -> Judgement:
    return Judgement(
        metric=metric.name,
        verdict=verdict,
        reference=reference.value if reference else None,
        tolerance_frac=reference.tolerance_frac if reference else None,
        why=why,
    )


def _expired(reference: Reference, today: date) -> bool:
    return reference.expires_on is not None and reference.expires_on < today


def _why_none(record: Record, metric: Metric, references: References | None) -> str:
    if references is None:
        return f"machine {record.machine!r} has no file of references"
    cell, sku = cell_key(record), sku_of(record)
    others = [r for r in references.references if (r.cell, r.metric) == (cell, metric.name)]
    if not others:
        return f"nobody measured this cell on {references.machine}"
    of_device = references.of_device(record, metric.name)
    if of_device is not None:
        return f"measured on {nodes_of(record)}; the reference is of {', '.join(of_device.nodes)} alone"
    known = sorted({f"{r.sku} at {_cap(r.power_cap_w)}" for r in others})
    return f"measured on {sku} at {_cap(power_cap_w_of(record))}; references are of {'; '.join(known)}"


def _cap(power_cap_w: float | None) -> str:
    return "an unknown power cap" if power_cap_w is None else f"a power cap of {power_cap_w:g} W"


def judge_nodes(
    records: Sequence[Record], judged: Mapping[str, Sequence[Judgement]], asked: Iterable[str]
) -> NodeVerdict:
    """Which of the hosts `asked` for are sound.

    Args:
        judged: record id -> its judgements.

    A host fails by a red verdict of a record that is of it alone, as the outlier among the hosts of one cell, or at the
    end of a dead link. Any other red record of several hosts, which accuses none of them, fails those of the ranks that
    did not answer. A host that only such records name is missing.
    """
    why: dict[str, str] = {}
    by_cell: dict[tuple[str, str, Better], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        hosts = set(record.hosts)
        red = next((j for j in judged[record.id] if j.verdict not in GREEN), None)
        if red is not None:
            what = f"{red.metric} {red.verdict}" if red.verdict == "regression" else red.verdict
            for host in hosts if len(hosts) == 1 else _accused(record):
                why.setdefault(host, f"{cell_key(record)}: {what}: {red.why}")
        if len(hosts) == 1 and not record.fault:
            for metric in record.metrics:
                by_cell[cell_key(record), metric.name, metric.better][record.hosts[0]].append(metric.median)
    for (cell, name, better), values in by_cell.items():
        medians = {host: statistics.median(v) for host, v in values.items()}
        for host, sentence in outlier_nodes(medians, better).items():
            why.setdefault(host, f"{cell}: {name}: {sentence}")
    cut_off = _ends_of_dead_links(records)
    why = cut_off | why
    heard = {host for r in records if r.metrics or len(set(r.hosts)) == 1 for host in r.hosts} | set(cut_off)
    missing = sorted({*asked, *(host for r in records for host in r.hosts)} - heard)
    failing = sorted(set(why) - set(missing))
    return NodeVerdict(
        passing=sorted(heard - set(failing)),
        failing=failing,
        missing=missing,
        why={host: "it left no record" for host in missing} | why,
    )


def _ends_of_dead_links(records: Sequence[Record]) -> dict[str, str]:
    """Host -> what is said of its link: of two that do not reach each other the one with more such links, or both."""
    of_pairs = [r for r in records if r.fault and "pair" in r.cell and len(r.hosts) == 2]
    dead = [r for r in of_pairs if not _accused(r)]
    n_dead = Counter(host for r in dead for host in r.hosts)
    return {host: r.fault or "" for r in dead for host in r.hosts if n_dead[host] == max(n_dead[h] for h in r.hosts)}


def _accused(record: Record) -> set[str]:
    """Hosts of the ranks that did not answer, of a record of several hosts."""
    return {record.hosts[rank] for rank in record.facts.get("missing_ranks", []) if rank < len(record.hosts)}


def exit_code_of(judgements: Iterable[Judgement], nodes: NodeVerdict) -> int:
    """1 for what is red by its numbers, 2 for what did not come to an end, 0 otherwise; 3 is a wrong command line."""
    verdicts = {judgement.verdict for judgement in judgements}
    unfinished = bool(verdicts & set(_UNFINISHED))
    if verdicts - set(GREEN) - set(_UNFINISHED) or (nodes.failing and not unfinished):
        return EXIT_REGRESSION
    return EXIT_INCOMPLETE if unfinished or nodes.missing else EXIT_GREEN


def _given_up(fault: str) -> Judgement:
    """A tuning is there to find out what fails: that says nothing against the nodes."""
    why = f"given up: {fault}"
    return Judgement(metric="", verdict="skipped", reference=None, tolerance_frac=None, why=why)


class FolderVerdict(NamedTuple):
    """records: with their verdicts filled in."""

    records: list[Record]
    nodes: NodeVerdict
    exit_code: int


def judge_folder(folder: Path, today: date, *, references_dir: Path | None = None) -> FolderVerdict:
    """Judge all records of a bench folder: write the verdicts into them, and the three lists of nodes beside.

    passing_nodes.txt, failing_nodes.txt and missing_nodes.txt are one line each as `sbatch --exclude` takes it, empty
    where there is none.

    Args:
        folder: of a bench, or of programs started by hand, which has no suite.json and so no missing nodes.
        references_dir: by default that of the project.

    Raises:
        RunFolderError: a damaged record. MachineError: faulty references. StorageError: disk full or no permission.
    """
    bench = BenchDir(folder)
    records = load_records(folder)
    asked = load_asked(folder) if bench.suite.exists() else None
    references = {name: load_references(name, references_dir) for name in {r.machine for r in records}}
    odd = odd_results(records)
    judged = {r.id: judge(r, references[r.machine], today, odd) for r in records}
    if asked is not None and asked.tuning is not None:
        judged |= {r.id: [_given_up(r.fault)] for r in records if r.fault}
    nodes = judge_nodes(records, judged, asked.hosts if asked else [])
    records = [record.model_copy(update={"verdicts": judged[record.id]}) for record in records]
    with storage_errors("writing verdicts", folder, "free some space"):
        for record in records:
            document = json.dumps(record.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False)
            write_atomic(bench.record(record.id), document + "\n")
        lists = {bench.passing_nodes: nodes.passing, bench.failing_nodes: nodes.failing}
        for path, names in (lists | {bench.missing_nodes: nodes.missing}).items():
            write_atomic(path, f"{compress(names)}\n" if names else "")
    return FolderVerdict(records, nodes, exit_code_of([j for of_one in judged.values() for j in of_one], nodes))
