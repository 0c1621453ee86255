"""References of a machine, learned from the results of its benches."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Literal, NamedTuple

from aifactory_train.bench.fingerprints import last_day, learn_fingerprints
from aifactory_train.bench.record import Metric, Record, cell_key
from aifactory_train.bench.references import (
    LEAST_OF_SOURCE,
    MIN_NODES,
    Reference,
    References,
    default_tolerance_frac,
    nodes_of,
    power_cap_w_of,
    sku_of,
    stack_of,
)
from aifactory_train.bench.statistics import MIN_JOBS, outlier_nodes, over_jobs_interval
from aifactory_train.errors import MachineError

VALID_DAYS = 365  # drivers, firmware and libraries move on


class Result(NamedTuple):
    """One metric of a record; `job` is the bench that it is of."""

    job: int
    record: Record
    metric: Metric


def is_valid(record: Record) -> bool:
    """Its values are right, and the device was neither slowed down nor broken."""
    validity = record.validity
    slowed = validity.throttled or validity.device_errors
    bad = record.fault or slowed or validity.wrong_values or validity.loss_finite is False
    return not bad and record.protocol is not None


def learn(benches: Sequence[Iterable[Record]], author: str) -> References:
    """References of one machine, of the records of its benches; each bench is a job of its own.

    Each node, or set of nodes, counts once, by the median of its jobs. Those that are worse than the others are taken
    out, until none is; the median of the rest is the reference. Its tolerance lets every job of them pass.

    MIN_NODES nodes make a limit for all nodes of their kind; fewer make one for themselves, of MIN_JOBS jobs each. What
    was never steady, and what differs by more than a limit may allow, is told and limits nothing.

    Raises MachineError for records of several machines, and for none that is valid.
    """
    by_id = {record.id: (job, record) for job, records in enumerate(benches) for record in records if is_valid(record)}
    machines = sorted({record.machine for _, record in by_id.values()})
    if len(machines) != 1:
        do = "give bench folders of one machine whose benchmarks came to an end"
        what = f"records of {len(machines)} machines: {', '.join(machines)}" if machines else "no sound record"
        raise MachineError(f"nothing to learn from: {what}", do=do)
    groups: dict[tuple[str, str, str | None, float | None], list[Result]] = defaultdict(list)
    for job, record in by_id.values():
        for metric in record.metrics:
            key = (cell_key(record), metric.name, sku_of(record), power_cap_w_of(record))
            groups[key].append(Result(job, record, metric))
    found = [_learn_one(results, author) for _, results in sorted(groups.items(), key=lambda item: str(item[0]))]
    fingerprints = learn_fingerprints([record for _, record in by_id.values()], author)
    return References(machine=machines[0], references=found, fingerprints=fingerprints)


def _learn_one(results: Sequence[Result], author: str) -> Reference:
    steady = [r for r in results if r.record.protocol is not None and r.record.protocol.steady]
    results = steady or results
    first, better = results[0].record, results[0].metric.better
    by_nodes = _by_nodes(results)
    kept = _without_outliers({nodes: statistics.median(jobs.values()) for nodes, jobs in by_nodes.items()}, better)
    repeated = {nodes for nodes in kept if len(by_nodes[nodes]) >= MIN_JOBS}
    if len(kept) < MIN_NODES and repeated:
        kept = {nodes: kept[nodes] for nodes in repeated}
    value = statistics.median(kept.values())
    every = [median for nodes in kept for median in by_nodes[nodes].values()]
    worst = min(every) if better == "higher" else max(every)
    tolerance_frac = default_tolerance_frac(first)
    spread_frac = _rounded_up(abs(worst - value) / abs(value)) if value else 0.0
    sources = [result.record for result in results if nodes_of(result.record) in kept]
    why_info = _why_info(kept, by_nodes, sku_of(first), value, spread_frac, is_steady=bool(steady))
    return Reference(
        cell=cell_key(first),
        metric=results[0].metric.name,
        kind="info" if why_info else "min" if better == "higher" else "max",
        value=value,
        source_value=value,
        ci95=over_jobs_interval(every),
        tolerance_frac=tolerance_frac if why_info else max(tolerance_frac, spread_frac),
        source_result_ids=sorted(record.id for record in sources),
        n_nodes=len(kept),
        n_jobs=len({job for nodes in kept for job in by_nodes[nodes]}),
        nodes=[] if why_info or len(kept) >= MIN_NODES else sorted(kept),
        sku=sku_of(first),
        power_cap_w=power_cap_w_of(first),
        stack=stack_of(max(sources, key=lambda record: record.ended)),
        measured_on=last_day(sources),
        expires_on=last_day(sources) + timedelta(days=VALID_DAYS),
        author=author,
        why_info=why_info,
    )


def _by_nodes(results: Sequence[Result]) -> dict[str, dict[int, float]]:
    """Nodes -> job -> median; of a cell that a job measured twice on them, the median of both."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        found[nodes_of(result.record)][result.job].append(result.metric.median)
    return {nodes: {job: statistics.median(of) for job, of in jobs.items()} for nodes, jobs in found.items()}


def _without_outliers(by_nodes: Mapping[str, float], better: Literal["higher", "lower"]) -> Mapping[str, float]:
    """A very bad node hides a bad one, so what is left is looked at again, as SuperBench does."""
    kept = dict(by_nodes)
    while bad := outlier_nodes(kept, better):
        kept = {nodes: value for nodes, value in kept.items() if nodes not in bad}
    return kept


def _why_info(
    kept: Collection[str],
    by_nodes: Mapping[str, Mapping[int, float]],
    sku: str | None,
    value: float,
    spread_frac: float,
    *,
    is_steady: bool,
) -> str | None:
    """Why these results make no limit; None where they make one."""
    if not is_steady:
        return "it was steady in no job"
    n_jobs = min(len(by_nodes[nodes]) for nodes in kept)
    if len(kept) < MIN_NODES and n_jobs < MIN_JOBS:
        few = f"{len(kept)} node(s) in {n_jobs} steady job(s) each"
        return f"{few} say too little: it takes {MIN_NODES} nodes, or {MIN_JOBS} jobs of the same"
    if sku is None:
        return "the records do not tell the device"
    if not value:
        return "a limit of 0 has no tolerance"
    if spread_frac > LEAST_OF_SOURCE:
        return f"its jobs differ by {spread_frac:.0%} from their median, so that a limit would catch nothing"
    return None


def _rounded_up(frac: float) -> float:
    return round(frac + 0.0005, 3) if frac else 0.0
