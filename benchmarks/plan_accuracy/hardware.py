"""The machine on which a published row was measured: the row's own words, else the vendor's reference node."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from aifactory_train.errors import MachineError
from aifactory_train.machine.facts import Facts
from aifactory_train.machine.machine import Machine, Network
from aifactory_train.strictyaml import Key, read_yaml, validate

HARDWARE = Path(__file__).with_name("hardware.yaml")
# Where parallel degrees are powers of two, 64 of the 72 devices of a rack work.
RACK_DEVICES_USED = 64


class ReferenceNode(Facts):
    """`gpus`, `memory_gb`: which rows it stands for. `nvlink_domain`: devices joined by NVLink beyond a tray."""

    gpus: list[str]
    memory_gb: list[int] = []
    nvlink_domain: int | None = None
    machine: Machine


class Hardware(Facts):
    nodes: list[ReferenceNode]


@cache
def load_hardware(path: Path = HARDWARE) -> Hardware:
    """Raises MachineError with every fault of the file and its line."""
    origins: dict[Key, str] = {}
    data = read_yaml(path, origins, MachineError)
    machines: dict[str, Any] = {}
    for node in data["nodes"]:
        like = node.pop("like", None)
        node["machine"] = _laid_over(machines[like] if like else {}, node["machine"])
        machines[node["machine"]["name"]] = node["machine"]
    return validate(Hardware, data, origins, str(path), MachineError, do="mend the lines named above")


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above`, with what it does not say from `below`; peaks and links are whole."""
    inner = {key: {**below[key], **above[key]} for key in ("device",) if key in below and key in above}
    return below | above | inner


def find_node(gpu: str, memory_gb: int | None) -> ReferenceNode | None:
    """The node for a row's `gpu` and `gpu_mem_gb`; without a size the first of that name. None: no such hardware."""
    named = [node for node in load_hardware().nodes if gpu.casefold() in (g.casefold() for g in node.gpus)]
    for node in named:
        if memory_gb is None or not node.memory_gb or memory_gb in node.memory_gb:
            return node
    return None


def published_network(text: str, devices_per_node: int) -> tuple[int, float] | None:
    """Number of NICs and Gbit/s of each from words such as "4x NDR200 InfiniBand per node"; None: not understood."""
    text = text.rsplit("Compute:", 1)[-1]
    if match := re.search(r"([\d.]+) ?Gb/s per GPU", text):
        return devices_per_node, float(match[1])
    cards = [(int(n), float(rate)) for n, rate in re.findall(r"(\d+)x [^,;:]*?(\d{3})(?!\d)", text)]
    if cards:
        return max(cards, key=lambda card: card[0] * card[1])
    if match := re.search(r"([\d.]+) ?Gb/s per node", text):
        return devices_per_node, float(match[1]) / devices_per_node
    return None


def machine_of(node: ReferenceNode, n_gpus: int, per_node: int | None, inter_node: str) -> tuple[Machine, list[str]]:
    """The reference node with the row's number of devices and network, and what had to be assumed."""
    machine, assumed = node.machine, []
    per_node = per_node or machine.device.per_node
    network = machine.network
    if n_gpus > per_node:
        published = published_network(inter_node, per_node)
        if published is None:
            assumed.append("network of the vendor's reference node")
            published = (network.nics_per_node or per_node, network.nic_gbit_per_s or 0.0)
        network = Network(fabric=network.fabric, nics_per_node=published[0], nic_gbit_per_s=published[1])
    if node.nvlink_domain is not None:
        trays = max(1, min(n_gpus, RACK_DEVICES_USED) // per_node)
        assumed.append("an NVLink rack is one node")
        per_node *= trays
        network = network.model_copy(update={"nics_per_node": (network.nics_per_node or 1) * trays})
    topology = machine.topology
    if topology.links and per_node != machine.device.per_node:
        topology = topology.model_copy(
            update={"links": [link for link in topology.links if max(link.devices) < per_node]}
        )
    device = machine.device.model_copy(update={"per_node": per_node})
    return machine.model_copy(update={"device": device, "network": network, "topology": topology}), assumed
