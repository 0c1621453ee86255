"""What follows from a machine's facts by plain arithmetic: rates of pairs, who shares a NIC, what a job may ask for."""

from __future__ import annotations

from collections.abc import Sequence

from aifactory_train.machine.machine import Machine
from aifactory_train.machine.site import limits_of


def link_rates(machine: Machine) -> dict[tuple[int, int], float]:
    """Bytes per second in one direction of each pair (a, b), a < b, that is linked directly.

    Empty where nobody published the links; a pair that is missing beside others has no direct link.
    """
    rates: dict[tuple[int, int], float] = {}
    everywhere = machine.topology.all_to_all_bytes_per_s
    if everywhere is not None:
        n = machine.device.per_node
        rates = {(a, b): everywhere for a in range(n) for b in range(a + 1, n)}
    for link in machine.topology.links:
        a, b = sorted(link.devices)
        rates[a, b] = link.bytes_per_s
    return rates


def linked_alike(machine: Machine) -> bool:
    """Whether every pair of devices has a direct link, and all of one rate."""
    rates, n = link_rates(machine), machine.device.per_node
    return n > 1 and len(rates) == n * (n - 1) // 2 and len(set(rates.values())) == 1


def devices_of_nics(machine: Machine) -> dict[str, list[int]]:
    """Every NIC that has a name, with the devices that are near it: none where nobody says."""
    found: dict[str, list[int]] = {nic.name: [] for nic in machine.network.nics}
    for place in machine.topology.places:
        if place.nic is not None:
            found.setdefault(place.nic, []).append(place.device)
    return found


def network_bytes_per_s(machine: Machine) -> float | None:
    """Of a whole node between nodes, one direction: the NICs' rates summed."""
    network = machine.network
    if network.nics_per_node is None or network.nic_gbit_per_s is None:
        return None
    return network.nics_per_node * network.nic_gbit_per_s * 1e9 / 8


def network_bytes_per_s_of_device(machine: Machine) -> float | None:
    """The node's share for each of its devices."""
    total = network_bytes_per_s(machine)
    return None if total is None else total / machine.device.per_node


def reserved_cores_of(machine: Machine) -> dict[int, list[int]]:
    """Device -> reserved cores that lie nearest to its own cores; empty where its cores are not known.

    A reserved core between two devices belongs to the one above: systems take the first core of a group.
    """
    near = {p.device: p.core_list() for p in machine.topology.places if p.cores}
    found: dict[int, list[int]] = {device: [] for device in near}
    for core in machine.host.reserved_cores if near else []:
        device = min(near, key=lambda d: min((abs(core - c), core > c) for c in near[d]))
        found[device].append(core)
    return found


def job_limits(machine: Machine) -> tuple[int | None, float | None]:
    """(nodes, hours) of one job in the default partition; what the default QoS says wins."""
    if machine.slurm is None:
        return None, None
    slurm = machine.slurm
    limits = limits_of(slurm.partition, next((q for q in slurm.qos if q.name == slurm.default_qos), None))
    return limits.max_nodes, limits.max_time_h


def unknown_facts(machine: Machine) -> list[str]:
    """Keys of facts that a user would look for and the machine does not know, in the order of the file."""
    device, host, topology, network = machine.device, machine.host, machine.topology, machine.network
    places = topology.places
    facts: dict[str, object] = {
        "device.memory_bytes": device.memory_bytes,
        "device.memory_bytes_per_s": device.memory_bytes_per_s,
        "device.peak_flops_per_s.bf16": device.peak_flops_per_s.bf16,
        "device.native_bf16": device.native_bf16,
        "device.power_w": device.power_w,
        "host.memory_bytes": host.memory_bytes,
        "host.architecture": host.architecture,
        "host.cpu": host.cpu,
        "host.numa_nodes": host.numa_nodes,
    }
    if device.kind != "cpu":
        facts |= {
            "topology.host_bytes_per_s": topology.host_bytes_per_s,
            "topology.places.cores": _all(machine, [p.cores for p in places]),
            "topology.places.numa_node": _all(machine, [p.numa_node for p in places]),
        }
    if device.per_node > 1:
        facts["topology.links"] = link_rates(machine) or None
    if machine.slurm is not None:
        slurm, (nodes, hours) = machine.slurm, job_limits(machine)
        facts |= {
            "nodes": machine.nodes,
            "topology.places.nic": _all(machine, [p.nic for p in places]),
            "network.fabric": network.fabric,
            "network.nics_per_node": network.nics_per_node,
            "network.nic_gbit_per_s": network.nic_gbit_per_s,
            "network.nics": network.nics or None,
            "slurm.partitions.max_nodes": nodes,
            "slurm.partitions.max_time_h": hours,
            "slurm.node_names": slurm.node_names,
            "slurm.account_required": slurm.account_required,
            "slurm.qos_required": slurm.qos_required,
            "slurm.requeues_after_node_failure": slurm.requeues_after_node_failure,
            "internet.login": machine.internet.login,
            "internet.compute": machine.internet.compute,
            "accounting": machine.accounting,
        }
    return [key for key, value in facts.items() if value is None]


def _all(machine: Machine, values: Sequence[object]) -> bool | None:
    """True where each device has its value, None where one is missing."""
    complete = len(values) == machine.device.per_node and all(v is not None for v in values)
    return complete or None
