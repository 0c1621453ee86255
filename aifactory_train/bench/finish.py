"""What follows when the programs of a bench have ended: faults are noted, records judged, pages written."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from aifactory_train.bench.exports import render_bmf, render_csv, render_junit, render_markdown, render_openmetrics
from aifactory_train.bench.faults import forget_stale_faults, note_faults
from aifactory_train.bench.judge import EXIT_GREEN, EXIT_INCOMPLETE, FolderVerdict, judge_folder
from aifactory_train.bench.report import build_reader, render_report
from aifactory_train.bench.rounds import search_of
from aifactory_train.bench.scaling import estimate_scaling
from aifactory_train.bench.store import BenchDir, update_index
from aifactory_train.bench.suites import Asked, Tuning, load_asked
from aifactory_train.bench.tuned import tell_search, write_search
from aifactory_train.errors import storage_errors
from aifactory_train.rundir import write_atomic


def finish(folder: Path) -> int:
    """Note what died, then as `conclude`."""
    asked = load_asked(folder)
    if asked.tuning is not None:
        forget_stale_faults(asked, folder)
    note_faults(asked, folder)
    return conclude(folder)


def conclude(folder: Path) -> int:
    """Judge the records of a folder, write all pages, and print the verdicts.

    Returns:
        0 all green, 1 a regression or a failing node, 2 something is incomplete. Of a tuning, which is there to find
        out what fails: 0 with a winner, 2 without.
    """
    bench = BenchDir(folder)
    verdict = judge_folder(folder, datetime.now(UTC).date())
    read, _ = build_reader(bench)
    scalings = estimate_scaling(verdict.records, read)
    pages = {
        bench.summary: render_markdown(verdict.records, verdict.nodes.why, scalings),
        bench.junit: render_junit(verdict.records),
        bench.openmetrics: render_openmetrics(verdict.records, scalings),
        bench.bmf: render_bmf(verdict.records),
        bench.root / "result.csv": render_csv(verdict.records),
        bench.report: render_report(bench),
    }
    with storage_errors("writing the pages of a bench", folder, "free some space: aifactory-train bench report FOLDER"):
        for path, text in pages.items():
            write_atomic(path, text)
    for sentence in update_index(bench.root.parent):
        print(f"not in the index: {sentence}")
    asked = load_asked(folder) if bench.suite.exists() else None
    if asked is not None and asked.tuning is not None:
        return _conclude_tuning(asked, asked.tuning, verdict, bench)
    print(_told(verdict, bench))
    return verdict.exit_code


def _conclude_tuning(asked: Asked, tuning: Tuning, verdict: FolderVerdict, bench: BenchDir) -> int:
    search = search_of(asked, tuning, bench.root)
    with storage_errors("writing what was tuned", bench.root, "free some space: aifactory-train bench report FOLDER"):
        write_search(asked, tuning, search, bench.root)
    print("\n".join([_told(verdict, bench), *tell_search(asked, search, bench.root)]))
    return EXIT_INCOMPLETE if search.best is None else EXIT_GREEN


def _told(verdict: FolderVerdict, bench: BenchDir) -> str:
    """How many of each verdict, every fault, every node that is not sound, and where to read on."""
    counts = Counter(judgement.verdict for record in verdict.records for judgement in record.verdicts)
    lines = [", ".join(f"{n} {name}" for name, n in counts.most_common()) or "no records"]
    lines += [f"fault: {record.fault}" for record in verdict.records if record.fault is not None]
    lines += [f"{host}: {why}" for host, why in sorted(verdict.nodes.why.items())]
    return "\n".join([*lines, f"report: {bench.report}"])
