"""The live machine, read without torch. Every fact says where it was read; what cannot be read stays None."""

from __future__ import annotations

import csv
import datetime
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from aifactory_train.machine.machine import Device, FactSource, Host, Machine, Measured

_KIB, _MIB = 1024, 1024**2
_QUERY_SECONDS = 20
# Version 1 writes this for "no limit" (LONG_MAX rounded down to pages); version 2 writes "max".
_CGROUP_V1_NO_LIMIT = 1 << 60


def probe_local() -> Machine:
    """This machine as plan and launch see it: GPUs where a vendor's tool lists any, else the CPU as one device."""
    cpuinfo = _read("/proc/cpuinfo")
    cores = len(os.sched_getaffinity(0))
    memory_bytes, memory_from = _host_memory()
    sources = [_probed("sched_getaffinity", "host.cores"), _probed(memory_from, "host.memory_bytes")]
    device, device_from = _gpus() or (
        Device(
            kind="cpu",
            name=parse_cpu_name(cpuinfo),
            per_node=1,
            memory_bytes=memory_bytes,
            native_bf16=parse_native_bf16(cpuinfo),
        ),
        "/proc/cpuinfo",
    )
    sources.append(_probed(device_from, "device"))
    return Machine(name="local", device=device, host=Host(cores=cores, memory_bytes=memory_bytes), sources=sources)


def cpu_name() -> str:
    """Model name of this machine's CPU, "unknown" where the system does not tell."""
    return parse_cpu_name(_read("/proc/cpuinfo"))


def with_measured(machine: Machine, measured: Measured) -> Machine:
    """The machine with measured rates in place of those it had, and today's date as their source."""
    today = datetime.date.today().isoformat()
    rates = FactSource(facts=["measured"], source="aifactory-train probe", by="measured", date=today)
    others = [s for s in machine.sources if s.by != "measured"]
    return machine.model_copy(update={"measured": measured, "sources": [*others, rates]})


def parse_cpu_name(cpuinfo: str) -> str:
    found = re.search(r"^(?:model name|Model|cpu model|CPU part)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def parse_native_bf16(cpuinfo: str) -> bool | None:
    """Whether the CPU multiplies bf16 in hardware: avx512_bf16 or amx_bf16 on x86, bf16 on Arm."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if not found:
        return None
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found.group(1).split())


def parse_mem_total_bytes(meminfo: str) -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.MULTILINE)
    return int(found.group(1)) * _KIB if found else None


def parse_cgroup_limit_bytes(text: str) -> int | None:
    """memory.max of version 2 or memory.limit_in_bytes of version 1; None where there is no limit."""
    text = text.strip()
    if not text.isdigit() or int(text) >= _CGROUP_V1_NO_LIMIT:
        return None
    return int(text)


def parse_cgroup_files(proc_self_cgroup: str) -> list[str]:
    """Files that may hold our memory limit, from /proc/self/cgroup: our own group and those above it."""
    files = []
    for line in proc_self_cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = "/sys/fs/cgroup" if not controllers else "/sys/fs/cgroup/memory"
        name = "memory.max" if not controllers else "memory.limit_in_bytes"
        group = Path(path.lstrip("/"))
        files += [str(Path(root) / above / name) for above in (group, *group.parents)]
    return list(dict.fromkeys(files))


def parse_nvidia_smi(text: str) -> Device | None:
    """Output of nvidia-smi --query-gpu=name,memory.total,compute_cap --format=csv,noheader,nounits (MiB)."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if len(row) == 3]
    rows = [row for row in rows if row[1].isdigit()]
    if not rows:
        return None
    capability = re.fullmatch(r"(\d+)\.\d+", rows[0][2])
    return Device(
        kind="cuda",
        name=rows[0][0],
        per_node=len(rows),
        memory_bytes=min(int(row[1]) for row in rows) * _MIB,
        native_bf16=int(capability.group(1)) >= 8 if capability else None,
    )


def parse_rocm_smi(text: str) -> Device | None:
    """Output of rocm-smi --showproductname --showmeminfo vram --json; a card is one device (a GCD on MI250X)."""
    try:
        cards: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError:
        return None
    found = [facts for name, facts in cards.items() if name.startswith("card") and isinstance(facts, dict)]
    if not found:
        return None
    names = [str(facts[k]) for facts in found for k in ("Card Series", "Card series", "Card Model") if k in facts]
    memory = [str(facts.get("VRAM Total Memory (B)", "")) for facts in found]
    return Device(
        kind="rocm",
        name=names[0] if names else "AMD GPU",
        per_node=len(found),
        memory_bytes=min(map(int, memory)) if all(m.isdigit() for m in memory) else None,
        # Every card that ROCm 5.7 and newer supports for training (CDNA) multiplies bf16 in hardware.
        native_bf16=True if any("MI" in name for name in names) else None,
    )


def _gpus() -> tuple[Device, str] | None:
    nvidia = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    rocm = ["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"]
    for command, parse in ((nvidia, parse_nvidia_smi), (rocm, parse_rocm_smi)):
        device = parse(_output(command))
        if device:
            return device, command[0]
    return None


def _host_memory() -> tuple[int | None, str]:
    total = parse_mem_total_bytes(_read("/proc/meminfo"))
    limits = [parse_cgroup_limit_bytes(_read(file)) for file in parse_cgroup_files(_read("/proc/self/cgroup"))]
    limit = min((x for x in limits if x is not None), default=None)
    if limit is not None and (total is None or limit < total):
        return limit, "memory limit of the control group"
    return total, "MemTotal of /proc/meminfo"


def _probed(where: str, *facts: str) -> FactSource:
    return FactSource(facts=list(facts), source=where, by="probed", date=datetime.date.today().isoformat())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    """What the command prints, "" where it is missing, fails or hangs (as it does beside a broken driver)."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
