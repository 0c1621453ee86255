"""The node and the GPU of each rank, down to driver and firmware; and in what ranks differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aifactory_train.bench.record import Scalar, Unavailable
from aifactory_train.hostlist import compress
from aifactory_train.machine.probe_host import (
    count_sockets,
    count_threads_per_core,
    numa_nodes,
    parse_cgroup_files,
    parse_cgroup_limit_bytes,
    parse_mem_total_bytes,
    render_cpu_list,
)
from aifactory_train.machine.probe_look import Look
from aifactory_train.machine.probe_network import infiniband_ports
from aifactory_train.measure.energy import open_amdsmi, open_nvml
from aifactory_train.train.ranks import node_name, node_switches

Facts = dict[str, Scalar]
LIBRARIES = re.compile(r"(lib(?:nccl|rccl|nccl-net[\w-]*|rccl-net[\w-]*|fabric|cxi|ucp|ibverbs|mpi|cuda|amdhip64))\.so")
# Mitigations, isolated cores, clock and sleep states, memory pages and the way of devices to memory.
KERNEL_OPTIONS = re.compile(
    r"(mitigations|isolcpus|nohz|nohz_full|rcu_nocbs|nosmt|idle|processor\.\w+|intel_idle\.\w+|intel_pstate|amd_pstate"
    r"|cpufreq\.\w+|cpuidle\.\w+|clocksource|tsc|skew_tick|nmi_watchdog|audit|preempt|numa_balancing|hugepages"
    r"|hugepagesz|default_hugepagesz|transparent_hugepage|init_on_alloc|iommu|intel_iommu|amd_iommu|iommu\.\w+"
    r"|pci|pcie_aspm|pcie_\w+|spectre_\w+|spec_\w+|retbleed|l1tf|mds|tsx|noht)(=|$)"
)
_CPU0 = "/sys/devices/system/cpu/cpu0"
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"


class Place(NamedTuple):
    """Where one rank runs. Keys begin with `node.` or `gpu.` and have their unit as suffix."""

    host: str
    facts: Facts
    unavailable: list[Unavailable]

    def as_json(self) -> dict[str, Any]:
        missed = [one.model_dump() for one in self.unavailable]
        return {"host": self.host, "facts": self.facts, "unavailable": missed}


class Joined(NamedTuple):
    """Of all ranks. common: what most of them have; drift: key -> each value with its nodes and ranks, most first."""

    common: dict[str, Facts]
    drift: dict[str, str]
    unavailable: list[Unavailable]


def probe_place(device: torch.device, look: Look | None = None) -> Place:
    """Of this rank; `look`: for its node."""
    of_node, no_node = probe_node(look or Look())
    of_gpu, no_gpu = probe_gpu(device) if device.type == "cuda" else ({}, [])
    facts = {f"node.{key}": value for key, value in of_node.items()}
    facts |= {f"gpu.{key}": value for key, value in of_gpu.items()}
    if switches := node_switches():
        facts["node.switches"] = switches
    return Place(node_name(), facts, [*no_node, *no_gpu])


def join_places(of_ranks: Sequence[Mapping[str, Any]]) -> Joined:
    """Args: of_ranks: `Place.as_json` of each rank, in their order."""
    common: dict[str, Facts] = {}
    drift: dict[str, str] = {}
    for key in dict.fromkeys(key for rank in of_ranks for key in rank["facts"]):
        ranks_of: dict[Scalar | None, list[int]] = {}
        for number, rank in enumerate(of_ranks):
            ranks_of.setdefault(rank["facts"].get(key), []).append(number)
        by_count = sorted(ranks_of.items(), key=lambda item: -len(item[1]))
        group, _, name = key.partition(".")
        value = next(value for value, _ in by_count if value is not None)
        common.setdefault(group, {})[name] = value
        if len(by_count) > 1:
            told = [f"{_said(value)} on {_named(of_ranks, ranks)}" for value, ranks in by_count]
            drift[key] = "; ".join(told)
    missed = {(m["probe"], m["reason"]): Unavailable(**m) for rank in of_ranks for m in rank["unavailable"]}
    return Joined(common, drift, list(missed.values()))


def _said(value: Scalar | None) -> str:
    return "not told" if value is None else str(value)


def _named(of_ranks: Sequence[Mapping[str, Any]], ranks: list[int]) -> str:
    hosts = compress(sorted({of_ranks[rank]["host"] for rank in ranks}))
    return f"{hosts} (rank{'s' if len(ranks) > 1 else ''} {render_cpu_list(ranks)})"


def probe_node(look: Look) -> tuple[Facts, list[Unavailable]]:
    """System, memory, limits and NICs of this node, as this process sees them."""
    cpuinfo, meminfo = look.read("/proc/cpuinfo"), look.read("/proc/meminfo")
    groups = parse_cgroup_files(look.read("/proc/self/cgroup"))
    memory_limits = [limit for file in groups if (limit := parse_cgroup_limit_bytes(look.read(file))) is not None]
    spans = [f"{node}: {render_cpu_list(cpus)}" for node, cpus in sorted(numa_nodes(look).items())]
    microcode = look.read(f"{_CPU0}/microcode/version") or _match(r"^microcode\s*:\s*(\S+)", cpuinfo)
    found: list[tuple[str, Scalar | None, str]] = [
        ("os", _match(r'^PRETTY_NAME="?([^"\n]+)', look.read("/etc/os-release")), "/etc/os-release"),
        ("kernel", look.uname.release, "uname"),
        ("kernel_options", _kernel_options(look), "/proc/cmdline"),
        ("microcode", microcode, "/proc/cpuinfo"),
        ("cpu_governor", look.read(f"{_CPU0}/cpufreq/scaling_governor") or None, f"{_CPU0}/cpufreq"),
        ("sockets", count_sockets(look), f"{_CPU0}/topology"),
        ("threads_per_core", count_threads_per_core(look), f"{_CPU0}/topology"),
        ("numa_nodes", "; ".join(spans) or None, "/sys/devices/system/node"),
        ("numa_balancing", look.read("/proc/sys/kernel/numa_balancing") or None, "/proc/sys/kernel/numa_balancing"),
        ("memory_bytes", parse_mem_total_bytes(meminfo), "/proc/meminfo"),
        ("transparent_hugepages", _match(r"\[(\w+)\]", look.read(_HUGE_PAGES)), _HUGE_PAGES),
        ("hugepages", _number(r"^HugePages_Total:\s*(\d+)", meminfo), "/proc/meminfo"),
        ("cgroup_memory_bytes", min(memory_limits) if memory_limits else "no limit", "/proc/self/cgroup"),
        ("cgroup_cpus", _cgroup_cpus(look, groups), "/proc/self/cgroup"),
        ("nics", _nics(look) or None, "active ports of /sys/class/infiniband"),
    ]
    facts = {key: value for key, value, _ in found if value is not None}
    missed = [Unavailable(probe=f"node.{key}", reason=f"not told by {where}") for key, v, where in found if v is None]
    return facts, missed


def _kernel_options(look: Look) -> str | None:
    """Of the line that the kernel was booted with: the options that change speed, in their order; "none" of them.

    The rest belongs to the site: addresses of its servers, and at some sites secrets.
    """
    words = look.read("/proc/cmdline").split()
    return " ".join(word for word in words if KERNEL_OPTIONS.match(word)) or "none" if words else None


def _match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _number(pattern: str, text: str) -> int | None:
    found = _match(pattern, text)
    return None if found is None else int(found)


def _cgroup_cpus(look: Look, memory_files: Iterable[str]) -> float | str:
    """Cores that the quota of our control group is worth, version 2 or 1; the strictest one on the way up."""
    limits = []
    for folder in dict.fromkeys(Path(file).parent for file in memory_files):
        parts = look.read(folder / "cpu.max").split()
        if len(parts) == 2 and parts[0].isdecimal():
            limits.append(int(parts[0]) / int(parts[1]))
    quota, period = (look.read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdecimal() and period.isdecimal():
        limits.append(int(quota) / int(period))
    return min(limits, default="no limit")


def _nics(look: Look) -> str:
    """ "mlx5_0 200 Gbit/s MT_0000000223 firmware 20.35.1012; ..."."""
    lines = []
    for port in infiniband_ports(look):
        folder = f"/sys/class/infiniband/{port.name}"
        board, firmware = (look.read(f"{folder}/{name}") for name in ("board_id", "fw_ver"))
        lines.append(f"{port.name} {port.gbit_per_s:g} Gbit/s {board} firmware {firmware or 'not told'}")
    return "; ".join(lines)


def probe_gpu(device: torch.device) -> tuple[Facts, list[Unavailable]]:
    """Driver, firmware, identity and settings of this rank's GPU, by NVML or amdsmi."""
    facts: Facts = {}
    missed = []
    smi, handle, reason = open_amdsmi(device) if torch.version.hip else open_nvml(device)
    if smi is None:
        return facts, [Unavailable(probe="gpu", reason=reason)]
    readers = _amd_readers(smi, handle) if torch.version.hip else _nvidia_readers(smi, handle)
    fault = smi.AmdSmiException if torch.version.hip else smi.NVMLError
    for key, read in readers.items():
        try:
            value = read()
            facts[key] = value.decode() if isinstance(value, bytes) else value
        # An older package lacks a function, an older ROCm a key of an answer.
        except (fault, AttributeError, KeyError, ValueError) as error:
            missed.append(Unavailable(probe=f"gpu.{key}", reason=f"{type(error).__name__}: {error}"))
    return facts, missed


