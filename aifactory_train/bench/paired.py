"""The ratio of two rates that were measured in turns, with its uncertainty. Pure functions."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

MIN_BLOCKS = 5
RESAMPLES = 4000
Block = Sequence[float]  # tokens/s of each step


class Ratio(NamedTuple):
    ratio: float
    low: float
    high: float


def order_of_turns(n_sides: int, n_blocks: int) -> list[int]:
    """Which side runs when: forwards, then backwards (ABBA), so that a steady drift of the machine cancels."""
    sides = list(range(n_sides))
    return [side for block in range(n_blocks) for side in (sides if block % 2 == 0 else sides[::-1])]


def ratio_of_medians(ours: Sequence[Block], theirs: Sequence[Block], seed: int = 0) -> Ratio:
    """Median rate of all of our steps over that of theirs, with a 95 % bootstrap interval over pairs of blocks.

    Block i of both sides ran one after the other: resampling draws pairs, so what slowed the machine down for both
    stays in both. Percentile interval, repeatable by `seed`.

    Raises ValueError if the blocks do not pair, or are fewer than MIN_BLOCKS.
    """
    if len(ours) != len(theirs) or len(ours) < MIN_BLOCKS:
        raise ValueError(f"{len(ours)} blocks of ours and {len(theirs)} of theirs; need as many, at least {MIN_BLOCKS}")
    draw = random.Random(seed)
    n = len(ours)
    ratios = sorted(_ratio(ours, theirs, [draw.randrange(n) for _ in range(n)]) for _ in range(RESAMPLES))
    return Ratio(_ratio(ours, theirs, range(n)), ratios[round(0.025 * RESAMPLES)], ratios[round(0.975 * RESAMPLES) - 1])


def ratio_line(name: str, ratio: float, low: float, high: float) -> str:
    """The line that a reader or a script looks for."""
    return f"ratio_to {name} {ratio:.3f} low {low:.3f} high {high:.3f}"


def _ratio(ours: Sequence[Block], theirs: Sequence[Block], pairs: Sequence[int]) -> float:
    return _median(ours, pairs) / _median(theirs, pairs)


def _median(blocks: Sequence[Block], chosen: Sequence[int]) -> float:
    return statistics.median([rate for i in chosen for rate in blocks[i]])
