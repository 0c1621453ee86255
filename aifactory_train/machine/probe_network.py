"""The NICs of a node: InfiniBand and RoCE by their ports, Slingshot and other Ethernet by their interfaces."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.machine.machine import Network, Nic
from aifactory_train.machine.probe_look import Look

_INFINIBAND = "/sys/class/infiniband"
_NET = "/sys/class/net"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Port:
    """An active port; `device` is where its card hangs in /sys, `fabric` "InfiniBand", "Slingshot" or "Ethernet"."""

    name: str
    interface: str | None
    gbit_per_s: float
    fabric: str
    device: Path


def probe_network(look: Look) -> tuple[Network, dict[str, Path]]:
    """The network, and for each NIC in it the folder of its card in /sys.

    Of all active ports those count that ranks would use: of the best kind that is there, and the fastest of it, since
    a slower card beside them is for storage or for the operator.
    """
    ports, where = infiniband_ports(look), _INFINIBAND
    if not ports:
        reason = f"no active port in {_INFINIBAND}" if look.children(_INFINIBAND) else f"no {_INFINIBAND} here"
        ports, where = ethernet_ports(look), _NET
        if not ports:
            reason += f", and no interface in {_NET} tells its speed"
            look.missed(reason, "network.nics", "network.nics_per_node", "network.nic_gbit_per_s", "network.fabric")
            return Network(), {}
    best = min((p.fabric for p in ports), key=["InfiniBand", "Slingshot", "Ethernet"].index)
    fastest = max(p.gbit_per_s for p in ports if p.fabric == best)
    chosen = [p for p in ports if p.fabric == best and p.gbit_per_s == fastest]
    nics = [Nic(**({"name": p.name} | ({"interface": p.interface} if p.interface else {}))) for p in chosen]
    look.saw(where, "network.nics", "network.nics_per_node", "network.nic_gbit_per_s", "network.fabric")
    network = Network(fabric=best, nics_per_node=len(nics), nic_gbit_per_s=fastest, nics=nics)
    return network, {p.name: p.device for p in chosen}


def infiniband_ports(look: Look) -> list[Port]:
    """Active ports of /sys/class/infiniband; its first active port stands for a card."""
    found = []
    for card in look.children(_INFINIBAND):
        folder = f"{_INFINIBAND}/{card.name}"
        for port in look.children(f"{folder}/ports"):
            facts = {name: look.read(f"{folder}/ports/{port.name}/{name}") for name in ("state", "rate", "link_layer")}
            rate = parse_rate_gbit_per_s(facts["rate"])
            if rate is None or not facts["state"].endswith("ACTIVE") or not _NAME.fullmatch(card.name):
                continue
            interfaces = [i.name for i in look.children(f"{folder}/device/net") if _NAME.fullmatch(i.name)]
            interface = interfaces[0] if interfaces else None
            fabric = "InfiniBand" if facts["link_layer"] == "InfiniBand" else _of_interface(interface)
            found.append(Port(card.name, interface, rate, fabric, (card / "device").resolve()))
            break
    return found


def ethernet_ports(look: Look) -> list[Port]:
    """Interfaces of /sys/class/net that are cards, are up and tell their speed; those of Slingshot are hsn0, hsn1."""
    found = []
    for interface in look.children(_NET):
        speed = look.read(f"{_NET}/{interface.name}/speed")  # Mbit/s; -1 where the driver does not know
        up = look.read(f"{_NET}/{interface.name}/operstate") == "up"
        card = interface / "device"
        if up and card.exists() and speed.isdecimal() and int(speed) > 0 and _NAME.fullmatch(interface.name):
            facts: dict[str, Any] = {"fabric": _of_interface(interface.name), "device": card.resolve()}
            found.append(Port(interface.name, interface.name, int(speed) / 1e3, **facts))
    return found


def parse_rate_gbit_per_s(text: str) -> float | None:
    """ "200 Gb/sec (4X HDR)" -> 200.0."""
    found = re.match(r"(\d+(?:\.\d+)?) Gb/sec", text)
    return float(found.group(1)) if found and float(found.group(1)) > 0 else None


def _of_interface(name: str | None) -> str:
    return "Slingshot" if name is not None and re.fullmatch(r"hsn\d+", name) else "Ethernet"
