"""What each axis crosses and how long collectives take, against arithmetic done by hand."""

import math

import pytest

from aifactory_train.machine.load import load_machine, machine_names
from aifactory_train.machine.machine import Device, Host, Link, Machine, Network, Topology
from aifactory_train.plan.constants import Constants
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.network import AxisLink, axis_links, collective_s

GB = 1e9
# Every rate at the vendor's figure, so that the numbers below are those of the data sheets.
FULL = Constants(node_link_frac=1.0, nic_frac=1.0, node_latency_s=1e-6, nic_latency_s=10e-6)
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "fsdp")


def layout(n_nodes, per_node, device_order=(), **degrees):
    """The axis that is not given, dp_shard, takes what is left."""
    world_size = n_nodes * per_node
    degrees = {"dp_shard": world_size // math.prod(degrees.values()), **degrees}
    return Layout(
        engine="fsdp2", world_size=world_size, n_nodes=n_nodes, micro_batch_rows=1, accumulation=1,
        reshard_after_forward=True, remat="none", precision="bf16", threads_per_rank=1,
        device_order=list(device_order), **degrees,
    )  # fmt: skip


def links(machine, n_nodes, per_node=None, constants=FULL, **degrees):
    machine = load_machine(machine) if isinstance(machine, str) else machine
    return axis_links(machine, layout(n_nodes, per_node or machine.device.per_node, **degrees), constants)


def node(per_node=8, kind="cuda", name="GPU", network=None, **topology):
    network = Network(nics_per_node=per_node, nic_gbit_per_s=400.0) if network is None else network
    device = Device(kind=kind, name=name, per_node=per_node)
    return Machine(name="m", device=device, host=Host(cores=64), topology=Topology(**topology), network=network)


def crossed(found):
    return {axis: (link.crosses, link.n_in_node, link.bytes_per_s / GB) for axis, link in found.items()}


def test_four_gpus_of_a_mesh_use_one_link_to_each_other_device_of_their_ring():
    # NVLink 3, 100 GB/s to each of three others: over 2 devices one link, over 4 three.
    for tp, gb_per_s in ((2, 100), (4, 300)):
        assert crossed(links("leonardo-booster", 1, tp=tp))["tp"] == ("node", tp, gb_per_s)


def test_a_ring_over_whole_nodes_runs_at_the_sum_of_the_nics():
    # Four of 100 Gbit/s = 12.5 GB/s: 50 GB/s, which is less than the 300 GB/s inside.
    assert crossed(links("leonardo-booster", 2))["fsdp"] == ("group", 4, 50)


def test_one_rank_per_node_has_its_share_of_the_nics():
    found = crossed(links("leonardo-booster", 8, tp=4))
    assert found["tp"] == ("node", 4, 300)
    assert found["dp_shard"] == ("group", 1, 12.5)


def test_two_ranks_per_node_have_the_share_of_two():
    # tp 2 leaves two groups of dp_shard in each node, ranks 0 2 and 1 3: half of 50 GB/s for each.
    assert crossed(links("leonardo-booster", 8, tp=2))["dp_shard"] == ("group", 2, 25)


def test_eight_gpus_behind_a_switch_have_their_whole_rate_to_any_other():
    # NVLink 4: 450 GB/s per device whether the ring has 2 or 8; 8 NICs of 50 GB/s carry 400 GB/s.
    machine = node(link_kind="NVLink 4", all_to_all_bytes_per_s=450e9)
    assert [crossed(links(machine, 1, tp=tp))["tp"] for tp in (2, 8)] == [("node", 2, 450), ("node", 8, 450)]
    assert crossed(links(machine, 4))["fsdp"] == ("group", 8, 400)
    assert crossed(links(machine, 4, tp=8))["fsdp"] == ("group", 1, 50)


def test_the_links_inside_bound_a_ring_that_the_nics_would_let_run_faster():
    machine = node(link_kind="PCIe", all_to_all_bytes_per_s=20e9, per_node=2)  # two NICs of 50 GB/s
    assert crossed(links(machine, 2))["fsdp"] == ("group", 2, 20)


def test_eight_gcds_share_four_nics_two_by_two():
    # Four NICs of 25 GB/s for eight GCDs: 12.5 GB/s for one, 25 for two, 100 for all in one ring.
    assert crossed(links("lumi-g", 4))["fsdp"] == ("group", 8, 100)
    found = crossed(links("lumi-g", 4, tp=4))
    assert found["dp_shard"] == ("group", 2, 25)
    assert found["tp"] == ("node", 4, 100)  # 0-1-3-2 over links of 50 GB/s, both ways round
    assert crossed(links("lumi-g", 4, tp=8))["dp_shard"] == ("group", 1, 12.5)
    assert crossed(links("lumi-g", 4, tp=2))["tp"] == ("node", 2, 200)


def test_inside_a_node_the_slowest_group_of_an_axis_counts():
    # cp 4 over tp 2 on one node: devices 0 2 4 6 and 1 3 5 7, each a ring over links of 50 GB/s, both ways.
    assert crossed(links("lumi-g", 1, tp=2, cp=4))["cp"] == ("node", 4, 100)
    # dp_shard 2 over tp 4: pairs 0-4 and 2-6 have no link and are routed over one of 50 GB/s.
    assert crossed(links("lumi-g", 1, tp=4))["dp_shard"] == ("node", 2, 50)


def test_the_order_of_the_devices_decides_which_links_a_group_has():
    # 0-6 and 2-4 have 100 GB/s; 1-7 and 3-5 no link: over 1-0-6-7 and 3-2-4-5 the slowest has 100.
    order = [0, 6, 1, 7, 2, 4, 3, 5]
    assert crossed(links("lumi-g", 1, device_order=order, tp=2))["tp"] == ("node", 2, 100)


def test_axes_nest_tp_innermost_and_pp_outermost():
    # 8 nodes of 4: tp 2 (stride 1), cp 2 (stride 2), dp_shard 2 (4), dp_replicate 2 (8), pp 2 (16).
    found = crossed(links("leonardo-booster", 8, pp=2, dp_replicate=2, cp=2, tp=2, dp_shard=2))
    assert {axis: crosses for axis, (crosses, _, _) in found.items()} == {
        "pp": "group", "dp_replicate": "group", "dp_shard": "group", "cp": "node", "tp": "node", "fsdp": "group",
    }  # fmt: skip
    # dp_shard and cp together: 4 ranks two apart, two of them in each node.
    assert [found[axis][1] for axis in AXES] == [1, 1, 1, 2, 2, 2]


def test_an_axis_of_one_rank_crosses_nothing_and_takes_no_time():
    link = links("leonardo-booster", 2)["tp"]
    assert (link.crosses, link.degree) == ("device", 1)
    assert [collective_s(kind, 1e9, link) for kind in ("all_gather", "all_reduce", "all_to_all", "send")] == [0] * 4


def test_a_group_of_ranks_that_does_not_fit_a_node_evenly_counts_as_crossing():
    # tp 6 on nodes of 4: ranks 0-5 sit four and two, so two share a node in the worst case.
    assert crossed(links("leonardo-booster", 3, tp=6))["tp"] == ("group", 2, 25)


def test_a_stage_sends_over_one_link_inside_a_node_and_one_nic_between_nodes():
    assert crossed(links("leonardo-booster", 1, pp=4))["pp"] == ("node", 4, 100)
    assert crossed(links("leonardo-booster", 4, pp=4))["pp"] == ("group", 1, 12.5)
    # Eight stages over 2 nodes: one rank at a time leaves the node, with one NIC of the four.
    assert crossed(links("leonardo-booster", 2, pp=8))["pp"] == ("group", 4, 12.5)


def test_beyond_a_fabric_group_each_hop_takes_longer():
    # 180 nodes to a group: 64 replicas of 2 nodes span 128, 128 of them 256.
    near, far = (links("leonardo-booster", 2 * n, dp_replicate=n)["dp_replicate"] for n in (64, 128))
    assert (near.crosses, far.crosses) == ("group", "groups")
    assert near.latency_s == 10e-6
    assert far.latency_s == pytest.approx(11.2e-6)
    assert near.bytes_per_s == far.bytes_per_s


def test_large_collectives_reach_a_share_of_each_rate():
    shares = Constants(node_link_frac=0.5, nic_frac=0.8)
    found = crossed(links("leonardo-booster", 8, constants=shares, tp=4))
    assert (found["tp"][2], found["dp_shard"][2]) == (pytest.approx(150), pytest.approx(10))


def test_ranks_of_a_cpu_node_meet_over_the_host_and_say_so():
    machine = node(per_node=1, kind="cpu", network=Network())
    inside = axis_links(machine, layout(1, 4), FULL)["fsdp"]
    assert (inside.crosses, inside.n_in_node, inside.bytes_per_s) == ("node", 4, 2e9)
    assert "gloo" in inside.assumed[0]
    # Ethernet of 10 Gbit/s for the four ranks of a node: 1.25 GB/s in one ring.
    between = axis_links(machine, layout(2, 4), FULL)["fsdp"]
    assert (between.crosses, between.bytes_per_s) == ("group", 1.25e9)
    assert "assumed 10 Gbit/s" in " ".join(between.assumed)
    # A NIC of 50 GB/s does not make the sockets of its host any faster.
    fast = node(per_node=1, kind="cpu", network=Network(nics_per_node=1, nic_gbit_per_s=400.0))
    assert axis_links(fast, layout(2, 1), FULL)["fsdp"].bytes_per_s == 2e9


@pytest.mark.parametrize(
    ("machine", "tp2_gb_per_s", "tp4_gb_per_s", "said"),
    [
        (node(4, link_kind="NVLink 3"), 100, 300, "NVLink 3 as link_kind says: 300 GB/s per device, by a direct link"),
        (node(8, link_kind="NVLink 3"), 300, 300, "NVLink 3 as link_kind says: 300 GB/s per device, by a switch"),
        (node(8, link_kind="NVLink5"), 900, 900, "NVLink 5 as link_kind says: 900 GB/s"),
        (node(4, name="NVIDIA GH200 120GB"), 150, 450, "NVLink 4 as boards named NVIDIA GH200 120GB have: 450 GB/s"),
        (node(8, name="NVIDIA A100-SXM4-80GB"), 300, 300, "NVLink 3 as boards named NVIDIA A100-SXM4-80GB have"),
        (node(8, name="NVIDIA H100 PCIe"), 25, 25, "PCIe 4 x16, 25.0 GB/s per device"),
    ],
)
def test_links_that_the_machine_file_does_not_name_are_assumed_and_said(machine, tp2_gb_per_s, tp4_gb_per_s, said):
    two, four = (links(machine, 1, tp=tp)["tp"] for tp in (2, 4))
    assert (two.bytes_per_s / GB, four.bytes_per_s / GB) == (tp2_gb_per_s, tp4_gb_per_s)
    assert len(two.assumed) == 1
    assert said in two.assumed[0]


def test_known_rates_leave_nothing_assumed():
    assert all(link.assumed == () for link in links("leonardo-booster", 8, tp=2).values())
    assert all(link.assumed == () for link in links("lumi-g", 8, tp=2).values())


def test_a_network_that_the_machine_file_does_not_name_is_assumed_and_said():
    known = {"link_kind": "NVLink 4", "all_to_all_bytes_per_s": 450e9}
    for network, gb_per_s, n_said in (
        (Network(), 8 * 12.5, 2),
        (Network(nics_per_node=2), 2 * 12.5, 1),
        (Network(nic_gbit_per_s=200.0), 25, 1),
    ):
        link = links(node(8, network=network, **known), 2)["fsdp"]
        assert link.bytes_per_s / GB == gb_per_s
        assert len(link.assumed) == n_said
        assert all("unknown; assumed" in sentence for sentence in link.assumed)


def test_what_was_assumed_is_said_only_where_it_counts():
    machine = node(4, link_kind="NVLink 3", network=Network())
    found = links(machine, 8, tp=4)
    assert "NVLink 3" in found["tp"].assumed[0]
    assert all("network." in sentence for sentence in found["dp_shard"].assumed)


def inside(n=4, gb_per_s=100.0):
    return AxisLink("tp", n, "node", gb_per_s * GB, 2e-6, 2e-6, n)


def between(n=32, n_in_node=4, gb_per_s=50.0):
    return AxisLink("fsdp", n, "group", gb_per_s * GB, 10e-6, 2e-6, n_in_node)


def test_a_gather_and_a_scatter_send_all_but_ones_own_part_over_each_hop():
    # 3 hops of 2 us, 3/4 of 1 GB at 100 GB/s.
    expected_s = 6e-6 + 7.5e-3
    assert collective_s("all_gather", 1e9, inside()) == pytest.approx(expected_s, rel=1e-12)
    assert collective_s("reduce_scatter", 1e9, inside()) == pytest.approx(expected_s, rel=1e-12)
    assert collective_s("all_reduce", 1e9, inside()) == pytest.approx(2 * expected_s, rel=1e-12)


def test_a_ring_between_nodes_has_one_slow_hop_per_node():
    # 32 ranks on 8 nodes: 7 of its 31 hops are between nodes. 31/32 of 1 GB at 50 GB/s is 19.375 ms.
    assert collective_s("all_gather", 1e9, between()) == pytest.approx(24 * 2e-6 + 7 * 10e-6 + 19.375e-3, rel=1e-12)


def test_a_small_all_reduce_between_nodes_is_a_tree_and_a_large_one_a_ring():
    # Tree: 2 (3 hops inside + log2 of 8 nodes between), 2 x the message at 0.92 of the rate.
    assert collective_s("all_reduce", 0, between()) == pytest.approx(2 * (3 * 2e-6 + 3 * 10e-6), rel=1e-12)
    ring_s = 2 * (24 * 2e-6 + 7 * 10e-6 + 19.375e-3)
    tree_s = 2 * (36e-6 + 1e9 / (0.92 * 50e9))
    assert ring_s < tree_s
    assert collective_s("all_reduce", 1e9, between()) == pytest.approx(ring_s, rel=1e-12)


def test_an_all_reduce_over_two_nodes_is_what_the_site_of_such_nodes_measured():
    # CSCS for 2 nodes of 4 GH200 and 4 NICs of 200 Gbit/s: bus bandwidth 123 GB/s at 128 MiB, more than the NICs' 100.
    # Hops as in NCCL's model: 3.4 us over NVLink, 14 us over a network.
    constants = Constants(nic_frac=0.75, node_latency_s=3.4e-6, nic_latency_s=14e-6)
    seconds = collective_s("all_reduce", 2**27, links("alps", 2, constants=constants)["fsdp"])
    assert 2 * 7 / 8 * 2**27 / seconds == pytest.approx(123e9, rel=0.1)


def test_an_all_to_all_sends_to_each_rank_its_part():
    # Each of 4 ranks holds 0.25 GB and sends three quarters of it.
    assert collective_s("all_to_all", 1e9, inside()) == pytest.approx(6e-6 + 0.1875 / 100, rel=1e-12)
    # Each of 32 holds 1/32 GB; of the four in a node, 28/32 of that leaves it, at 50 GB/s for the four together.
    expected_s = 24 * 2e-6 + 7 * 10e-6 + 4 * (1 / 32) * (28 / 32) / 50
    assert collective_s("all_to_all", 1e9, between()) == pytest.approx(expected_s, rel=1e-12)


def test_a_send_takes_one_hop():
    assert collective_s("send", 1e9, between()) == pytest.approx(10e-6 + 0.02, rel=1e-12)


def test_links_of_one_rate_between_all_devices_are_a_mesh_however_they_are_written():
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    each = [Link(devices=list(pair), bytes_per_s=100e9) for pair in pairs]
    assert crossed(links(node(4, links=each), 1, tp=4))["tp"] == ("node", 4, 300)


def test_a_change_of_the_constants_is_seen():
    machine = load_machine("leonardo-booster")
    first, second = (
        axis_links(machine, layout(2, 4), Constants(nic_frac=share))["fsdp"].bytes_per_s for share in (0.5, 0.8)
    )
    assert second / first == pytest.approx(1.6)


def test_the_data_axis_of_every_machine_file_has_a_rate():
    assert len(machine_names()) >= 15
    for name in machine_names():
        for link in links(name, 4).values():
            assert link.bytes_per_s > 0
            assert collective_s("all_gather", 1e6, link) < 1
