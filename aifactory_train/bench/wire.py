"""What the links of a machine allow a collective: the bus bandwidth beside which a measured one is read.

Bytes of an op are those of nccl-tests: the whole message of an all_reduce, all_gather and reduce_scatter, what one
rank sends in an all_to_all and in a sendrecv (each rank to the next one of a ring). Its bus bandwidth is
bytes / duration * `bus_factor`: what a ring sends over each link, whatever the number of ranks
(doc/PERFORMANCE.md of https://github.com/NVIDIA/nccl-tests, 2.19).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple, get_args

from aifactory_train.machine.machine import Machine
from aifactory_train.machine.node import link_rates
from aifactory_train.plan.constants import CONSTANTS, Constants
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.network import AxisLink, axis_links, collective_s
from aifactory_train.plan.rings import routed_rate

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "sendrecv"]
OPS: tuple[Op, ...] = get_args(Op)
# Rates of links as the machine file has them, and hops that take no time: what cannot be beaten by a ring.
_WIRE = replace(CONSTANTS, node_link_frac=1.0, nic_frac=1.0, node_latency_s=0.0, nic_latency_s=0.0)


class Wire(NamedTuple):
    """Of one op over some ranks; None where the machine file does not know a link that the op crosses.

    ceiling_bytes_per_s: bus bandwidth of a ring that fills the slowest of its links. A tree can show more: over two
        nodes it sends each byte of an all_reduce once, where a ring's share of the network sends it twice.
    expected_s, expected_bytes_per_s: duration and bus bandwidth by the planner's model, whose software reaches only a
        part of that and takes time for each hop.
    crosses: "node" inside a node, "group" nodes of one fabric group, "groups" beyond it; "device" for one rank.
    why_unknown: what the machine file lacks; "" where it is known.
    """

    ceiling_bytes_per_s: float | None
    expected_s: float | None
    expected_bytes_per_s: float | None
    crosses: str
    why_unknown: str = ""


def bus_factor(op: Op, n_ranks: int) -> float:
    """Bus bandwidth by algorithm bandwidth. 0 for one rank alone, which sends nothing."""
    if op == "sendrecv":
        return 1.0 if n_ranks > 1 else 0.0
    return (2 if op == "all_reduce" else 1) * (n_ranks - 1) / n_ranks


def estimate_wire(machine: Machine, op: Op, n_bytes: int, n_ranks: int, n_nodes: int) -> Wire:
    """Of one op over the first `n_ranks` devices of a job that has as many of them on each of its nodes."""
    if n_ranks == 1:
        return Wire(None, None, None, "device", "one rank alone sends nothing")
    link = _link(machine, op, n_ranks, n_nodes, _WIRE)
    if machine.device.kind == "cpu":
        why = "ranks of a CPU meet in memory and in sockets, of which a machine file knows no rate"
        return Wire(None, None, None, link.crosses, why)
    if link.assumed:
        return Wire(None, None, None, link.crosses, "; ".join(link.assumed))
    factor = bus_factor(op, n_ranks)
    # An all-reduce as its scatter and gather: `collective_s` would take the tree where that is faster.
    ring: Op = "all_gather" if op == "all_reduce" else op
    ceiling = bus_factor(ring, n_ranks) * n_bytes / _seconds(ring, n_bytes, link)
    seconds = _seconds(op, n_bytes, _link(machine, op, n_ranks, n_nodes, CONSTANTS))
    return Wire(ceiling, seconds, factor * n_bytes / seconds, link.crosses)


def device_pair_bytes_per_s(machine: Machine, first: int, second: int) -> float | None:
    """One direction between two devices of a node, over other devices where no link joins them."""
    rates = link_rates(machine)
    pair = routed_rate(rates, (first, second), 0.0) if rates else 0.0
    return pair or None


def nic_bytes_per_s(machine: Machine) -> float | None:
    """One direction of one NIC."""
    gbit_per_s = machine.network.nic_gbit_per_s
    return None if gbit_per_s is None else gbit_per_s * 1e9 / 8


def _seconds(op: Op, n_bytes: int, link: AxisLink) -> float:
    if op == "sendrecv":
        return collective_s("send", n_bytes, link)
    # The planner counts the message of an all-to-all over all ranks.
    return collective_s(op, n_bytes * link.degree if op == "all_to_all" else n_bytes, link)


def _link(machine: Machine, op: Op, n_ranks: int, n_nodes: int, constants: Constants) -> AxisLink:
    """A ring over all ranks; of sends each to the next rank, as between stages of a pipeline."""
    sends = op == "sendrecv"
    layout = Layout(
        engine="fsdp2",
        world_size=n_ranks,
        n_nodes=n_nodes,
        pp=n_ranks if sends else 1,
        dp_shard=1 if sends else n_ranks,
        micro_batch_rows=1,
        accumulation=1,
        reshard_after_forward=False,
        remat="none",
        precision="bf16",
        threads_per_rank=1,
    )
    return axis_links(machine, layout, constants)["pp" if sends else "dp_shard"]
