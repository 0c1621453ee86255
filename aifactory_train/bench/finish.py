"""What follows when the programs of a bench have ended: faults are noted, and an exit code says how it went."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aifactory_train.bench.record import Record, new_id, read_record, write_record
from aifactory_train.bench.suites import Asked, Cell, End, load_asked, read_ends
from aifactory_train.results.provenance import provenance

# What `timeout` of coreutils ends with when it had to stop its command, and what a shell says of SIGKILL.
TIMED_OUT = (124, 137)
INCOMPLETE = 2


def finish(folder: Path) -> int:
    """Note what died, and print what every program has left.

    Returns:
        0 all programs ended well, 2 something is incomplete.
    """
    asked = load_asked(folder)
    note_faults(asked, folder)
    records = _records(folder)
    for record in records:
        print(f"{record.benchmark:<14}{record.fault or f'{len(record.metrics)} metrics'}")
    return INCOMPLETE if any(record.fault is not None for record in records) else 0


def _records(folder: Path) -> list[Record]:
    return [read_record(path) for path in sorted((folder / "records").glob("*.json"))]


def note_faults(asked: Asked, folder: Path) -> None:
    """Leave a record of each program that died without a word of its own, or never came to its turn."""
    records, ends = _records(folder), read_ends(folder)
    for cell in asked.cells:
        end = ends.get(cell.number)
        if end is not None and not end.exit_code:
            continue
        of_cell = [] if end is None else [record for record in records if _is_of(record, cell, end)]
        if any(record.fault is not None for record in of_cell):
            continue
        hosts = asked.hosts[: cell.n_nodes]
        if cell.scope == "node":  # each is measured alone, and those that have a record are well
            heard = {host for record in of_cell for host in record.hosts}
            hosts = [host for host in hosts if host not in heard] or hosts
        write_record(folder, _fault_record(asked, cell, hosts, _story(cell, end)), {})


def forget_faults(cells: Sequence[Cell], folder: Path) -> None:
    """Remove the records of faults of programs that are started again."""
    programs = {cell.program for cell in cells}
    for record in _records(folder):
        if record.fault is not None and record.benchmark in programs:
            (folder / "records" / f"{record.id}.json").unlink()


def _is_of(record: Record, cell: Cell, end: End) -> bool:
    # Records count whole seconds.
    last = end.began + timedelta(seconds=end.seconds + 1)
    started = datetime.fromisoformat(record.started)
    return record.benchmark == cell.program and end.began - timedelta(seconds=1) <= started <= last


def _story(cell: Cell, end: End | None) -> str:
    if end is None:
        return f"{cell.program} was never started; see the output of the job"
    if end.exit_code in TIMED_OUT and end.seconds >= cell.timeout_s - 1:
        return f"{cell.program} was killed after {end.seconds:.0f} s, its time-out; see {cell.log}"
    return f"{cell.program} ended with exit code {end.exit_code} after {end.seconds:.0f} s; see {cell.log}"


def _fault_record(asked: Asked, cell: Cell, hosts: list[str], fault: str) -> Record:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(
        schema="aifactory-bench/1",
        id=new_id(cell.program),
        benchmark=cell.program,
        suite=asked.suite,
        machine=asked.machine,
        hosts=hosts,
        started=now,
        ended=now,
        cell={"nodes": cell.n_nodes, "options": " ".join(cell.options)},
        protocol=None,
        metrics=[],
        provenance=provenance(),
        samples=None,
        fault=fault,
    )
