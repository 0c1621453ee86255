"""Device pairs of a node, or node pairs of a job: both ways, and a fault for each pair that does not come to an end.

On one node with GPUs: copies from each device to each other one. On several nodes: a tournament, each node meeting
each other one; rank i of one sends to rank i of the other, all i at once, then back, then both nodes do an all_reduce.
On one node without GPUs its ranks are the pairs. A pair that is not done within --pair-timeout-s is reported with both
hosts, and the others are still measured.

    srun python benchmarks/p2p.py --alone
    srun --export=ALL,NCCL_ALGO=RING python benchmarks/p2p.py --machine NAME
    mpirun -n 2 python benchmarks/p2p.py --bytes 1048576
"""

from __future__ import annotations

import itertools
import socket
from argparse import ArgumentParser
from typing import Any

import torch

from aifactory_train.bench.record import Protocol, Validity
from aifactory_train.bench.statistics import steady_from
from aifactory_train.bench.wire import bus_factor, device_pair_bytes_per_s, nic_bytes_per_s
from aifactory_train.measure.control import Missing
from aifactory_train.measure.pairs import OPS, Pair, Task, rounds_of, run_child
from aifactory_train.measure.program import Program, start
from aifactory_train.measure.timing import time_calls

BYTES = {"cpu": 1 << 20, "cuda": 256 << 20}
ENDED = "it has ended"
RATE = "aifactory_p2p_bandwidth_bytes_per_second"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--bytes", type=int, help=f"of a message (default: {BYTES})")
    parser.add_argument("--calls", type=int, default=50, help="that count (default: 50)")
    parser.add_argument("--warmup-calls", type=int, default=10, help="after the first one (default: 10)")
    parser.add_argument("--pair-timeout-s", type=float, default=60.0, help="for all of a pair (default: 60)")


def protocol_of(program: Program, times: dict[int, list[float]]) -> Protocol:
    warmup_calls = 1 + program.options.warmup_calls
    slowest = [max(of_all) for of_all in zip(*times.values(), strict=True)]
    return Protocol(
        warmup_steps=warmup_calls,
        warmup_rule=f"{warmup_calls} calls; then steady where the medians of two windows of 10 samples agree",
        steady=steady_from(slowest) is not None,
        timed_steps=program.options.calls,
        timer="device_event+wall" if program.device.type == "cuda" else "wall",
        rank_reduction="max",
        ci_reached=False,
    )


def measure_devices(program: Program, n_bytes: int) -> None:
    """The first rank of each node copies between all of its devices, one pair at a time."""
    control, options, n = program.control, program.options, torch.cuda.device_count()
    leads = control.hosts.index(control.hosts[control.rank]) == control.rank
    for source, target in itertools.permutations(range(n), 2):
        cell = {"src": source, "dst": target, "mode": "copy", "bytes": n_bytes}
        times, n_wrong = [], 0
        with program.watched(cell):
            if leads:
                given = torch.randint(255, (n_bytes,), dtype=torch.uint8, device=f"cuda:{source}")
                got = torch.zeros(n_bytes, dtype=torch.uint8, device=f"cuda:{target}")
                calls = 1 + options.warmup_calls + options.calls
                with torch.cuda.device(source):
                    times = time_calls(lambda a=given, b=got: b.copy_(a), given.device, None, calls)
                n_wrong = int((got.to(given.device) != given).sum())
            reports = control.gather([times[1 + options.warmup_calls :], n_wrong], options.timeout_s)
        found = {rank: report[0] for rank, report in enumerate(reports or []) if report[0]}
        if found:
            samples = {RATE: {rank: [n_bytes / s for s in seconds] for rank, seconds in found.items()}}
            facts = {"wire_bytes_per_s": device_pair_bytes_per_s(program.machine, source, target)}
            valid = Validity(wrong_values=sum(report[1] for report in reports or []))
            program.write(cell, samples, protocol_of(program, found), facts=facts, validity=valid)


