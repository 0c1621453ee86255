"""The lines of `probe --against`: what differs, agrees, is new, or could not be seen."""

from typing import Any

from aifactory_train.machine.compare import render_differences
from aifactory_train.machine.machine import Device, Host, Link, Machine, Measured, Network, Nic, Place, Topology
from aifactory_train.machine.site import Partition, Slurm

GIB = 1024**3


def a_machine(name: str = "lab", **facts: Any) -> Machine:
    device = facts.pop("device", Device(kind="cuda", name="NVIDIA H100", per_node=4, memory_bytes=80 * GIB))
    return Machine(name=name, device=device, host=facts.pop("host", Host(cores=64)), **facts)


def lines(seen: Machine, expected: Machine) -> list[str]:
    return render_differences(seen, expected).splitlines()[1:]


def test_equal_machines_only_agree():
    assert lines(a_machine("here"), a_machine()) == ["0 differ, 5 agree, 0 not seen"]


def test_a_difference_names_both_values_and_the_file():
    found = lines(a_machine(host=Host(cores=56)), a_machine("big"))
    assert found == ["host.cores: here 56, big says 64", "1 differ, 4 agree, 0 not seen"]


def test_quantities_carry_their_units():
    def machine(rate: float, watts: float, hours: float, gbit: float) -> Machine:
        device = Device(kind="cuda", name="X", per_node=4, memory_bytes_per_s=rate, power_w=watts)
        slurm = Slurm(partitions=[Partition(name="gpu", max_time_h=hours)])
        return a_machine(device=device, slurm=slurm, network=Network(nic_gbit_per_s=gbit))

    found = lines(machine(3.35e12, 700.0, 0.5, 200.0), machine(2e12, 560.0, 48.0, 400.0))
    assert found[:-1] == [
        "device.memory_bytes_per_s: here 3.35 TB/s, lab says 2.00 TB/s",
        "device.power_w: here 700 W, lab says 560 W",
        "network.nic_gbit_per_s: here 200 Gbit/s, lab says 400 Gbit/s",
        "slurm.partitions.gpu.max_time_h: here 30 min, lab says 48 h",
    ]


def test_memory_is_equal_within_three_percent_and_the_first_line_says_so():
    expected = a_machine(host=Host(cores=64, memory_bytes=512 * GIB))
    near = a_machine(host=Host(cores=64, memory_bytes=503 * GIB))
    far = a_machine(host=Host(cores=64, memory_bytes=480 * GIB))
    assert lines(near, expected) == ["0 differ, 6 agree, 0 not seen"]
    assert lines(far, expected)[0] == "host.memory_bytes: here 480 GiB, lab says 512 GiB"
    assert "memory is equal within 3 %" in render_differences(near, expected).splitlines()[0]


def test_values_that_print_alike_are_shown_in_full():
    seen = a_machine(network=Network(nic_gbit_per_s=200.01))
    found = lines(seen, a_machine(network=Network(nic_gbit_per_s=200.0)))
    assert found[0] == "network.nic_gbit_per_s: here 200.01, lab says 200.0"


def test_what_was_not_seen_stands_below_its_reason():
    expected = a_machine(
        nodes=9,
        topology=Topology(all_to_all_bytes_per_s=150e9, places=[Place(device=0, cores="0-7", nic="mlx5_0")]),
        network=Network(nics=[Nic(name="mlx5_0", interface="ib0")]),
    )
    unseen = {"network.nics": "no /sys/class/infiniband here", "topology.places.*.nic": "no NIC is seen"}
    unseen |= {"topology": "no GPU here"}
    assert lines(a_machine(unseen=unseen), expected) == [
        "not seen, the probe does not look at this:",
        "  nodes: lab says 9",
        "not seen, no GPU here:",
        "  topology.places.0.cores: lab says 0-7",
        "  topology.all_to_all_bytes_per_s: lab says 150 GB/s",
        "not seen, no NIC is seen:",
        "  topology.places.0.nic: lab says mlx5_0",
        "not seen, no /sys/class/infiniband here:",
        "  network.nics.mlx5_0: lab lists it",
        "0 differ, 5 agree, 5 not seen",
    ]


