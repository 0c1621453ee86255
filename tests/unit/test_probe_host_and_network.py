"""Trees of /proc and /sys as nodes show them, and what the probe makes of them."""

import os
from pathlib import Path

from aifactory_train.machine.probe import probe
from aifactory_train.machine.probe_gpus import Gpus, Matrix, parse_nvidia_smi
from aifactory_train.machine.probe_host import parse_cpu_list, probe_host, render_cpu_list
from aifactory_train.machine.probe_look import Answer, Look
from aifactory_train.machine.probe_network import parse_rate_gbit_per_s, probe_network
from aifactory_train.machine.probe_places import nics_by_bus, nics_by_matrix, probe_places

MIB = 1024**2


def a_look(root: Path, cpus: list[int], machine: str = "x86_64", query: str = "") -> Look:
    uname = os.uname_result(("Linux", "n1", "5.14", "#1", machine))
    return Look(root, lambda command: Answer(query if "--query" in command[1] else "", "is not there"), cpus, uname)


def write(root: Path, files: dict[str, object]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")


def add_cpus(root: Path, n_cores: int, sockets: int, smt: int = 2) -> None:
    for cpu in range(n_cores * smt):
        core, folder = cpu % n_cores, f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = ",".join(str(core + n_cores * k) for k in range(smt))
        write(root, {f"{folder}/thread_siblings_list": siblings})
        write(root, {f"{folder}/physical_package_id": core * sockets // n_cores})


def test_a_core_with_two_threads_counts_once_and_cores_that_are_not_ours_do_not_count(tmp_path):
    add_cpus(tmp_path, n_cores=64, sockets=2)
    write(tmp_path, {"sys/devices/system/node/node0/cpulist": "0-31,64-95"})
    write(tmp_path, {"sys/devices/system/node/node1/cpulist": "32-63,96-127"})
    write(tmp_path, {"proc/meminfo": "MemTotal:   1024 kB", "proc/cpuinfo": "model name\t: AMD EPYC 7763"})
    ours = [cpu for cpu in range(128) if cpu % 8]  # core 0, 8, ... kept by the site
    look = a_look(tmp_path, ours)
    host = probe_host(look, devices_have_memory=False)
    assert (host.cores, host.sockets, host.threads_per_core, host.numa_nodes) == (56, 2, 2, 2)
    assert (host.memory_bytes, host.cpu, host.architecture) == (MIB, "AMD EPYC 7763", "x86_64")
    assert not look.unseen and {s.by for s in look.sources} == {"probed"}


def test_memory_of_grace_hopper_gpus_is_not_counted_to_the_host(tmp_path):
    add_cpus(tmp_path, n_cores=4, sockets=2, smt=1)
    for node, cpulist in enumerate(["0-1", "2-3", "", ""]):
        write(tmp_path, {f"sys/devices/system/node/node{node}/cpulist": cpulist})
        write(tmp_path, {f"sys/devices/system/node/node{node}/meminfo": f"Node {node} MemTotal:  {1000 + node} kB"})
    write(tmp_path, {"proc/meminfo": "MemTotal:   4006 kB"})
    look = a_look(tmp_path, [0, 1, 2, 3], "aarch64")
    host = probe_host(look, devices_have_memory=True)
    assert host.memory_bytes == 2001 * 1024 and host.numa_nodes == 2 and host.architecture == "aarch64"
    assert probe_host(a_look(tmp_path, [0]), devices_have_memory=False).memory_bytes == 4006 * 1024


def test_what_a_bare_system_does_not_tell_is_listed_with_the_reason(tmp_path):
    machine = probe(a_look(tmp_path, [0, 1], "riscv64"), with_slurm=False)
    assert machine.host.cores == 2 and machine.host.sockets is None and machine.device.kind == "cpu"
    assert machine.unseen["host.architecture"] == "not told by uname"
    assert "/sys/devices/system/node" in machine.unseen["host.numa_nodes"]
    assert machine.unseen["network.nics"] == (
        "no /sys/class/infiniband here, and no interface in /sys/class/net tells its speed"
    )
    assert set(machine.unseen) >= {"topology", "host.memory_bytes", "host.cpu", "host.sockets"}


def test_lists_of_cpus_are_read_and_written_as_the_kernel_does():
    assert parse_cpu_list("0-2,8") == [0, 1, 2, 8] and render_cpu_list([8, 1, 0, 2]) == "0-2,8"
    assert parse_cpu_list("") == parse_cpu_list("N/A") == parse_cpu_list("0-") == []


def add_card(root: Path, name: str, bus: str, rate: str, state: str = "4: ACTIVE", layer: str = "InfiniBand") -> None:
    device = root / "sys/devices" / bus
    device.mkdir(parents=True, exist_ok=True)
    card = f"sys/class/infiniband/{name}"
    write(root, {f"{card}/ports/1/rate": rate, f"{card}/ports/1/state": state, f"{card}/ports/1/link_layer": layer})
    (root / card / "device").symlink_to(device)


def test_only_active_infiniband_ports_of_the_fastest_kind_are_nics(tmp_path):
    add_card(tmp_path, "mlx5_0", "pci0000:10/0000:11:00.0", "200 Gb/sec (4X HDR)")
    add_card(tmp_path, "mlx5_1", "pci0000:40/0000:41:00.0", "100 Gb/sec (4X EDR)")
    add_card(tmp_path, "mlx5_2", "pci0000:80/0000:81:00.0", "400 Gb/sec (4X NDR)", layer="Ethernet")
    add_card(tmp_path, "mlx5_3", "pci0000:c0/0000:c1:00.0", "200 Gb/sec (4X HDR)", state="1: DOWN")
    add_card(tmp_path, "mlx5_10", "pci0000:c0/0000:c2:00.0", "200 Gb/sec (4X HDR)")
    (tmp_path / "sys/devices/pci0000:10/0000:11:00.0/net/ib0").mkdir(parents=True)
    look = a_look(tmp_path, [0])
    network, _ = probe_network(look)
    assert [(nic.name, nic.interface) for nic in network.nics] == [("mlx5_0", "ib0"), ("mlx5_10", None)]
    assert (network.fabric, network.nics_per_node, network.nic_gbit_per_s) == ("InfiniBand", 2, 200.0)
    assert not look.unseen and look.sources[0].source == "/sys/class/infiniband"


def add_interface(root: Path, name: str, speed: int, bus: str | None, state: str = "up") -> None:
    write(root, {f"sys/class/net/{name}/speed": speed, f"sys/class/net/{name}/operstate": state})
    if bus:
        (root / "sys/devices" / bus).mkdir(parents=True, exist_ok=True)
        (root / f"sys/class/net/{name}/device").symlink_to(root / "sys/devices" / bus)


def test_slingshot_interfaces_are_nics_and_those_of_the_operator_are_not(tmp_path):
    for i in range(4):
        add_interface(tmp_path, f"hsn{i}", 200000, f"pci0000:c{i}/0000:c{i}:00.0")
    add_interface(tmp_path, "nmn0", 400000, "pci0000:20/0000:21:00.0")
    add_interface(tmp_path, "lo", -1, None)
    network, _ = probe_network(a_look(tmp_path, [0]))
    assert [nic.name for nic in network.nics] == ["hsn0", "hsn1", "hsn2", "hsn3"]
    assert (network.fabric, network.nic_gbit_per_s) == ("Slingshot", 200.0)


def test_interfaces_that_are_down_virtual_or_tell_no_speed_are_no_nics(tmp_path):
    add_interface(tmp_path, "eth0", 100000, "pci0000:10/0000:11:00.0", state="down")
    add_interface(tmp_path, "bond0", 100000, None)
    add_interface(tmp_path, "eth1", -1, "pci0000:10/0000:12:00.0")
    look = a_look(tmp_path, [0])
    assert probe_network(look)[0].nics == [] and "network.nics" in look.unseen
    assert parse_rate_gbit_per_s("200 Gb/sec (4X HDR)") == 200.0 and parse_rate_gbit_per_s("garbage") is None


def test_devices_share_the_nearest_nics_of_the_matrix_in_turn_and_far_ones_are_left_out():
    device = parse_nvidia_smi("H100, 81559, 9.0\n" * 4)
    ways = {"a": {"m0": "PXB", "m1": "PXB", "m2": "SYS"}, "b": {"m0": "SYS", "m1": "SYS", "m2": "SYS"}}
    gpus = Gpus(device, [""] * 4, matrix=Matrix(paths={0: ways["a"], 1: ways["a"], 2: ways["b"]}))
    assert nics_by_matrix(gpus, ["m0", "m1", "m2"]) == {0: ["m0", "m1"], 1: ["m0", "m1"]}
    assert nics_by_matrix(gpus, ["m2"]) == {}
    look = Look(Path("/nowhere"), cpus=[0])
    places = probe_places(look, gpus, {"m0": Path("/x"), "m1": Path("/y"), "m2": Path("/z")})
    assert [p.nic for p in places] == ["m0", "m1", None, None]


def test_places_come_from_where_devices_and_nics_hang_on_the_bus(tmp_path):
    add_cpus(tmp_path, n_cores=8, sockets=2)
    buses = ["pci0000:10/0000:10:01.0/0000:12:00.0", "pci0000:80/0000:80:01.0/0000:82:00.0"]
    for i, bus in enumerate(buses):
        cpulist = ["0-3,8-11", "4-7,12-15"][i]
        write(tmp_path, {f"sys/devices/{bus}/local_cpulist": cpulist, f"sys/devices/{bus}/numa_node": i})
        (tmp_path / "sys/bus/pci/devices").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/bus/pci/devices" / bus.rpartition("/")[2]).symlink_to(tmp_path / "sys/devices" / bus)
    add_card(tmp_path, "mlx5_0", "pci0000:10/0000:10:01.0/0000:11:00.0", "200 Gb/sec (4X HDR)")
    add_card(tmp_path, "mlx5_1", "pci0000:10/0000:13:00.0", "200 Gb/sec (4X HDR)")
    query = "H100, 81559, 9.0, 00000000:12:00.0, 700.00\nH100, 81559, 9.0, 00000000:82:00.0, 700.00\n"
    machine = probe(a_look(tmp_path, [1, 2, 3, 4, 5, 9, 10, 11], query=query), with_slurm=False)
    first, second = machine.topology.places
    assert (first.cores, first.numa_node, first.nic) == ("1-3", 0, "mlx5_0")
    assert (second.cores, second.numa_node, second.nic) == ("4-5", 1, None)
    assert "longest common way" in machine.source_of("topology.places.0.nic").source


def test_devices_that_share_no_host_bridge_are_not_near():
    card = Path("/sys/devices/platform/a/0000:01:00.0")
    assert nics_by_bus([Path("/sys/devices/platform/b/0000:02:00.0"), None, Path("/gone")], {"eth0": card}) == {}
    card = Path("/sys/devices/pci0000:10/0000:11:00.0")
    assert nics_by_bus([Path("/sys/devices/pci0000:10/0000:12:00.0")], {"eth0": card}) == {0: ["eth0"]}


def test_a_numa_node_that_the_kernel_does_not_know_is_left_out(tmp_path):
    folder = "sys/bus/pci/devices/0000:12:00.0"
    write(tmp_path, {f"{folder}/numa_node": -1, f"{folder}/local_cpulist": "0-1"})
    machine = probe(a_look(tmp_path, [0, 1], query="H100, 81559, 9.0, 00000000:12:00.0, 700.00\n"), with_slurm=False)
    assert machine.topology.places[0].numa_node is None and machine.topology.places[0].cores == "0-1"
    assert "topology.places.*.numa_node" in machine.unseen
