"""How far a run is, what its jobs do, and how it is told to end."""

from __future__ import annotations

import shlex
import statistics
import time
from pathlib import Path
from typing import Any

from aifactory_train.errors import MachineError
from aifactory_train.launch.attempts import Attempt, read_attempts, stopped_at_the_deadline
from aifactory_train.launch.chain import job_ids
from aifactory_train.launch.squeue import QueuedJob, ask_squeue, has_ranks, scancel
from aifactory_train.plan.plan import Plan, load_plan
from aifactory_train.rundir import (
    COMMIT,
    STOP_SIGNAL,
    RunDir,
    committed_steps,
    is_finished,
    is_held,
    read_jsonl,
    step_folder,
    write_atomic,
)
from aifactory_train.units import (
    format_count,
    format_difference,
    format_fraction,
    format_nats,
    format_rate,
    format_seconds,
)

# Rates are medians over this many of the newest log lines.
_RECENT_LINES = 20

Row = dict[str, Any]


def live_jobs(run: RunDir) -> list[str]:
    """Ids of its jobs that wait or run. Raises MachineError where Slurm cannot be asked."""
    return [job.job_id for job in ask_squeue(list(dict.fromkeys(job_ids(run))))]


def render_status(run: RunDir) -> str:
    """What the run folder and squeue tell of a run. Raises PlanError or RunFolderError where its files are damaged."""
    plan, attempts = load_plan(run.plan), read_attempts(run)
    jobs, silence = _ask(run)
    engine = plan.layout.engine_name
    rows = [
        ("run", str(run.root)),
        ("recipe", f"{plan.recipe.name} on {_counted(plan.layout.world_size, 'rank')} of {_nodes(plan)}, {engine}"),
        ("state", _state(run, plan, attempts, jobs)),
        *_progress(run, plan),
        *[("job", _job_line(job)) for job in jobs or []],
        *([("jobs", f"unknown: {silence}")] if silence else []),
        *([("follow", f"tail -F {shlex.quote(str(attempts[-1].log))}")] if attempts else []),
    ]
    lines = [f"{name:<11}{text}" for name, text in rows]
    running = {job.job_id for job in jobs or [] if job.on_nodes}
    return "\n".join([*lines, *_table(attempts, running)])


def cancel(run: RunDir, now: bool) -> str:
    """End the jobs of a run, after a save unless `now`, and let none follow. Returns what was done.

    Raises:
        MachineError: squeue or scancel is missing or refuses.
    """
    jobs = ask_squeue(list(dict.fromkeys(job_ids(run))))
    if not jobs:
        return _nothing_to_cancel(run)
    write_atomic(run.cancelled, f"{time.time():.3f}\n")
    lines = [_cancel_job(job, now) for job in jobs]
    return "\n".join([*lines, f"no further job will follow; to go on, launch {run.root} again"])


def _cancel_job(job: QueuedJob, now: bool) -> str:
    if not job.on_nodes:
        scancel(job.job_id)
        return f"job {job.job_id} was waiting ({job.state}): taken out of the queue"
    if not now and not has_ranks(job.job_id):
        scancel(job.job_id)
        return f"job {job.job_id} was running, and none of its ranks: told to end; what is saved stays"
    if now:
        scancel(job.job_id)
        return f"job {job.job_id} was running: told to end at once; what came after the last commit is lost"
    # Slurm hands it to the ranks, and not to the batch script, which sees how they end.
    scancel(job.job_id, STOP_SIGNAL.name.removeprefix("SIG"))
    return f"job {job.job_id} is running: told to save and end; if it does not: scancel {job.job_id}"


def _nothing_to_cancel(run: RunDir) -> str:
    if not is_held(run.root):
        return f"no job of {run.root} waits or runs; nothing to cancel"
    launcher = _launcher(run.root / ".lock")
    kill = "" if launcher is None else f", or type: kill -{STOP_SIGNAL.name.removeprefix('SIG')} {launcher}"
    return (
        f"{run.root} is being trained, and not by a batch job of Slurm: nothing was cancelled\n"
        f"  do:    press Ctrl-C where it was launched{kill}; it saves and ends"
    )


