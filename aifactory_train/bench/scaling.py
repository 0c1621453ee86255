"""Scaling efficiency: the same step on more nodes, beside the fewest on which it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from aifactory_train.bench.cells import Read, words
from aifactory_train.bench.record import Record
from aifactory_train.bench.statistics import Interval

METRIC = "aifactory_train_scaling_efficiency_ratio"
TOKENS_PER_S_PER_DEVICE = "aifactory_train_tokens_per_second_per_gpu"
RESAMPLES = 2000
# Successive steps are alike; drawn one by one they would promise too narrow an interval.
BLOCK_STEPS = 5
# What changes of itself when a job gets more nodes.
SIZE_KEYS = ("nodes", "devices", "ranks", "gbs_tokens", "layout")

Mode = Literal["weak", "strong"]


class Efficiency(NamedTuple):
    """`ratio` = rate per device on `nodes` over that on the fewest nodes; `n` samples made the rate.

    interval: 95 %, None for the base itself and where a side has fewer than two blocks of samples.
    """

    nodes: int
    rate_per_s: float
    ratio: float
    interval: Interval | None
    n: int


class Scaling(NamedTuple):
    """Sizes of one job, by nodes. cell: what they share, in words. devices: of each number of nodes.

    mode: `weak` has a constant number of tokens per node, `strong` a constant global batch.
    """

    mode: Mode
    cell: str
    machine: str
    devices: Mapping[int, int]
    sizes: list[Efficiency]

    @property
    def base_devices(self) -> int:
        return self.devices[self.sizes[0].nodes]


def estimate_scaling(records: Sequence[Record], read: Read) -> list[Scaling]:
    """Cells of the step that differ in their size alone, where there are two sizes or more.

    A batch that grows with the nodes and one that stays share their smallest cell. Rates are those of the slowest rank.
    """
    groups: dict[tuple[Mode, str, str, float], dict[int, list[float]]] = {}
    devices: dict[int, int] = {}
    for record in records:
        nodes, tokens = record.cell.get("nodes"), record.cell.get("gbs_tokens")
        if not isinstance(nodes, int) or not isinstance(tokens, int):
            continue
        by_rank = read(record).get(TOKENS_PER_S_PER_DEVICE)
        if not by_rank:
            continue
        devices[nodes] = int(record.cell.get("devices") or nodes)
        rates = [min(of_all) for of_all in zip(*by_rank.values(), strict=False)]
        modes: tuple[tuple[Mode, float], ...] = (("weak", tokens / nodes), ("strong", float(tokens)))
        for mode, size in modes:
            key = (mode, _beside_size(record, mode), record.machine, size)
            groups.setdefault(key, {}).setdefault(nodes, []).extend(rates)
    return [
        Scaling(mode, cell, machine, {nodes: devices[nodes] for nodes in rates}, estimate_efficiency(rates))
        for (mode, cell, machine, _), rates in groups.items()
        if len(rates) > 1
    ]


def _beside_size(record: Record, mode: Mode) -> str:
    """What must be the same on all sizes: "tiny, seq 4096, tp 4, 1 rows".

    Data parallel degrees and accumulation follow the nodes; with a constant batch the rows of a micro-batch do, too.
    """
    rest = words({key: value for key, value in record.cell.items() if key not in SIZE_KEYS})
    parts = [part for part in str(record.cell.get("layout", "")).split(", ") if part and not part.startswith("dp_")]
    rows = [part.split(" x ")[-1] for part in parts if part.endswith(" rows") and mode == "weak"]
    return ", ".join(filter(None, (rest, *(part for part in parts if not part.endswith(" rows")), *rows)))


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
