"""A controller without running nodes, configured as a site: it takes or refuses a job by the site's limits."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aifactory_train.hostlist import expand
from aifactory_train.launch.slurm import cpus_per_rank
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.site import Partition, Qos, Slurm
from slurm.cluster import Daemons, Munge, common_settings, free_ports, poll, write_conf

MIB = 1024**2
# Nodes are never contacted, but each must have a port of its own.
FIRST_NODE_PORT = 40001
# Where a site tells no number of nodes: enough for every job of the tests.
SOME_NODES = 8


def slurm_of(machine: Machine) -> Slurm:
    assert machine.slurm is not None
    return machine.slurm


def default_qos(slurm: Slurm) -> Qos | None:
    return next((q for q in slurm.qos if q.name == slurm.default_qos), None)


def max_nodes(slurm: Slurm) -> int | None:
    """Of one job in the default partition and QoS, whose limit wins; None where nobody says."""
    qos, partition = default_qos(slurm), slurm.partition
    return (qos.max_nodes if qos else None) or partition.max_nodes or partition.nodes


def max_minutes(slurm: Slurm) -> int | None:
    qos = default_qos(slurm)
    hours = (qos.max_time_h if qos else None) or slurm.partition.max_time_h
    return None if hours is None else round(hours * 60)


def min_nodes(slurm: Slurm) -> int:
    qos = default_qos(slurm)
    return (qos.min_nodes if qos else None) or 1


def device_option(slurm: Slurm, n: int) -> str | None:
    """The machine's option for devices, asking for `n` of them."""
    return None if slurm.devices is None else re.sub(r"\d+$", str(n), slurm.devices.option)


def threads_per_core(machine: Machine) -> int:
    """Threads that Slurm counts as CPUs there: all of them where the launcher asks for more CPUs than cores."""
    asked = cpus_per_rank(machine) * machine.device.per_node
    return (machine.host.threads_per_core or 1) if asked > machine.host.cores else 1


def slurm_cpus(machine: Machine) -> int:
    """Of a node, as far as jobs may ask for them."""
    return machine.host.cores * threads_per_core(machine)


def render_site(machine: Machine) -> list[str]:
    """The lines of slurm.conf that say what the site is."""
    slurm = slurm_of(machine)
    names = _node_names(machine, slurm)
    host = machine.host
    sockets = host.sockets if host.sockets and host.cores % host.sockets == 0 else 1
    node = {
        "NodeName": names,
        "NodeHostname": socket.gethostname().split(".")[0],
        "NodeAddr": "127.0.0.1",
        "Port": f"[{FIRST_NODE_PORT}-{FIRST_NODE_PORT + len(expand(names)) - 1}]",
        # The cores that the site gives to jobs; it does not matter here which numbers they have.
        "CPUs": slurm_cpus(machine),
        "Sockets": sockets,
        "CoresPerSocket": host.cores // sockets,
        "ThreadsPerCore": threads_per_core(machine),
        "State": "DOWN",  # so that nobody is contacted
    }
    if host.memory_bytes is not None:
        node["RealMemory"] = host.memory_bytes // MIB
    if slurm.devices is not None:
        node["Gres"] = f"{_gres(slurm)}:{machine.device.per_node}"
    features = _features(slurm)
    if features:
        node["Features"] = ",".join(features)
    return [_line(node), *(_line(_limits(slurm, p)) for p in slurm.partitions)]


def _line(words: dict[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in words.items())


def _node_names(machine: Machine, slurm: Slurm) -> str:
    if slurm.node_names is not None:
        return slurm.node_names
    n = max(slurm.partition.nodes or 0, machine.nodes or 0, max_nodes(slurm) or 0) or SOME_NODES
    return f"{machine.name}[1-{n}]"


def _limits(slurm: Slurm, partition: Partition) -> dict[str, object]:
    """Without accounting there are no QoS: those of the default one tighten the default partition."""
    limits: dict[str, object] = {"PartitionName": partition.name, "Nodes": "ALL", "State": "UP"}
    default = partition is slurm.partition
    nodes = max_nodes(slurm) if default else partition.max_nodes
    minutes = max_minutes(slurm) if default else None
    limits["MaxNodes"] = nodes or "UNLIMITED"
    limits["MaxTime"] = minutes or "UNLIMITED"
    if default:
        limits |= {"Default": "YES", "MinNodes": min_nodes(slurm)}
    return limits


def _gres(slurm: Slurm) -> str:
    """ "gpu" or "gpu:TYPE", as the machine's option names it: --gres=gpu:a100:4, --gpus-per-node=4."""
    assert slurm.devices is not None
    words = slurm.devices.option.partition("=")[2].split(":")[:-1]
    types = [word for word in words if word != "gpu"]
    return ":".join(["gpu", *types])


def _features(slurm: Slurm) -> list[str]:
    asked = [o.option for o in slurm.directives if re.match(r"(--constraint|-C)=", o.option)]
    return sorted({name for option in asked for name in re.findall(r"[\w-]+", option.partition("=")[2])})


class Site(Daemons):
    """The controller of one machine file."""

    def __init__(self, machine: Machine, folder: Path, munge: Munge) -> None:
        super().__init__(folder)
        self.machine = machine
        (folder / "state").mkdir()
        settings = common_settings(munge.socket) | {
            "ClusterName": "site",
            "SlurmctldPort": free_ports(1),
            "StateSaveLocation": folder / "state",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmctldLogFile": folder / "slurmctld.log",
            "SelectTypeParameters": "CR_Core_Memory" if machine.host.memory_bytes else "CR_Core",
            "GresTypes": "gpu",
        }
        write_conf(self.conf, settings, render_site(machine))
        self.start("slurmctld", "slurmctld", "-D", "-i")
        poll(lambda: self.run("scontrol", "ping").returncode == 0, "slurmctld", 20, lambda: self.output("slurmctld"))


@contextmanager
def running_site(machine: Machine, folder: Path, munge: Munge) -> Iterator[Site]:
    site = Site(machine, folder, munge)
    try:
        yield site
    finally:
        site.stop()
