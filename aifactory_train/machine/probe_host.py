"""The host: CPU, cores, memory, NUMA nodes. Parsers of /proc and /sys, and what this process may use of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from aifactory_train.machine.machine import Host
from aifactory_train.machine.probe_look import Look

_KIB = 1024
# Version 1 writes this for "no limit" (LONG_MAX rounded down to pages); version 2 writes "max".
_CGROUP_V1_NO_LIMIT = 1 << 60
_CPUS = "/sys/devices/system/cpu"
_NODES = "/sys/devices/system/node"


def probe_host(look: Look, devices_have_memory: bool) -> Host:
    """What a job may use here. On hosts whose GPUs are NUMA nodes too, their memory is not counted to the host's."""
    memory_bytes, memory_from = _memory(look, devices_have_memory)
    machine, name = look.uname.machine, parse_cpu_name(look.read("/proc/cpuinfo"))
    topology, nodes = f"{_CPUS}/cpu*/topology", f"{_NODES}, those that have cores"
    found: list[tuple[str, Any, str]] = [
        ("cores", len(first_threads(look, look.cpus)), "sched_getaffinity, one thread of each core"),
        ("memory_bytes", memory_bytes, memory_from),
        ("architecture", machine if machine in ("x86_64", "aarch64") else None, "uname"),
        ("cpu", name if name != "unknown" else None, "/proc/cpuinfo"),
        ("sockets", count_sockets(look), topology),
        ("numa_nodes", len(numa_nodes(look)) or None, nodes),
        ("threads_per_core", count_threads_per_core(look), topology),
    ]
    for key, value, where in found:
        if value is None:
            look.missed(f"not told by {where}", f"host.{key}")
        else:
            look.saw(where, f"host.{key}")
    return Host(**{key: value for key, value, _ in found if value is not None})


def parse_cpu_name(cpuinfo: str) -> str:
    """Model name of the CPU, "unknown" where the system does not tell."""
    found = re.search(r"^(?:model name|Model|cpu model|CPU part)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else "unknown"


def parse_native_bf16(cpuinfo: str) -> bool | None:
    """Whether the CPU multiplies bf16 in hardware: avx512_bf16 or amx_bf16 on x86, bf16 on Arm."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if not found:
        return None
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found.group(1).split())


def parse_mem_total_bytes(meminfo: str) -> int | None:
    """MemTotal of /proc/meminfo, or of the meminfo of one NUMA node."""
    found = re.search(r"^(?:Node \d+ )?MemTotal:\s*(\d+) kB", meminfo, re.MULTILINE)
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


def parse_cpu_list(text: str) -> list[int]:
    """ "0-2,8" -> [0, 1, 2, 8], as the kernel and nvidia-smi write it; empty where it is no such list."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text.strip()):
        return []
    spans = re.findall(r"(\d+)(?:-(\d+))?", text)
    return [n for first, last in spans for n in range(int(first), int(last or first) + 1)]


def render_cpu_list(cpus: list[int]) -> str:
    """[0, 1, 2, 8] -> "0-2,8"."""
    spans: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if spans and cpu == spans[-1][1] + 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def first_threads(look: Look, cpus: list[int]) -> list[int]:
    """One number for each core among `cpus`: its lowest thread there. All of them where the system does not tell."""
    seen: set[int] = set()
    firsts = []
    for cpu in sorted(cpus):
        if cpu not in seen:
            firsts.append(cpu)
            seen |= {cpu, *parse_cpu_list(look.read(f"{_CPUS}/cpu{cpu}/topology/thread_siblings_list"))}
    return firsts


def count_sockets(look: Look) -> int | None:
    ids = {look.read(f"{_CPUS}/{cpu.name}/topology/physical_package_id") for cpu in look.children(_CPUS, "cpu[0-9]*")}
    # Virtual machines and some Arm kernels write -1: not known.
    return len(ids - {"", "-1"}) or None


def count_threads_per_core(look: Look) -> int | None:
    """Threads of the core that has most of them: some may be switched off."""
    files = (f"{_CPUS}/{cpu.name}/topology/thread_siblings_list" for cpu in look.children(_CPUS, "cpu[0-9]*"))
    return max((len(parse_cpu_list(look.read(file))) for file in files), default=0) or None


def numa_nodes(look: Look) -> dict[int, list[int]]:
    """Threads of each NUMA node that has any; memory of a GPU is a node without."""
    found = {}
    for folder in look.children(_NODES, "node[0-9]*"):
        cpus = parse_cpu_list(look.read(f"{_NODES}/{folder.name}/cpulist"))
        if cpus:
            found[int(folder.name.removeprefix("node"))] = cpus
    return found


def _memory(look: Look, devices_have_memory: bool) -> tuple[int | None, str]:
    total, where = parse_mem_total_bytes(look.read("/proc/meminfo")), "MemTotal of /proc/meminfo"
    nodes = numa_nodes(look)
    if devices_have_memory and nodes and len(nodes) < len(look.children(_NODES, "node[0-9]*")):
        of_nodes = [parse_mem_total_bytes(look.read(f"{_NODES}/node{node}/meminfo")) for node in nodes]
        if None not in of_nodes:
            total, where = sum(n or 0 for n in of_nodes), "MemTotal of the NUMA nodes that have cores"
    limits = [parse_cgroup_limit_bytes(look.read(f)) for f in parse_cgroup_files(look.read("/proc/self/cgroup"))]
    limit = min((x for x in limits if x is not None), default=None)
    if limit is not None and (total is None or limit < total):
        return limit, "memory limit of the control group"
    return total or None, where
