"""Which device of a node each local rank drives, so that the ranks that talk most have the fastest links."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from aifactory_train.machine.machine import Machine
from aifactory_train.machine.node import link_rates, linked_alike
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.network import axis_links
from aifactory_train.plan.rings import MAX_RING_DEVICES, direct_ring_bytes_per_s
from aifactory_train.units import format_bytes_per_s

_CROSSED = {"node": "inside a node", "group": "between nodes of a fabric group", "groups": "across fabric groups"}


def device_of(layout: Layout, local_rank: int) -> int:
    """Number of the device that this rank of a node drives."""
    return layout.device_order[local_rank] if layout.device_order else local_rank


def place(machine: Machine, layout: Layout) -> tuple[list[int], list[str]]:
    """(device of each local rank, sentences that say why). The list is empty where rank n drives device n.

    The innermost axis is what the order serves: its groups are chosen so that the slowest ring among them is the
    fastest possible. Between nodes the rank order alone decides: the outermost axis crosses the longest links.
    """
    order, why = _order(machine, layout)
    links = axis_links(machine, layout.model_copy(update={"device_order": order}))
    reasons = [why] if why else []
    for axis in ("tp", "cp", "dp_shard", "dp_replicate", "pp"):
        link = links[axis]
        if link.degree > 1:
            rate = format_bytes_per_s(link.bytes_per_s)
            reasons.append(f"{axis} {link.degree} runs {_CROSSED[link.crosses]}: {rate} per rank in one direction")
    return order, reasons


def _order(machine: Machine, layout: Layout) -> tuple[list[int], str]:
    n = layout.world_size // layout.n_nodes
    rates = link_rates(machine)
    degrees = (layout.tp, layout.cp, layout.dp_shard, layout.dp_replicate, layout.pp)
    size = next((degree for degree in degrees if degree > 1), 1)
    if machine.device.kind == "cpu" or n != machine.device.per_node or not rates or linked_alike(machine):
        return [], ""
    if size in (1, n) or n % size:
        return [], ""
    if n > MAX_RING_DEVICES:
        return [], f"rank n drives device n: the links of {n} devices were not searched for better groups"
    identity = [list(range(i, i + size)) for i in range(0, n, size)]
    best = max([identity, *_partitions(list(range(n)), size)], key=lambda groups: _score(rates, groups))
    shown = ", ".join("-".join(map(str, group)) for group in best)
    slowest = format_bytes_per_s(_score(rates, best)[0])
    why = f"ranks of the innermost axis share the fastest links: devices {shown}, the slowest ring {slowest}"
    return ([] if best == identity else [device for group in best for device in group]), why


def _score(rates: dict[tuple[int, int], float], groups: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Slowest ring over direct links, then the sum of the links inside the groups."""
    slowest = min(direct_ring_bytes_per_s(rates, group) for group in groups)
    return slowest, sum(rate for (a, b), rate in rates.items() for group in groups if a in group and b in group)


def _partitions(devices: list[int], size: int) -> Iterator[list[list[int]]]:
    """Every way to cut the devices into groups of `size`."""
    if not devices:
        yield []
        return
    for others in itertools.combinations(devices[1:], size - 1):
        group = [devices[0], *others]
        for rest in _partitions([d for d in devices if d not in group], size):
            yield [group, *rest]
