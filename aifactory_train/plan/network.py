"""What each axis of a layout crosses on a machine, and how long a collective takes over it.

Rates are of one direction. Rank r sits on node r // ranks_per_node; the axes nest as pp dp_replicate dp_shard cp tp,
tp innermost, so an axis joins ranks that lie the product of the degrees inside it apart (its stride).
"""

from __future__ import annotations

import itertools
import math
import re
from functools import lru_cache
from typing import Literal, NamedTuple

from aifactory_train.machine.machine import Machine
from aifactory_train.machine.node import link_rates, linked_alike, network_bytes_per_s
from aifactory_train.plan.constants import CONSTANTS, Constants
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.rings import ring_bytes_per_s
from aifactory_train.units import format_bytes_per_s, format_gbit_per_s

Crosses = Literal["device", "node", "group", "groups"]
Collective = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send"]

# All NVLinks of one device by generation, from NVIDIA's data sheets of V100, A100, H100 and B200.
NVLINK_BYTES_PER_S = {"2": 150e9, "3": 300e9, "4": 450e9, "5": 900e9}
# Names that nvidia-smi and vendors give to boards with NVLink, where a machine file does not name its links.
NVLINK_BOARDS = (
    (r"\bG?B[23]00\b", "5"),
    (r"GH200|H200(?! NVL)|H100.*(HBM3|SXM)|H800.*SXM", "4"),
    (r"A[18]00.*SXM", "3"),
    (r"V100.*SXM", "2"),
)
PCIE_BYTES_PER_S = 25e9  # 16 lanes of generation 4: 31.5e9 by the standard, less what packets cost
HOST_BYTES_PER_S = 2e9  # gloo between two processes of one host: a copy in and one out of a socket
NIC_GBIT_PER_S = 100.0
ETHERNET_GBIT_PER_S = 10.0
# Two more switches of 0.35 us (De Sensi et al. 2020, arXiv 2008.08886) and up to 100 m of fibre at 5 ns per metre.
GROUP_LATENCY_S = 1.2e-6
# A tree moves less than a ring at large sizes: NCCL's own model, ncclTopoTuneModel in src/graph/tuning.cc (2.21).
TREE_FRAC = 0.92
# A node with more devices than this joins them by switches: each then has its whole rate to any other.
MESH_DEVICES = 4


