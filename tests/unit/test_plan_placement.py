"""Which device each local rank drives, and that the ranks do so."""

import os
from types import SimpleNamespace

import pytest

from aifactory_train.faults.checks import Here
from aifactory_train.machine.load import load_machine
from aifactory_train.machine.machine import Link, Place
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.placement import device_of, place
from aifactory_train.plan.rings import direct_ring_bytes_per_s, ring_bytes_per_s, routed_rate
from aifactory_train.train.ranks import Ranks
from aifactory_train.train.setup import bind_cores, pick_device

# Of a node with eight GCDs in four packages: four, two or one link of 50 GB/s between two of them.
PACKAGES = {(0, 1): 200.0, (2, 3): 200.0, (4, 5): 200.0, (6, 7): 200.0}
XGMI = PACKAGES | {(0, 6): 100.0, (2, 4): 100.0}
XGMI |= {(0, 2): 50.0, (1, 3): 50.0, (1, 5): 50.0, (3, 7): 50.0, (4, 6): 50.0, (5, 7): 50.0}


def layout(world_size, n_nodes=1, device_order=(), **degrees):
    degrees = {"dp_shard": world_size, **degrees}
    return Layout(
        engine="fsdp2", world_size=world_size, n_nodes=n_nodes, micro_batch_rows=1, accumulation=1,
        reshard_after_forward=True, remat="none", precision="bf16", threads_per_rank=1,
        device_order=list(device_order), **degrees,
    )  # fmt: skip


def renumbered(numbers):
    """LUMI-G with device n of the file called numbers[n]."""
    machine = load_machine("lumi-g")
    links = [Link(devices=[numbers[d] for d in link.devices], bytes_per_s=link.bytes_per_s)
             for link in machine.topology.links]  # fmt: skip
    topology = machine.topology.model_copy(update={"links": links})
    return machine.model_copy(update={"topology": topology})


def test_two_devices_send_at_the_rate_of_their_link():
    assert [ring_bytes_per_s(XGMI, pair, 25.0) for pair in ([0, 1], [0, 6], [1, 5])] == [200, 100, 50]


def test_four_devices_run_one_ring_and_the_same_ring_backwards():
    # 0-1 200, 1-3 50, 3-2 200, 2-0 50: 50 one way round and 50 the other.
    assert direct_ring_bytes_per_s(XGMI, [0, 1, 2, 3]) == 2 * 50


def test_eight_gcds_run_two_disjoint_rings_both_ways():
    # 1-0-6-7-5-4-2-3-1 and 1-0-2-3-7-6-4-5-1 share only links of 200; the slowest hop of each is one link of 50.
    assert direct_ring_bytes_per_s(XGMI, range(8)) == 2 * 2 * 50


def test_without_a_direct_ring_pairs_are_routed_over_other_devices():
    assert direct_ring_bytes_per_s(XGMI, [0, 4]) == 0
    assert routed_rate(XGMI, (0, 4), 25.0) == 50  # 0-6 100, 6-4 50, or 0-2 50, 2-4 100
    assert routed_rate(XGMI, (1, 6), 25.0) == 100  # 1-0 200, 0-6 100
    assert ring_bytes_per_s(XGMI, [0, 4], 25.0) == 50


def test_devices_that_no_chain_of_links_joins_meet_over_the_host():
    bridges = {(0, 1): 300.0, (2, 3): 300.0}
    assert ring_bytes_per_s(bridges, [0, 1, 2, 3], 25.0) == 25


def test_a_ring_over_more_devices_than_can_be_searched_has_its_slowest_link():
    chain = {(n, n + 1): 100.0 for n in range(15)}
    assert ring_bytes_per_s(chain, range(16), 25.0) == 100


