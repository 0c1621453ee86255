"""The devices of a node by their vendors' tools: what they are, on which PCI address, and how they are linked."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from aifactory_train.machine.machine import Device, Link, Topology
from aifactory_train.machine.probe_host import parse_cpu_list
from aifactory_train.machine.probe_look import Look

_MIB = 1024**2
_GB = 1e9
_NVIDIA_QUERY = [
    "nvidia-smi",
    "--query-gpu=name,memory.total,compute_cap,pci.bus_id,power.limit",
    "--format=csv,noheader,nounits",
]
_ROCM_QUERY = ["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showbus", "--json"]
_AMD_QUERY = ["amd-smi", "static", "--asic", "--bus", "--vram", "--json"]
# NVLink generation and bytes/s of one link in one direction, by compute capability: what NVIDIA's data sheets give
# for P100, V100, A100, H100/H200/GH200 and B200/GB200. nvidia-smi nvlink -s shows the line rate, up to 6 % more.
_NVLINK = {
    "6.0": (1, 20 * _GB),
    "7.0": (2, 25 * _GB),
    "8.0": (3, 25 * _GB),
    "9.0": (4, 25 * _GB),
    "10.0": (5, 50 * _GB),
    "10.3": (5, 50 * _GB),
}
# One xGMI link, one direction: 16 lanes at 25 GT/s on MI200, 32 GT/s on MI300 (AMD's data sheets).
_XGMI = {"MI210": 50 * _GB, "MI250": 50 * _GB, "MI300": 64 * _GB, "MI325": 64 * _GB}
# KFD's weight of one xGMI hop; pairs that are not direct neighbours show a multiple (ROCm/rocm-systems#7372).
_XGMI_HOP_WEIGHT = 15


@dataclass
class Matrix:
    """`nvidia-smi topo -m`: how each GPU reaches the others and the NICs, and the cores and NUMA node beside it."""

    links: dict[tuple[int, int], int] = field(default_factory=dict)  # pair of GPUs -> NVLinks between them
    paths: dict[int, dict[str, str]] = field(default_factory=dict)  # GPU -> NIC -> "PIX"
    cpus: dict[int, list[int]] = field(default_factory=dict)
    numa_nodes: dict[int, int] = field(default_factory=dict)


@dataclass
class Gpus:
    """The devices of this node.

    addresses: on PCI, as /sys writes them, "" where not told.
    numa_nodes: by rocm-smi.
    """

    device: Device
    addresses: list[str]
    topology: Topology = field(default_factory=Topology)
    matrix: Matrix = field(default_factory=Matrix)
    numa_nodes: dict[int, int] = field(default_factory=dict)


def probe_gpus(look: Look) -> Gpus | None:
    """The GPUs that a vendor's tool lists, with the links between them; None where no tool lists any."""
    faults = []
    for command, parse, parse_addresses, probe_links in (
        (_NVIDIA_QUERY, parse_nvidia_smi, parse_nvidia_addresses, _nvidia_links),
        (_ROCM_QUERY, parse_rocm_smi, parse_rocm_addresses, _amd_links),
        (_AMD_QUERY, parse_amd_smi, parse_amd_addresses, _amd_links),
    ):
        answer = look.run(command)
        device = parse(answer.text)
        if device is not None:
            look.saw(command[0], "device")
            gpus = Gpus(device, parse_addresses(answer.text))
            probe_links(look, gpus, answer.text)
            return gpus
        faults.append(answer.fault or f"{command[0]} lists no GPU")
    look.missed("no GPU here: " + ", ".join(faults), "topology")
    return None


def parse_nvidia_smi(text: str) -> Device | None:
    """Output of nvidia-smi --query-gpu=name,memory.total,compute_cap[,pci.bus_id,power.limit] (MiB, W)."""
    rows = _nvidia_rows(text)
    if not rows:
        return None
    memory = [row[1] for row in rows]
    capability = re.fullmatch(r"(\d+)\.\d+", rows[0][2])
    power = rows[0][4] if len(rows[0]) > 4 else ""
    facts: dict[str, Any] = {"kind": "cuda", "name": rows[0][0], "per_node": len(rows)}
    if all(m.isdecimal() for m in memory):  # "[N/A]" where GPU and CPU share one memory
        facts["memory_bytes"] = min(map(int, memory)) * _MIB
    if capability:
        facts["native_bf16"] = int(capability.group(1)) >= 8
    if re.fullmatch(r"\d+\.\d+", power):
        facts["power_w"] = float(power)
    return Device(**facts)


