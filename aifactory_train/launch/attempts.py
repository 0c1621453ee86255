"""What the attempts of a run have left behind: job.json, end.json, their lines in the logs, and where the time went."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from aifactory_train.errors import RunFolderError, storage_errors
from aifactory_train.rundir import OUT_OF_TIME, RunDir, read_jsonl, write_atomic

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """job.json: the batch job, written as it begins. `end_time_s`: when it will be cut off, None where nobody says.

    `first_step` is the newest commit at that time, 0 without one.
    """

    job_id: str
    node_list: str
    n_nodes: int
    begin_s: float
    end_time_s: float | None
    first_step: int


@dataclass(frozen=True)
class Times:
    """Where the seconds of an attempt went.

    startup_s: until training began. training_s: from there to its last log line, without waiting for saves.
    unused_s: what was left of the wall time after a stop at the deadline.
    redone_steps: steps that an attempt before had logged, and that this one had to do again.
    """

    in_job_s: float
    startup_s: float
    training_s: float
    unused_s: float
    redone_steps: int
    redone_s: float

    @property
    def wasted_s(self) -> float:
        """All of the slot that did not bring the run forward."""
        return self.in_job_s - self.training_s + self.redone_s + self.unused_s

    @property
    def slot_s(self) -> float:
        return self.in_job_s + self.unused_s


@dataclass(frozen=True)
class End:
    """end.json: how the attempt ended, and what was done about it. `excluded` is in host-list syntax.

    verdict: `done`, `next` (another job goes on) or `stop`.
    """

    exit_code: int
    verdict: str
    reason: str
    last_step: int
    excluded: str
    end_s: float
    in_job_s: float
    training_s: float
    startup_s: float
    unused_s: float
    redone_steps: int


@dataclass(frozen=True)
class Attempt:
    """One attempt: its folder, and the lines of metrics.jsonl and events.jsonl from its time.

    `job` is None where mpirun started the ranks here, `end` while it runs, or where nothing was left to write it.
    """

    number: int
    folder: Path
    begin_s: float
    job: Job | None
    end: End | None
    rows: list[Row]
    events: list[Row]

    def newest(self, kind: str) -> Row | None:
        """Its newest event of that kind."""
        return next((e for e in reversed(self.events) if e.get("event") == kind), None)

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def last_seen_s(self) -> float:
        """When it ended, else when it last wrote a line."""
        if self.end is not None:
            return self.end.end_s
        return max((row["time_s"] for row in (*self.rows, *self.events)), default=self.begin_s)


def read_attempts(run: RunDir) -> list[Attempt]:
    """All attempts in their order. Raises RunFolderError where a file of one is damaged."""
    folders = [run.attempt(n) for n in range(1, run.last_attempt() + 1)]
    folders = [folder for folder in folders if folder.is_dir()]
    jobs = [_read(folder / "job.json", Job) for folder in folders]
    begins_s = [job.begin_s if job else _made_s(folder) for job, folder in zip(jobs, folders, strict=True)]
    metrics, events = _timed(run.metrics), _timed(run.events)
    attempts = []
    for index, (folder, job, begin_s) in enumerate(zip(folders, jobs, begins_s, strict=True)):
        until_s = begins_s[index + 1] if index + 1 < len(begins_s) else float("inf")
        rows = [row for row in metrics if begin_s <= row["time_s"] < until_s and isinstance(row.get("step"), int)]
        own = [event for event in events if begin_s <= event["time_s"] < until_s]
        attempts.append(Attempt(int(folder.name), folder, begin_s, job, _read(folder / "end.json", End), rows, own))
    return attempts


def write_part(path: Path, part: Job | End) -> None:
    """Write job.json or end.json. Raises StorageError."""
    with storage_errors(f"writing {path.name}", path, "free some space and launch again"):
        write_atomic(path, json.dumps(asdict(part), indent=1) + "\n")


def account(attempts: list[Attempt], index: int, end_s: float) -> Times:
    """Times of attempts[index], which ended at `end_s`; those before it tell what it had to do again."""
    this = attempts[index]
    in_job_s = max(0.0, end_s - this.begin_s)
    start = next((e for e in this.events if e.get("event") == "start"), None)
    if not this.rows:
        startup_s = in_job_s if start is None else start["time_s"] - this.begin_s
        return Times(in_job_s, startup_s, 0.0, _unused_s(this, end_s), 0, 0.0)
    began_s = this.rows[0]["time_s"] if start is None else start["time_s"]
    stalled_s = sum(row.get("save_stall_s") or 0.0 for row in this.rows)
    training_s = max(0.0, this.rows[-1]["time_s"] - began_s - stalled_s)
    steps, seconds = _redone(attempts[:index], _first_step(this))
    return Times(in_job_s, began_s - this.begin_s, training_s, _unused_s(this, end_s), steps, seconds)


def stopped_at_the_deadline(attempt: Attempt) -> bool:
    """Whether it stopped because its time was nearly up, and not because somebody asked."""
    stop = attempt.newest("stop")
    return stop is not None and stop.get("signal") == OUT_OF_TIME.name


def _unused_s(attempt: Attempt, end_s: float) -> float:
    if attempt.job is None or attempt.job.end_time_s is None or not stopped_at_the_deadline(attempt):
        return 0.0
    return max(0.0, attempt.job.end_time_s - end_s)


def _redone(before: list[Attempt], first_step: int) -> tuple[int, float]:
    """Steps, and their seconds, that the last attempt which trained had logged beyond `first_step`."""
    trained = [attempt for attempt in before if attempt.rows]
    if not trained:
        return 0, 0.0
    steps = max(0, trained[-1].rows[-1]["step"] - first_step)
    step_time_s = statistics.median(row.get("step_time_s") or 0.0 for row in trained[-1].rows)
    return steps, steps * step_time_s


def _first_step(attempt: Attempt) -> int:
    start = attempt.newest("start")
    if start is not None:
        return int(start["step"])
    return attempt.job.first_step if attempt.job else 0


def _timed(path: Path) -> list[Row]:
    return [row for row in read_jsonl(path) if isinstance(row.get("time_s"), int | float)]


def _made_s(folder: Path) -> float:
    """When an attempt without job.json began: its command was written then, and never again."""
    command = folder / "command.sh"
    return (command if command.exists() else folder).stat().st_mtime


P = TypeVar("P", Job, End)


def _read(path: Path, part: type[P]) -> P | None:
    if not path.exists():
        return None
    try:
        return part(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(
            f"{path.name} cannot be read: {error}", where=str(path), do=f"mv {path} elsewhere and try again"
        ) from None