@pytest.mark.parametrize("tp", [2, 4])
def test_lumi_numbers_its_devices_so_that_tp_has_the_packages_as_they_are(tp):
    order, reasons = place(load_machine("lumi-g"), layout(16, 2, tp=tp, dp_shard=16 // tp))
    assert order == []
    groups = {2: "0-1, 2-3, 4-5, 6-7, the slowest ring 200 GB/s", 4: "0-1-2-3, 4-5-6-7, the slowest ring 100 GB/s"}
    assert groups[tp] in reasons[0]


def test_tp_2_gets_the_pairs_with_the_fastest_links_wherever_they_are():
    machine = renumbered([0, 4, 1, 5, 2, 6, 3, 7])  # packages are 0-4, 1-5, 2-6, 3-7
    order, _ = place(machine, layout(8, tp=2, dp_shard=4))
    assert order == [0, 4, 1, 5, 2, 6, 3, 7]


def test_tp_4_gets_the_two_halves_that_have_rings():
    machine = renumbered([0, 4, 1, 5, 2, 6, 3, 7])  # halves of two packages: 0 4 1 5 and 2 6 3 7
    order, _ = place(machine, layout(8, tp=4, dp_shard=2))
    assert order == [0, 1, 4, 5, 2, 3, 6, 7]


def test_where_all_devices_are_linked_alike_rank_n_drives_device_n():
    for name in ("leonardo-booster", "discoverer-plus", "karolina-gpu"):
        machine = load_machine(name)
        n = machine.device.per_node
        assert place(machine, layout(n, tp=2, dp_shard=n // 2))[0] == []


def test_the_reasons_name_what_each_axis_crosses():
    _, reasons = place(load_machine("leonardo-booster"), layout(4 * 400, 400, tp=4, dp_shard=2, dp_replicate=200))
    assert reasons[0].startswith("tp 4 runs inside a node: ")
    assert reasons[1].startswith("dp_shard 2 runs between nodes of a fabric group: ")
    assert reasons[2].startswith("dp_replicate 200 runs across fabric groups: ")
    assert len(reasons) == 3


def planned(order):
    """As much of a plan as tells a rank its device."""
    return SimpleNamespace(machine=load_machine("lumi-g"), layout=layout(16, 2, device_order=order))


def rank(local_rank, node=0):
    return Ranks(8 * node + local_rank, 16, local_rank, "slurm", "", 0)


@pytest.fixture
def eight_gpus(monkeypatch):
    picked, bound = [], {}
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.set_device", picked.append)
    monkeypatch.setattr(os, "sched_setaffinity", bound.__setitem__)
    return picked, bound


ORDER = [4, 0, 5, 1, 6, 2, 7, 3]


def test_a_rank_drives_the_device_that_the_plan_gives_it(eight_gpus, tmp_path):
    assert [device_of(layout(8, device_order=ORDER), r) for r in range(8)] == ORDER
    assert [pick_device(planned(ORDER), rank(r)).index for r in range(8)] == ORDER
    assert [Here(planned(ORDER), r, r, tmp_path).device.index for r in range(8)] == ORDER
    assert [pick_device(planned([]), rank(r)).index for r in range(8)] == list(range(8))
    assert [device.index for device in eight_gpus[0]] == [*ORDER, *range(8)]


def test_a_rank_moves_to_the_cores_beside_its_device_with_all_of_its_threads(eight_gpus):
    bind_cores(planned(ORDER), rank(0, node=1))
    threads = {int(name) for name in os.listdir("/proc/self/task")}
    assert eight_gpus[1] == {thread: set(range(1, 8)) for thread in threads}  # device 4 has cores 1-7


def test_the_system_really_moves_every_thread_of_a_rank():
    before = os.sched_getaffinity(0)
    core = max(before)
    places = [Place(device=0, cores=str(min(before))), Place(device=1, cores=str(core))]
    machine = load_machine("lumi-g")
    machine = machine.model_copy(update={"topology": machine.topology.model_copy(update={"places": places})})
    plan = SimpleNamespace(machine=machine, layout=layout(2, device_order=[1, 0]))
    threads = [int(name) for name in os.listdir("/proc/self/task")]
    try:
        bind_cores(plan, Ranks(0, 2, 0, "slurm", "", 0))
        assert [os.sched_getaffinity(thread) for thread in threads] == [{core}] * len(threads)
    finally:
        for thread in threads:
            os.sched_setaffinity(thread, before)


def test_a_rank_that_drives_the_device_of_its_number_stays_where_the_launcher_put_it(eight_gpus):
    for order in ([], [0, 2, 1, 3, 4, 5, 6, 7]):
        bind_cores(planned(order), rank(0))
    assert eight_gpus[1] == {}


def test_a_rank_that_sees_only_its_own_gpu_keeps_its_cores_and_says_that_the_order_has_no_effect(
    eight_gpus, monkeypatch, capfd
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert pick_device(planned(ORDER), rank(0)).index == 0
    bind_cores(planned(ORDER), rank(0))
    assert eight_gpus[1] == {}
    assert "the plan gives it device 4; it sees one GPU only" in capfd.readouterr().err


def test_where_the_system_forbids_other_cores_the_first_node_says_so_and_training_goes_on(
    eight_gpus, monkeypatch, capfd
):
    def forbidden(thread, cores):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    bind_cores(planned(ORDER), rank(1))
    assert "[rank 1] the plan gives it device 0; it stays on cores" in capfd.readouterr().err
    bind_cores(planned(ORDER), rank(1, node=1))
    assert capfd.readouterr().err == ""