def parse_nvidia_addresses(text: str) -> list[str]:
    """PCI addresses from the same output: "00000000:C1:00.0" -> "0000:c1:00.0", "" where there is none."""
    return [_address(row[3]) if len(row) > 3 else "" for row in _nvidia_rows(text)]


def parse_topo_matrix(text: str) -> Matrix:
    """Output of nvidia-smi topo -m, with tabs as it prints them or with blanks as they are copied."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    header: list[str] = []
    n_beside = 0
    matrix = Matrix()
    names = {f"NIC{i}": name for i, name in re.findall(r"^\s*NIC(\d+):\s*(\S+)\s*$", "\n".join(lines), re.MULTILINE)}
    for line in lines:
        words = line.split()
        if not header:
            if "GPU0" in words and "CPU" in words:
                header = words[: words.index("CPU")]
                n_beside = sum(what in line for what in ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID"))
            continue
        if not words or not re.fullmatch(r"GPU\d+", words[0]):
            continue
        gpu = int(words[0].removeprefix("GPU"))
        cells = [cell.strip() for cell in line.split("\t")][1:] if "\t" in line else words[1:]
        for name, cell in zip(header, cells, strict=False):
            peer = re.fullmatch(r"GPU(\d+)", name)
            n_links = re.fullmatch(r"NV(\d+)", cell)
            if peer and n_links and int(peer.group(1)) > gpu:
                matrix.links[gpu, int(peer.group(1))] = int(n_links.group(1))
            elif not peer:
                matrix.paths.setdefault(gpu, {})[names.get(name, name)] = cell
        beside = cells[len(header) :]
        # Copied with blanks, an empty cell cannot be told from none: believe the row only where it is complete.
        if "\t" in line or len(beside) == n_beside:
            _note_what_is_beside(matrix, gpu, beside)
    return matrix


def parse_nvlink_rates(text: str) -> dict[int, float]:
    """Output of nvidia-smi nvlink -s -> bytes/s of one link in one direction, for each GPU that has an active one."""
    rates: dict[int, float] = {}
    gpu = None
    for line in text.splitlines():
        head = re.match(r"GPU (\d+):", line)
        link = re.match(r"\s+Link \d+:\s+([\d.]+) GB/s", line)
        if head:
            gpu = int(head.group(1))
        elif link and gpu is not None and float(link.group(1)) > 0:
            rates[gpu] = min(rates.get(gpu, float("inf")), float(link.group(1)) * _GB)
    return rates


def parse_rocm_smi(text: str) -> Device | None:
    """Output of rocm-smi --showproductname --showmeminfo vram --json; a card is one device (a GCD on MI250X)."""
    found = _cards(text)
    if not found:
        return None
    names = [str(facts[k]) for facts in found for k in ("Card Series", "Card series", "Card Model") if k in facts]
    memory = [str(facts.get("VRAM Total Memory (B)", "")) for facts in found]
    return _amd_device(names, len(found), [int(m) for m in memory if m.isdecimal()])


def parse_rocm_addresses(text: str) -> list[str]:
    """PCI addresses of the cards, with --showbus in the same command."""
    return [_address(str(facts.get("PCI Bus", ""))) for facts in _cards(text)]


def parse_rocm_topology(text: str) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """Output of rocm-smi --showtopo: (weight of each pair that xGMI joins, NUMA node of each device)."""
    weights: dict[tuple[int, int], int] = {}
    kinds: dict[tuple[int, int], str] = {}
    nodes: dict[int, int] = {}
    section = ""
    for line in text.splitlines():
        title = re.fullmatch(r"=+\s*(.*?)\s*=+", line.strip())
        row = re.match(r"GPU(\d+)\s+(\S.*)", line)
        numa = re.match(r"GPU\[(\d+)\]\s*:\s*\(Topology\) Numa Affinity:\s*(\d+)\s*$", line)
        if title:
            section = title.group(1)
        elif numa:
            nodes[int(numa.group(1))] = int(numa.group(2))
        elif row:
            pairs = [((int(row.group(1)), j), cell) for j, cell in enumerate(row.group(2).split())]
            if section.startswith("Weight"):
                weights |= {pair: int(cell) for pair, cell in pairs if cell.isdecimal() and pair[0] < pair[1]}
            elif section.startswith("Link Type"):
                kinds |= {pair: cell for pair, cell in pairs if pair[0] < pair[1]}
    return {pair: weight for pair, weight in weights.items() if kinds.get(pair) == "XGMI"}, nodes


def parse_amd_smi(text: str) -> Device | None:
    """Output of amd-smi static --asic --bus --vram --json."""
    found = _amd_gpus(text)
    if not found:
        return None
    names = [str(_part(gpu, "asic").get("market_name", "")) for gpu in found]
    sizes = [_part(_part(gpu, "vram"), "size").get("value") for gpu in found]
    memory = [size * _MIB for size in sizes if isinstance(size, int) and size > 0]
    return _amd_device([name for name in names if name not in ("", "N/A")], len(found), memory)


def parse_amd_addresses(text: str) -> list[str]:
    return [_address(str(_part(gpu, "bus").get("bdf", ""))) for gpu in _amd_gpus(text)]


def parse_amd_topology(text: str) -> dict[tuple[int, int], float]:
    """Output of amd-smi topology --json: bytes/s in one direction of each pair that xGMI joins directly.

    The last number of "bandwidth" (MB/s, "50000-200000") is all links of the pair together; pairs that are reached
    through others have "N/A" or "0-0".
    """
    found: dict[tuple[int, int], float] = {}
    for gpu in _amd_gpus(text):
        links = gpu.get("links")
        for link in links if isinstance(links, list) else []:
            if not isinstance(link, dict) or link.get("link_type") != "XGMI":
                continue
            rate = re.fullmatch(r"(?:\d+-)?(\d+)(?: Mb/s)?", str(link.get("bandwidth", "")))
            here, there = gpu.get("gpu"), link.get("gpu")
            if rate and int(rate.group(1)) and isinstance(here, int) and isinstance(there, int) and here < there:
                found[here, there] = int(rate.group(1)) * 1e6
    return found


def build_topology(rates: dict[tuple[int, int], float], n_devices: int, link_kind: str) -> Topology:
    """One rate where every pair has the same, else each pair that has a link."""
    pairs = list(combinations(range(n_devices), 2))
    if set(rates) == set(pairs) and len(set(rates.values())) == 1:
        return Topology(link_kind=link_kind, all_to_all_bytes_per_s=rates[pairs[0]])
    links = [Link(devices=list(pair), bytes_per_s=rate) for pair, rate in sorted(rates.items())]
    return Topology(link_kind=link_kind, links=links)


def _nvidia_links(look: Look, gpus: Gpus, query: str) -> None:
    answer = look.run(["nvidia-smi", "topo", "-m"])
    gpus.matrix = parse_topo_matrix(answer.text)
    if gpus.device.per_node == 1:
        look.missed("one device has no links", "topology.links")
        return
    if not gpus.matrix.links:
        look.missed(answer.fault or "nvidia-smi topo -m shows no NVLink between the devices", "topology.links")
        return
    generation, by_vendor = _NVLINK.get(_nvidia_rows(query)[0][2], (None, None))
    status = look.run(["nvidia-smi", "nvlink", "-s"])
    shown = parse_nvlink_rates(status.text)
    rates = {}
    for pair, n_links in gpus.matrix.links.items():
        known = [r for r in (shown.get(pair[0]), shown.get(pair[1]), by_vendor) if r is not None]
        if known and pair[1] < gpus.device.per_node:
            rates[pair] = n_links * min(known)
    if not rates:
        look.missed(status.fault or "nvidia-smi nvlink -s shows no rate", "topology.links")
        return
    gpus.topology = build_topology(rates, gpus.device.per_node, f"NVLink {generation}" if generation else "NVLink")
    where = "nvidia-smi topo -m"
    where += " and nvlink -s" if shown else ""
    where += f", at most {by_vendor / _GB:g} GB/s for a link" if by_vendor else ""
    _saw_links(look, gpus.topology, where)


def _amd_links(look: Look, gpus: Gpus, query: str) -> None:
    listed = look.run(["rocm-smi", "--showtopo"])
    weights, gpus.numa_nodes = parse_rocm_topology(listed.text)
    if gpus.device.per_node == 1:
        look.missed("one device has no links", "topology.links")
        return
    answer = look.run(["amd-smi", "topology", "--json"])
    rates, where = parse_amd_topology(answer.text), "amd-smi topology --json"
    if not rates:
        per_link = next((rate for name, rate in _XGMI.items() if name in gpus.device.name), None)
        n_links = parse_xgmi_links([look.read(f"/sys/bus/pci/devices/{a}/xgmi_num_links") for a in gpus.addresses])
        if per_link:
            rates = {pair: n * per_link for pair, n in n_links.items()}
            where = f"xgmi_num_links in /sys/bus/pci/devices, {per_link / _GB:g} GB/s for a link"
    if rates:
        gpus.topology = build_topology(rates, gpus.device.per_node, "xGMI")
        _saw_links(look, gpus.topology, where)
        return
    reason = answer.fault or "amd-smi topology --json shows no bandwidth"
    if weights:
        direct = sum(weight == _XGMI_HOP_WEIGHT for weight in weights.values())
        gpus.topology = Topology(link_kind="xGMI")
        look.saw("rocm-smi --showtopo", "topology.link_kind")
        reason = f"rocm-smi --showtopo shows {direct} pairs joined by xGMI directly, not how fast; {reason}"
    look.missed(reason, "topology.links")


def parse_xgmi_links(rows: list[str]) -> dict[tuple[int, int], int]:
    """xgmi_num_links of each device ("00 04 01 00", hexadecimal) -> links of each pair that has any.

    Columns are in the driver's order: empty unless the rows fit a matrix with zeros on its diagonal, both halves alike.
    """
    cells = [row.split() for row in rows]
    n = len(cells)
    if not all(len(row) == n and all(re.fullmatch(r"[0-9a-f]{1,2}", c) for c in row) for row in cells):
        return {}
    numbers = [[int(c, 16) for c in row] for row in cells]
    if any(numbers[i][i] or numbers[i][j] != numbers[j][i] for i in range(n) for j in range(n)):
        return {}
    return {(i, j): numbers[i][j] for i, j in combinations(range(n), 2) if numbers[i][j]}


def _saw_links(look: Look, topology: Topology, where: str) -> None:
    look.saw(where, "topology.link_kind", "topology.links" if topology.links else "topology.all_to_all_bytes_per_s")


def _note_what_is_beside(matrix: Matrix, gpu: int, beside: list[str]) -> None:
    cpus = parse_cpu_list(beside[0]) if beside else []
    numa = re.match(r"\d+", beside[1]) if len(beside) > 1 else None  # "0,5-11" on Grace: the first one has the cores
    if cpus:
        matrix.cpus[gpu] = cpus
    if numa:
        matrix.numa_nodes[gpu] = int(numa.group())


def _nvidia_rows(text: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) >= 3]
    return [row for row in rows if row[1].isdecimal() or re.fullmatch(r"\d+\.\d+", row[2])]


def _amd_device(names: list[str], count: int, memory_bytes: list[int]) -> Device:
    facts: dict[str, Any] = {"kind": "rocm", "name": names[0] if names else "AMD GPU", "per_node": count}
    if len(memory_bytes) == count:
        facts["memory_bytes"] = min(memory_bytes)
    # Every card that ROCm 5.7 and newer supports for training (CDNA) multiplies bf16 in hardware.
    if any("MI" in name for name in names):
        facts["native_bf16"] = True
    return Device(**facts)


def _cards(text: str) -> list[dict[str, Any]]:
    try:
        cards = json.loads(text)
    except json.JSONDecodeError:
        return []
    if not isinstance(cards, dict):
        return []
    return [facts for name, facts in cards.items() if name.startswith("card") and isinstance(facts, dict)]


def _amd_gpus(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return []
    if isinstance(found, dict):  # ROCm 7 wraps the list
        found = found.get("gpu_data")
    return [g for g in found if isinstance(g, dict) and "gpu" in g] if isinstance(found, list) else []


def _part(facts: dict[str, Any], key: str) -> dict[str, Any]:
    """What stands below a key, {} where it is no object: the tools write "N/A" for what they do not know."""
    found = facts.get(key)
    return found if isinstance(found, dict) else {}


def _address(text: str) -> str:
    found = re.fullmatch(r"(?:[0-9a-f]{4})?([0-9a-f]{4}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", text.strip().lower())
    return f"{found.group(1)}:{found.group(2)}" if found else ""
