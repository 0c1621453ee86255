"""One JSON document per measured cell: its numbers with their spread, how they were taken, and what ran where.

The schema is shipped as benchmarks/schema/aifactory-bench-1.json. Fields are only ever added.
"""

from __future__ import annotations

import difflib
import json
import math
import secrets
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.statistics import Better, spikes, summarize
from aifactory_train.errors import RunFolderError, storage_errors
from aifactory_train.rundir import write_atomic

SCHEMA = "aifactory-bench/1"
Verdict = Literal[
    "pass", "regression", "improvement", "no_reference", "unstable", "degraded", "incomplete", "invalid", "skipped"
]
GREEN: tuple[Verdict, ...] = ("pass", "improvement", "no_reference", "skipped")
Scalar = str | int | float | bool


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WorstRank(Part):
    """The rank whose median is worst, by `better`."""

    rank: int
    host: str
    median: float


class Metric(Part):
    """One quantity. All numbers are of the samples that are kept in full beside the record.

    name: without the labels that tell cells apart, in base units; one of metric_names.NAMES.
    ci95: of the median, by order statistics; None for fewer than 6 samples, which cannot give one.
    """

    name: str
    unit: str
    better: Better
    median: float
    ci95: tuple[float, float] | None
    p5: float
    p95: float
    p99: float
    min: float
    max: float
    cv: float | None
    n: int = Field(ge=1)
    worst_rank: WorstRank | None = None
    flagged: dict[str, int] = {}


class Protocol(Part):
    """How the samples were taken.

    warmup_rule: in words, as measure/timing.py applies it. ci_reached: the interval was as narrow as asked for, before
    the budget was spent. rank_reduction: how a sample is made of those of all ranks.
    """

    warmup_steps: int
    warmup_rule: str
    steady: bool
    timed_steps: int
    jobs: int = 1
    timer: Literal["wall", "device_event+wall"]
    rank_reduction: Literal["max", "none"]
    ci_reached: bool


class EnergyWindow(Part):
    """scope: gpu, module, package or node; windows of different scopes are never added."""

    scope: str
    method: str
    joules: float
    seconds: float


class Unavailable(Part):
    """What could not be read, and why."""

    probe: str
    reason: str


class Validity(Part):
    """None where the benchmark has no such thing. wrong_values: elements that came out wrong.

    device_errors: what GPUs or their driver reported as broken in the timed window, with the rank.
    """

    loss_finite: bool | None = None
    loss_decreased: bool | None = None
    n_parameters: int | None = None
    fingerprint: str | None = None
    throttled: bool | None = None
    device_errors: list[str] | None = None
    wrong_values: int | None = None


class Judgement(Part):
    """One metric against its reference; `why` is a sentence with the numbers."""

    metric: str
    verdict: Verdict
    reference: float | None
    tolerance_frac: float | None
    why: str


class Flops(Part):
    """peak None: nobody published one for this device, so there is no MFU."""

    convention: str
    per_token: float
    peak_flops_per_s: float | None
    peak_source: str | None


class Record(Part):
    """cell: what tells this measurement from others of its benchmark, such as dtype, bytes or layout; flat."""

    schema_: Literal["aifactory-bench/1"] = Field("aifactory-bench/1", alias="schema")
    id: str
    benchmark: str
    suite: str
    machine: str
    hosts: list[str]
    started: str
    ended: str
    cell: dict[str, Scalar | None]
    protocol: Protocol | None
    metrics: list[Metric]
    energy: list[EnergyWindow] = []
    flops: Flops | None = None
    validity: Validity = Validity()
    verdicts: list[Judgement] = []
    facts: dict[str, Any] = {}
    provenance: dict[str, Any]
    unavailable: list[Unavailable] = []
    samples: str | None
    fault: str | None = None