def _launcher(lock: Path) -> int | None:
    """The process that took this lock, by the kernel's list: "1: FLOCK ADVISORY WRITE <pid> <device>:<inode> 0 EOF"."""
    try:
        inode = str(lock.stat().st_ino)
        fields = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        pids = [int(f[4]) for f in fields if f[1] == "FLOCK" and f[5].rsplit(":", 1)[-1] == inode]
        return next((p for p in pids if any(fd.samefile(lock) for fd in Path(f"/proc/{p}/fd").iterdir())), None)
    except (OSError, ValueError, IndexError):  # another system, another user, or gone by now
        return None


def _ask(run: RunDir) -> tuple[list[QueuedJob] | None, str]:
    """Jobs that wait or run; None and the reason where Slurm cannot be asked."""
    try:
        return ask_squeue(list(dict.fromkeys(job_ids(run)))), ""
    except MachineError as error:
        return None, error.what


def _state(run: RunDir, plan: Plan, attempts: list[Attempt], jobs: list[QueuedJob] | None) -> str:
    if is_finished(run, plan.recipe.n_steps):
        return "finished"
    if jobs and any(job.on_nodes for job in jobs):
        return "running, told to save and end" if run.cancelled.exists() else "running"
    if jobs:
        return "queued"
    if is_held(run.root):
        return "running"
    if run.cancelled.exists():
        return "cancelled; to go on, launch it again"
    if jobs is None:
        return _unseen_state(attempts)
    if not attempts:
        submitted = job_ids(run)
        if not submitted:
            return "not started"
        return f"stopped: job {submitted[-1]} is gone and left no attempt; see its slurm-{submitted[-1]}.out"
    last = attempts[-1]
    if last.end is not None and last.end.verdict == "next":
        newest = job_ids(run)[-1:]
        if last.job is not None and newest and newest != [last.job.job_id]:
            return f"stopped: job {newest[0]} is gone and never began; see slurm-{newest[0]}.out, and launch again"
        return "stopped: the next job was not submitted, or was taken out of the queue; launch again"
    return f"stopped: {_reason(last)}"


def _unseen_state(attempts: list[Attempt]) -> str:
    last = attempts[-1] if attempts else None
    if last is None or (last.end is not None and last.end.verdict == "next"):
        return "unknown: a job was submitted, and Slurm cannot be asked from here"
    if last.end is not None:
        return f"stopped: {last.end.reason}"
    return f"unknown: last line {format_seconds(time.time() - last.last_seen_s)} ago, no end is noted"


def _reason(attempt: Attempt) -> str:
    """Why an attempt is over, by its end.json or by the last word of its ranks."""
    if attempt.end is not None:
        return attempt.end.reason
    stop, fault = attempt.newest("stop"), attempt.newest("fault")
    if attempt.newest("finish") is not None:
        return "finished"
    if stop is not None:
        after = f"after step {stop.get('step')}"
        if stopped_at_the_deadline(attempt):
            return f"{after}, as the wall time was nearly over; should no job follow, launch again"
        return f"{after} by {stop.get('signal')}; launch again to go on"
    if fault is not None:
        return str(fault.get("message"))
    return f"it went without a word; see {attempt.log}, and launch again to go on"


