"""What is near each device: cores, NUMA node and NIC, by the vendor's tool and by where things hang in /sys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aifactory_train.machine.machine import Place
from aifactory_train.machine.probe_gpus import Gpus
from aifactory_train.machine.probe_host import first_threads, numa_nodes, parse_cpu_list, render_cpu_list
from aifactory_train.machine.probe_look import Look

_PCI = "/sys/bus/pci/devices"
# How nvidia-smi topo -m calls a way between GPU and NIC, shortest first; SYS (through another socket) is not near.
_NEAR = ("PIX", "PXB", "PHB", "NODE")


def probe_places(look: Look, gpus: Gpus, nics: dict[str, Path]) -> list[Place]:
    """One place for each device, with what could be seen; `nics`: name -> folder of the card in /sys."""
    near = nics_by_matrix(gpus, list(nics))
    nic_where = "nvidia-smi topo -m"
    if not near:
        near = nics_by_bus([look.path(f"{_PCI}/{a}").resolve() if a else None for a in gpus.addresses], nics)
        nic_where = f"{_PCI}, the longest common way"
    shared = _share_out(near)
    places, unseen = [], {"cores", "numa_node", "nic"}
    for device, address in enumerate(gpus.addresses):
        facts: dict[str, Any] = {}
        numa = look.read(f"{_PCI}/{address}/numa_node") if address else ""
        node = int(numa) if numa.isdecimal() else gpus.matrix.numa_nodes.get(device, gpus.numa_nodes.get(device))
        cpus = parse_cpu_list(look.read(f"{_PCI}/{address}/local_cpulist")) if address else []
        cpus = cpus or gpus.matrix.cpus.get(device, []) or numa_nodes(look).get(-1 if node is None else node, [])
        usable = sorted(set(first_threads(look, cpus)) & set(first_threads(look, look.cpus)))
        if usable:
            facts["cores"] = render_cpu_list(usable)
        if node is not None:
            facts["numa_node"] = node
        if device in shared:
            facts["nic"] = shared[device]
        unseen -= set(facts)
        places.append(Place(device=device, **facts))
    _note(look, unseen, nic_where, bool(nics))
    return places if len(unseen) < 3 else []


def nics_by_matrix(gpus: Gpus, nics: list[str]) -> dict[int, list[str]]:
    """Nearest NICs of each device by `nvidia-smi topo -m`; none where all are behind another socket."""
    found = {}
    for gpu, ways in gpus.matrix.paths.items():
        by_way = {way: [nic for nic in nics if ways.get(nic) == way] for way in _NEAR}
        nearest = next((those for those in by_way.values() if those), [])
        if nearest:
            found[gpu] = nearest
    return found


def nics_by_bus(devices: list[Path | None], nics: dict[str, Path]) -> dict[int, list[str]]:
    """Nearest NICs of each device: those whose folder in /sys shares the most steps, a host bridge at least."""
    found = {}
    for i, device in enumerate(devices):
        common = {name: _common_steps(device, card) for name, card in nics.items()} if device else {}
        most = max(common.values(), default=0)
        if most > 0:
            found[i] = [name for name, steps in common.items() if steps == most]
    return found


def _common_steps(device: Path, card: Path) -> int:
    ways = [path.parts[path.parts.index("devices") + 1 :] if "devices" in path.parts else () for path in (device, card)]
    if not (ways[0] and ways[1] and ways[0][0].startswith("pci")):
        return 0
    steps = 0
    for a, b in zip(*ways, strict=False):
        if a != b:
            break
        steps += 1
    return steps


def _share_out(near: dict[int, list[str]]) -> dict[int, str]:
    """One NIC for each device: devices with the same nearest NICs take them in turn."""
    turns: dict[tuple[str, ...], int] = {}
    shared = {}
    for device, nics in sorted(near.items()):
        turn = turns.get(tuple(nics), 0)
        shared[device] = nics[turn % len(nics)]
        turns[tuple(nics)] = turn + 1
    return shared


def _note(look: Look, unseen: set[str], nic_where: str, has_nics: bool) -> None:
    where = [f"{_PCI}/*/{{local_cpulist,numa_node}}, else the vendor's tool"] if {"cores", "numa_node"} - unseen else []
    where += [f"NIC by {nic_where}"] if "nic" not in unseen else []
    if where:
        look.saw("; ".join(where), "topology.places")
    reasons = {
        "cores": f"neither {_PCI}/*/local_cpulist nor the vendor's tool tells, or none of those is ours to use",
        "numa_node": f"neither {_PCI}/*/numa_node nor the vendor's tool tells",
        "nic": "no NIC hangs on the host bridge of a device" if has_nics else "no NIC is seen",
    }
    for fact in sorted(unseen):
        look.missed(reasons[fact], f"topology.places.*.{fact}")
