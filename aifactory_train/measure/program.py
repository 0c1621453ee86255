"""The frame of every benchmark program: its options, its ranks, its record, and its end when something goes wrong.

with start("gemm", __doc__, add_options) as program:
    program.measure({"dtype": "bf16"}, [Quantity("aifactory_gemm_flops_per_second", 2.0 * m * n * k)], work)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch

from aifactory_train.bench.metric_names import NAMES
from aifactory_train.bench.record import (
    EnergyWindow,
    Flops,
    Judgement,
    Metric,
    Protocol,
    Record,
    Scalar,
    Unavailable,
    Validity,
    build_metric,
    new_id,
    write_record,
)
from aifactory_train.errors import AifactoryError, Interrupted, RendezvousError
from aifactory_train.machine.load import LOCAL, load_machine
from aifactory_train.machine.machine import Machine
from aifactory_train.measure.control import VERDICT_S, Control, Missing, build_control, limited_start, raise_interrupted
from aifactory_train.measure.energy import MIN_WINDOW_S
from aifactory_train.measure.hardware import find_libraries, probe_place
from aifactory_train.measure.meters import Meters, join_windows
from aifactory_train.measure.surroundings import bind_threads, pick_device, probe_rank, probe_surroundings
from aifactory_train.measure.timing import Limits, WarmUp, Work, sample, warm_up
from aifactory_train.train.ranks import Ranks, _open_store, find_ranks, node_name
from aifactory_train.units import format_quantity

ROLL_CALL_S = 10.0
SIGNAL_ROLL_CALL_S = 0.4
SOAK_S = {"cpu": 0.0, "cuda": 30.0}
BUDGET_S = {"cpu": 2.0, "cuda": 12.0}
Cell = Mapping[str, Scalar | None]


class Quantity(NamedTuple):
    """A metric of bench/metric_names.py. A sample of it is `amount` of a call over its seconds, or its seconds."""

    name: str
    amount: float | None = None


class Program:
    """A benchmark on all its ranks. Used as a context manager: on an error it leaves a record that says so, and ends.

    device: this rank's. limits: for `measure`; a program may replace it. folder: the bench folder.
    """

    def __init__(self, benchmark: str, options: Namespace, ranks: Ranks, device: torch.device) -> None:
        self.benchmark, self.options, self.ranks, self.device = benchmark, options, ranks, device
        self.control = Control()
        budget_s = BUDGET_S[device.type] if options.budget_s is None else options.budget_s
        # Energy counters of GPUs say nothing about shorter windows.
        window_s = MIN_WINDOW_S if device.type == "cuda" else 0.0
        self.limits = Limits(
            soak_s=SOAK_S[device.type], budget_s=budget_s, min_window_s=window_s, change_frac=options.change_frac
        )
        self.folder = Path(options.out or f"bench-results/{options.suite}-{self.machine_name}-{_now():%Y%m%dT%H%M%SZ}")
        self._cell: Cell = {}
        self._started = _now()
        self._busy_since_s: float | None = None
        self._surroundings: tuple[dict[str, Any], list[Unavailable]] | None = None

    @property
    def machine_name(self) -> str:
        """As records call it: without the folder and the ending of a file."""
        name = self.options.machine
        return Path(name).stem if name.endswith((".yaml", ".yml")) else name

    @cached_property
    def machine(self) -> Machine:
        """Facts of the machine; `local` is looked at now."""
        return load_machine(self.options.machine)

    def connect(self) -> None:
        """Meet the other ranks. Raises RendezvousError within the time-out."""
        timeout_s = self.options.timeout_s
        ranks = self.ranks
        if ranks.world_size > 1 and ranks.source != "mpi" and ranks.store is None:
            self.ranks = ranks = replace(ranks, store=_open_store(ranks, timeout_s))
        self.control = build_control(ranks, timeout_s, self.options.alone)
        bind_threads(self.control, timeout_s)
        places = self.control.gather(probe_place(self.device).as_json(), timeout_s)
        if places is not None:  # now, not when a fault leaves no time for it
            self._surroundings = probe_surroundings(ranks, places)
        self.meters = Meters(self.device, of_node=ranks.local_rank == 0)
        threading.Thread(target=self._watch, daemon=True).start()

    def measure(
        self,
        cell: Cell,
        quantities: Sequence[Quantity],
        work: Work,
        *,
        before: Work | None = None,
        wrong: Callable[[], int] | None = None,
        facts: Mapping[str, Any] | None = None,
        flops: Flops | None = None,
        reduction: Literal["max", "none"] = "max",
    ) -> Record | None:
        """Time `work` on all ranks and write its record, which rank 0 returns. All ranks arrive.

        before: runs ahead of each call, outside of its time. wrong: counts elements that came out wrong, afterwards.
        reduction: `max` where a call ends with the slowest rank, `none` where ranks work alone.
        """
        timeout_s = self.options.timeout_s
        with self.watched(cell):
            warmed = warm_up(self._alive(work), self.device, self.limits, self.control, before, timeout_s)
            # The device stays warm from here on.
            self.limits = replace(self.limits, soak_s=0.0)
            with self.meters.window() as window:
                seconds, ci_reached = sample(
                    self._alive(work), self.device, self.limits, self.control, before, warmed, timeout_s
                )
            n_wrong = None if wrong is None else wrong()
        mine = {"seconds": seconds, "wrong": n_wrong, "window": window.as_json(), "rank": probe_rank(self.device)}
        reports = self.control.gather(mine, timeout_s)
        if reports is None:
            return None
        by_rank = {rank: report["seconds"] for rank, report in enumerate(reports)}
        windows = join_windows([report["window"] for report in reports])
        samples = {
            quantity.name: {rank: _values(quantity, times) for rank, times in by_rank.items()}
            for quantity in quantities
        }
        wrongs = [report["wrong"] for report in reports]
        return self.write(
            cell,
            samples,
            self._protocol(warmed, seconds, ci_reached, reduction),
            facts={**(facts or {}), "ranks": [report["rank"] for report in reports], **windows.facts()},
            flops=flops,
            validity=Validity(wrong_values=None if None in wrongs else sum(wrongs), **windows.validity()),
            energy=windows.energy,
            unavailable=windows.unavailable,
        )

    def write(
        self,
        cell: Cell,
        samples: Mapping[str, Mapping[int, Sequence[float]]],
        protocol: Protocol | None,
        *,
        hosts: Sequence[str] | None = None,
        fault: str | None = None,
        facts: Mapping[str, Any] | None = None,
        flops: Flops | None = None,
        validity: Validity | None = None,
        energy: Sequence[EnergyWindow] = (),
        unavailable: Sequence[Unavailable] = (),
    ) -> Record | None:
        """Write and print a record of samples that the program has taken itself and gathered: name -> rank -> values.

        Rank 0 writes; elsewhere nothing happens. Names that are no metric are kept as samples only. hosts: of the cell,
        if not all. Without samples there is no protocol, but a fault, or facts["skipped"] says why.
        """
        if self.control.rank != 0:
            return None
        metrics = [
            build_metric(name, NAMES[name].better, by_rank, self.control.hosts, protocol.rank_reduction)
            for name, by_rank in samples.items()
            if name in NAMES and protocol is not None
        ]
        why = (facts or {}).get("skipped", "")
        skipped = Judgement(metric="", verdict="skipped", reference=None, tolerance_frac=None, why=why)
        record = self._record(
            cell,
            new_id(self.benchmark),
            hosts=list(hosts or self.control.hosts),
            fault=fault,
            verdicts=[skipped] if why else [],
            protocol=protocol,
            metrics=metrics,
            facts=dict(facts or {}),
            flops=flops,
            validity=validity or Validity(),
            energy=list(energy),
            unavailable=list(unavailable),
        )
        write_record(self.folder, record, samples)
        lines = [_line(self.benchmark, cell, metric, protocol) for metric in metrics if protocol is not None]
        print("\n".join(lines or [f"{_shown(self.benchmark, cell)} | {fault or f'skipped: {why}'}"]), flush=True)
        self._started = _now()
        return record

    @contextmanager
    def watched(self, cell: Cell) -> Iterator[None]:
        """What is inside may hang where no time-out ends it: then the program ends, with a record that says where.

        Inside, `--timeout-s` runs anew with each call of the work of `measure`, and with each `alive()`.
        """
        self._cell = cell
        self.alive()
        try:
            yield
        finally:
            self._busy_since_s = None

    def alive(self) -> None:
        """Something has come to an end, or begins."""
        self._busy_since_s = time.monotonic()

    def _alive(self, work: Work) -> Work:
        def watched_work() -> None:
            self.alive()
            work()

        return watched_work

    def _watch(self) -> None:
        """In a thread of its own: what hangs in a collective or in a driver does not come back to Python."""
        limit_s = self.options.timeout_s + 2 * VERDICT_S
        while True:
            time.sleep(1.0)
            since_s = self._busy_since_s
            if since_s is not None and time.monotonic() - since_s > limit_s:
                where = f"rank {self.control.rank} of {self.control.size} on {node_name()}"
                what = f"did not come to an end within {limit_s:.0f} s: {_shown(self.benchmark, self._cell)}"
                self.end(RendezvousError(what, where=where, do="look at the network between the hosts"))

    def _protocol(
        self, warmed: WarmUp, seconds: list[float], ci_reached: bool, reduction: Literal["max", "none"]
    ) -> Protocol:
        return Protocol(
            warmup_steps=warmed.calls,
            warmup_rule=self.limits.warmup_rule(),
            steady=warmed.steady,
            timed_steps=len(seconds),
            timer="device_event+wall" if self.device.type == "cuda" else "wall",
            rank_reduction=reduction,
            ci_reached=ci_reached,
        )

    def _record(self, cell: Cell, identity: str, *, unavailable: Sequence[Unavailable] = (), **parts: Any) -> Record:
        seen, missed = self._surroundings or probe_surroundings(self.ranks, [probe_place(self.device).as_json()])
        return Record(
            schema="aifactory-bench/1",
            id=identity,
            benchmark=self.benchmark,
            suite=self.options.suite,
            machine=self.machine_name,
            **{"hosts": self.control.hosts, **parts},
            started=self._started.isoformat(timespec="seconds"),
            ended=_now().isoformat(timespec="seconds"),
            cell={**cell, "ranks": self.control.size},
            provenance={**seen, "libraries": find_libraries()},
            unavailable=[*missed, *unavailable],
            samples=None,
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            try:
                self.control.close(self.options.timeout_s)
            except AifactoryError as late:
                self.end(late)
        elif not isinstance(error, SystemExit):
            self.end(error)

    def end(self, error: BaseException) -> None:
        """Say what happened, leave a record of it, and end this process: nothing that hangs is waited for."""
        if threading.current_thread() is threading.main_thread():
            # A launcher sends it when a rank has died, which may be what ends us already.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ours, asked = error if isinstance(error, AifactoryError) else None, isinstance(error, Interrupted)
        what = ours.what if ours else f"{type(error).__name__}: {error}"
        print(ours.render() if ours else "".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
        identity = new_id(self.benchmark)
        missing = error.ranks if isinstance(error, Missing) else []
        # Before others are asked: a launcher that ends the ranks of a dead one leaves them a part of a second.
        self._write_fault(identity, what, missing)
        if self.control.size > 1 and not missing:
            # A rank that has died shows as a broken connection in the work of the others, or as that signal.
            limit_s = SIGNAL_ROLL_CALL_S if asked else min(ROLL_CALL_S, self.options.timeout_s)
            missing = self.control.roll_call(limit_s, linger=not asked)
            if missing:
                self._write_fault(identity, f"{what}; missing: {self.control.names(missing)}", missing)
        sys.stdout.flush()
        sys.stderr.flush()
        # MPI_Finalize and the threads of torch would wait for ranks that are gone.
        os._exit(ours.exit_code if ours else 1)

    def _write_fault(self, identity: str, what: str, missing: list[int]) -> None:
        if not self._speaks(missing):
            return
        facts = {"missing_ranks": missing}
        record = self._record(self._cell, identity, protocol=None, metrics=[], fault=what, facts=facts)
        try:
            print(f"fault: {what}; record {write_record(self.folder, record, {})}", file=sys.stderr, flush=True)
        except AifactoryError as late:
            print(late.render(), file=sys.stderr, flush=True)

    def _speaks(self, missing: list[int]) -> bool:
        """Rank 0 writes; without it the first rank of another host, or the next one where there is none."""
        if self.control.rank == 0 or 0 not in missing:
            return self.control.rank == 0
        hosts = self.control.hosts
        left = [rank for rank in range(1, self.control.size) if rank not in missing]
        elsewhere = [rank for rank in left if hosts and hosts[rank] != hosts[0]]
        return self.control.rank == (elsewhere or left)[0]


def start(
    benchmark: str,
    doc: str,
    add_options: Callable[[ArgumentParser], object] | None = None,
    argv: Sequence[str] | None = None,
) -> Program:
    """Read the options, find the other ranks and meet them. `doc` is the text of --help.

    Ends the process with a message where a rank does not arrive within --timeout-s.
    """
    options = _parse(benchmark, doc, add_options, argv)
    signal.signal(signal.SIGTERM, raise_interrupted)
    try:
        with limited_start(options.timeout_s + VERDICT_S):
            ranks = find_ranks(options.timeout_s, keep_mpi=True, of_node=options.alone)
        program = Program(benchmark, options, ranks, pick_device(ranks))
        if options.machine != LOCAL:
            _ = program.machine
    except AifactoryError as error:
        print(error.render(), file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    try:
        program.connect()
    except AifactoryError as error:
        program.end(error)
    torch.manual_seed(1234 + ranks.rank)
    return program


def _parse(
    benchmark: str,
    doc: str,
    add_options: Callable[[ArgumentParser], object] | None,
    argv: Sequence[str] | None,
) -> Namespace:
    parser = ArgumentParser(benchmark, description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default=LOCAL, help="name or file of the machine (default: local)")
    parser.add_argument("--out", metavar="FOLDER", help="bench folder (default: a new one below bench-results/)")
    parser.add_argument("--suite", default="none", help="name of the suite that this cell belongs to")
    parser.add_argument("--budget-s", type=float, help=f"time for the samples of a cell (default: {BUDGET_S})")
    parser.add_argument("--change-frac", type=float, default=0.01, help="steady below this change (default: 0.01)")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="longest wait for a call or a rank (default: 60)")
    parser.add_argument("--alone", action="store_true", help="the ranks of each node are a job of their own")
    if add_options is not None:
        add_options(parser)
    return parser.parse_args(argv)


def _values(quantity: Quantity, seconds: list[float]) -> list[float]:
    return seconds if quantity.amount is None else [quantity.amount / s for s in seconds]


def _shown(benchmark: str, cell: Cell) -> str:
    return " ".join([benchmark, *(f"{name}={value}" for name, value in cell.items() if value is not None)])


def _line(benchmark: str, cell: Cell, metric: Metric, protocol: Protocol) -> str:
    """One line with all that a number needs: interval, count, worst rank, and whether it was steady."""
    interval = "no interval"
    if metric.ci95 is not None:
        interval = " to ".join(format_quantity(limit, metric.unit) for limit in metric.ci95)
    worst = "" if metric.worst_rank is None else f", worst rank {metric.worst_rank.rank} on {metric.worst_rank.host}"
    notes = ("" if protocol.steady else ", not steady") + ("" if protocol.ci_reached else ", ci_not_reached")
    value = format_quantity(metric.median, metric.unit)
    name = metric.name.removeprefix("aifactory_")
    return f"{_shown(benchmark, cell)} | {name}: {value} ({interval}), n {metric.n}{worst}{notes}"


def _now() -> datetime:
    return datetime.now(UTC)