def _progress(run: RunDir, plan: Plan) -> list[tuple[str, str]]:
    """Step, loss, speed, time left and newest commit."""
    recipe, now_s = plan.recipe, time.time()
    rows = [row for row in read_jsonl(run.metrics) if isinstance(row.get("step"), int) and "time_s" in row]
    starts = [event for event in read_jsonl(run.events) if event.get("event") == "start"]
    resumed = bool(starts) and (not rows or rows[-1]["time_s"] < starts[-1]["time_s"])
    step = starts[-1]["step"] if resumed else rows[-1]["step"] if rows else 0
    batch = recipe.train.global_batch_tokens
    done = format_fraction(step / recipe.n_steps)
    tokens = f"{format_count(step * batch)} of {format_count(recipe.n_steps * batch)} tokens"
    lines = [("step", f"{step} of {recipe.n_steps} ({done}), {tokens}")]
    if rows:
        lines.append(("loss", f"{format_nats(rows[-1].get('loss'))} at step {rows[-1]['step']}"))
    measured = _recent(rows, "tokens_per_s")
    predicted = plan.predicted.tokens_per_s
    off = f" ({format_difference(measured / predicted - 1)})" if measured and predicted else ""
    speed = f"{format_rate(measured, 'tokens')} measured{off}, {format_rate(predicted, 'tokens')} predicted"
    lines.append(("speed", speed))
    step_time_s = _recent(rows, "step_time_s") or plan.predicted.total_step_time_s
    if step < recipe.n_steps and step_time_s:
        by = "" if rows else ", by the prediction"
        lines.append(("left", f"{format_seconds((recipe.n_steps - step) * step_time_s)} of training{by}"))
    commits = committed_steps(run.checkpoints)
    if commits:
        made_s = (step_folder(run.checkpoints, commits[-1]) / COMMIT).stat().st_mtime
        lines.append(("commit", f"step {commits[-1]}, {format_seconds(max(0.0, now_s - made_s))} ago"))
    else:
        lines.append(("commit", "none yet"))
    return lines


def _recent(rows: list[Row], key: str) -> float | None:
    """Median over the newest lines of the newest attempt, without its first, which holds the warm-up."""
    newest = [row for row in rows if row.get("attempt") == rows[-1].get("attempt")]
    values = [row[key] for row in (newest[1:] or newest)[-_RECENT_LINES:] if row.get(key) is not None]
    return statistics.median(values) if values else None


def _job_line(job: QueuedJob) -> str:
    nodes = f"{job.n_nodes} node{'s' * (job.n_nodes != '1')}"
    if job.on_nodes:
        return f"{job.job_id} {job.state} on {nodes} {job.hosts}, {job.time_left} left"
    start = "" if job.start in ("", "N/A") else f", expected to start at {job.start}"
    return f"{job.job_id} {job.state} for {nodes} ({job.reason}){start}"


def _nodes(plan: Plan) -> str:
    return f"{_counted(plan.layout.n_nodes, 'node')} of {plan.machine.name}"


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def _table(attempts: list[Attempt], running: set[str]) -> list[str]:
    """`running`: ids of the jobs that have their nodes."""
    if not attempts:
        return []
    cells = [
        ("attempt", "job", "nodes", "steps", "time", "exit", "then"),
        *[_cells(a, a is attempts[-1] and a.job is not None and a.job.job_id in running) for a in attempts],
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    padded = ([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]] for row in cells)
    return ["", *["  ".join(row).rstrip() for row in padded]]


def _cells(a: Attempt, under_way: bool) -> tuple[str, ...]:
    start = a.newest("start")
    first = start["step"] if start else a.job.first_step if a.job else 0
    steps = f"{first}-{a.rows[-1]['step']}" if a.rows else f"{first}-"
    until_s = max(a.last_seen_s, time.time()) if under_way and a.end is None else a.last_seen_s
    over = a.end is not None or any(a.newest(kind) for kind in ("stop", "fault", "finish"))
    return (
        str(a.number),
        a.job.job_id if a.job else "here",
        a.job.node_list if a.job else "1",
        steps,
        format_seconds(until_s - a.begin_s),
        str(a.end.exit_code) if a.end else "-",
        f"{a.end.verdict}: {a.end.reason}" if a.end else _reason(a) if over else "",
    )
