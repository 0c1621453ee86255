"""Which row stands at global position n: a pure function of (seed, n), with no state to save.

Position -> (source, k-th draw of it) by a fixed pattern of slots; draw -> (epoch, row) by a keyed permutation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aifactory_train.errors import DataError

SLOTS = 1024
ROUNDS = 8  # four are enough against a statistical test on halves of many bits; small halves need more mixing
_U64 = np.uint64


class Order:
    """The order of the rows of several sources, mixed by weight.

    Of each SLOTS consecutive positions that begin at a multiple of SLOTS, every source gets the same number,
    by largest remainder: its share differs from weight / sum(weights) by less than 1/SLOTS.

    Args:
        seed: any whole number >= 0.
        names, weights, rows: of each source: its name for messages, its weight, its rows per epoch.

    Raises DataError if a weight is so small that its source would get no slot.
    """

    def __init__(self, seed: int, names: Sequence[str], weights: Sequence[float], rows: Sequence[int]) -> None:
        self._seed = seed
        self._rows = np.asarray(rows, np.int64)
        self._slots = _slot_counts(names, weights)
        sorted_slots = np.repeat(np.arange(len(rows)), self._slots)
        self._source_of_slot = sorted_slots[permute(np.arange(SLOTS), SLOTS, _key(seed, -1, np.zeros(SLOTS, np.int64)))]
        self._nth_of_slot = np.zeros(SLOTS, np.int64)
        for source, count in enumerate(self._slots):
            self._nth_of_slot[self._source_of_slot == source] = np.arange(count)

    def locate(self, positions_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, epoch, row) of each global position, all int64 [R]."""
        positions_R = np.asarray(positions_R, np.int64)
        block_R, slot_R = positions_R // SLOTS, positions_R % SLOTS
        source_R = self._source_of_slot[slot_R]
        draw_R = block_R * self._slots[source_R] + self._nth_of_slot[slot_R]
        epoch_R, place_R = draw_R // self._rows[source_R], draw_R % self._rows[source_R]
        row_R = np.zeros_like(place_R)
        for source in np.unique(source_R):
            mine = source_R == source
            key = _key(self._seed, int(source), epoch_R[mine])
            row_R[mine] = permute(place_R[mine], int(self._rows[source]), key)
        return source_R, epoch_R, row_R


def _slot_counts(names: Sequence[str], weights: Sequence[float]) -> np.ndarray:
    exact = np.asarray(weights, np.float64) / sum(weights) * SLOTS
    counts = np.floor(exact).astype(np.int64)
    for source in np.argsort(counts - exact, kind="stable")[: SLOTS - int(counts.sum())]:
        counts[source] += 1
    if not counts.all():
        source = int(np.argmin(counts))
        raise DataError(
            f"data source {names[source]} would never be read: its weight {weights[source]:g} is less than "
            f"1/{SLOTS} of the sum of all weights, {sum(weights):g}",
            where=f"data.sources, name {names[source]}, key weight",
            do=f"give it at least {sum(weights) / SLOTS:.3g}, or remove the source",
        )
    return counts


def permute(index_R: np.ndarray, n: int, key_R: np.ndarray) -> np.ndarray:
    """Where a permutation of range(n) sends each index; each key is another permutation.

    A Feistel network on the next even number of bits is a permutation of a range of less than 4n; an index
    that lands outside of range(n) is sent on until it is inside (cycle walking), which stays a permutation.
    """
    half_bits = _U64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (_U64(1) << half_bits) - _U64(1)
    out = np.asarray(index_R, np.uint64).copy()
    walking = np.ones(len(out), bool)
    while walking.any():
        left, right, key = out[walking] >> half_bits, out[walking] & mask, key_R[walking]
        for round_number in range(ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + _U64(round_number))) & mask)
        out[walking] = left << half_bits | right
        walking = out >= _U64(n)
    return out.astype(np.int64)


def _key(seed: int, source: int, epoch_R: np.ndarray) -> np.ndarray:
    key = _mix(np.full(len(epoch_R), seed % (1 << 64), np.uint64))
    key = _mix(key ^ _U64(source % (1 << 64)))
    return _mix(key ^ epoch_R.astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014): each bit of the input changes half of the output's."""
    x = x + _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))
