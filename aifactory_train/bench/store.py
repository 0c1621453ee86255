"""Where the files of a bench lie, the index over all benches of a folder, and one file of a bench to send.

The index is made of the records and can be removed at any time: the next update makes it anew.
"""

from __future__ import annotations

import os
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from aifactory_train.bench.record import Record, cell_key, read_record
from aifactory_train.errors import RunFolderError, storage_errors
from aifactory_train.hostlist import compress
from aifactory_train.rundir import write_atomic

INDEX_VERSION = 1
_TABLES = f"""
PRAGMA user_version = {INDEX_VERSION};
CREATE TABLE records (
  folder TEXT, id TEXT, stamp TEXT, benchmark TEXT, suite TEXT, machine TEXT, cell TEXT, hosts TEXT, started TEXT,
  ended TEXT, git_sha TEXT, fault TEXT, PRIMARY KEY (folder, id));
CREATE TABLE metrics (
  folder TEXT, id TEXT, name TEXT, unit TEXT, better TEXT, median REAL, ci_low REAL, ci_high REAL, p5 REAL, p95 REAL,
  n INTEGER, worst_rank INTEGER, worst_host TEXT, verdict TEXT, PRIMARY KEY (folder, id, name));
"""


class BenchDir:
    """Paths below one bench folder. Makes nothing.

    suite.json                   what was asked for: suite, machine, nodes, hosts, cells as command lines
    records/ID.json              one per cell, with its samples in ID.samples.jsonl.zst
    logs/N-PROGRAM.txt           output of each program
    passing_nodes.txt            and failing_nodes.txt, missing_nodes.txt: in Slurm's list syntax
    summary.md, report.html      for people
    junit.xml, metrics.prom, bmf.json    for CI, Prometheus and Bencher
    recipe.yaml, tuned.yaml      of a tuning: what was tuned, and what won; tuning.md and tuning.json are the search
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.suite = self.root / "suite.json"
        self.records = self.root / "records"
        self.logs = self.root / "logs"
        self.passing_nodes = self.root / "passing_nodes.txt"
        self.failing_nodes = self.root / "failing_nodes.txt"
        self.missing_nodes = self.root / "missing_nodes.txt"
        self.summary = self.root / "summary.md"
        self.report = self.root / "report.html"
        self.junit = self.root / "junit.xml"
        self.openmetrics = self.root / "metrics.prom"
        self.bmf = self.root / "bmf.json"

    def log(self, number: int, program: str) -> Path:
        return self.logs / f"{number}-{program}.txt"

    def record(self, record_id: str) -> Path:
        return self.records / f"{record_id}.json"

    def samples(self, record: Record) -> Path | None:
        """None for a record without samples, such as that of a fault."""
        return self.records / record.samples if record.samples else None


def load_records(folder: Path) -> list[Record]:
    """All records of a bench folder, by their start; none before the first. Raises RunFolderError for a damaged one."""
    records = [read_record(path) for path in _record_files(folder)]
    return sorted(records, key=lambda record: (record.started, record.id))


def _record_files(folder: Path) -> list[Path]:
    return sorted(p for p in BenchDir(folder).records.glob("*.json") if not p.name.startswith("."))


def update_index(parent: Path) -> list[str]:
    """Bring PARENT/index.sqlite up to date with the records of all bench folders in `parent`.

    Reads only records that are new or have changed. The file is replaced as a whole: parallel file systems often lack
    the locks of SQLite. Of two updates at the same time the later one stands, and the next puts in what it misses.

    Returns:
        A sentence for each record that cannot be read; the index is without them.

    Raises:
        StorageError: disk full or no permission.
    """
    path = parent / "index.sqlite"
    files = {
        (folder.name, file.stem): file
        for folder in sorted(parent.iterdir())
        if BenchDir(folder).suite.is_file()
        for file in _record_files(folder)
    }
    unreadable = []
    with storage_errors("writing the index of benches", path, "free some space, or move the bench folders"):
        index = _open(path)
        indexed = {
            (folder, id_): stamp for folder, id_, stamp in index.execute("SELECT folder, id, stamp FROM records")
        }
        for key in indexed.keys() - files.keys():
            _forget(index, *key)
        for key, file in files.items():
            stamp = _stamp(file)
            if indexed.get(key) == stamp:
                continue
            _forget(index, *key)
            try:
                _insert(index, *key, stamp, read_record(file))
            except RunFolderError as error:
                unreadable.append(f"{error.what} ({file})")
        index.commit()
        write_atomic(path, index.serialize())
        index.close()
    return unreadable


def _open(path: Path) -> sqlite3.Connection:
    """The index in memory; an empty one where there is none, a damaged one, or one of another version."""
    data = path.read_bytes() if path.is_file() else b""
    if data:
        index = sqlite3.connect(":memory:")
        try:
            index.deserialize(data)
            (version,), (state,) = (
                index.execute(f"PRAGMA {name}").fetchone() for name in ("user_version", "quick_check")
            )
            if version == INDEX_VERSION and state == "ok":
                return index
        except sqlite3.DatabaseError:
            pass  # it is made anew from the records, below
        index.close()
    index = sqlite3.connect(":memory:")
    index.executescript(_TABLES)
    return index


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_mtime_ns} {status.st_size}"


def _forget(index: sqlite3.Connection, folder: str, record_id: str) -> None:
    for table in ("records", "metrics"):
        index.execute(f"DELETE FROM {table} WHERE folder = ? AND id = ?", (folder, record_id))


def _insert(index: sqlite3.Connection, folder: str, record_id: str, stamp: str, record: Record) -> None:
    whose = {"folder": folder, "id": record_id}
    names: tuple[str, ...] = ("benchmark", "suite", "machine", "started", "ended", "fault")
    row = whose | {name: getattr(record, name) for name in names}
    row |= {"stamp": stamp, "cell": cell_key(record), "hosts": compress(record.hosts)}
    _put(index, "records", row | {"git_sha": record.provenance.get("git_sha")})
    verdicts = {judgement.metric: judgement.verdict for judgement in record.verdicts}
    for metric in record.metrics:
        low, high = metric.ci95 or (None, None)
        worst = metric.worst_rank
        names = ("name", "unit", "better", "median", "p5", "p95", "n")
        row = whose | {name: getattr(metric, name) for name in names}
        row |= {"ci_low": low, "ci_high": high, "verdict": verdicts.get(metric.name)}
        row |= {"worst_rank": worst.rank if worst else None, "worst_host": worst.host if worst else None}
        _put(index, "metrics", row)


def _put(index: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    places = ", ".join(f":{name}" for name in row)
    index.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", row)


def archive(folder: Path, to: Path) -> Path:
    """One .tar.zst to send: records with all samples, logs, and the files beside them. `tar --zstd -xf` opens it.

    What programs left in other folders, such as checkpoints, stays out; so do the names of users.

    Args:
        to: the file, or a folder in which it is named after the bench folder.

    Returns:
        The file.

    Raises:
        RunFolderError: `folder` is none of a bench.
        StorageError: disk full or no permission.
    """
    bench = BenchDir(folder)
    if not bench.suite.is_file():
        do = "give a bench folder, such as one of bench-results/"
        raise RunFolderError("no bench folder: it holds no suite.json", where=str(bench.root), do=do)
    path = to / f"{bench.root.name}.tar.zst" if to.is_dir() else to
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors("writing the archive of a bench", path, "free some space, or name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zstandard.open(part, "wb") as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
                for file in _archived(bench):
                    tar.add(file, f"{bench.root.name}/{file.relative_to(bench.root)}", filter=_nobody)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _archived(bench: BenchDir) -> Iterator[Path]:
    for folder in (bench.root, bench.records, bench.logs):
        if folder.is_dir():
            # An archive that lies in the bench folder itself is none of its files.
            names = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.endswith(".tar.zst"))
            yield from (p for p in names if not p.name.startswith("."))


def _nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
