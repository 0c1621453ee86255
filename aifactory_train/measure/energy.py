"""Energy of a timed window, by the counters and meters that the node lets us read.

NVML and amdsmi for this rank's device; RAPL, the Grace-Hopper power meters and Cray's pm_counters for the node, which
its first rank reads. Scopes overlap and are never added: a module holds its GPU, a node all of them.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from aifactory_train.bench.record import EnergyWindow, Unavailable

# Sensors of GPUs see part of the time only (arXiv 2312.02741), and pm_counters move at 10 Hz: below this, no claim.
MIN_WINDOW_S = 10.0
# RAPL counts every millisecond.
MIN_RAPL_WINDOW_S = 1.0
METER_PERIOD_S = 0.1
# Two methods that look at the same scope and differ by more: one of them is wrong.
MAX_APART_FRAC = 0.05
_GRACE_SCOPES = {"Module": "module", "Grace": "package"}


@dataclass
class Counter:
    """Counts joules. wraps_at_j: then it begins at 0 again."""

    scope: str
    method: str
    read_j: Callable[[], float]
    min_window_s: float = MIN_WINDOW_S
    wraps_at_j: float | None = None
    begin_j: float = 0.0

    def used_j(self) -> float:
        used_j = self.read_j() - self.begin_j
        return used_j + self.wraps_at_j if used_j < 0 and self.wraps_at_j is not None else used_j


@dataclass
class Meter:
    """Shows watts, which are read at METER_PERIOD_S and integrated by trapezoids."""

    scope: str
    method: str
    read_w: Callable[[], float]
    trace: list[tuple[float, float]] = field(default_factory=list)  # (s, W)

    def look(self) -> None:
        self.trace.append((time.monotonic(), self.read_w()))

    def used_j(self) -> float:
        pairs = zip(self.trace, self.trace[1:], strict=False)
        return sum((w0 + w1) / 2 * (t1 - t0) for (t0, w0), (t1, w1) in pairs)


class EnergyMeter:
    """All sources of this rank. unavailable: what could not be read, and why."""

    def __init__(self, device: torch.device, of_node: bool, sys_root: Path = Path("/sys")) -> None:
        """of_node: also read what belongs to the whole node; for one rank of it."""
        self.counters: list[Counter] = []
        self.meters: list[Meter] = []
        self.unavailable: list[Unavailable] = []
        self._begin_s = 0.0
        self._stop: threading.Event | None = None
        if device.type == "cuda":
            self._open_amdsmi(device) if torch.version.hip else self._open_nvml(device)
        if of_node:
            self._open_rapl(sys_root)
            self._open_grace(sys_root)
            self._open_pm_counters(sys_root)

    def begin(self) -> None:
        """The window begins; the device has been waited for."""
        for meter in self.meters:
            meter.trace.clear()
            meter.look()
        for counter in self.counters:
            counter.begin_j = counter.read_j()
        self._begin_s = time.monotonic()
        if self.meters:
            self._stop = threading.Event()
            threading.Thread(target=self._look, args=[self._stop], daemon=True).start()

    def end(self) -> tuple[list[EnergyWindow], list[Unavailable]]:
        """The window ends: joules by scope and method, added over the sources of one kind."""
        if self._stop is not None:
            self._stop.set()
        seconds = time.monotonic() - self._begin_s
        used: dict[tuple[str, str], float] = {}
        short: dict[tuple[str, str], Unavailable] = {}
        for meter in self.meters:
            meter.look()
        sources: list[Counter | Meter] = [*self.counters, *self.meters]
        for source in sources:
            limit_s = source.min_window_s if isinstance(source, Counter) else MIN_WINDOW_S
            key = (source.scope, source.method)
            if seconds < limit_s:
                reason = f"the window of {seconds:.1f} s is shorter than {limit_s:.0f} s"
                short[key] = Unavailable(probe=f"energy of {source.scope} by {source.method}", reason=reason)
            else:
                used[key] = used.get(key, 0.0) + source.used_j()
        windows = [
            EnergyWindow(scope=scope, method=method, joules=joules, seconds=seconds)
            for (scope, method), joules in used.items()
        ]
        return windows, [*self.unavailable, *short.values()]

    def _look(self, stop: threading.Event) -> None:
        while not stop.wait(METER_PERIOD_S):
            for meter in self.meters:
                meter.look()

    def _missed(self, probe: str, reason: str) -> None:
        self.unavailable.append(Unavailable(probe=probe, reason=reason))

    def _open_nvml(self, device: torch.device) -> None:
        nvml, handle, reason = open_nvml(device)
        if nvml is None:
            self._missed("nvml", reason)
            return
        try:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            read_j = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3  # noqa: E731
            self.counters.append(Counter("gpu", "nvml_counter", read_j))
        except nvml.NVMLError as error:
            self._missed("nvml energy counter", str(error))
        try:
            nvml.nvmlDeviceGetPowerUsage(handle)
            self.meters.append(Meter("gpu", "nvml_power", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3))
        except nvml.NVMLError as error:
            self._missed("nvml power", str(error))

    def _open_amdsmi(self, device: torch.device) -> None:
        smi, handle, reason = open_amdsmi(device)
        if smi is None:
            self._missed("amdsmi", reason)
            return
        try:
            amdsmi_joules(smi.amdsmi_get_energy_count(handle))
        except (smi.AmdSmiException, KeyError) as error:
            self._missed("amdsmi energy counter", f"{type(error).__name__}: {error}")
            return
        read_j = lambda: amdsmi_joules(smi.amdsmi_get_energy_count(handle))  # noqa: E731
        self.counters.append(Counter("gpu", "amdsmi_counter", read_j))

    def _open_rapl(self, sys_root: Path) -> None:
        zones = sorted((sys_root / "class/powercap").glob("intel-rapl:*"))
        if not zones:
            self._missed("rapl", f"no intel-rapl zone in {sys_root}/class/powercap")
        for zone in zones:
            try:
                name = (zone / "name").read_text().strip()
                if not name.startswith(("package", "dram")):
                    continue  # core and uncore are inside a package, psys around it
                wraps_at_j = int((zone / "max_energy_range_uj").read_text()) / 1e6
                read_j = _reader(zone / "energy_uj", 1e-6)
                read_j()
            except (OSError, ValueError) as error:
                self._missed(f"rapl {zone.name}", f"{zone}: {getattr(error, 'strerror', None) or error}")
                continue
            self.counters.append(Counter(name.split("-")[0], "rapl", read_j, MIN_RAPL_WINDOW_S, wraps_at_j))

    def _open_grace(self, sys_root: Path) -> None:
        labels = sorted((sys_root / "class/hwmon").glob("hwmon*/device/power1_oem_info"))
        if not labels:
            self._missed("grace hwmon", f"no power1_oem_info below {sys_root}/class/hwmon")
        for label in labels:
            try:
                scope = _GRACE_SCOPES.get(label.read_text().split(" ")[0])
                read_w = _reader(label.with_name("power1_average"), 1e-6)
                read_w()
            except (OSError, ValueError) as error:
                self._missed(f"grace {label.parts[-3]}", f"{label}: {getattr(error, 'strerror', None) or error}")
                continue
            if scope is not None:  # CPU and SysIO are parts of Grace
                self.meters.append(Meter(scope, "grace_hwmon", read_w))

    def _open_pm_counters(self, sys_root: Path) -> None:
        folder = sys_root / "cray/pm_counters"
        if not folder.is_dir():
            self._missed("pm_counters", f"no {folder}")
            return
        for path in sorted([*folder.glob("energy"), *folder.glob("*_energy")]):
            try:
                read_j = _reader(path, 1.0)
                read_j()
            except (OSError, ValueError) as error:
                self._missed(f"pm_counters {path.name}", str(error))
                continue
            part = re.sub(r"\d*_?energy$", "", path.name)
            scope = {"": "node", "cpu": "package", "accel": "accelerators"}.get(part, part)
            self.counters.append(Counter(scope, "pm_counters", read_j))


def find_disagreements(windows: Sequence[EnergyWindow]) -> list[str]:
    """A sentence for each two methods of one scope that are more than MAX_APART_FRAC apart."""
    found = []
    for one, other in combinations(windows, 2):
        low, high = sorted((one, other), key=lambda window: window.joules)
        if one.scope == other.scope and high.joules > low.joules * (1 + MAX_APART_FRAC):
            told = f"{high.joules:.0f} J by {high.method}, {low.joules:.0f} J by {low.method}"
            found.append(f"energy of {one.scope}: {told}; they should be within {MAX_APART_FRAC * 100:g} %")
    return found


def open_nvml(device: torch.device) -> tuple[Any, Any, str]:
    """(module, handle of this device, ""), or (None, None, why not). The UUID holds where devices are hidden, too."""
    nvml, reason = _import("pynvml", "pip install 'aifactory-train[gpu]', or pip install nvidia-ml-py")
    if nvml is None:
        return None, None, reason
    try:
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return nvml, nvml.nvmlDeviceGetHandleByUUID(uuid), ""
    except nvml.NVMLError as error:
        return None, None, f"NVML: {error}"


def open_amdsmi(device: torch.device) -> tuple[Any, Any, str]:
    """(module, handle of this device, ""), or (None, None, why not)."""
    smi, reason = _import("amdsmi", "the package amdsmi comes with ROCm: pip install /opt/rocm/share/amd_smi")
    if smi is None:
        return None, None, reason
    try:
        smi.amdsmi_init()
        properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the bus
        bus = properties.pci_bus_id
        for handle in smi.amdsmi_get_processor_handles():
            if _bus_of(smi.amdsmi_get_gpu_device_bdf(handle)) == bus:
                return smi, handle, ""
    except smi.AmdSmiException as error:
        return None, None, f"amdsmi: {type(error).__name__}: {error}"
    return None, None, f"amdsmi shows no device on PCI bus {bus:#x}"


def amdsmi_joules(answer: dict[str, Any]) -> float:
    """Of amdsmi_get_energy_count: ticks of `counter_resolution` microjoules. Older versions call the ticks `power`."""
    ticks = answer["energy_accumulator"] if "energy_accumulator" in answer else answer["power"]
    return ticks * answer["counter_resolution"] * 1e-6


def _reader(path: Path, scale: float) -> Callable[[], float]:
    """The first number of a file: pm_counters put a unit and a time behind it."""
    return lambda: float(path.read_text().split()[0]) * scale


def _bus_of(address: str) -> int:
    """ "0000:c1:00.0" -> 0xc1."""
    return int(address.split(":")[1], 16)


def _import(name: str, do: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except (ImportError, OSError) as error:  # amdsmi raises what the loader of its library says
        return None, f"{error}; {do}"
