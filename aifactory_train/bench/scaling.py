"""Scaling efficiency: the same step on more nodes, beside the fewest on which it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from aifactory_train.bench.statistics import Interval

RESAMPLES = 2000
# Successive steps are alike; drawn one by one they would promise too narrow an interval.
BLOCK_STEPS = 5


class Efficiency(NamedTuple):
    """`ratio` = rate per device on `nodes` over that on the fewest nodes; `n` samples made the rate.

    interval: 95 %, None for the base itself and where a side has fewer than two blocks of samples.
    """

    nodes: int
    rate_per_s: float
    ratio: float
    interval: Interval | None
    n: int


def estimate_efficiency(rates_by_nodes: Mapping[int, Sequence[float]], seed: int = 0) -> list[Efficiency]:
    """E = r(N) / r(N0) of median rates per device, N0 the fewest nodes; by nodes.

    With a constant number of tokens per device this is weak scaling, with a constant global batch strong scaling: both
    are the ratio of rates per device. Interval by block bootstrap, repeatable by `seed`. Rates in 1/s, at least one
    per size.
    """
    sizes = sorted(rates_by_nodes)
    base = np.asarray(rates_by_nodes[sizes[0]], dtype=np.float64)
    draw = np.random.default_rng(seed)
    found = []
    for nodes in sizes:
        rates = np.asarray(rates_by_nodes[nodes], dtype=np.float64)
        ratio = float(np.median(rates) / np.median(base))
        interval = None
        if nodes != sizes[0] and min(len(rates), len(base)) >= 2 * BLOCK_STEPS:
            ratios = _medians(rates, draw) / _medians(base, draw)
            low, high = np.quantile(ratios, (0.025, 0.975))
            interval = float(low), float(high)
        found.append(Efficiency(nodes, float(np.median(rates)), ratio, interval, len(rates)))
    return found


def _medians(samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Medians of resamples of `samples`, made of runs of BLOCK_STEPS successive ones that wrap around its end."""
    n = len(samples)
    starts = draw.integers(n, size=(RESAMPLES, -(-n // BLOCK_STEPS), 1))
    chosen = (starts + np.arange(BLOCK_STEPS)).reshape(RESAMPLES, -1)[:, :n] % n
    medians: np.ndarray = np.median(samples[chosen], axis=1)
    return medians
