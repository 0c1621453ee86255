"""The live machine, read without torch. Every fact says where it was read; what cannot be read is in `unseen`."""

from __future__ import annotations

import datetime
from typing import Any

from aifactory_train.machine.facts import FactSource
from aifactory_train.machine.machine import Device, Machine, Measured
from aifactory_train.machine.probe_gpus import probe_gpus
from aifactory_train.machine.probe_host import parse_cpu_name, parse_native_bf16, probe_host
from aifactory_train.machine.probe_look import Look
from aifactory_train.machine.probe_network import probe_network
from aifactory_train.machine.probe_places import probe_places
from aifactory_train.machine.probe_slurm import probe_slurm


def probe_local() -> Machine:
    """This machine as plan and launch see it: GPUs where a vendor's tool lists any, else the CPU as one device.

    Without Slurm, also where there is one: ranks on `local` are started here and not by a batch job.
    """
    return probe(Look(), with_slurm=False)


def probe_machine() -> Machine:
    """This machine and the Slurm that gives it out, for a machine file."""
    return probe(Look(), with_slurm=True)


def probe(look: Look, with_slurm: bool) -> Machine:
    """The machine that `look` looks at."""
    gpus = probe_gpus(look)
    host = probe_host(look, devices_have_memory=gpus is not None)
    network, nics = probe_network(look)
    facts: dict[str, Any] = {"name": "local", "host": host, "network": network}
    if gpus is None:
        cpuinfo = look.read("/proc/cpuinfo")
        device: dict[str, Any] = {"kind": "cpu", "name": parse_cpu_name(cpuinfo), "per_node": 1}
        device |= {"memory_bytes": host.memory_bytes, "native_bf16": parse_native_bf16(cpuinfo)}
        facts["device"] = Device(**{key: value for key, value in device.items() if value is not None})
        look.saw("/proc/cpuinfo", "device")
    else:
        facts["device"] = gpus.device
        places = probe_places(look, gpus, nics)
        facts["topology"] = gpus.topology.model_copy(update={"places": places} if places else {})
    slurm = probe_slurm(look) if with_slurm else None
    if slurm is not None:
        facts["slurm"] = slurm
    return Machine(**facts, sources=look.sources, unseen=look.unseen)


def cpu_name() -> str:
    """Model name of this machine's CPU, "unknown" where the system does not tell."""
    return parse_cpu_name(Look().read("/proc/cpuinfo"))


def with_measured(machine: Machine, measured: Measured) -> Machine:
    """The machine with measured rates in place of those it had, and today's date as their source."""
    today = datetime.date.today().isoformat()
    rates = FactSource(facts=["measured"], source="aifactory-train probe", by="measured", date=today)
    others = [s for s in machine.sources if s.by != "measured"]
    return machine.model_copy(update={"measured": measured, "sources": [*others, rates]})
