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
    """Of one window. Lists hold one value per look; slowed_by: names of SLOWED_BY that were seen."""

    sm_clock_hertz: list[float] = field(default_factory=list)
    temperature_celsius: list[float] = field(default_factory=list)
    power_watts: list[float] = field(default_factory=list)
    slowed_by: list[str] = field(default_factory=list)
    power_capped_looks: int = 0
    ecc_errors: int | None = None

    @property
    def throttled(self) -> bool:
        return bool(self.slowed_by)


class HealthMonitor:
    """Looks at this rank's GPU from `begin` to `end`; where it cannot, `unavailable` says why."""

    def __init__(self, device: torch.device) -> None:
        self.unavailable: list[Unavailable] = []
        self._nvml: Any = None
        self._stop = threading.Event()
        self._health = Health()
        self._errors_before: int | None = None
        reason = "no GPU: the clock and heat of a CPU are not read"
        if device.type == "cuda" and torch.version.hip:
            reason = "clock and heat of AMD's devices are not read"
        elif device.type == "cuda":
            self._nvml, self._handle, reason = open_nvml(device)
        if self._nvml is None:
            self.unavailable.append(Unavailable(probe="device health", reason=reason))

    def begin(self) -> None:
        if self._nvml is None:
            return
        self._health, self._stop = Health(), threading.Event()
        self._errors_before = self._ecc_errors()
        threading.Thread(target=self._watch, args=[self._stop, self._health], daemon=True).start()

    def end(self) -> Health | None:
        """None where nothing can be looked at."""
        if self._nvml is None:
            return None
        self._stop.set()
        self._look(self._health)
        errors = self._ecc_errors()
        if errors is not None and self._errors_before is not None:
            self._health.ecc_errors = errors - self._errors_before
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
