"""Bandwidth of collectives over all ranks: all_reduce, all_gather, reduce_scatter, all_to_all, sendrecv in a ring.

Sizes go from 32 KiB to --max-bytes, each twice the one before. Algorithm and bus bandwidth are those of nccl-tests,
and each result is checked. The first call of a cell stands apart in its facts, as does what the machine's links allow.
NCCL takes a tree over two nodes, which is no test of the wires: start with NCCL_ALGO=RING for that, which the cell
then names, and the rate of a NIC is derived.

    mpirun -n 2 python benchmarks/collectives.py --max-bytes 1048576
    srun --export=ALL,NCCL_ALGO=RING python benchmarks/collectives.py --machine NAME --ops all_reduce
    srun python benchmarks/collectives.py --nccl-tests DIR
"""

from __future__ import annotations

import time
from argparse import ArgumentParser
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.bench.wire import OPS, Op, bus_factor, estimate_wire
from aifactory_train.measure.collectives import build_exchange
from aifactory_train.measure.nccltests import find_nccl_tests, write_nccl_tests
from aifactory_train.measure.program import Program, Quantity, start
from aifactory_train.train.ranks import join, quoted_environment

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALLEST_BYTES = 32 << 10
MAX_BYTES = {"cpu": 1 << 20, "cuda": 4 << 30}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--max-bytes", type=int, help=f"the largest size (default: {MAX_BYTES})")
    parser.add_argument("--nccl-tests", metavar="DIR", help="its binaries are run, too (default: those on PATH)")


def sizes(program: Program) -> list[int]:
    largest = program.options.max_bytes or MAX_BYTES[program.device.type]
    return [SMALLEST_BYTES << i for i in range(64) if SMALLEST_BYTES << i <= largest] or [largest]


def measure_op(program: Program, op: Op, dtype: str, n_bytes: int, algo: str) -> None:
    n, hosts = program.control.size, program.control.hosts
    n_nodes = len(set(hosts))
    exchange = build_exchange(op, n_bytes, DTYPES[dtype], program.device)
    cell = {"op": op, "bytes": n_bytes, "dtype": dtype, "nodes": n_nodes, "algo": algo, "by": "torch"}
    wire = estimate_wire(program.machine, op, exchange.n_bytes, n, n_nodes)
    with program.watched(cell):
        program.control.barrier(program.options.timeout_s)
        begin_s = time.perf_counter()
        exchange.run()
        if program.device.type == "cuda":
            torch.cuda.synchronize(program.device)
        first_s = program.control.gather(time.perf_counter() - begin_s, program.options.timeout_s)
    facts: dict[str, Any] = {
        "init_s": first_s and max(first_s),
        "wire": wire._asdict(),
        "backend": dist.get_backend_config(),
    }
    bus_bytes = exchange.n_bytes * bus_factor(op, n)
    quantities = [
        Quantity("aifactory_collective_duration_seconds"),
        Quantity("aifactory_collective_algorithm_bandwidth_bytes_per_second", exchange.n_bytes),
        Quantity("aifactory_collective_bus_bandwidth_bytes_per_second", bus_bytes),
    ]
    nics = program.machine.network.nics_per_node
    if n_nodes > 1 and algo == "ring" and op in ("all_reduce", "all_gather", "reduce_scatter") and nics:
        # All rings together enter and leave a node once, over all of its NICs.
        quantities.append(Quantity("aifactory_collective_nic_rate_bytes_per_second", bus_bytes / nics))
    before = exchange.refresh if exchange.pristine is not None else None
    program.measure(cell, quantities, exchange.run, before=before, wrong=exchange.count_wrong, facts=facts)


def main() -> None:
    with start("collectives", __doc__ or "", add_options) as program:
        options = program.options
        if program.control.size == 1:
            why = "one rank alone has nobody to exchange anything with"
            program.write({"op": " ".join(options.ops)}, {}, None, facts={"skipped": why})
            return
        join(program.ranks, program.device, options.timeout_s)
        algo = quoted_environment().get("NCCL_ALGO", "default").lower()
        for op in options.ops:
            for dtype in options.dtypes:
                for n_bytes in sizes(program):
                    measure_op(program, op, dtype, n_bytes, algo)
                folder = find_nccl_tests(options.nccl_tests) if program.device.type == "cuda" else None
                if folder is not None:
                    write_nccl_tests(program, folder, op, dtype, SMALLEST_BYTES, sizes(program)[-1], algo)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
