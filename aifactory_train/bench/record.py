"""One JSON document per measured cell: its numbers with their spread, how they were taken, and what ran where.

The schema is shipped as benchmarks/schema/aifactory-bench-1.json. Fields are only ever added.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = "aifactory-bench/1"
Better = Literal["higher", "lower"]
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
    """None where the benchmark has no such thing. wrong_values: elements that came out wrong."""

    loss_finite: bool | None = None
    loss_decreased: bool | None = None
    n_parameters: int | None = None
    fingerprint: str | None = None
    throttled: bool | None = None
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
