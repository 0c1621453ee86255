"""Is this node fit to train on? What one rank checks alone, against what the plan and its machine promise.

The checks of the device are here, those of the host in host.py. A `check_` function looks at the node and calls a
pure one that judges what was seen: those end in `_faults`.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from aifactory_train.faults.checks import Check, Fault, Here, read_text
from aifactory_train.faults.host import check_binding, check_disk, check_network, check_traps
from aifactory_train.machine.machine import Device
from aifactory_train.metrics.outliers import SLOW_FRAC
from aifactory_train.metrics.rates import MATMUL_SIZE, measure_matmul_flops_per_s, measure_memory_bytes_per_s
from aifactory_train.models.parts import DTYPES
from aifactory_train.units import format_bytes, format_bytes_per_s, format_flops_per_s, format_fraction

# Between what a vendor prints and what is left for programs lie GB against GiB (7 %) and ECC; between two variants
# of a device (40 and 64 GB, 64 and 80 GB) lies a quarter.
MEMORY_AT_LEAST_FRAC, MEMORY_AT_MOST_FRAC = 0.91, 1.12
OCCUPIED_FRAC = 0.1
# Enough for a median on a shared CPU, in time.
REPEATS = 3
SOAK_S = 1.0


def check_devices(here: Here) -> list[Fault]:
    """Number, kind, name and memory of what torch sees."""
    wanted = here.machine.device
    if wanted.kind == "cpu":
        seen_bytes = _mem_total_bytes(read_text(Path("/proc/meminfo")))
        return [] if seen_bytes is None else memory_faults(wanted, seen_bytes, at_most=False)
    if not torch.cuda.is_available():
        return [
            Fault(
                f"torch {torch.__version__} sees no GPU, expected {wanted.per_node} x {wanted.name}",
                "look at nvidia-smi or rocm-smi on that node; torch must be built for these GPUs",
            )
        ]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    here.facts["devices"] = names
    faults = device_faults(wanted, names, "rocm" if torch.version.hip else "cuda")
    if not faults:
        torch.cuda.set_device(here.device)
        properties = torch.cuda.get_device_properties(here.device)
        # A rank's GPU by its place on the bus too: what `uuid` means differs between vendors.
        bus = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
        here.facts["device_id"] = f"{getattr(properties, 'uuid', None)} {bus}"
        faults = memory_faults(wanted, properties.total_memory)
    return faults


def device_faults(wanted: Device, names: list[str], kind: str) -> list[Fault]:
    """`names`: of each device that torch sees: all of the node, or the rank's own."""
    if kind != wanted.kind:
        what = f"torch is built for {kind}, the machine has {wanted.kind} devices"
        return [Fault(what, "take a torch built for these GPUs, as in the site's container")]
    if len(names) not in (1, wanted.per_node):
        what = f"torch sees {len(names)} devices, expected {wanted.per_node} (or one, the rank's own)"
        return [Fault(what, "ask for all devices of the node; if the job did, leave the node out: sbatch --exclude")]
    model = _model(wanted.name)
    other = sorted({name for name in names if model and _model(name) and _model(name) != model})
    if other:
        return [Fault(f"the devices are {', '.join(other)}, expected {wanted.name}", "take the machine's partition")]
    return []


def _model(name: str) -> str | None:
    """ "NVIDIA A100-SXM4-40GB" -> "A100": the rest is told in many ways."""
    found = re.search(r"\b[A-Z]{1,3}\d{2,4}[A-Z]?\b", name)
    return found.group() if found else None


def memory_faults(wanted: Device, seen_bytes: int, at_most: bool = True) -> list[Fault]:
    if wanted.memory_bytes is None:
        return []
    frac = seen_bytes / wanted.memory_bytes
    if frac >= MEMORY_AT_LEAST_FRAC and (frac <= MEMORY_AT_MOST_FRAC or not at_most):
        return []
    what = f"the device has {format_bytes(seen_bytes)}, expected {format_bytes(wanted.memory_bytes)}"
    return [Fault(what, "look whether the partition has several kinds of node, or a GPU is cut into slices (MIG)")]


def check_memory(here: Here) -> list[Fault]:
    """Whether something else sits on this rank's device."""
    if here.device.type == "cpu":
        return []
    free, total = torch.cuda.mem_get_info(here.device)
    here.facts["free_device_bytes"] = free
    faults = occupied_faults(free, total, "")
    return faults and occupied_faults(free, total, _processes_on_gpus())


