"""Bandwidth of copies between the host and each device, in each direction and in both at once, from pinned memory.

Without a GPU there is no such link: then no record is written, and a line says so.

    python benchmarks/hostlink.py
    srun --ntasks-per-node=4 python benchmarks/hostlink.py --alone
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable

import torch

from aifactory_train.measure.program import Program, Quantity, start

DIRECTIONS = ("host_to_device", "device_to_host", "both")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, nargs="+", default=[512], help="size of a copy (default: 512)")


def measure_copies(program: Program, direction: str, n_bytes: int) -> None:
    """All ranks of a node copy at once, as training does."""
    upward, downward = (torch.randint(255, (n_bytes,), dtype=torch.uint8).pin_memory() for _ in range(2))
    on_device = upward.to(program.device)
    target = torch.empty_like(on_device)
    side = torch.cuda.Stream(program.device)

    def both() -> None:
        here = torch.cuda.current_stream(program.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            downward.copy_(on_device, non_blocking=True)
        target.copy_(upward, non_blocking=True)
        here.wait_stream(side)

    work: dict[str, Callable[[], object]] = {
        "host_to_device": lambda: target.copy_(upward, non_blocking=True),
        "device_to_host": lambda: downward.copy_(on_device, non_blocking=True),
        "both": both,
    }

    def wrong() -> int:
        up = 0 if direction == "device_to_host" else int((target != on_device).sum())
        return up + (0 if direction == "host_to_device" else int((downward != upward).sum()))

    moved = n_bytes * (2 if direction == "both" else 1)
    rate = Quantity("aifactory_hostlink_bandwidth_bytes_per_second", float(moved))
    program.measure(
        {"direction": direction, "bytes": n_bytes, "memory": "pinned"}, [rate], work[direction], wrong=wrong
    )


def main() -> None:
    with start("hostlink", __doc__ or "", add_options) as program:
        if program.device.type != "cuda":
            if program.control.rank == 0:
                print("hostlink: skipped: no GPU that torch sees, so there is no link between host and device")
            return
        for mib in program.options.mib:
            for direction in DIRECTIONS:
                measure_copies(program, direction, mib << 20)


if __name__ == "__main__":
    main()
