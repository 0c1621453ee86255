"""What is said of programs that died: by their own records, or by how they ended where those say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aifactory_train.bench.record import Record, new_id, write_record
from aifactory_train.bench.store import load_records
from aifactory_train.bench.suites import Asked, Cell, End, read_ends
from aifactory_train.results.provenance import provenance

# What `timeout` of coreutils ends with when it had to stop its command, and what a shell says of SIGKILL.
TIMED_OUT = (124, 137)
# Of the cell of a record that was written here.
_OPTIONS = "options"


def note_faults(asked: Asked, folder: Path) -> None:
    """Leave a record of each program that died without a word of its own, or never came to its turn."""
    records, ends = load_records(folder), read_ends(folder)
    for cell in asked.cells:
        end = ends.get(cell.number)
        if end is not None and not end.exit_code:
            continue
        of_cell = [] if end is None else [record for record in records if is_of(record, cell, end)]
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
    for record in load_records(folder):
        if record.fault is not None and record.benchmark in programs:
            _remove(record, folder)


def forget_stale_faults(asked: Asked, folder: Path) -> None:
    """Of a tuning, which starts nothing again that has ended: what was noted here, and faults of runs broken off."""
    ends = read_ends(folder)
    ended = [(cell, ends[cell.number]) for cell in asked.cells if cell.number in ends]
    for record in load_records(folder):
        stale = _OPTIONS in record.cell or not any(is_of(record, cell, end) for cell, end in ended)
        if record.fault is not None and stale:
            _remove(record, folder)


def _remove(record: Record, folder: Path) -> None:
    (folder / "records" / f"{record.id}.json").unlink()


def is_of(record: Record, cell: Cell, end: End) -> bool:
    """Whether a program wrote the record when it was run as this cell."""
    # Records count whole seconds.
    last = end.began + timedelta(seconds=end.seconds + 1)
    started = datetime.fromisoformat(record.started)
    return record.benchmark == cell.program and end.began - timedelta(seconds=1) <= started <= last


def why_it_died(cell: Cell, end: End, of_cell: Sequence[Record]) -> str:
    """What the program itself said last, if it said anything."""
    faults = [record.fault for record in of_cell if record.fault is not None and _OPTIONS not in record.cell]
    return faults[-1] if faults else _story(cell, end)


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
        cell={"nodes": cell.n_nodes, _OPTIONS: " ".join(cell.options)},
        protocol=None,
        metrics=[],
        provenance=provenance(),
        samples=None,
        fault=fault,
    )
