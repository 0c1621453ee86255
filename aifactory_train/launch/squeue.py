"""What Slurm knows about the jobs of a run, and how it is told to end them."""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass

from aifactory_train.errors import MachineError

_ANSWER_S = 60
# id, state, reason, time left, nodes, expected or actual start, hosts
_FORMAT = "%i|%T|%r|%L|%D|%S|%N"
# Its processes are gone or being killed: there is nothing to wait for and nothing to end.
_ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "COMPLETING", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}
_ON_NODES = {"RUNNING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue, in its words."""

    job_id: str
    state: str
    reason: str
    time_left: str
    n_nodes: str
    start: str
    hosts: str

    @property
    def on_nodes(self) -> bool:
        """Whether it has its nodes; otherwise it waits for them."""
        return self.state in _ON_NODES


def ask_squeue(job_ids: list[str]) -> list[QueuedJob]:
    """Those of the jobs that wait or run. Raises MachineError where Slurm cannot be asked."""
    if not job_ids:
        return []
    command = ["squeue", "--noheader", f"--jobs={','.join(job_ids)}", f"--format={_FORMAT}"]
    done = run_command(command)
    if done.returncode:
        if "Invalid job id" in done.stderr:  # one job that is over, and that Slurm has forgotten
            return []
        raise _refused(command, done, "try again; if it stays so, ask the site whether Slurm is up")
    fields = [line.split("|") for line in done.stdout.splitlines()]
    jobs = [QueuedJob(*(f.strip() for f in line)) for line in fields if len(line) == _FORMAT.count("|") + 1]
    return [job for job in jobs if job.state not in _ENDED]


def has_ranks(job_id: str) -> bool:
    """Whether srun has started something in that job, beside the batch script. Raises MachineError."""
    command = ["squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i"]
    done = run_command(command)
    if done.returncode:
        raise _refused(command, done, f"scancel {job_id}  ends the job without a save")
    return any(line.strip().rpartition(".")[2].isdigit() for line in done.stdout.splitlines())


def scancel(job_id: str, signal_name: str | None = None) -> None:
    """End a job, or send a signal to its ranks. Raises MachineError."""
    command = ["scancel", *([f"--signal={signal_name}"] if signal_name else []), job_id]
    done = run_command(command)
    if done.returncode:
        raise _refused(command, done, f"squeue --jobs={job_id}  to see it, scancel {job_id}  to end it without a save")


def run_command(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Its output and exit code. Raises MachineError where there is no such command, or no answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
    except FileNotFoundError:
        raise MachineError(
            f"{command[0]} is not on this node's PATH",
            where=shlex.join(command),
            do="do it on a login node of the machine that the run was launched on",
        ) from None
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"{command[0]} has not answered in {_ANSWER_S} s",
            where=shlex.join(command),
            do="Slurm is busy or down: try again later",
        ) from None


def _refused(command: list[str], done: subprocess.CompletedProcess[str], do: str) -> MachineError:
    # The last line says what made it give up; those before it, what it had tried.
    said = [f"exit code {done.returncode}", *done.stdout.split("\n"), *done.stderr.split("\n")]
    return MachineError(
        f"{command[0]} failed: {[line for line in said if line.strip()][-1]}", where=shlex.join(command), do=do
    )
