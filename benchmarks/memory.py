"""Bandwidth of the memory of each device: copy, scale, add and triad, as STREAM has them.

Bytes count as STREAM counts them: each array that a kernel reads or writes, once. Arrays are larger than caches.

    python benchmarks/memory.py
    mpirun -n 4 python benchmarks/memory.py --mib 1024
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

import torch

from aifactory_train.measure.program import Program, Quantity, start

MIB = {"cpu": 64, "cuda": 1024}
SCALE = 3.0
# Kernel -> arrays that it moves, and what each element of a is afterwards when b is 1 and c is 2.
KERNELS = {"copy": (2, 1.0), "scale": (2, SCALE), "add": (3, 3.0), "triad": (3, 1.0 + SCALE * 2.0)}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, help=f"size of each of three arrays (default: {MIB})")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))


def build_work(kernel: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Callable[[], object]:
    return {
        "copy": lambda: a.copy_(b),
        "scale": lambda: torch.mul(b, SCALE, out=a),
        "add": lambda: torch.add(b, c, out=a),
        "triad": lambda: torch.add(b, c, alpha=SCALE, out=a),
    }[kernel]


def measure_kernel(program: Program, kernel: str) -> None:
    n_bytes = (program.options.mib or MIB[program.device.type]) << 20
    a, b, c = (torch.full((n_bytes // 4,), value, device=program.device) for value in (0.0, 1.0, 2.0))
    n_arrays, expected = KERNELS[kernel]
    program.measure(
        {"kernel": kernel, "dtype": "fp32", "bytes": n_bytes},
        [Quantity("aifactory_memory_bandwidth_bytes_per_second", float(n_arrays * a.nbytes))],
        build_work(kernel, a, b, c),
        wrong=lambda: int((a != expected).sum()),
    )


def main() -> None:
    with start("memory", __doc__ or "", add_options) as program:
        for kernel in program.options.kernels:
            measure_kernel(program, kernel)


if __name__ == "__main__":
    main()
