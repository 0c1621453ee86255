"""Measured rates of one device, for the `measured` block of a machine file."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
WARMUP = 2
REPEATS = 7


def measure_matmul_flops_per_s(device: torch.device, dtype: torch.dtype, repeats: int = REPEATS) -> float:
    """Median rate of square matrix products of random numbers; 2 n^3 FLOPs each, all threads."""
    size = MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _median_s(lambda: a @ b, device, repeats)


def measure_memory_bytes_per_s(device: torch.device, repeats: int = REPEATS) -> float:
    """Median rate of a copy, read and written bytes both counted."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _median_s(lambda: target.copy_(source), device, repeats)


def _median_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    times_s = []
    for _ in range(WARMUP + repeats):
        _synchronize(device)
        t0_s = time.perf_counter()
        work()
        _synchronize(device)
        times_s.append(time.perf_counter() - t0_s)
    return sorted(times_s[WARMUP:])[repeats // 2]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