def _nvidia_readers(nvml: Any, gpu: Any) -> dict[str, Callable[[], Any]]:
    return {
        "name": lambda: nvml.nvmlDeviceGetName(gpu),
        "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
        "cuda_of_driver": lambda: "{}.{}".format(*_cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2())),
        "vbios": lambda: nvml.nvmlDeviceGetVbiosVersion(gpu),
        "firmware": lambda: nvml.nvmlDeviceGetGspFirmwareVersion(gpu),
        "inforom": lambda: nvml.nvmlDeviceGetInforomImageVersion(gpu),
        "pci_id": lambda: _pci_id(nvml.nvmlDeviceGetPciInfo(gpu).pciDeviceId),
        "pci_subsystem_id": lambda: _pci_id(nvml.nvmlDeviceGetPciInfo(gpu).pciSubSystemId),
        "pcie_lanes": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(gpu),
        "nvlinks": lambda: _active_nvlinks(nvml, gpu),
        "power_cap_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3,
        "power_cap_default_w": lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(gpu) / 1e3,
        "most_sm_clock_hertz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM) * 1e6,
        "most_memory_clock_hertz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM) * 1e6,
        "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(gpu)[0]),
        "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(gpu)[0]),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(gpu)),
    }


def _cuda_version(number: int) -> tuple[int, int]:
    """12040 -> (12, 4)."""
    return number // 1000, number % 1000 // 10


