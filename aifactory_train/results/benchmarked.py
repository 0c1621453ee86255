"""Records of benchmarks (schema aifactory-bench/1), read for `calibrate`: rates of a device, and steps."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aifactory_train.errors import RunFolderError
from aifactory_train.machine.machine import ByDtype, Machine, Measured
from aifactory_train.plan.calibrate import RateObservation, RunObservation
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.work import work_of
from aifactory_train.units import format_fraction

SHA_DIGITS = 10
# Half of the interval of a median, beside it. Wider, and the measurement alone uses up the tenth that plans promise.
WIDE_FRAC = 0.05
# benchmark -> the metric that is read; the other benchmarks measure nothing that a plan is made from.
_READ = {
    "gemm": "aifactory_gemm_flops_per_second",
    "memory": "aifactory_memory_bandwidth_bytes_per_second",
    "checkpoint": "aifactory_checkpoint_save_bandwidth_bytes_per_second",
    "step": "aifactory_train_step_duration_seconds",
}


class _Metric(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    median: float
    ci95: tuple[float, float] | None = None


class BenchRecord(BaseModel):
    """What is needed of a record. hosts: of each rank."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    schema_: Literal["aifactory-bench/1"] = Field(alias="schema")
    id: str
    benchmark: str
    machine: str
    hosts: list[str]
    cell: dict[str, Any]
    protocol: dict[str, Any] | None = None
    metrics: list[_Metric]
    validity: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    provenance: dict[str, Any]
    fault: str | None = None

    @property
    def metric(self) -> _Metric | None:
        """What `calibrate` reads of this benchmark; None where it reads nothing."""
        name = _READ.get(self.benchmark)
        return next((metric for metric in self.metrics if metric.name == name), None)

    @property
    def median(self) -> float:
        """Of `metric`, which is there."""
        assert self.metric is not None
        return self.metric.median

    @property
    def doubt(self) -> str | None:
        """Why the median may be far from what the device does: a busy or a sick one. None: nothing says so."""
        if self.protocol is not None and not self.protocol.get("steady", True):
            return "not steady"
        if self.validity.get("throttled") or self.validity.get("device_errors"):
            return "on a device that was slowed down or reported errors"
        low, high = (self.metric and self.metric.ci95) or (self.median, self.median)
        wide_frac = (high - low) / 2 / self.median if self.median else 0.0
        return f"known to within {format_fraction(wide_frac)}" if wide_frac > WIDE_FRAC else None

    @property
    def origin(self) -> str:
        return f"{self.id} (git {self.provenance['git_sha'][:SHA_DIGITS]}{f', {self.doubt}' if self.doubt else ''})"


def load_bench_records(path: Path) -> list[BenchRecord]:
    """One record, or all of a bench folder that say something to a plan and did not fail.

    Of the records of a folder that measured the same, those in doubt are left out where others are not in doubt.

    Raises:
        RunFolderError: no record, one without git sha, or none that can be used.
    """
    if path.is_file():
        record = _load(path)
        if why := _why_not(record):
            raise RunFolderError(f"{record.id}: {why}", where=str(path), do="leave it out")
        return [record]
    records = [_load(p) for p in sorted((path / "records").glob("*.json"))]
    usable = [record for record in records if _why_not(record) is None]
    if not usable:
        raise RunFolderError(
            f"none of the {len(records)} records here is of {', '.join(_READ)} and can be used",
            where=str(path / "records"),
            do="aifactory-train bench node, or bench train, measures what plans need",
        )
    sure = {_measured(record) for record in usable if record.doubt is None}
    return [record for record in usable if record.doubt is None or _measured(record) not in sure]


def _measured(record: BenchRecord) -> str:
    """Cell and nodes."""
    return json.dumps([record.benchmark, record.cell, sorted(record.hosts)], sort_keys=True)


def _load(path: Path) -> BenchRecord:
    try:
        record = BenchRecord.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise RunFolderError(
            f"neither a run nor a record of a benchmark (schema aifactory-bench/1): {said}",
            where=str(path),
            do="give run folders, bench folders, their records, or files that aifactory-train probe wrote",
        ) from None
    if not record.provenance.get("git_sha"):
        raise RunFolderError(
            "a record without git sha cannot be traced back to what ran",
            where=f"{path}: provenance",
            do="leave it out, or run the benchmark again from a git checkout",
        )
    return record


def _why_not(record: BenchRecord) -> str | None:
    """Why a record says nothing to a plan, None where it does."""
    if record.fault is not None:
        return f"it failed: {record.fault}"
    if record.metric is None:
        return f"benchmark {record.benchmark} measures nothing that a plan is made from"
    if record.validity.get("loss_finite") is False or record.validity.get("wrong_values"):
        return "what it computed is wrong"
    if record.cell.get("deterministic"):
        return "deterministic kernels are slower than those of training"
    return None


def rates_of(machine: Machine, records: Iterable[BenchRecord]) -> list[RateObservation]:
    """Of each set of hosts: the best rate of matrix products, copies and saves, each of a whole device.

    The best over shapes and sizes: small ones say how long a call takes to start, which the plan counts by itself.
    """
    found: dict[tuple[str, ...], dict[str, BenchRecord]] = {}
    for record in records:
        key = _rate_key(record)
        if key is None:
            continue
        best = found.setdefault(tuple(sorted(set(record.hosts))), {})
        if key not in best or _of_device(machine, record) > _of_device(machine, best[key]):
            best[key] = record
    return [_observation(machine, best) for best in found.values()]


def _rate_key(record: BenchRecord) -> str | None:
    """Which rate of `Measured` a record is of."""
    if record.benchmark == "gemm":
        dtype = str(record.cell.get("dtype"))
        return dtype if dtype in ByDtype.model_fields else None
    if record.benchmark == "memory":
        return "memory_bytes_per_s" if record.cell.get("kernel") == "copy" else None
    return "checkpoint_bytes_per_s" if record.benchmark == "checkpoint" else None


def _of_device(machine: Machine, record: BenchRecord) -> float:
    """Ranks of a CPU node share one device, and what is written is of the whole job."""
    if machine.device.kind != "cpu" or record.benchmark == "checkpoint":
        return record.median
    return record.median * len(record.hosts) / len(set(record.hosts))


def _observation(machine: Machine, best: dict[str, BenchRecord]) -> RateObservation:
    rates = {key: _of_device(machine, record) for key, record in best.items()}
    products = {key: rates.pop(key) for key in ByDtype.model_fields if key in rates}
    return RateObservation(
        origin=", ".join(record.origin for record in best.values()),
        measured=Measured.model_validate({"matmul_flops_per_s": products, **rates}),
        doubt=", ".join(f"{record.id} is {record.doubt}" for record in best.values() if record.doubt) or None,
    )


def plan_of(record: BenchRecord, path: Path) -> Plan:
    """The plan that the steps were of. Raises RunFolderError where it is of another version."""
    try:
        return Plan.model_validate(record.facts.get("plan"))
    except ValidationError as error:
        first = error.errors()[0]
        raise RunFolderError(
            f"no plan of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=f"{path}: {record.id}: facts.plan",
            do="run the step benchmark again with this version",
        ) from None


def run_of(record: BenchRecord, plan: Plan) -> RunObservation:
    """The steps of a record as those of a run."""
    n_nodes = len(set(record.hosts))
    return RunObservation(
        origin=f"{record.origin}, {n_nodes} node" + ("" if n_nodes == 1 else "s"),
        work=work_of(plan.recipe),
        layout=plan.layout,
        step_time_s=record.median,
        doubt=f"{record.id} is {record.doubt}" if record.doubt else None,
    )
