"""What the links of a machine allow a collective, against counts by hand."""

from __future__ import annotations

import pytest

from aifactory_train.bench.wire import OPS, bus_factor, device_pair_bytes_per_s, estimate_wire, nic_bytes_per_s
from aifactory_train.machine.load import load_machine
from aifactory_train.machine.machine import Device, Host, Link, Machine, Network, Topology

GIB = 1 << 30
# Four devices, each linked to each other one at 100 GB/s, and four NICs of 25 GB/s.
MESH = Machine(
    name="mesh",
    device=Device(kind="cuda", name="some GPU", per_node=4),
    host=Host(cores=4),
    topology=Topology(all_to_all_bytes_per_s=100e9),
    network=Network(nics_per_node=4, nic_gbit_per_s=200),
)


@pytest.mark.parametrize(
    ("op", "factor"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("all_to_all", 0.75), ("sendrecv", 1.0)],
)
def test_bus_factors_are_those_of_nccl_tests(op: str, factor: float) -> None:
    assert bus_factor(op, 4) == factor  # type: ignore[arg-type]


def test_one_rank_alone_has_neither_factor_nor_wire() -> None:
    assert [bus_factor(op, 1) for op in OPS] == [0.0] * len(OPS)
    assert estimate_wire(MESH, "all_reduce", GIB, 1, 1).ceiling_bytes_per_s is None


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_inside_a_mesh_a_ring_fills_the_links_to_all_others(op: str) -> None:
    wire = estimate_wire(MESH, op, GIB, 4, 1)  # type: ignore[arg-type]
    assert wire.crosses == "node"
    assert wire.ceiling_bytes_per_s == pytest.approx(3 * 100e9)


def test_a_send_to_the_next_rank_has_one_link_and_one_nic() -> None:
    assert estimate_wire(MESH, "sendrecv", GIB, 4, 1).ceiling_bytes_per_s == pytest.approx(100e9)
    assert estimate_wire(MESH, "sendrecv", GIB, 8, 2).ceiling_bytes_per_s == pytest.approx(25e9)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_between_nodes_a_ring_has_the_sum_of_the_nics(op: str) -> None:
    assert estimate_wire(MESH, op, GIB, 16, 4).ceiling_bytes_per_s == pytest.approx(100e9)  # type: ignore[arg-type]


def test_an_all_to_all_between_nodes_shares_the_nics_among_the_ranks() -> None:
    # Each of 4 ranks sends 4 of its 8 parts to the other node: 2 GiB leave it at 100 GB/s.
    seconds = 2 * GIB / 100e9
    wire = estimate_wire(MESH, "all_to_all", GIB, 8, 2)
    assert wire.ceiling_bytes_per_s == pytest.approx(7 / 8 * GIB / seconds)


def test_a_tree_over_two_nodes_is_expected_above_the_ceiling_of_a_ring() -> None:
    two, four = (estimate_wire(MESH, "all_reduce", GIB, 4 * n, n) for n in (2, 4))
    for wire, above in ((two, True), (four, False)):
        assert wire.expected_bytes_per_s is not None and wire.ceiling_bytes_per_s is not None
        assert (wire.expected_bytes_per_s > wire.ceiling_bytes_per_s) is above


def test_small_messages_are_expected_to_take_the_time_of_their_hops() -> None:
    small, large = (estimate_wire(MESH, "all_reduce", n, 8, 2) for n in (1 << 15, GIB))
    assert small.expected_bytes_per_s is not None and large.expected_bytes_per_s is not None
    assert small.expected_bytes_per_s < 0.1 * large.expected_bytes_per_s
    assert small.ceiling_bytes_per_s == pytest.approx(large.ceiling_bytes_per_s)


def test_what_the_machine_file_does_not_know_is_none_and_said() -> None:
    no_links = MESH.model_copy(update={"topology": Topology()})
    wire = estimate_wire(no_links, "all_reduce", GIB, 4, 1)
    assert wire[:3] == (None, None, None)
    assert "topology has no rate of links" in wire.why_unknown
    no_nics = MESH.model_copy(update={"network": Network(nics_per_node=4)})
    assert "network.nic_gbit_per_s" in estimate_wire(no_nics, "all_reduce", GIB, 8, 2).why_unknown
    assert nic_bytes_per_s(no_nics) is None
    assert device_pair_bytes_per_s(no_links, 0, 1) is None


def test_ranks_of_a_cpu_have_no_wire() -> None:
    cpu = MESH.model_copy(update={"device": Device(kind="cpu", name="some CPU", per_node=4)})
    assert estimate_wire(cpu, "all_reduce", GIB, 4, 1).ceiling_bytes_per_s is None


def test_a_pair_without_a_link_goes_over_other_devices() -> None:
    chain = Topology(links=[Link(devices=[0, 1], bytes_per_s=50e9), Link(devices=[1, 2], bytes_per_s=20e9)])
    machine = MESH.model_copy(update={"topology": chain})
    assert device_pair_bytes_per_s(machine, 0, 1) == 50e9
    assert device_pair_bytes_per_s(machine, 2, 0) == 20e9
    assert device_pair_bytes_per_s(machine, 0, 3) is None


def test_the_wire_of_a_published_machine_is_its_nics() -> None:
    machine = load_machine("jupiter-booster")
    assert estimate_wire(machine, "all_reduce", GIB, 32, 8).ceiling_bytes_per_s == pytest.approx(4 * 200e9 / 8)
    assert nic_bytes_per_s(machine) == 25e9