def _pci_id(number: int) -> str:
    """NVML has the vendor in the low half: 0x233010DE -> "10de:2330"."""
    return f"{number & 0xFFFF:04x}:{number >> 16:04x}"


def _active_nvlinks(nvml: Any, gpu: Any) -> int:
    """A link that the device does not have raises an error."""
    n_active = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            n_active += nvml.nvmlDeviceGetNvLinkState(gpu, link)
        except nvml.NVMLError:
            break
    return n_active


def _amd_readers(smi: Any, gpu: Any) -> dict[str, Callable[[], Any]]:
    return {
        "name": lambda: smi.amdsmi_get_gpu_asic_info(gpu)["market_name"],
        "driver": lambda: smi.amdsmi_get_gpu_driver_info(gpu)["driver_version"],
        "vbios": lambda: smi.amdsmi_get_gpu_vbios_info(gpu)["version"],
        "firmware": lambda: _amd_firmware(smi.amdsmi_get_fw_info(gpu)["fw_list"]),
        "pci_id": lambda: "1002:{:04x}".format(_hex(smi.amdsmi_get_gpu_asic_info(gpu)["device_id"])),
        "pci_subsystem_id": lambda: "{:04x}".format(_hex(smi.amdsmi_get_gpu_asic_info(gpu)["subsystem_id"])),
        "power_cap_w": lambda: smi.amdsmi_get_power_cap_info(gpu)["power_cap"] / 1e6,
        "power_cap_default_w": lambda: smi.amdsmi_get_power_cap_info(gpu)["default_power_cap"] / 1e6,
        "compute_partition": lambda: smi.amdsmi_get_gpu_compute_partition(gpu),
        "memory_partition": lambda: smi.amdsmi_get_gpu_memory_partition(gpu),
    }


def _amd_firmware(blocks: Iterable[Mapping[str, Any]]) -> str:
    """Each block of the device has a firmware of its own."""
    return ", ".join(sorted(f"{getattr(b['fw_name'], 'name', b['fw_name'])} {b['fw_version']}" for b in blocks))


def _hex(value: int | str) -> int:
    """ROCm 6 writes "0x74a1", older versions numbers."""
    return int(value, 16) if isinstance(value, str) else value


def find_libraries(maps: Path = Path("/proc/self/maps")) -> dict[str, str]:
    """File of each library that this process has loaded by now and that communication uses, by its name."""
    paths = {line[line.index("/") :] for line in maps.read_text().splitlines() if "/" in line}
    names = {path: LIBRARIES.match(path.rpartition("/")[2]) for path in sorted(paths)}
    return {found.group(1): path for path, found in names.items() if found}
