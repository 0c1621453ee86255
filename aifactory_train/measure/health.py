"""How a GPU fares in a timed window: clock, heat, power, and what slowed it down. Looked at each second.

A number taken while heat or hardware held the clock down is not that of a sound device.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from aifactory_train.bench.record import Unavailable
from aifactory_train.measure.energy import open_nvml

PERIOD_S = 1.0
# Bits of NVML's clock event reasons that mean a fault or heat. A power cap that the site has set is none of them.
SLOWED_BY = {
    "hardware slowdown": 0x08,
    "software thermal slowdown": 0x20,
    "hardware thermal slowdown": 0x40,
    "hardware power brake": 0x80,
}
POWER_CAP = 0x04


@dataclass
class Health:
    """Of one window. Lists hold one value per look; slowed_by: names of SLOWED_BY that were seen.

    ecc_errors: uncorrected ones; remapped_rows: of memory, taken out of use for errors. Both None for devices that do
    not count them. xids: numbers of the driver's error reports, as NVIDIA's table of Xid errors has them.
    """

    sm_clock_hertz: list[float] = field(default_factory=list)
    temperature_celsius: list[float] = field(default_factory=list)
    power_watts: list[float] = field(default_factory=list)
    slowed_by: list[str] = field(default_factory=list)
    power_capped_looks: int = 0
    ecc_errors: int | None = None
    remapped_rows: int | None = None
    xids: list[int] = field(default_factory=list)

    @property
    def throttled(self) -> bool:
        return bool(self.slowed_by)

    @property
    def errors(self) -> list[str]:
        """What the device or its driver reported of itself as broken."""
        counts = {"uncorrected memory errors": self.ecc_errors, "memory rows remapped": self.remapped_rows}
        return [f"{count} {what}" for what, count in counts.items() if count] + [f"Xid {xid}" for xid in self.xids]


class HealthMonitor:
    """Looks at this rank's GPU from `begin` to `end`; where it cannot, `unavailable` says why."""

    def __init__(self, device: torch.device) -> None:
        self.unavailable: list[Unavailable] = []
        self._nvml: Any = None
        self._stop = threading.Event()
        self._health = Health()
        self._before: tuple[int | None, int | None] = None, None
        self._events: Any = None
        reason = "no GPU: the clock and heat of a CPU are not read"
        if device.type == "cuda" and torch.version.hip:
            reason = "clock and heat of AMD's devices are not read"
        elif device.type == "cuda":
            self._nvml, self._handle, reason = open_nvml(device)
        if self._nvml is None:
            self.unavailable.append(Unavailable(probe="device health", reason=reason))
        else:
            self._listen()

    def begin(self) -> None:
        if self._nvml is None:
            return
        self._health, self._stop = Health(), threading.Event()
        self._xids()  # of the time before
        self._before = self._ecc_errors(), self._remapped_rows()
        threading.Thread(target=self._watch, args=[self._stop, self._health], daemon=True).start()

    def end(self) -> Health | None:
        """None where nothing can be looked at."""
        if self._nvml is None:
            return None
        self._stop.set()
        self._look(self._health)
        self._health.xids = self._xids()
        errors, rows = self._ecc_errors(), self._remapped_rows()
        if errors is not None and self._before[0] is not None:
            self._health.ecc_errors = errors - self._before[0]
        if rows is not None and self._before[1] is not None:
            self._health.remapped_rows = rows - self._before[1]
        return self._health

    def _watch(self, stop: threading.Event, health: Health) -> None:
        while not stop.wait(PERIOD_S):
            self._look(health)

    def _look(self, health: Health) -> None:
        nvml, handle = self._nvml, self._handle
        try:
            health.sm_clock_hertz.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6)
            health.temperature_celsius.append(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            health.power_watts.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)
            reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        except nvml.NVMLError as error:
            missed = Unavailable(probe="device health", reason=f"NVML: {error}")
            if missed not in self.unavailable:
                self.unavailable.append(missed)
            return
        health.power_capped_looks += bool(reasons & POWER_CAP)
        for name, bit in SLOWED_BY.items():
            if reasons & bit and name not in health.slowed_by:
                health.slowed_by.append(name)

    def _ecc_errors(self) -> int | None:
        """Uncorrected memory errors since the driver was loaded; None for devices that do not count them."""
        nvml = self._nvml
        try:
            kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            return int(nvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, since))
        except nvml.NVMLError:
            return None

    def _remapped_rows(self) -> int | None:
        """Since the device was made, for corrected and uncorrected errors."""
        try:
            return sum(self._nvml.nvmlDeviceGetRemappedRows(self._handle)[:2])
        except self._nvml.NVMLError:
            return None

    def _listen(self) -> None:
        nvml = self._nvml
        try:
            self._events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(self._handle, nvml.nvmlEventTypeXidCriticalError, self._events)
        except nvml.NVMLError as error:
            self._events = None
            self.unavailable.append(Unavailable(probe="Xid errors", reason=f"NVML: {error}"))

    def _xids(self) -> list[int]:
        """Reported since the last call."""
        xids: list[int] = []
        while self._events is not None:
            try:
                xids.append(int(self._nvml.nvmlEventSetWait(self._events, 0).eventData))
            except self._nvml.NVMLError:  # there is no more
                break
        return xids
