"""What a cell reaches on a sound machine: references, learned from results, one YAML file for each machine.

A reference holds for one kind of device at one power cap. A limit without the results that it was learned from never
judges, and one of few nodes judges those nodes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.record import Record, cell_key
from aifactory_train.bench.statistics import MIN_JOBS
from aifactory_train.errors import MachineError
from aifactory_train.hostlist import compress
from aifactory_train.strictyaml import Key, configs_dir, read_yaml, validate

# Of a reference: TorchBench's for a CPU, SuperBench's and CSCS's for devices and networks; shared storage is noisy.
TOLERANCE_FRAC = {"gemm": 0.02, "memory": 0.02, "loader": 0.20, "checkpoint": 0.20, "startup": 0.20}
OTHER_TOLERANCE_FRAC = 0.05
CPU_TOLERANCE_FRAC = 0.07

MIN_NODES = 20  # fewer say too little about how sound nodes differ to judge one that is not among them
LEAST_OF_SOURCE = 0.5  # a limit below half of what was measured catches nothing
STACK = ("torch", "cuda", "hip", "nccl", "driver")


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reference(Part):
    """One cell and metric.

    cell: as record.cell_key gives it. value: in the metric's unit. source_value: median of the sources.
    ci95: of source_value, over the results of different jobs and nodes; None for few.
    kind: `min` and `max` bound from one side and `band` from both; `info` is printed and judges nothing, and why_info
    says why.
    sku: as sku_of gives it. n_nodes: different nodes, or sets of nodes, that were kept; n_jobs: benches they ran in.
    nodes: as nodes_of gives them: those that the limit holds for, where they were few; none: all of the sku.
    """

    cell: str
    metric: str
    kind: Literal["min", "max", "band", "info"]
    value: float
    source_value: float | None = None
    ci95: tuple[float, float] | None = None
    tolerance_frac: Annotated[float, Field(ge=0, lt=1)]
    source_result_ids: list[str] = []
    n_nodes: Annotated[int, Field(ge=0)]
    n_jobs: Annotated[int, Field(ge=0)]
    nodes: list[str] = []
    sku: str | None
    power_cap_w: float | None
    stack: str
    measured_on: date | None
    expires_on: date | None
    author: str
    why_info: str | None = None


class Setting(Part):
    """What must be the same for two results to be the same to the last bit.

    recipe, code: SHA-256 of the recipe, and of our Python files.
    """

    cell: str
    sku: str | None
    stack: str
    recipe: str
    code: str


class Fingerprint(Part):
    """What the steps of a cell compute, to the last bit, where setting is the same."""

    setting: Setting
    fingerprint: str
    source_result_ids: list[str]
    n_nodes: Annotated[int, Field(ge=1)]
    measured_on: date
    author: str


class References(Part):
    machine: str
    references: list[Reference]
    fingerprints: list[Fingerprint] = []

    def find(self, record: Record, metric: str) -> Reference | None:
        """Of the record's cell on its device at its power cap; None where nobody measured that."""
        of_device = self.of_device(record, metric)
        if of_device is None or (of_device.nodes and nodes_of(record) not in of_device.nodes):
            return None
        return of_device

    def of_device(self, record: Record, metric: str) -> Reference | None:
        """As `find`, also where it holds for other nodes alone."""
        cell, sku, cap_w = cell_key(record), sku_of(record), power_cap_w_of(record)
        for reference in self.references:
            if (reference.cell, reference.metric, reference.sku) == (cell, metric, sku) and _same_cap(reference, cap_w):
                return reference
        return None

    def find_fingerprint(self, record: Record) -> Fingerprint | None:
        """Of the record's setting; None where nobody computed that."""
        setting = setting_of(record)
        return next((known for known in self.fingerprints if known.setting == setting), None)


def nodes_of(record: Record) -> str:
    """The nodes of a record, in Slurm's syntax: "n[1-4]"."""
    return compress(sorted(set(record.hosts)))


def setting_of(record: Record) -> Setting:
    return Setting(
        cell=cell_key(record),
        sku=sku_of(record),
        stack=stack_of(record),
        recipe=str(record.facts.get("recipe_hash") or ""),
        code=str(record.facts.get("code_sha256") or record.provenance.get("git_sha") or ""),
    )


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
    settings = [fingerprint.setting for fingerprint in references.fingerprints]
    for number, fingerprint in enumerate(references.fingerprints):
        at = f"fingerprint of {fingerprint.setting.cell}"
        if fingerprint.setting in settings[:number]:
            found.append(f"fault: {at}: twice for {fingerprint.setting.sku}")
        if not fingerprint.source_result_ids or not fingerprint.setting.sku:
            found.append(f"fault: {at}: without source_result_ids, or without a sku")
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
    if reference.n_nodes < MIN_NODES and not (reference.nodes and reference.n_jobs >= MIN_JOBS):
        few = f"a limit of {reference.n_nodes} node(s) in {reference.n_jobs} job(s)"
        faults.append(f"{few}; it needs {MIN_NODES} nodes, or {MIN_JOBS} jobs and the names of the nodes")
    if reference.tolerance_frac > LEAST_OF_SOURCE:
        faults.append(f"a tolerance of {reference.tolerance_frac:g} catches nothing; allowed is {LEAST_OF_SOURCE:g}")
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
