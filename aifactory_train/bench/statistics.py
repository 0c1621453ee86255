"""Medians with their intervals, steady state, spikes, slow nodes and dips: pure functions over samples."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from aifactory_train import units

Better = Literal["higher", "lower"]
Interval = tuple[float, float]

RESAMPLES = 2000
MIN_JOBS = 3  # fewer allocations say nothing about how allocations differ

SPIKE_FACTOR = 1.5
SUSPECT_FRAC = 0.05  # as SuperBench: worse than the median node by this much
SUSPECT_MAD_Z = 4.0
MIN_NODES_FOR_MAD = 4  # among fewer, the median may be the bad node
SUSPECT_FEW_FRAC = 0.20  # two or three nodes: beside the best one
MAD_OF_NORMAL = 0.6745  # median absolute deviation of a normal distribution of standard deviation 1
DIP_FRAC = 0.05


class Summary(NamedTuple):
    """Of one list of samples, all in their unit. `ci95` is that of the median; `cv` standard deviation over mean.

    ci95 is None for fewer than 6 samples, cv for a single one or where the mean is 0.
    """

    median: float
    ci95: Interval | None
    p5: float
    p95: float
    p99: float
    min: float
    max: float
    cv: float | None
    n: int


@dataclass(frozen=True)
class Spike:
    """Sample `index` was slow on these ranks: `system` where on more than half of them."""

    index: int
    kind: Literal["system", "straggler"]
    ranks: tuple[int, ...]


class Dip(NamedTuple):
    """At `size_bytes` the rate is lower than at the smaller size `before_bytes`."""

    size_bytes: int
    rate_per_s: float
    before_bytes: int
    before_per_s: float


def summarize(samples: Sequence[float]) -> Summary:
    """Percentiles are linear between the two nearest samples.

    Raises ValueError for no sample and for one that is not finite.
    """
    if not samples:
        raise ValueError("no samples")
    values = np.asarray(samples, dtype=np.float64)
    if not np.isfinite(values).all():
        index = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"sample {index} of {len(values)} is {values[index]}")
    p5, p95, p99 = (float(q) for q in np.quantile(values, (0.05, 0.95, 0.99)))
    mean = float(values.mean())
    return Summary(
        median=statistics.median(samples),
        ci95=median_interval(samples),
        p5=p5,
        p95=p95,
        p99=p99,
        min=min(samples),
        max=max(samples),
        cv=float(values.std(ddof=1)) / abs(mean) if len(values) > 1 and mean else None,
        n=len(samples),
    )


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Confidence interval of the median by order statistics: no assumption but that the samples are independent.

    The two samples of equal rank from either end that hold the median at least that often; None where even the
    smallest and the largest do not (fewer than 6 samples for 95 %).
    """
    rank = _interval_rank(len(samples), confidence)
    if rank == 0:
        return None
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


@lru_cache(maxsize=1024)
def _interval_rank(n: int, confidence: float) -> int:
    """The largest rank r for which Binomial(n, 1/2) is below r in at most (1 - confidence) / 2 of all cases."""
    most = Fraction((1 - confidence) / 2) * 2**n
    rank, below, combinations = 0, 0, 1
    while rank <= n // 2 and below + combinations <= most:
        below += combinations
        rank += 1
        combinations = combinations * (n - rank + 1) // rank
    return rank


def over_jobs_interval(medians: Sequence[float], seed: int = 0) -> Interval | None:
    """95 % interval of the median over jobs, each given by the median of its own samples; repeatable by `seed`.

    Samples of one job are alike, so that jobs are drawn as a whole. None for fewer than MIN_JOBS; with fewer than ten,
    the interval holds the truth less often than it says.
    """
    if len(medians) < MIN_JOBS:
        return None
    draws = np.random.default_rng(seed).integers(len(medians), size=(RESAMPLES, len(medians)))
    low, high = np.quantile(np.median(np.asarray(medians, dtype=np.float64)[draws], axis=1), (0.025, 0.975))
    return float(low), float(high)


def steady_from(samples: Sequence[float], window: int = 10, change_frac: float = 0.01) -> int | None:
    """Index of the first of two successive windows whose medians differ by less than `change_frac` of the second.

    Windows lie end to end from sample 0, so that more samples never change an answer. None: not steady yet.
    """
    medians = [statistics.median(samples[i : i + window]) for i in range(0, len(samples) - window + 1, window)]
    for index, (before, after) in enumerate(itertools.pairwise(medians)):
        if before == after or abs(after - before) < change_frac * abs(after):
            return index * window
    return None


def spikes(by_rank: Mapping[int, Sequence[float]]) -> list[Spike]:
    """Samples longer than SPIKE_FACTOR times the median of their own rank, by index. Seconds, not rates.

    A rank that is slow all the time has no spikes: see outlier_nodes.
    """
    slow: dict[int, list[int]] = {}
    for rank, samples in sorted(by_rank.items()):
        limit = SPIKE_FACTOR * statistics.median(samples)
        for index, sample in enumerate(samples):
            if sample > limit:
                slow.setdefault(index, []).append(rank)
    return [
        Spike(index, "system" if 2 * len(ranks) > len(by_rank) else "straggler", tuple(ranks))
        for index, ranks in sorted(slow.items())
    ]


def outlier_nodes(by_host: Mapping[str, float], better: Better) -> dict[str, str]:
    """The hosts that are worse than the others, each with a sentence that says by how much.

    Four nodes or more: by more than SUSPECT_FRAC of their median and more than SUSPECT_MAD_Z (scaled) median absolute
    deviations. Two or three: by more than SUSPECT_FEW_FRAC of the best of them.
    """
    if len(by_host) < 2:
        return {}
    values = list(by_host.values())
    sign = -1.0 if better == "higher" else 1.0
    if len(values) < MIN_NODES_FOR_MAD:
        best = max(values) if better == "higher" else min(values)
        beside = f"the best of {len(values)} nodes, {best:.4g} (too few nodes for their spread)"
        worse = {host: sign * (value - best) for host, value in by_host.items()}
        return {
            host: f"{by_host[host]:.4g} is {units.format_fraction(by / abs(best))} worse than {beside}"
            for host, by in worse.items()
            if by > SUSPECT_FEW_FRAC * abs(best)
        }
    median = statistics.median(values)
    mad = statistics.median(abs(value - median) for value in values)
    found = {}
    for host, value in by_host.items():
        by = sign * (value - median)
        z = MAD_OF_NORMAL * by / mad if mad else math.inf
        if by > SUSPECT_FRAC * abs(median) and z > SUSPECT_MAD_Z:
            worse_by = units.format_fraction(by / abs(median)) if median else f"{by:.4g}"
            found[host] = f"{value:.4g} is {worse_by} worse than the median of {len(values)} nodes, {median:.4g}"
            found[host] += f" (MAD z {z:.1f})"
    return found


def dips(points: Sequence[tuple[int, float]]) -> list[Dip]:
    """Sizes (bytes) at which the rate (per second) is more than DIP_FRAC below the best of all smaller sizes.

    A rate that grows with the size and then stays has none; a dip is often a change of algorithm or protocol.
    """
    found, best = [], (0, 0.0)
    for size, rate in sorted(points):
        if rate < (1 - DIP_FRAC) * best[1]:
            found.append(Dip(size, rate, *best))
        elif rate > best[1]:
            best = (size, rate)
    return found
