"""What a cell reaches on a sound machine: references, learned from results, one YAML file for each machine.

A reference holds for one kind of device at one power cap. A limit of few nodes, or without the results that it was
learned from, never judges.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.record import Metric, Record, cell_key
from aifactory_train.bench.statistics import outlier_nodes
from aifactory_train.errors import MachineError
from aifactory_train.hostlist import compress
from aifactory_train.strictyaml import Key, configs_dir, read_yaml, validate

# Of a reference: TorchBench's for a CPU, SuperBench's and CSCS's for devices and networks; shared storage is noisy.
TOLERANCE_FRAC = {"gemm": 0.02, "memory": 0.02, "loader": 0.20, "checkpoint": 0.20, "startup": 0.20}
OTHER_TOLERANCE_FRAC = 0.05
CPU_TOLERANCE_FRAC = 0.07

MIN_NODES = 20  # results of fewer say too little about how sound nodes differ
VALID_DAYS = 365  # drivers, firmware and libraries move on
LEAST_OF_SOURCE = 0.5  # a limit below half of what was measured catches nothing
STACK = ("torch", "cuda", "hip", "nccl", "driver")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(Part):
    """One cell and metric.

    cell: as record.cell_key gives it. value: in the metric's unit. source_value: median of the sources.
    kind: `min` and `max` bound from one side and `band` from both; `info` is printed and judges nothing.
    sku: as sku_of gives it. n_nodes: results of different nodes, or sets of nodes, that were kept.
    """

    cell: str
    metric: str
    kind: Literal["min", "max", "band", "info"]
    value: float
    source_value: float | None = None
    tolerance_frac: Annotated[float, Field(ge=0, lt=1)]
    source_result_ids: list[str] = []
    n_nodes: Annotated[int, Field(ge=0)]
    sku: str | None
    power_cap_w: float | None
    stack: str
    measured_on: date | None
    expires_on: date | None
    author: str


class References(Part):
    machine: str
    references: list[Reference]

    def find(self, record: Record, metric: str) -> Reference | None:
        """Of the record's cell on its device at its power cap; None where nobody measured that."""
        cell, sku, cap_w = cell_key(record), sku_of(record), power_cap_w_of(record)
        for reference in self.references:
            if (reference.cell, reference.metric, reference.sku) == (cell, metric, sku) and _same_cap(reference, cap_w):
                return reference
        return None


def _same_cap(reference: Reference, cap_w: float | None) -> bool:
    return reference.power_cap_w is None or cap_w is None or reference.power_cap_w == cap_w


def sku_of(record: Record) -> str | None:
    """The kind of device that was measured; None where the record does not tell it.

    "NVIDIA H100 80GB HBM3, 79 GiB" for GPUs, joined by " + " where they differ; "AMD EPYC, 2 cores" without.
    """
    gpus = {f"{r['gpu']}, {r['gpu_memory_bytes'] / 2**30:.0f} GiB" for r in _ranks(record) if r.get("gpu")}
    if gpus:
        return " + ".join(sorted(gpus))
    cpu, n_cores = record.provenance.get("cpu"), record.provenance.get("n_cpus")
    return f"{cpu}, {n_cores} cores" if on_cpu(record) and cpu and n_cores else None


def _ranks(record: Record) -> list[Mapping[str, Any]]:
    """What each rank said of its device."""
    return [rank for rank in record.facts.get("ranks") or [] if isinstance(rank, dict)]


def on_cpu(record: Record) -> bool:
    """No rank named a GPU, and the clock was not that of one."""
    on_gpu = record.protocol is not None and record.protocol.timer == "device_event+wall"
    return not on_gpu and not any(rank.get("gpu") for rank in _ranks(record))


def power_cap_w_of(record: Record) -> float | None:
    """Lowest cap of the devices; None where it could not be read."""
    return min((rank["power_cap_w"] for rank in _ranks(record) if rank.get("power_cap_w") is not None), default=None)


def default_tolerance_frac(record: Record) -> float:
    frac = TOLERANCE_FRAC.get(record.benchmark, OTHER_TOLERANCE_FRAC)
    return max(frac, CPU_TOLERANCE_FRAC) if on_cpu(record) else frac


def references_dir() -> Path:
    return configs_dir().parent / "benchmarks" / "references"


def load_references(machine: str, folder: Path | None = None) -> References | None:
    """FOLDER/MACHINE.yaml, by default of benchmarks/references/; None where there is none.

    Raises MachineError for a file with faults: nothing is judged by a limit that lint refuses.
    """
    path = (folder or references_dir()) / f"{machine}.yaml"
    if not path.is_file():
        return None
    origins: dict[Key, str] = {}
    data = read_yaml(path, origins, MachineError)
    do = "mend the lines named above, or learn the references anew"
    references = validate(References, data, origins, str(path), MachineError, do=do)
    faults = [line for line in lint(references) if line.startswith("fault: ")]
    if references.machine != machine:
        faults.append(f"fault: the file is of machine {references.machine!r}, its name says {machine!r}")
    if faults:
        raise MachineError("\n  ".join([f"{len(faults)} fault(s) in references", *faults]), where=str(path), do=do)
    return references


def lint(references: References, today: date | None = None) -> list[str]:
    """Lines that begin with "fault: " or, for what has expired on `today`, "warning: "."""
    found = []
    seen: set[tuple[str, str, str | None, float | None]] = set()
    for reference in references.references:
        at = f"{reference.metric} of {reference.cell}"
        found += [f"fault: {at}: {fault}" for fault in _faults(reference)]
        key = (reference.cell, reference.metric, reference.sku, reference.power_cap_w)
        if key in seen:
            found.append(f"fault: {at}: twice for {reference.sku}")
        seen.add(key)
        if today and reference.expires_on and reference.expires_on < today:
            found.append(f"warning: {at}: expired on {reference.expires_on}; measure and learn it again")
    return found


