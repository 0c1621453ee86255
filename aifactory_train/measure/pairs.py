"""Pairs of nodes, each measured by processes of its own under a time-out.

A broken link shows as a hang that no time-out inside the communication library ends reliably. So each rank starts a
child for each round; children of two nodes meet at a store, measure, and print one line. A child that is late is ended,
and its pair has a fault; the ranks themselves only talk over the control plane, and go on with the next round.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from aifactory_train.bench.wire import Op
from aifactory_train.measure.collectives import Exchange, build_exchange

# Both ways between rank i of one node and rank i of the other, all i at once, and a collective over both nodes.
OPS = ("send", "receive", "all_reduce")
Pair = tuple[str, str]


class Task(NamedTuple):
    """What a child does, as JSON on its command line. rank: among the `size` ranks of both nodes, first node first."""

    rank: int
    size: int
    address: str
    port: int
    device: str
    n_bytes: int
    calls: int
    warmup_calls: int
    timeout_s: float


def rounds_of(hosts: Sequence[str]) -> list[list[Pair]]:
    """A tournament: each host meets each other one once, and in a round each host has one partner at most."""
    table: list[str | None] = list(hosts)
    if len(table) % 2:
        table.append(None)
    found = []
    for _ in range(len(table) - 1):
        pairs = [(table[i], table[-1 - i]) for i in range(len(table) // 2)]
        found.append([(a, b) if a < b else (b, a) for a, b in pairs if a is not None and b is not None])
        table = [table[0], table[-1], *table[1:-1]]
    return found


def run_child(task: Task) -> dict[str, Any]:
    """In a process of its own: {"seconds": {op: [...]}, "first_s": {op: ...}, "wrong": n} or {"fault": sentence}."""
    command = [sys.executable, "-m", "aifactory_train.measure.pairs", json.dumps(task)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, words = child.communicate(timeout=task.timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"fault": f"no answer within {task.timeout_s:.0f} s"}
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if child.returncode == 0 and lines:
        return json.loads(lines[-1])
    if child.returncode < 0:
        return {"fault": f"its process was killed by signal {-child.returncode}"}
    last = ([line for line in words.splitlines() if line.strip()] or ["no words"])[-1]
    return {"fault": f"its process ended with {child.returncode}: {last[:300]}"}


def measure_pair(task: Task) -> dict[str, Any]:
    """What a child does: meet the other ranks of both nodes, exchange, check."""
    device = torch.device(task.device)
    timeout = timedelta(seconds=task.timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = dist.TCPStore(task.address, task.port, task.size, task.rank == 0, timeout, wait_for_workers=False)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=task.rank, world_size=task.size, timeout=timeout)
    found: dict[str, Any] = {"seconds": {}, "first_s": {}, "wrong": 0}
    for op in OPS:
        kind: Op = "all_reduce" if op == "all_reduce" else "sendrecv"
        exchange = build_exchange(kind, task.n_bytes, torch.float32, device)
        work = exchange.run if op == "all_reduce" else _one_way(exchange, task, op)
        times = [_timed(work, exchange, device) for _ in range(1 + task.warmup_calls + task.calls)]
        found["first_s"][op], found["seconds"][op] = times[0], times[1 + task.warmup_calls :]
        found["wrong"] += exchange.count_wrong()
    dist.barrier()  # all ranks arrive: nobody leaves while others still talk to it
    return found


def _timed(work: Any, exchange: Exchange, device: torch.device) -> float:
    exchange.refresh()
    dist.barrier()  # all ranks begin together, so that one that is late is not counted as a slow link
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin_s


def _one_way(exchange: Exchange, task: Task, op: str) -> Any:
    """From each rank of the first node to its partner on the second one, or back."""
    half = task.size // 2
    on_first = task.rank < half
    partner = task.rank + half if on_first else task.rank - half

    def work() -> None:
        if on_first == (op == "send"):
            dist.send(exchange.given, partner)
        else:
            dist.recv(exchange.got, partner)

    return work


if __name__ == "__main__":
    print(json.dumps(measure_pair(Task(*json.loads(sys.argv[1])))), flush=True)
    # All is measured and said. gloo's threads abort now and then while the interpreter takes itself down, and that
    # would be told as a dead link.
    os._exit(0)