def measure_pairs(program: Program, ends: dict[str, list[int]], n_bytes: int) -> None:
    """ends: name -> its ranks, which are the nodes, or the ranks of the only node."""
    control, options = program.control, program.options
    for pairs in rounds_of(list(ends)):
        with socket.socket() as free:
            free.bind(("", 0))
            meeting = [socket.gethostname(), free.getsockname()[1]]
        places = control.broadcast(control.gather(meeting, options.timeout_s), options.timeout_s)
        own: dict[str, Any] | None = None
        for first, second in pairs:
            n = min(len(ends[first]), len(ends[second]))
            ranks = ends[first][:n] + ends[second][:n]
            if control.rank in ranks:
                address, port = places[ranks[0]]
                address = "127.0.0.1" if len({places[r][0] for r in ranks}) == 1 else address
                where = (ranks.index(control.rank), 2 * n, address, port, str(program.device), n_bytes)
                own = run_child(Task(*where, options.calls, options.warmup_calls, options.pair_timeout_s))
        try:
            reports = control.gather(own, options.pair_timeout_s + options.timeout_s)
        except Missing as error:
            for pair in pairs:
                if any(rank in error.ranks for end in pair for rank in ends[end]):
                    told = [{"fault": ENDED} if r in error.ranks else {} for r in range(control.size)]
                    write_pair(program, ends, pair, told, n_bytes)
            raise
        for pair in pairs if reports is not None else ():
            write_pair(program, ends, pair, reports or [], n_bytes)


def write_pair(program: Program, ends: dict[str, list[int]], pair: Pair, reports: list, n_bytes: int) -> None:
    n = min(len(ends[end]) for end in pair)
    ranks = [rank for end in pair for rank in ends[end][:n]]
    hosts = list(dict.fromkeys(program.control.hosts[rank] for rank in ranks))
    cell = {"pair": "+".join(pair), "bytes": n_bytes}
    faults = [f"rank {r} on {program.control.hosts[r]}: {reports[r]['fault']}" for r in ranks if "fault" in reports[r]]
    if faults:
        what = f"{pair[0]} and {pair[1]} do not reach each other: {'; '.join(faults)}"
        ended = [hosts.index(program.control.hosts[r]) for r in ranks if reports[r].get("fault") == ENDED]
        program.write(cell, {}, None, hosts=hosts, fault=what, facts={"missing_ranks": ended})
        return
    wrong = Validity(wrong_values=sum(reports[r]["wrong"] for r in ranks))
    nic = nic_bytes_per_s(program.machine) if len(hosts) > 1 else None
    for op in OPS:
        times = {r: reports[r]["seconds"][op] for r in ranks}
        moved = n_bytes * (bus_factor("all_reduce", 2 * n) if op == "all_reduce" else 1)
        samples = {RATE: {r: [moved / s for s in seconds] for r, seconds in times.items()}}
        facts = {"init_s": max(reports[r]["first_s"][op] for r in ranks), "nic_bytes_per_s": nic}
        protocol = protocol_of(program, times)
        program.write({**cell, "mode": op}, samples, protocol, hosts=hosts, facts=facts, validity=wrong)


def main() -> None:
    with start("p2p", __doc__ or "", add_options) as program:
        hosts, kind = program.control.hosts, program.device.type
        n_bytes = program.options.bytes or BYTES[kind]
        ends: dict[str, list[int]] = {}
        for rank, host in enumerate(hosts):
            ends.setdefault(host if len(set(hosts)) > 1 else f"{host}:{rank}", []).append(rank)
        if len(set(hosts)) == 1 and kind == "cuda" and torch.cuda.device_count() > 1:
            measure_devices(program, n_bytes)
        elif len(ends) > 1:
            measure_pairs(program, ends, n_bytes)
        else:
            program.write({"bytes": n_bytes}, {}, None, facts={"skipped": "one device alone makes no pair"})


if __name__ == "__main__":
    main()