def _faults(reference: Reference) -> list[str]:
    if reference.metric not in NAMES:
        return ["no metric of aifactory_train/bench/metric_names.py"]
    if reference.kind == "info":
        return []
    given = {
        "source_result_ids": reference.source_result_ids,
        "source_value": reference.source_value,
        "sku": reference.sku,
        "measured_on": reference.measured_on,
        "expires_on": reference.expires_on,
    }
    faults = [f"a limit without {name}" for name, value in given.items() if not value]
    wrong_side = {"higher": "max", "lower": "min"}[NAMES[reference.metric].better]
    if reference.kind == wrong_side:
        faults.append(f"kind {reference.kind}, but {NAMES[reference.metric].better} is better")
    if reference.source_value:
        faults += _source_faults(reference, reference.value / reference.source_value)
    return faults


def _source_faults(reference: Reference, ratio: float) -> list[str]:
    """A limit may be weaker than what was measured, but not so weak that it never fails, and never stronger."""
    low, high = (LEAST_OF_SOURCE, 1.0) if NAMES[reference.metric].better == "higher" else (1.0, 1 / LEAST_OF_SOURCE)
    if low <= ratio <= high:
        return []
    of = f"{ratio:.4g} of its source {reference.source_value:.6g}"
    return [f"value {reference.value:.6g} is {of}; allowed is {low:g} to {high:g} of it"]


def is_sound(record: Record) -> bool:
    """Fit to learn from: steady, not slowed down, and with the right result."""
    validity = record.validity
    bad = record.fault or validity.throttled or validity.wrong_values or validity.loss_finite is False
    return not bad and record.protocol is not None and record.protocol.steady


def learn(records: Iterable[Record], author: str) -> References:
    """References of the sound records of one machine.

    Each node, or set of nodes, counts once, by the median of its results. Those that are worse than the others are
    taken out, until none is; the median of the rest is the reference. Its tolerance lets all of them pass.

    Raises MachineError for records of several machines, and for none that is sound.
    """
    groups: dict[tuple[str, str, str | None, float | None], list[tuple[Record, Metric]]] = defaultdict(list)
    sound = [record for record in records if is_sound(record)]
    machines = sorted({record.machine for record in sound})
    if len(machines) != 1:
        do = "give bench folders of one machine whose benchmarks came to an end"
        what = f"records of {len(machines)} machines: {', '.join(machines)}" if machines else "no sound record"
        raise MachineError(f"nothing to learn from: {what}", do=do)
    for record in sound:
        for metric in record.metrics:
            key = (cell_key(record), metric.name, sku_of(record), power_cap_w_of(record))
            groups[key].append((record, metric))
    found = [_learn_one(results, author) for _, results in sorted(groups.items(), key=lambda item: str(item[0]))]
    return References(machine=machines[0], references=found)


def _learn_one(results: Sequence[tuple[Record, Metric]], author: str) -> Reference:
    first, better = results[0][0], results[0][1].better
    by_nodes: dict[str, list[float]] = defaultdict(list)
    for record, metric in results:
        by_nodes[compress(sorted(record.hosts))].append(metric.median)
    kept = _without_outliers({nodes: statistics.median(values) for nodes, values in by_nodes.items()}, better)
    value = statistics.median(kept.values())
    worst = min(kept.values()) if better == "higher" else max(kept.values())
    sources = [record for record, _ in results if compress(sorted(record.hosts)) in kept]
    measured_on = max(datetime.fromisoformat(record.ended).date() for record in sources)
    limits = len(kept) >= MIN_NODES and sku_of(first) is not None and value != 0
    return Reference(
        cell=cell_key(first),
        metric=results[0][1].name,
        kind=("min" if better == "higher" else "max") if limits else "info",
        value=value,
        source_value=value,
        tolerance_frac=max(
            default_tolerance_frac(first), _rounded_up(abs(worst - value) / abs(value)) if value else 0.0
        ),
        source_result_ids=sorted(record.id for record in sources),
        n_nodes=len(kept),
        sku=sku_of(first),
        power_cap_w=power_cap_w_of(first),
        stack=stack_of(max(sources, key=lambda record: record.ended)),
        measured_on=measured_on,
        expires_on=measured_on + timedelta(days=VALID_DAYS),
        author=author,
    )


def _without_outliers(by_nodes: Mapping[str, float], better: Literal["higher", "lower"]) -> Mapping[str, float]:
    """A very bad node hides a bad one, so what is left is looked at again, as SuperBench does."""
    kept = dict(by_nodes)
    while bad := outlier_nodes(kept, better):
        kept = {nodes: value for nodes, value in kept.items() if nodes not in bad}
    return kept


def _rounded_up(frac: float) -> float:
    return round(frac + 0.0005, 3) if frac else 0.0


def stack_of(record: Record) -> str:
    """ "torch 2.13.0, cuda 12.8": of those versions that the record has."""
    build = record.provenance.get("torch_build") or {}
    versions = {**build, **(record.provenance.get("versions") or {})}
    shown = {name: versions[name] for name in STACK if versions.get(name)}
    return ", ".join(f"{k} {'.'.join(map(str, v)) if isinstance(v, list) else v}" for k, v in shown.items())


def render_references(references: References) -> str:
    """The YAML file."""
    head = f"# What sound nodes of {references.machine} reach; learned from results, not written by hand.\n"
    return head + yaml.safe_dump(references.model_dump(mode="json"), sort_keys=False, width=120)
