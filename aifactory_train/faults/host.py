"""Checks of the host: cores, network cards, disks, versions. Each looks, and calls a pure function that judges."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from aifactory_train.faults.checks import Fault, Here, read_text
from aifactory_train.faults.traps import applies, load_traps, probe_version
from aifactory_train.machine.machine import Network
from aifactory_train.rundir import RunDir
from aifactory_train.units import format_bytes, format_gbit_per_s

# Weights and two moments in fp32, and what an unfinished write leaves beside them.
CHECKPOINT_BYTES_PER_PARAMETER = 16
# Compilers and sockets write there.
TMP_BYTES = 1 << 30
_LEAVE_OUT = "leave this node out: sbatch --exclude, and tell the site"


def check_binding(here: Here) -> list[Fault]:
    """The cores that this rank may use, as the system sees them now."""
    seen = sorted(os.sched_getaffinity(0))
    here.facts["cores"] = seen
    slurm = here.machine.slurm
    # The launcher's masks go by local rank; a rank whose plan gives it another device moves when training begins.
    mapped = [p.core_list() for p in here.machine.topology.places if p.device == here.local_rank]
    if slurm is not None and slurm.cpu_bind == "map" and mapped:
        return mapped_binding_faults(seen, mapped[0], core_siblings)
    wanted = slurm.cpus_per_task if slurm is not None and slurm.cpus_per_task else here.plan.layout.threads_per_rank
    return core_count_faults(seen, wanted)


def mapped_binding_faults(seen: list[int], place: list[int], siblings: Callable[[int], list[int]]) -> list[Fault]:
    """Every CPU seen must be one of the place's cores, or a hardware thread of one of them."""
    astray = [cpu for cpu in seen if not set(place) & {cpu, *siblings(cpu)}]
    if not astray:
        return []
    return [
        Fault(
            f"bound to cores {_spans(seen)}; the map wants {_spans(place)} only",
            "start the ranks with srun and the masks of the launcher, one task per device in order",
        )
    ]


def core_count_faults(seen: list[int], wanted: int) -> list[Fault]:
    if len(seen) >= wanted:
        return []
    return [
        Fault(
            f"number of cores to use is {len(seen)} ({_spans(seen)}), the plan counts on {wanted}",
            f"give each rank its cores: srun --cpus-per-task={wanted}, or mpirun --bind-to none",
        )
    ]


def core_siblings(cpu: int) -> list[int]:
    """The hardware threads of this CPU's core; itself alone where the system does not tell."""
    text = read_text(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")).strip()
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [n for first, last in spans for n in range(int(first), int(last or first) + 1)] or [cpu]


def _spans(cores: Iterable[int]) -> str:
    """[1, 2, 3, 7] -> "1-3,7"."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][1] + 1:
            parts[-1][1] = core
        else:
            parts.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def check_network(here: Here) -> list[Fault]:
    """One rank of each node looks at its network cards; a run on one node needs none."""
    if here.local_rank != 0 or here.plan.layout.n_nodes == 1:
        return []
    return network_faults(here.machine.network, Path("/sys/class"))


def network_faults(network: Network, sys_class: Path) -> list[Fault]:
    """Each card must be there, up, and at its full rate. InfiniBand tells by port, others by interface."""
    faults = []
    for nic in network.nics:
        ports = sorted((sys_class / "infiniband" / nic.name / "ports").glob("*"))
        names = list(dict.fromkeys(n for n in (nic.interface, nic.name) if n))
        there = [sys_class / "net" / n for n in names if (sys_class / "net" / n).exists()]
        if not ports and not there:
            faults.append(Fault(f"network card {nic.name} is not there", _LEAVE_OUT))
        elif nic.interface and nic.interface not in [i.name for i in there]:
            faults.append(Fault(f"interface {nic.interface} of {nic.name} is not there", _LEAVE_OUT))
        for port in ports:
            faults += _port_faults(nic.name, port, network.nic_gbit_per_s)
        for interface in there:
            faults += _interface_faults(interface, None if ports else network.nic_gbit_per_s)
    return faults


def _port_faults(nic: str, port: Path, wanted: float | None) -> list[Fault]:
    """`state` reads "4: ACTIVE", `rate` "200 Gb/sec (4X HDR)"."""
    state = read_text(port / "state").strip()
    if state and "ACTIVE" not in state:
        return [Fault(f"{nic} port {port.name} is {state!r}, expected ACTIVE", _LEAVE_OUT)]
    found = re.match(r"([\d.]+) Gb/sec", read_text(port / "rate"))
    return _nic_rate_faults(f"{nic} port {port.name}", float(found.group(1)) if found else None, wanted)


def _interface_faults(interface: Path, wanted: float | None) -> list[Fault]:
    """`operstate` is "unknown" where the driver does not tell; `speed` is in Mbit/s, -1 or unreadable then."""
    state = read_text(interface / "operstate").strip()
    if state in ("down", "lowerlayerdown", "notpresent"):
        return [Fault(f"interface {interface.name} is {state}, expected up", _LEAVE_OUT)]
    speed = read_text(interface / "speed").strip()
    return _nic_rate_faults(interface.name, int(speed) / 1000 if speed.isdigit() else None, wanted)


def _nic_rate_faults(name: str, seen: float | None, wanted: float | None) -> list[Fault]:
    if seen is None or wanted is None or seen >= 0.99 * wanted:
        return []
    return [Fault(f"{name} runs at {format_gbit_per_s(seen)}, expected {format_gbit_per_s(wanted)}", _LEAVE_OUT)]


def check_disk(here: Here) -> list[Fault]:
    """Rank 0 looks at the run folder, which all share, and one rank of each node at its /tmp."""
    faults = []
    if here.rank == 0:
        n_kept = len(list(RunDir(here.root).checkpoints.glob("step-*")))
        here.facts["free_bytes"] = shutil.disk_usage(here.root).free
        faults += disk_faults(here.root, here.facts["free_bytes"], here.plan.shape.n_parameters, n_kept)
    if here.local_rank == 0:
        tmp = tempfile.gettempdir()
        here.facts["tmp_free_bytes"] = free = shutil.disk_usage(tmp).free
        if free < TMP_BYTES:
            what = f"{format_bytes(free)} free in {tmp} of this node, {format_bytes(TMP_BYTES)} wanted"
            faults.append(Fault(what, f"clean {tmp} there, or leave the node out: sbatch --exclude"))
    return faults


def disk_faults(root: Path, free_bytes: int, n_parameters: int, n_checkpoints: int) -> list[Fault]:
    """Room for two checkpoints; for one where there is one already, which makes room when the next is complete."""
    wanted = CHECKPOINT_BYTES_PER_PARAMETER * n_parameters * (1 if n_checkpoints else 2)
    if free_bytes >= wanted:
        return []
    what = f"{format_bytes(free_bytes)} free in {root}, the checkpoints need {format_bytes(wanted)}"
    return [Fault(what, "free space there, or launch with another folder: --run RUN", elsewhere=True)]


def check_traps(here: Here) -> list[Fault]:
    """Known versions that hang or crawl. Warnings go into facts: the job may go on."""
    faults, warnings = [], []
    kind, n_nodes = here.machine.device.kind, here.plan.layout.n_nodes
    for trap in load_traps():
        version = probe_version(trap.when.package)
        if not applies(trap.when, version, platform.machine(), kind, n_nodes):
            continue
        assert version is not None
        if trap.severity == "fault":
            faults.append(Fault(trap.sentence(version), trap.do, elsewhere=True))
        else:
            warnings.append(f"{trap.sentence(version)}; {trap.do}")
    here.facts["warnings"] = warnings
    return faults
