"""Benchmark records made by hand, for tests of what reads them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from aifactory_train.bench.record import Metric, Protocol, Record, WorstRank

GEMM = "aifactory_gemm_flops_per_second"
STEADY = (99.0, 99.5, 99.8, 99.9, 100.0, 100.0, 100.1, 100.2, 100.5, 101.0)
PROVENANCE = {
    "git_sha": "1" * 40,
    "versions": {"python": "3.11.2", "torch": "2.13.0", "nccl": None},
    "cpu": "AMD EPYC",
    "n_cpus": 2,
}


def a_metric(name: str = GEMM, samples: Sequence[float] = STEADY, **changes: Any) -> Metric:
    """A metric of `samples`; its interval is that between the third samples from both ends."""
    ordered = sorted(samples)
    wide = len(ordered) >= 6
    fields: dict[str, Any] = {
        "name": name,
        "unit": "FLOP/s",
        "better": "higher",
        "median": statistics.median(ordered),
        "ci95": (ordered[2], ordered[-3]) if wide else None,
        "p5": ordered[0],
        "p95": ordered[-1],
        "p99": ordered[-1],
        "min": ordered[0],
        "max": ordered[-1],
        "cv": 0.01,
        "n": len(ordered),
        "worst_rank": WorstRank(rank=0, host="n1", median=statistics.median(ordered)),
    }
    return Metric(**(fields | changes))


def a_record(samples: Sequence[float] = STEADY, **changes: Any) -> Record:
    """One GEMM cell of one CPU node; `metrics` or any other field of Record may be given instead."""
    fields: dict[str, Any] = {
        "schema": "aifactory-bench/1",
        "id": "r1",
        "benchmark": "gemm",
        "suite": "node",
        "machine": "here",
        "hosts": ["n1"],
        "started": "2026-11-20T10:00:00Z",
        "ended": "2026-11-20T10:00:30Z",
        "cell": {"dtype": "bf16", "m": 1024, "n": 1024, "k": 1024},
        "protocol": a_protocol(),
        "metrics": [a_metric(samples=samples)],
        "provenance": PROVENANCE,
        "samples": None,
    }
    return Record(**(fields | changes))


def a_protocol(**changes: Any) -> Protocol:
    fields: dict[str, Any] = {
        "warmup_steps": 10,
        "warmup_rule": "10 calls, then two windows within 1 %",
        "steady": True,
        "timed_steps": len(STEADY),
        "timer": "wall",
        "rank_reduction": "max",
        "ci_reached": True,
    }
    return Protocol(**(fields | changes))


def write_folder(
    folder: Path,
    records: Sequence[Record],
    samples: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]] | None = None,
    hosts: Sequence[str] | None = None,
) -> Path:
    """A bench folder of `records`; `samples`: record id -> metric -> rank -> values; `hosts`: those asked for."""
    (folder / "records").mkdir(parents=True, exist_ok=True)
    asked = list(hosts) if hosts is not None else sorted({h for r in records for h in r.hosts})
    suite = {"suite": "node", "machine": "here", "nodes": len(asked), "hosts": asked, "cells": []}
    (folder / "suite.json").write_text(json.dumps(suite))
    for record in records:
        own = (samples or {}).get(record.id)
        name = f"{record.id}.samples.jsonl.zst" if own else None
        if own:
            rows = [{"metric": m, "rank": r, "values": list(v)} for m, by in own.items() for r, v in by.items()]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "records" / str(name)).write_bytes(zstandard.compress(text.encode()))
        written = record.model_copy(update={"samples": name})
        (folder / "records" / f"{record.id}.json").write_text(written.model_dump_json(by_alias=True))
    return folder
