"""What follows when the programs of a bench have ended: faults are noted, records judged, pages written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aifactory_train.bench.exports import render_bmf, render_csv, render_junit, render_markdown, render_openmetrics
from aifactory_train.bench.judge import FolderVerdict, judge_folder
from aifactory_train.bench.record import Record, new_id, write_record
from aifactory_train.bench.report import render_report
from aifactory_train.bench.store import BenchDir, load_records, update_index
from aifactory_train.bench.suites import Asked, Cell, End, load_asked, read_ends
from aifactory_train.errors import storage_errors
from aifactory_train.results.provenance import provenance
from aifactory_train.rundir import write_atomic

# What `timeout` of coreutils ends with when it had to stop its command, and what a shell says of SIGKILL.
TIMED_OUT = (124, 137)


def finish(folder: Path) -> int:
    """Note what died, then as `conclude`."""
    note_faults(load_asked(folder), folder)
    return conclude(folder)


def conclude(folder: Path) -> int:
    """Judge the records of a folder, write all pages, and print the verdicts.

    Returns:
        0 all green, 1 a regression or a failing node, 2 something is incomplete.
    """
    bench = BenchDir(folder)
    verdict = judge_folder(folder, datetime.now(UTC).date())
    pages = {
        bench.summary: render_markdown(verdict.records),
        bench.junit: render_junit(verdict.records),
        bench.openmetrics: render_openmetrics(verdict.records),
        bench.bmf: render_bmf(verdict.records),
        bench.root / "result.csv": render_csv(verdict.records),
        bench.report: render_report(bench),
    }
    with storage_errors("writing the pages of a bench", folder, "free some space: aifactory-train bench report FOLDER"):
        for path, text in pages.items():
            write_atomic(path, text)
    for sentence in update_index(bench.root.parent):
        print(f"not in the index: {sentence}")
    print(_told(verdict, bench))
    return verdict.exit_code


def _told(verdict: FolderVerdict, bench: BenchDir) -> str:
    """How many of each verdict, every fault, every node that is not sound, and where to read on."""
    counts = Counter(judgement.verdict for record in verdict.records for judgement in record.verdicts)
    lines = [", ".join(f"{n} {name}" for name, n in counts.most_common()) or "no records"]
    lines += [f"fault: {record.fault}" for record in verdict.records if record.fault is not None]
    lines += [f"{host}: {why}" for host, why in sorted(verdict.nodes.why.items())]
    return "\n".join([*lines, f"report: {bench.report}"])


def note_faults(asked: Asked, folder: Path) -> None:
    """Leave a record of each program that died without a word of its own, or never came to its turn."""
    records, ends = load_records(folder), read_ends(folder)
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
    for record in load_records(folder):
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
