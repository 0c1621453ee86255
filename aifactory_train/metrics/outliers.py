"""Ranks that are slower than the others. Pure, without torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

# Good devices of one kind differ by less than a tenth; power and heat explain a little more.
SLOW_FRAC = 0.7
# With fewer ranks the median may be the slow one.
MIN_RANKS = 4


def slow_ranks(rates: Mapping[int, float]) -> tuple[list[int], float | None]:
    """Ranks below SLOW_FRAC of the median rate, and that median; nobody and None for fewer than MIN_RANKS."""
    if len(rates) < MIN_RANKS:
        return [], None
    median = statistics.median(rates.values())
    return [rank for rank, rate in sorted(rates.items()) if rate < SLOW_FRAC * median], median