def test_what_the_file_leaves_open_could_be_added():
    seen = a_machine(host=Host(cores=64, sockets=2), network=Network(nics=[Nic(name="mlx5_0", interface="ib0")]))
    assert lines(seen, a_machine()) == [
        "host.sockets: here 2, not in lab; new: could be added",
        "network.nics.mlx5_0: here present, not in lab; new: could be added",
        "0 differ, 5 agree, 0 not seen",
    ]


def test_elements_of_a_list_are_compared_by_their_names():
    def machine(**max_nodes: int) -> Machine:
        return a_machine(slurm=Slurm(partitions=[Partition(name=n, max_nodes=m) for n, m in max_nodes.items()]))

    assert lines(machine(gpu=8, debug=2, new=1), machine(debug=4, gpu=8, gone=1)) == [
        "slurm.partitions.debug.max_nodes: here 2, lab says 4",
        "slurm.partitions.gone: not here, lab lists it",
        "slurm.partitions.new: here present, not in lab; new: could be added",
        "2 differ, 8 agree, 0 not seen",
    ]


def test_links_are_compared_as_one_rate_or_pair_by_pair():
    uniform = a_machine(topology=Topology(all_to_all_bytes_per_s=100e9))
    slower = a_machine(topology=Topology(all_to_all_bytes_per_s=50e9))
    assert lines(slower, uniform)[0] == "topology.all_to_all_bytes_per_s: here 50.0 GB/s, lab says 100 GB/s"
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    listed = a_machine(topology=Topology(links=[Link(devices=[b, a], bytes_per_s=100e9) for a, b in pairs]))
    assert lines(listed, uniform) == ["0 differ, 6 agree, 0 not seen"]
    broken = a_machine(topology=Topology(links=[Link(devices=list(p), bytes_per_s=100e9) for p in pairs[1:]]))
    assert lines(broken, uniform) == [
        "topology.links.0-1: not here, lab says 100 GB/s",
        "1 differ, 10 agree, 0 not seen",
    ]


def test_near_cores_agree_where_those_of_the_file_are_among_those_seen():
    def machine(cores: str) -> Machine:
        return a_machine(topology=Topology(places=[Place(device=0, cores=cores, numa_node=3)]))

    assert lines(machine("48-63"), machine("49-55")) == ["0 differ, 7 agree, 0 not seen"]
    assert lines(machine("0-15"), machine("49-55"))[0] == "topology.places.0.cores: here 0-15, lab says 49-55"


def test_names_agree_where_one_has_all_words_of_the_other():
    seen = a_machine(host=Host(cores=64, cpu="Intel(R) Xeon(R) Platinum 8358 CPU @ 2.60GHz"))
    assert lines(seen, a_machine(host=Host(cores=64, cpu="Intel Xeon Platinum 8358")))[-1].startswith("0 differ, 6")
    other = lines(seen, a_machine(host=Host(cores=64, cpu="Intel Xeon Platinum 8460Y")))
    assert other[0].startswith("host.cpu: here Intel(R) Xeon(R) Platinum 8358")


def test_lists_of_hosts_agree_however_they_are_written():
    partitions = [Partition(name="gpu")]
    short = a_machine(slurm=Slurm(partitions=partitions, node_names="n[01-03]"))
    long = a_machine(slurm=Slurm(partitions=partitions, node_names="n01,n[02,03]"))
    other = a_machine(slurm=Slurm(partitions=partitions, node_names="n[01-04]"))
    assert lines(long, short)[-1].startswith("0 differ") and lines(other, short)[-1].startswith("1 differ")


def test_what_a_machine_is_called_how_jobs_ask_for_it_and_what_was_measured_is_not_compared():
    slurm = Slurm(partitions=[Partition(name="gpu")], cpu_bind="none", memory="0", account_hint="ask")
    expected = a_machine(title="Lab", slurm=slurm, measured=Measured(memory_bytes_per_s=1e12))
    seen = a_machine("local", slurm=Slurm(partitions=[Partition(name="gpu")], quirks=["has features"]))
    assert lines(seen, expected) == ["0 differ, 6 agree, 0 not seen"]