def new_id(benchmark: str) -> str:
    """Names of files; in the order of time: "20261123T212233Z-gemm-9f3a61c2"."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{benchmark}-{secrets.token_hex(4)}"


def cell_key(record: Record) -> str:
    """What a reference is found by: "benchmark=gemm,dtype=bf16,m=4096", sorted; what is None is left out."""
    parts = {"benchmark": record.benchmark, **record.cell}
    words = {k: v if isinstance(v, str) else json.dumps(v) for k, v in sorted(parts.items()) if v is not None}
    return ",".join(f"{name}={value}" for name, value in words.items())


def build_metric(
    name: str,
    better: Better,
    samples_by_rank: Mapping[int, Sequence[float]],
    hosts: Sequence[str],
    reduction: Literal["max", "none"],
) -> Metric:
    """Join the samples of all ranks, in the unit of `name`.

    Args:
        hosts: host of each rank, by rank.
        reduction: `max`: all ranks did sample i together, and its value is that of the worst of them; `none`: ranks
            worked alone, and all their samples count.

    Raises:
        KeyError: `name` is not in metric_names.NAMES.
        ValueError: a sample that is not finite, a rank without samples, or for `max` ranks with more than others.
    """
    lengths = {len(samples) for samples in samples_by_rank.values()}
    if not lengths or 0 in lengths or (reduction == "max" and len(lengths) > 1):
        counts = {rank: len(samples) for rank, samples in sorted(samples_by_rank.items())}
        raise ValueError(f"{name}: number of samples by rank: {counts}")
    worst = min if better == "higher" else max
    if reduction == "max":
        values = [worst(of_all) for of_all in zip(*samples_by_rank.values(), strict=True)]
    else:
        values = [value for _, samples in sorted(samples_by_rank.items()) for value in samples]
    medians = {rank: statistics.median(samples) for rank, samples in sorted(samples_by_rank.items())}
    rank = worst(medians, key=lambda r: medians[r])
    slowness = {r: [_slowness(v, better) for v in samples] for r, samples in samples_by_rank.items()}
    flagged: Counter[str] = Counter(spike.kind for spike in spikes(slowness) if reduction == "max")
    return Metric(
        name=name,
        unit=NAMES[name].unit,
        better=better,
        **summarize(values)._asdict(),
        worst_rank=WorstRank(rank=rank, host=hosts[rank], median=medians[rank]),
        flagged=dict(flagged),
    )


def _slowness(value: float, better: Better) -> float:
    """A rate as the time of one unit, so that a slow sample is a large one."""
    if better == "lower":
        return value
    return 1 / value if value > 0 else math.inf


def check_record(record: Record) -> None:
    """Refuse a record that nobody could trace back, compare or recompute. Raises RunFolderError."""
    versions = record.provenance.get("versions") or {}
    needed = {
        "git sha": record.provenance.get("git_sha"),
        "versions": versions.get("python"),
        "hosts": record.hosts,
        "machine": record.machine,
        "start and end": record.started and record.ended,
        "protocol": record.protocol or not record.metrics,
        "samples": record.samples or not record.metrics,
        "metrics, fault or verdict": record.metrics or record.fault or record.verdicts,
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise RunFolderError(
            f"no record without {', '.join(missing)}: it could not be traced back to what ran",
            where=f"record {record.id} of benchmark {record.benchmark}",
            do="run from a git checkout with git installed, or from a wheel built in one",
        )
    for fault in _metric_faults(record.metrics):
        raise RunFolderError(
            f"no record with {fault}",
            where=f"record {record.id} of benchmark {record.benchmark}",
            do="names, units and directions are those of aifactory_train/bench/metric_names.py",
        )


def _metric_faults(metrics: Sequence[Metric]) -> Iterator[str]:
    for name, n in Counter(metric.name for metric in metrics).items():
        if n > 1:
            yield f"{name} {n} times: what tells them apart belongs into the cell, a record each"
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, 1)
            yield f"metric {name}" + (f"; the nearest known one is {near[0]}" if near else ", which is not known")
    for metric in metrics:
        known = NAMES[metric.name]
        if (metric.unit, metric.better) != (known.unit, known.better):
            yield f"{metric.name} in {metric.unit}, {metric.better} is better; it is {known.unit}, {known.better}"


def write_record(folder: Path, record: Record, samples: Mapping[str, Mapping[int, Sequence[float]]]) -> Path:
    """Write FOLDER/records/ID.json, and the samples beside it as ID.samples.jsonl.zst.

    Args:
        folder: the bench folder.
        record: its `samples` is filled in here.
        samples: metric name -> rank -> values in the metric's unit. More names than the metrics is fine.

    Raises:
        RunFolderError: check_record refuses it, or a metric has no samples.
        StorageError: disk full or no permission.
    """
    path = folder / "records" / f"{record.id}.json"
    raw = path.with_name(f"{record.id}.samples.jsonl.zst")
    record = record.model_copy(update={"samples": raw.name if samples else None})
    check_record(record)
    bare = [metric.name for metric in record.metrics if not any(samples.get(metric.name, {}).values())]
    if bare:
        raise RunFolderError(f"no record without the samples of {', '.join(bare)}", where=str(path), do="hand them in")
    rows = [
        {"metric": name, "rank": rank, "values": list(values)}
        for name, by_rank in sorted(samples.items())
        for rank, values in sorted(by_rank.items())
    ]
    with storage_errors("writing a benchmark record", path, "free some space, or name another folder with --out"):
        if rows:  # first, so that a record that can be read has its samples
            text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            write_atomic(raw, zstandard.ZstdCompressor(level=9).compress(text.encode()))
        document = record.model_dump(mode="json", by_alias=True)
        write_atomic(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def read_record(path: Path) -> Record:
    """Raises RunFolderError where there is no record, or one that does not follow the schema."""
    try:
        return Record.model_validate_json(path.read_bytes())
    except OSError as error:
        what, do = f"cannot read the record: {error.strerror}", "give a file of BENCH_FOLDER/records/"
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole file"
        what = f"no record of {SCHEMA}: {key}: {first['msg']}"
        do = "run the benchmark again, or use the version of aifactory-train that wrote it"
    raise RunFolderError(what, where=str(path), do=do)


def read_samples(path: Path) -> dict[str, dict[int, list[float]]]:
    """Metric name -> rank -> values, of an ID.samples.jsonl.zst. Raises RunFolderError."""
    found: dict[str, dict[int, list[float]]] = {}
    try:
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                found.setdefault(row["metric"], {})[row["rank"]] = row["values"]
    except OSError as error:
        what = f"cannot read the samples: {error.strerror}"
    except (zstandard.ZstdError, ValueError, KeyError, TypeError) as error:
        what = f"the samples are damaged: {error}"
    else:
        return found
    raise RunFolderError(what, where=str(path), do="copy records/ anew from where the benchmark ran, or run it again")


def render_schema() -> str:
    """The JSON-Schema of a record, as shipped in benchmarks/schema/aifactory-bench-1.json."""
    schema = Record.model_json_schema(by_alias=True)
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"
