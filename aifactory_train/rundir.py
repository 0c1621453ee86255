"""The run folder: every file name that launch, train and results share, how files are written, and the signal.

RUN/
  recipe.yaml            the resolved recipe; a second launch must bring the same
  machine.yaml           the machine that the plan was made for
  plan.json              all that training reads
  job.sbatch             the batch script, where Slurm runs the ranks
  jobs.jsonl             one line per batch job that was submitted for this run
  cancelled              exists: the jobs of this run do not submit another
  attempts/001/          one folder per start of the ranks
    command.sh             the command, where mpirun started them here
    job.json               the batch job: id, nodes, time limit (class Job of launch/attempts.py)
    preflight/             one file per rank
    preflight.json         which nodes are fit, and what is wrong with the others
    log.txt                output of the ranks
    end.json               how it ended, and what was done about it (class End of launch/attempts.py)
  metrics.jsonl          one JSON object per log line, appended by rank 0
  events.jsonl           starts, resumes, commits, stops, faults
  checkpoints/step-N/    sharded state; exists only when it holds COMMIT
  tokenizer/             copy of the one that the text was prepared with
  export/                Hugging Face folder of the newest commit
  wandb-id               under which W&B knows the run
  result.json            predicted beside measured
  report.html
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from aifactory_train.errors import AifactoryError, RunFolderError, storage_errors

# The one signal that asks a run to save and stop. mpirun and Slurm forward it; NCCL and Lightning use USR1.
STOP_SIGNAL = signal.SIGUSR2

# Nobody sends it: the name that a stop event carries where the job's time was used up.
OUT_OF_TIME = signal.SIGXCPU

# What makes a checkpoint folder a checkpoint.
COMMIT = "COMMIT"


class RunDir:
    """Paths below one run folder. Makes nothing until asked to write."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.recipe = self.root / "recipe.yaml"
        self.machine = self.root / "machine.yaml"
        self.plan = self.root / "plan.json"
        self.job_script = self.root / "job.sbatch"
        self.jobs = self.root / "jobs.jsonl"
        self.cancelled = self.root / "cancelled"
        self.attempts = self.root / "attempts"
        self.metrics = self.root / "metrics.jsonl"
        self.events = self.root / "events.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.tokenizer = self.root / "tokenizer"
        self.export = self.root / "export"
        self.wandb_id = self.root / "wandb-id"
        self.result = self.root / "result.json"
        self.report = self.root / "report.html"

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number:03d}"

    def last_attempt(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        if not self.attempts.is_dir():
            return 0
        return max((int(p.name) for p in self.attempts.iterdir() if p.name.isdigit()), default=0)


def existing_run(root: Path) -> Path:
    """`root`, if it is a run folder; otherwise RunFolderError that names those there are."""
    if (root / "plan.json").exists():
        return root
    others = sorted(str(p.parent) for p in Path("runs").glob("*/plan.json"))
    raise RunFolderError(
        "no run folder" if not root.exists() else "not a run folder: it holds no plan.json",
        where=str(root.absolute()),
        do=f"one of: {', '.join(others)}" if others else "aifactory-train launch RECIPE --run RUN  makes one",
    )


def existing_attempt(folder: Path) -> Path:
    """`folder`, if it is one of an attempt: RUN/attempts/NNN. Raises RunFolderError."""
    if folder.is_dir() and folder.absolute().parent.name == "attempts":
        return folder
    raise RunFolderError(
        "not the folder of an attempt" if folder.exists() else "no such folder",
        where=str(folder.absolute()),
        do="give what was printed by: aifactory-train attempt begin, such as RUN/attempts/001",
    )


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write so that a reader sees the old file or the whole new one, also after a power cut."""
    if path.is_dir():  # "" is one too
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data.encode() if isinstance(data, str) else data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def hold(folder: Path, busy: AifactoryError) -> Iterator[IO[str]]:
    """Hold the folder's lock, or raise `busy` if another process on this node holds it.

    The system lets go of it when the process ends, however it ends, and with it every process that was given the
    file. Where the file system has no locks, nothing is held and nothing is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield file


def is_held(folder: Path) -> bool:
    """Whether a process on this node holds the folder's lock."""
    try:
        with open(folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock file, or a file system without locks
        return False
    return False


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one line; a line that a kill cut short before it is closed off, not continued."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with open(path, "ab+") as f:
        if f.tell() > 0:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":
                line = "\n" + line
        f.write(line.encode())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line cut short by a kill is passed over."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def log_event(run: RunDir, kind: str, **fields: Any) -> None:
    """Append to events.jsonl. `time_s` is seconds since the epoch. Raises StorageError."""
    with storage_errors("writing an event", run.events, "free some space and launch again"):
        append_jsonl(run.events, {"time_s": round(time.time(), 3), "event": kind, **fields})


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps that have a COMMIT, in rising order."""
    steps = (re.fullmatch(r"step-(\d+)", p.parent.name) for p in checkpoints.glob(f"step-*/{COMMIT}"))
    return sorted(int(m.group(1)) for m in steps if m)


def is_finished(run: RunDir, n_steps: int) -> bool:
    """Whether the last attempt came to its end and the commit of its last step is there."""
    kinds = [e.get("event") for e in read_jsonl(run.events) if e.get("event") in ("start", "stop", "finish")]
    return kinds[-1:] == ["finish"] and (step_folder(run.checkpoints, n_steps) / COMMIT).exists()