def occupied_faults(free_bytes: int, total_bytes: int, processes: str) -> list[Fault]:
    used = total_bytes - free_bytes
    if used <= OCCUPIED_FRAC * total_bytes:
        return []
    what = f"{format_bytes(used)} of {format_bytes(total_bytes)} on the device are taken by something else"
    return [Fault(what + (f": {processes}" if processes else ""), "end that process, or leave the node out")]


def _processes_on_gpus() -> str:
    """Who computes on the GPUs of this node, as far as the driver shows it to us."""
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in done.stdout.splitlines() if not line.startswith(f"{os.getpid()},"))


def check_products(here: Here) -> list[Fault]:
    """A GPU is kept at it for a second: memory and arithmetic that go wrong do so when warm."""
    seconds = SOAK_S if here.device.type == "cuda" else 0.0
    finite, n_wrong, n = repeat_product(here.device, DTYPES[here.plan.layout.precision], seconds)
    return product_faults(finite, n_wrong, n)


def repeat_product(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[bool, int, int]:
    """Whether a matrix product is finite, how many of its repeats differ from it, and how many there were.

    The factors hold small whole numbers: every sum is exact in fp32, so that no order of summation may differ.
    """
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randint(-2, 3, (size, size), device=device).to(dtype) for _ in range(2))
    first = a @ b
    n_wrong = torch.zeros((), dtype=torch.int64, device=device)
    n, end_s = 0, time.perf_counter() + seconds
    while n == 0 or time.perf_counter() < end_s:
        n_wrong += (a @ b != first).any()
        n += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return bool(first.isfinite().all()), int(n_wrong), n


def product_faults(finite: bool, n_wrong: int, n: int) -> list[Fault]:
    do = "leave this node out: sbatch --exclude, and tell the site that the device computes wrongly"
    faults = [] if finite else [Fault("a product of small whole numbers is not finite", do)]
    if n_wrong:
        faults.append(Fault(f"{n_wrong} of {n} repeats of one matrix product gave another result", do))
    return faults


def check_matmul_rate(here: Here) -> list[Fault]:
    rate = measure_matmul_flops_per_s(here.device, DTYPES[here.plan.layout.precision], REPEATS)
    here.facts["matmul_flops_per_s"] = rate
    precision = "fp32" if DTYPES[here.plan.layout.precision] == torch.float32 else "bf16"
    wanted = getattr(here.machine.measured.matmul_flops_per_s, precision)
    return rate_faults(f"matrix products ({precision})", rate, _share(here, wanted), format_flops_per_s)


def check_copy_rate(here: Here) -> list[Fault]:
    rate = measure_memory_bytes_per_s(here.device, REPEATS)
    here.facts["memory_bytes_per_s"] = rate
    return rate_faults(
        "a memory copy", rate, _share(here, here.machine.measured.memory_bytes_per_s), format_bytes_per_s
    )


def _share(here: Here, rate: float | None) -> float | None:
    """The machine file's rates are of one device; the ranks of a CPU node share theirs."""
    return rate / here.ranks_per_node if rate is not None and here.machine.device.kind == "cpu" else rate


def rate_faults(what: str, seen: float, wanted: float | None, shown: Callable[[float], str]) -> list[Fault]:
    if wanted is None or seen >= SLOW_FRAC * wanted:
        return []
    return [
        Fault(
            f"{what} at {shown(seen)}, {format_fraction(seen / wanted)} of the {shown(wanted)} in the machine file",
            "leave this node out: sbatch --exclude; if all nodes are that slow, measure again: aifactory-train probe",
        )
    ]


def _mem_total_bytes(meminfo: str) -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


# What needs no device first: a broken one may take the process with it.
CHECKS = (
    Check("the CPU binding", check_binding),
    Check("the network cards", check_network),
    Check("free disk", check_disk),
    Check("versions that are known to fail", check_traps),
    Check("the devices", check_devices, on_device=True, gate=True),
    Check("free memory of the device", check_memory, on_device=True),
    Check("the result of a matrix product", check_products, on_device=True),
    Check("the rate of matrix products", check_matmul_rate, on_device=True),
    Check("the rate of a memory copy", check_copy_rate, on_device=True),
)
