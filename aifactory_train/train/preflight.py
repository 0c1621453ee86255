"""What each rank runs before training: is this node fit, and do the ranks reach each other?

Phase 1 is local and waits for nobody but, under MPI, for MPI itself. Phase 2 calls the roll over the store and runs
small collectives; a rank that is not fit says so there, so that nobody waits for it. Each rank keeps its file
attempts/N/preflight/rank-NNNNN.json; launch/fitness.py reads them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aifactory_train.errors import AifactoryError, PreflightFault
from aifactory_train.faults.checks import Fault, Here
from aifactory_train.faults.preflight import CHECKS
from aifactory_train.hostlist import expand
from aifactory_train.plan.plan import load_plan
from aifactory_train.rundir import RunDir, storage_errors, write_atomic
from aifactory_train.train.meet import LIMIT_S, Clock, Verdict, meet
from aifactory_train.train.ranks import Ranks, check_world_size, find_ranks
from aifactory_train.units import format_bytes_per_s, format_flops_per_s, format_seconds

# Where even the watchdog's thread cannot run, because native code holds the interpreter, the system ends the process.
ALARM_S = int(LIMIT_S) + 10


@dataclass
class Report:
    """What one rank has found. missing: ranks that did not come, or went away.

    phase: "local" until the rank has met the others or given up on it.
    """

    rank: int
    local_rank: int
    host: str
    phase: str = "local"
    found: list[Fault] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fit(self) -> bool:
        """Whether this node is; what is `elsewhere` does not count."""
        return all(fault.elsewhere for fault in self.found)

    def write(self, folder: Path) -> None:
        row = {
            "rank": self.rank,
            "local_rank": self.local_rank,
            "host": self.host,
            "ok": not self.found,
            "phase": self.phase,
            "faults": [f.sentence() for f in self.found if not f.elsewhere],
            "elsewhere": [f.sentence() for f in self.found if f.elsewhere],
            "missing": self.missing,
            "facts": self.facts,
        }
        with storage_errors("writing the report of this rank", folder, "free space or get the permission there"):
            write_atomic(folder / f"rank-{self.rank:05d}.json", json.dumps(row, indent=1) + "\n")


@dataclass
class Watch:
    """What the watchdog tells when the time is over. `report` is None until the rank knows who it is."""

    doing: str = "finding out its rank"
    alone: bool = True
    report: Report | None = None
    folder: Path | None = None

    def bark(self) -> None:
        fault = Fault(f"did not end within {LIMIT_S:.0f} s: stuck at {self.doing}", "leave this node out if it recurs")
        where = f"host {socket.gethostname()}"
        if self.report is not None and self.folder is not None:
            where = _where(self.report)
            self.report.found.append(fault._replace(elsewhere=not self.alone))
            self.report.phase = "local" if self.alone else "together"
            self.report.write(self.folder)
        print(PreflightFault(fault.what, where=where, do=fault.do).render(), file=sys.stderr, flush=True)
        os._exit(PreflightFault.exit_code)


def preflight(attempt: Path) -> int:
    """Check this rank's node and the way to the others; ends within LIMIT_S, whatever hangs.

    Leaves by `os._exit`: interpreter shutdown would wait for threads and process groups. The exit code is 0, that of
    PreflightFault where this node or the way to the others is not fit, else that of the error.
    """
    clock, watch = Clock(), Watch()
    signal.alarm(ALARM_S)
    watchdog = threading.Timer(LIMIT_S, watch.bark)
    watchdog.daemon = True
    watchdog.start()
    try:
        code = _preflight(attempt, clock, watch)
    except AifactoryError as error:
        rank = watch.report.rank if watch.report else 0
        if rank == 0 or not error.on_every_rank:
            print(error.render(), file=sys.stderr)
        code = error.exit_code
    except BaseException:  # a bug of ours; what a broken node does to a check is a fault of the node
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _preflight(attempt: Path, clock: Clock, watch: Watch) -> int:
    run = RunDir(attempt.absolute().parent.parent)
    plan = load_plan(run.plan)
    ranks = find_ranks(clock.left_s())
    check_world_size(ranks, plan.layout.world_size)
    per_node = plan.layout.world_size // plan.layout.n_nodes
    hosts = _hosts(attempt, ranks, per_node)
    watch.report = report = Report(ranks.rank, ranks.local_rank, hosts[ranks.rank] or socket.gethostname())
    watch.folder = folder = attempt / "preflight"
    torch.set_num_threads(plan.layout.threads_per_rank)
    here = Here(plan, ranks.rank, ranks.local_rank, run.root, report.facts)
    check_node(here, report, watch)
    report.facts["local_s"] = round(clock.elapsed_s(), 3)
    report.write(folder)
    watch.doing, watch.alone = "meeting the other ranks", False
    verdict = meet(ranks, here, report.fit, clock, report.facts)
    _conclude(report, verdict, hosts, folder)
    report.phase = "together"
    report.facts["total_s"] = round(clock.elapsed_s(), 3)
    report.write(folder)
    _print(report, verdict)
    verdict.leave()
    return PreflightFault.exit_code if report.found else 0


def check_node(here: Here, report: Report, watch: Watch) -> None:
    """Phase 1. What a check raises is a fault of the node; then its device is left alone."""
    device_is_good = True
    for check in CHECKS:
        if check.on_device and not device_is_good:
            continue
        watch.doing = check.doing
        try:
            faults = check.run(here)
        except (RuntimeError, OSError, AssertionError, MemoryError) as error:  # torch reports devices by all of these
            line = (str(error).splitlines() or [""])[0]
            faults = [Fault(f"{check.doing}: {type(error).__name__}: {line}", "look at the node, or leave it out")]
            device_is_good = device_is_good and not check.on_device
        if faults and check.gate:
            device_is_good = False
        report.found += faults


def _hosts(attempt: Path, ranks: Ranks, per_node: int) -> list[str | None]:
    """Slurm's name for each rank's node, by blocks of ranks in the order of the job's node list; None if not known."""
    try:
        names = expand(json.loads((attempt / "job.json").read_text())["node_list"])
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    if len(names) * per_node != ranks.world_size:
        return [None] * ranks.world_size
    return [names[rank // per_node] for rank in range(ranks.world_size)]


def _conclude(report: Report, verdict: Verdict, hosts: list[str | None], folder: Path) -> None:
    """Join what the ranks found together to what this one found alone."""
    report.missing = verdict.missing
    if verdict.slow is not None:
        report.found.append(verdict.slow)
    if verdict.missing:
        shown = ", ".join(_name(rank, hosts, folder) for rank in verdict.missing[:16])
        more = f" and {len(verdict.missing) - 16} more" if len(verdict.missing) > 16 else ""
        what = f"{len(verdict.missing)} of {len(hosts)} ranks {verdict.how_missing}: {shown}{more}"
        report.found.append(Fault(what, "look above for their own message, and at those hosts", elsewhere=True))
    report.found += verdict.faults


def _name(rank: int, hosts: list[str | None], folder: Path) -> str:
    """With its host, by the job's node list or by what the rank itself has written."""
    host = hosts[rank]
    if host is None:
        try:
            host = json.loads((folder / f"rank-{rank:05d}.json").read_text())["host"]
        except (OSError, ValueError, KeyError, TypeError):
            return f"rank {rank}"
    return f"rank {rank} on {host}"


def _where(report: Report) -> str:
    return f"rank {report.rank} (local rank {report.local_rank}) on host {report.host}"


def _print(report: Report, verdict: Verdict) -> None:
    """A rank prints its own faults; what all have met is printed by rank 0, or by one of each node without it."""
    leads = report.rank == 0 or (0 in report.missing and report.local_rank == 0)
    for fault in report.found:
        if leads or not fault.elsewhere:
            error = PreflightFault(fault.what, where=_where(report), do=fault.do)
            print(error.render(), file=sys.stderr)
    if report.rank != 0:
        return
    for warning in report.facts.get("warnings", []):
        print(f"warning: {warning}")
    if verdict.unfit:
        print(f"preflight: not fit: ranks {', '.join(map(str, verdict.unfit[:16]))}; so no collective was tried")
    elif not report.found:
        took = format_seconds(report.facts["total_s"])
        print(f"preflight: all ranks are fit, in {took}; on rank 0 {_rates(report.facts)}")


def _rates(facts: dict[str, Any]) -> str:
    rates = [
        f"matrix products {format_flops_per_s(facts.get('matmul_flops_per_s'))}",
        f"copies {format_bytes_per_s(facts.get('memory_bytes_per_s'))}",
    ]
    if facts.get("all_reduce_bytes_per_s"):  # one rank alone moves nothing
        rates.append(f"all-reduce {format_bytes_per_s(facts['all_reduce_bytes_per_s'])} bus bandwidth")
    return ", ".join(rates)
