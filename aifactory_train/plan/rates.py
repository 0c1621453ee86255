"""The rates of a device: measured on the machine, else published for it, else those of its family's stock part."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

from aifactory_train.machine.machine import Machine
from aifactory_train.units import format_bytes_per_s, format_flops_per_s

Precision = Literal["fp32", "bf16", "fp8", "fp8_rowwise"]
RateKey = Literal["fp32", "bf16", "fp8"]
RateSource = Literal["measured", "published", "assumed", "unknown"]


@dataclass(frozen=True)
class Family:
    """The vendor's peaks of a stock part, dense, and the most that it draws; None: the part has no such units."""

    name: str
    fp32_flops_per_s: float
    bf16_flops_per_s: float | None
    fp8_flops_per_s: float | None
    memory_bytes_per_s: float
    power_w: float


@dataclass(frozen=True)
class Rates:
    """Of one device. `assumed` has one sentence for the plan's notes for each rate that nobody published.

    peak_flops_per_s: what large matrix products reach where `matmul_source` is "measured", else the peak, of which
        they reach a share. memory_bytes_per_s: the same for reads and writes of the device's own memory.
    """

    peak_flops_per_s: float | None
    memory_bytes_per_s: float | None
    assumed: tuple[str, ...] = ()
    matmul_source: RateSource = "unknown"
    memory_source: RateSource = "unknown"


# Vendors' data sheets, dense figures. The first pattern that is found in a device's name decides, so a part stands
# before another whose name it holds (GH200 before H200), and a variant before its family.
# fp32 is that of plain fp32 units, as PyTorch multiplies unless TF32 is allowed; of a GCD, its matrix cores.
_FAMILIES: tuple[tuple[str, Family], ...] = (
    (r"GB200|GB300", Family("GB200", 80e12, 2500e12, 5000e12, 8.0e12, 1200)),
    (r"B200|B300", Family("B200", 75e12, 2250e12, 4500e12, 8.0e12, 1000)),
    (r"GH200.*144", Family("GH200 144GB", 66.9e12, 989.4e12, 1978.9e12, 4.9e12, 700)),
    (r"GH200", Family("GH200 96GB", 66.9e12, 989.4e12, 1978.9e12, 4.0e12, 700)),
    (r"H200.*NVL", Family("H200 NVL", 60e12, 835.5e12, 1671e12, 4.8e12, 600)),
    (r"H200", Family("H200 SXM", 66.9e12, 989.4e12, 1978.9e12, 4.8e12, 700)),
    (r"H[18]00.*PCIe", Family("H100 PCIe", 51.2e12, 756e12, 1513e12, 2.0e12, 350)),
    (r"H100.*NVL", Family("H100 NVL", 60e12, 835.5e12, 1671e12, 3.9e12, 400)),
    (r"H[18]00", Family("H100 SXM", 66.9e12, 989.4e12, 1978.9e12, 3.35e12, 700)),
    (r"A[18]00.*PCIE.*80|A[18]00.*80.*PCIE", Family("A100 PCIe 80GB", 19.5e12, 312e12, None, 1.935e12, 300)),
    (r"A[18]00.*40", Family("A100 40GB", 19.5e12, 312e12, None, 1.555e12, 400)),
    (r"A[18]00", Family("A100 SXM 80GB", 19.5e12, 312e12, None, 2.0e12, 400)),
    (r"V100", Family("V100 SXM2", 15.7e12, None, None, 0.9e12, 300)),
    (r"MI355X", Family("MI355X", 157.3e12, 2516.6e12, 5033.2e12, 8.0e12, 1400)),
    (r"MI325X", Family("MI325X", 163.4e12, 1307.4e12, 2614.9e12, 6.0e12, 1000)),
    (r"MI300X", Family("MI300X", 163.4e12, 1307.4e12, 2614.9e12, 5.3e12, 750)),
    (r"MI300A", Family("MI300A", 122.6e12, 980.6e12, 1961.2e12, 5.3e12, 760)),
    (r"MI250X", Family("MI250X, one GCD", 47.9e12, 191.5e12, None, 1.6e12, 280)),
    (r"MI250", Family("MI250, one GCD", 45.3e12, 181e12, None, 1.6e12, 280)),
)


@functools.cache
def family_rates(device_name: str) -> Family | None:
    """The stock part of a device's family by its name, as PyTorch shows it; None where the name is of none of them.

    An assumption where it stands in for a rate that nobody published: a custom part is not the stock one.
    """
    for pattern, family in _FAMILIES:
        if re.search(rf"(?<![A-Z0-9])(?:{pattern})(?!\d)", device_name, re.IGNORECASE):
            return family
    return None


def rate_key(precision: Precision) -> RateKey:
    """Under which name machine files have the rates of a precision: vendors publish one for fp8, however scaled."""
    return "fp8" if precision == "fp8_rowwise" else precision


def device_rates(machine: Machine, precision: Precision) -> Rates:
    """Matrix and memory rates of one device in `precision`: measured, else published, else of its family.

    On a CPU a rate is of all its cores together, and a family is never assumed.
    """
    key = rate_key(precision)
    device, measured = machine.device, machine.measured
    family = None if device.kind == "cpu" else family_rates(device.name)
    flops, matmul_source = _first(
        getattr(measured.matmul_flops_per_s, key),
        getattr(device.peak_flops_per_s, key),
        None if family is None else getattr(family, f"{key}_flops_per_s"),
    )
    memory, memory_source = _first(
        measured.memory_bytes_per_s, device.memory_bytes_per_s, None if family is None else family.memory_bytes_per_s
    )
    assumed = []
    if matmul_source == "assumed" and family is not None:
        assumed.append(_note(f"{key} peak", device.name, format_flops_per_s(flops), family))
    if memory_source == "assumed" and family is not None:
        assumed.append(_note("memory rate", device.name, format_bytes_per_s(memory), family))
    return Rates(flops, memory, tuple(assumed), matmul_source, memory_source)


def _first(measured: float | None, published: float | None, assumed: float | None) -> tuple[float | None, RateSource]:
    if measured is not None:
        return measured, "measured"
    if published is not None:
        return published, "published"
    return (None, "unknown") if assumed is None else (assumed, "assumed")


def _note(what: str, device_name: str, rate: str, family: Family) -> str:
    return f"assumed: the {what} of {device_name} is not published; {rate} is that of {family.name}"
