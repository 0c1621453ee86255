"""Rings over the direct links of a node, where its devices are not all linked alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

Pair = tuple[int, int]
# All rings over 8 devices are looked at, 5040 at most; over more of them that takes minutes.
MAX_RING_DEVICES = 8


def ring_bytes_per_s(rates: Mapping[Pair, float], devices: Sequence[int], routed_bytes_per_s: float) -> float:
    """What one device of a ring collective over `devices` sends in one direction, over all rings together.

    Where the direct links make no ring, it is one ring in which pairs without a link go over other devices.

    Args:
        rates: of each pair (a, b), a < b, that is linked directly.
        routed_bytes_per_s: of a pair that no chain of links joins.
    """
    if len(devices) > MAX_RING_DEVICES:
        return min(routed_rate(rates, (a, b), routed_bytes_per_s) for a in devices for b in devices if a < b)
    direct = direct_ring_bytes_per_s(rates, devices)
    if direct:
        return direct
    pairs = [(a, b) for a in devices for b in devices if a != b]
    return _take_best_ring({p: routed_rate(rates, p, routed_bytes_per_s) for p in pairs}, devices)


def direct_ring_bytes_per_s(rates: Mapping[Pair, float], devices: Sequence[int]) -> float:
    """The same over direct links alone; 0 where they make no ring.

    As NCCL and RCCL do it: the ring with the fastest slowest link first, then more rings over what is left of the
    links. A ring backwards is another ring, since links carry their rate in both directions at once.
    """
    both_ways = {(a, b): rate for (x, y), rate in rates.items() for a, b in ((x, y), (y, x))}
    left = {pair: rate for pair, rate in both_ways.items() if set(pair) <= set(devices)}
    total = 0.0
    while more := _take_best_ring(left, devices):
        total += more
    return total


def routed_rate(rates: Mapping[Pair, float], pair: Pair, routed_bytes_per_s: float) -> float:
    """Rate of the direct link of a pair, else of the slowest link on its best way over other devices."""
    first, last = sorted(pair)
    if (first, last) in rates:
        return rates[first, last]
    best: dict[int, float] = {first: float("inf")}
    todo = [first]
    while todo:
        here = todo.pop()
        for (a, b), rate in rates.items():
            if here in (a, b):
                other, reached = a + b - here, min(best[here], rate)
                if reached > best.get(other, 0.0):
                    best[other] = reached
                    todo.append(other)
    return best.get(last, routed_bytes_per_s)


def _take_best_ring(left: dict[Pair, float], devices: Sequence[int]) -> float:
    """Rate of the best ring, taken off its links; 0 where there is none. Of equals, the one that leaves most."""
    best: tuple[float, float, list[Pair]] = (0.0, 0.0, [])
    for ring in _rings(left, [devices[0]], len(devices)):
        hops = list(zip(ring, [*ring[1:], ring[0]], strict=True))
        along = [left[hop] for hop in hops]
        if (min(along), sum(along)) > best[:2]:
            best = (min(along), sum(along), hops)
    for hop in best[2]:
        left[hop] -= best[0]
        if left[hop] <= 0:
            del left[hop]
    return best[0]


def _rings(left: Mapping[Pair, float], path: list[int], length: int) -> Iterator[list[int]]:
    if len(path) == length:
        if (path[-1], path[0]) in left:
            yield path
        return
    for a, b in list(left):
        if a == path[-1] and b not in path:
            yield from _rings(left, [*path, b], length)