class AxisLink(NamedTuple):
    """How the ranks of one axis reach each other, in one of its groups, while all other groups do the same.

    crosses: "device" nothing, "node" inside a node, "group" nodes of one fabric group, "groups" beyond it.
    bytes_per_s: what one rank sends in one direction in a large ring collective; for pp, in a send to the next stage.
    latency_s: per hop between nodes where it leaves the node, else as `node_latency_s`, per hop inside a node.
    n_in_node: ranks of a group that share a node.
    assumed: sentences, each a fact that the machine file lacks and what stands in for it.
    """

    axis: str
    degree: int
    crosses: Crosses
    bytes_per_s: float
    latency_s: float
    node_latency_s: float
    n_in_node: int
    assumed: tuple[str, ...] = ()

    @property
    def n_nodes(self) -> int:
        return -(-self.degree // self.n_in_node)


def axis_links(machine: Machine, layout: Layout, constants: Constants = CONSTANTS) -> dict[str, AxisLink]:
    """One link for each of pp, dp_replicate, dp_shard, cp, tp, and for "fsdp": dp_shard and cp together."""
    network = _network_of(
        _Same(machine),
        _Reached(constants.node_link_frac, constants.nic_frac, constants.node_latency_s, constants.nic_latency_s),
    )
    tp, cp, dp_shard, dp_replicate = layout.tp, layout.cp, layout.dp_shard, layout.dp_replicate
    fsdp = dp_shard * cp
    per_node, order = layout.world_size // layout.n_nodes, tuple(layout.device_order)
    return {
        "pp": network.link("pp", dp_replicate * fsdp * tp, layout.pp, per_node, order),
        "dp_replicate": network.link("dp_replicate", fsdp * tp, dp_replicate, per_node, order),
        "dp_shard": network.link("dp_shard", cp * tp, dp_shard, per_node, order),
        "cp": network.link("cp", tp, cp, per_node, order),
        "tp": network.link("tp", 1, tp, per_node, order),
        "fsdp": network.link("fsdp", tp, fsdp, per_node, order),
    }


def collective_s(kind: Collective, n_bytes: float, link: AxisLink) -> float:
    """Seconds of one collective of `n_bytes`, the whole (gathered) message; of a send, what is sent.

    Gather and scatter are rings: NCCL has nothing else for them with more than one rank per node. Each rank sends
    (n-1)/n of the message, over n-1 hops of which n_nodes-1 are between nodes. An all-reduce is a scatter and a
    gather, or a tree with 2 log2(n_nodes) hops between nodes and a lower rate, whichever is faster; two nodes
    exchange each byte once in a tree, more nodes pass it up and down. In an all-to-all each rank holds 1/n of the
    message and keeps 1/n of that; its rounds are as many as the hops of a ring.
    Hops and tree: ncclTopoTuneModel in NCCL's src/graph/tuning.cc (2.21).
    """
    n, n_nodes, n_in_node = link.degree, link.n_nodes, link.n_in_node
    if n == 1:
        return 0.0
    if kind == "send":
        return link.latency_s + n_bytes / link.bytes_per_s
    hops_s = (n - n_nodes) * link.node_latency_s + (n_nodes - 1) * link.latency_s
    ring_s = hops_s + (n - 1) / n * n_bytes / link.bytes_per_s
    if kind == "all_to_all":
        # The ring's rate between nodes is that of the node for all ranks that share it there.
        leaving = (n - 1) / n if n_nodes == 1 else n_in_node * (n - n_in_node) / n
        return hops_s + leaving * n_bytes / n / link.bytes_per_s
    if kind != "all_reduce":
        return ring_s
    if n_nodes == 1:
        return 2 * ring_s
    tree_hops_s = (n_in_node - 1) * link.node_latency_s + math.log2(n_nodes) * link.latency_s
    tree_bytes = n_bytes if n_nodes == 2 else 2 * n_bytes
    return min(2 * ring_s, 2 * tree_hops_s + tree_bytes / (TREE_FRAC * link.bytes_per_s))


class _Same:
    """A machine as a key: machines hold lists, so they have no hash. Equal to itself alone, which is kept alive."""

    __slots__ = ("machine",)

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __hash__(self) -> int:
        return id(self.machine)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.machine is self.machine


class _Reached(NamedTuple):
    """What large collectives reach of the links' rates, and the seconds of a hop: as in Constants."""

    node_link_frac: float
    nic_frac: float
    node_latency_s: float
    nic_latency_s: float


@lru_cache(maxsize=16)
def _network_of(same: _Same, reached: _Reached) -> _Network:
    return _Network(same.machine, reached)


class _Network:
    """The links of one machine; remembers each axis it was asked for, since layouts share most of them."""

    def __init__(self, machine: Machine, reached: _Reached) -> None:
        self.n_devices, self.reached = machine.device.per_node, reached
        self.is_cpu = machine.device.kind == "cpu"
        self.nodes_per_group = machine.network.nodes_per_group
        self.rates = {} if self.is_cpu or linked_alike(machine) else link_rates(machine)
        self.pair_bytes_per_s, self.device_bytes_per_s, self.node_assumed = _node_rates(machine)
        self.host_bytes_per_s = machine.topology.host_bytes_per_s or PCIE_BYTES_PER_S
        self.nics_bytes_per_s, self.n_nics, self.nic_assumed = _nic_rates(machine)
        self.rings: dict[tuple[int, ...], float] = {}
        self.known: dict[tuple[str, int, int, int, tuple[int, ...]], AxisLink] = {}

    def link(self, axis: str, stride: int, degree: int, per_node: int, order: tuple[int, ...]) -> AxisLink:
        key = (axis, stride, degree, per_node, order)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._link(*key)
        return found

    def _link(self, axis: str, stride: int, degree: int, per_node: int, order: tuple[int, ...]) -> AxisLink:
        node_latency_s = self.reached.node_latency_s
        if degree == 1:
            return AxisLink(axis, 1, "device", math.inf, 0.0, 0.0, 1)
        span = stride * degree
        # Where blocks of `span` ranks do not fit into nodes evenly, this is the fewest that share one.
        n_in_node = max(1, math.gcd(per_node, span) // stride)
        node_bytes_per_s = math.inf
        if n_in_node > 1:
            node_bytes_per_s = self._node_rate(axis, stride, n_in_node, per_node, order)
        if n_in_node == degree:
            assumed = self.node_assumed
            return AxisLink(axis, degree, "node", node_bytes_per_s, node_latency_s, node_latency_s, n_in_node, assumed)
        n_nodes_spanned = stride * (degree - 1) // per_node + 1
        beyond = self.nodes_per_group is not None and n_nodes_spanned > self.nodes_per_group
        latency_s = self.reached.nic_latency_s + (GROUP_LATENCY_S if beyond else 0.0)
        rate = min(node_bytes_per_s, self._nic_rate(axis, n_in_node, per_node))
        assumed = self.nic_assumed + (self.node_assumed if n_in_node > 1 else ())
        crosses: Crosses = "groups" if beyond else "group"
        return AxisLink(axis, degree, crosses, rate, latency_s, node_latency_s, n_in_node, assumed)

    def _nic_rate(self, axis: str, n_in_node: int, per_node: int) -> float:
        """Bytes per second of one rank's ring between nodes.

        Each group has as large a share of the NICs as it has of the node's ranks, and all of its rings together
        enter and leave the node once: with all ranks in one group that ring runs at the sum of the NICs (NCCL makes
        one ring per NIC), with one rank in each group each ring has a rank's share. A send of pp takes one NIC.
        """
        rate = self.nics_bytes_per_s * n_in_node / per_node
        if axis == "pp":
            rate = min(rate, self.nics_bytes_per_s / self.n_nics)
        rate *= self.reached.nic_frac
        return min(rate, HOST_BYTES_PER_S) if self.is_cpu else rate

    def _node_rate(self, axis: str, stride: int, n: int, per_node: int, order: tuple[int, ...]) -> float:
        """Bytes per second inside a node of a ring over n ranks `stride` apart; of the slowest such group."""
        if self.is_cpu:
            return self.device_bytes_per_s
        if not self.rates:
            # A ring over n devices of a mesh uses the n-1 links that each has to the others.
            n_links = 1 if axis == "pp" else n - 1
            return self.reached.node_link_frac * min(self.pair_bytes_per_s * n_links, self.device_bytes_per_s)
        devices = order or tuple(range(self.n_devices))
        starts = [b + i for b in range(0, per_node - stride * n + 1, stride * n) for i in range(stride)]
        groups = [[devices[start + i * stride] for i in range(n)] for start in starts]
        if axis == "pp":
            groups = [list(pair) for group in groups for pair in itertools.pairwise(group)]
        return self.reached.node_link_frac * min(self._ring_rate(tuple(group)) for group in groups)

    def _ring_rate(self, group: tuple[int, ...]) -> float:
        found = self.rings.get(group)
        if found is None:
            found = self.rings[group] = ring_bytes_per_s(self.rates, group, self.host_bytes_per_s)
        return found


def _node_rates(machine: Machine) -> tuple[float, float, tuple[str, ...]]:
    """(of a pair of devices, of one device to all others, what was assumed). Irregular links have no such rates."""
    pair, n = machine.topology.all_to_all_bytes_per_s, machine.device.per_node
    if machine.device.kind == "cpu":
        said = f"ranks of one host exchange {format_bytes_per_s(HOST_BYTES_PER_S)} (assumed: gloo over loopback)"
        return HOST_BYTES_PER_S, HOST_BYTES_PER_S, (said,)
    if n == 1 or (machine.topology.links and not linked_alike(machine)):
        return math.inf, math.inf, ()
    if linked_alike(machine):
        pair = next(iter(link_rates(machine).values()))
    generation, why = _nvlink_generation(machine)
    device = NVLINK_BYTES_PER_S.get(generation)
    if pair is not None:
        # Behind a switch the rate to one other device is all that a device has.
        return pair, min(pair * (n - 1), device or math.inf), ()
    if device is None:
        rate = format_bytes_per_s(PCIE_BYTES_PER_S)
        return (
            PCIE_BYTES_PER_S,
            PCIE_BYTES_PER_S,
            (f"topology has no rate of links inside the node; assumed PCIe 4 x16, {rate} per device",),
        )
    how = "a direct link to each other one" if n <= MESH_DEVICES else "a switch"
    said = f"topology has no rate of links inside the node; assumed NVLink {generation} {why}: "
    said += f"{format_bytes_per_s(device)} per device, by {how}"
    return device / (n - 1) if n <= MESH_DEVICES else device, device, (said,)


def _nvlink_generation(machine: Machine) -> tuple[str, str]:
    """(generation, where from); ("", "") where neither links nor device tell."""
    kind = machine.topology.link_kind or ""
    named = re.search(r"nvlink\s*(\d)", kind, re.IGNORECASE)
    if named:
        return named[1], "as link_kind says"
    for pattern, generation in NVLINK_BOARDS:
        if re.search(pattern, machine.device.name):
            return generation, f"as boards named {machine.device.name} have"
    return "", ""


def _nic_rates(machine: Machine) -> tuple[float, int, tuple[str, ...]]:
    """(bytes per second of all NICs of a node, their number, what was assumed)."""
    network, n_nics = machine.network, machine.network.nics_per_node
    known = network_bytes_per_s(machine)
    if known is not None and n_nics is not None:
        return known, n_nics, ()
    assumed = []
    gbit_per_s = network.nic_gbit_per_s
    if n_nics is None:
        n_nics = machine.device.per_node if gbit_per_s is None and machine.device.kind != "cpu" else 1
        assumed.append(f"network.nics_per_node is unknown; assumed {n_nics}")
    if gbit_per_s is None:
        gbit_per_s = ETHERNET_GBIT_PER_S if machine.device.kind == "cpu" else NIC_GBIT_PER_S
        assumed.append(f"network.nic_gbit_per_s is unknown; assumed {format_gbit_per_s(gbit_per_s)}")
    return n_nics * gbit_per_s * 1e9 / 8, n_nics, tuple(assumed)
