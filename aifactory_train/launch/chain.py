"""One job after the other: what a batch script asks before the ranks start and after they ended.

A run goes on in the next job until it is finished, or until an attempt ended in a way that the next would repeat.
"""

from __future__ import annotations

import re
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aifactory_train.errors import (
    Interrupted,
    MachineError,
    PreflightFault,
    RendezvousError,
    RunFolderError,
    TrainingFault,
    UserError,
    storage_errors,
)
from aifactory_train.hostlist import compress, expand
from aifactory_train.launch.attempts import (
    Attempt,
    End,
    Job,
    Times,
    account,
    read_attempts,
    stopped_at_the_deadline,
    write_part,
)
from aifactory_train.launch.fitness import judge, render_fitness
from aifactory_train.launch.local import check_run_folder, default_run_folder, write_run_folder
from aifactory_train.launch.squeue import ask_squeue
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.plan import Plan, load_plan, make_plan
from aifactory_train.plan.support import refuse_untrainable
from aifactory_train.recipe.load import load_recipe
from aifactory_train.rundir import RunDir, append_jsonl, committed_steps, is_finished, log_event, read_jsonl
from aifactory_train.units import format_fraction, format_seconds

SUBMIT_NEXT = 75  # EX_TEMPFAIL of sysexits.h, which no rank ends with
# Slurm sends SIGTERM when the wall time is over; with more than this left, somebody else ended the job.
_AT_THE_LIMIT_S = 60.0
# A job that kills its nodes, or a site that drains what a failed job leaves behind, would try one node after the other.
_MOST_IN_VAIN = 5
# As faults/guard.py says it. Resumed at the same commit, the same steps lead there again.
_NOT_FINITE = re.compile(r"(loss|grad_norm) is ")

_MEANING = {
    0: "the ranks ended before the last step",
    RendezvousError.exit_code: "the ranks did not find each other in time",
    TrainingFault.exit_code: "training failed",
    PreflightFault.exit_code: "a node is not fit to train on",
    Interrupted.exit_code: "the ranks were told to stop",
}


def begin(
    recipe: Path,
    machine: str | Path,
    n_nodes: int,
    run: Path | None,
    job_id: str,
    node_list: str,
    end_time_s: float | None,
) -> Path | None:
    """Make plan and attempt folder for the job that runs now. Returns the folder, None where this job has no work.

    Args:
        n_nodes: nodes of the job; the plan is made for them.
        run: run folder, None for the default one of the recipe.
        node_list: its hosts, in Slurm's syntax.
        end_time_s: when Slurm will cut it off, seconds since the epoch.

    Raises:
        UserError: recipe, machine and run folder do not fit together.
        TrainingFault: Slurm has started this job again and again, and nothing was saved.
    """
    begin_s = round(time.time(), 3)
    plan = make_plan(load_recipe(recipe), load_machine(machine), n_nodes)
    refuse_untrainable(plan.layout, where=f"recipe {plan.recipe.name} on machine {plan.machine.name}")
    folder = RunDir(run or default_run_folder(plan.recipe.name))
    check_run_folder(plan, folder)
    no_work = _no_work(folder, plan, job_id)
    if no_work:
        print(no_work, file=sys.stderr)
        return None
    first_step = _newest_commit(folder)
    if (n := in_vain(read_attempts(folder), job_id, first_step)) >= _MOST_IN_VAIN:
        raise TrainingFault(
            f"the last {n} attempts have saved nothing; job {job_id} does not try again",
            where=str(folder.attempts),
            do="see their log.txt and what the nodes died of, mend it, and launch again",
        )
    write_run_folder(plan, folder)
    note_job(folder, job_id)
    number = folder.last_attempt() + 1
    attempt = folder.attempt(number)
    with storage_errors("making the attempt's folder", attempt, "free some space and launch again"):
        try:
            attempt.mkdir(parents=True)
        except FileExistsError:
            raise RunFolderError(
                f"another job has begun attempt {number} at this moment",
                where=str(attempt),
                do=f"aifactory-train status {shlex.quote(str(folder.root))}  shows which; this job ends",
            ) from None
    write_part(attempt / "job.json", Job(job_id, node_list, n_nodes, begin_s, end_time_s, first_step))
    log_event(folder, "attempt", number=number, job_id=job_id, nodes=node_list, step=first_step)
    return attempt


def note_job(run: RunDir, job_id: str) -> None:
    """Note that this job goes on with the run from now on. Raises StorageError."""
    if job_ids(run)[-1:] == [job_id]:
        return
    with storage_errors("noting the job", run.jobs, "free some space and launch again"):
        append_jsonl(run.jobs, {"time_s": round(time.time(), 3), "job_id": job_id})


def job_ids(run: RunDir) -> list[str]:
    """Jobs of the run in the order in which they took it over; the last one has it."""
    return [str(row["job_id"]) for row in read_jsonl(run.jobs) if "job_id" in row]


def end(attempt: Path, exit_code: int, down_nodes: str, terminated: bool) -> int:
    """Decide what follows an attempt, write end.json, and tell: on stderr why, on stdout the hosts that are unfit.

    Args:
        exit_code: of the ranks, see errors.py.
        down_nodes: hosts that Slurm has lost, in its syntax.
        terminated: whether the batch script itself was told to end.

    Returns:
        0 the run is finished, 75 submit the next job, anything else: stop.
    """
    end_s = round(time.time(), 3)
    run = RunDir(attempt.absolute().parent.parent)
    plan, attempts = load_plan(run.plan), read_attempts(run)
    index = next((i for i, a in enumerate(attempts) if a.folder.name == attempt.name), None)
    if index is None or (job := attempts[index].job) is None:
        raise RunFolderError(
            "no attempt of a batch job: it holds no job.json",
            where=str(attempt),
            do="give the folder that was printed by: aifactory-train attempt begin",
        )
    this, before = attempts[index], attempts[:index]
    known_bad = {host for a in before if a.end for host in expand(a.end.excluded)}
    own = set(expand(job.node_list))
    bad = [host for host in expand(down_nodes) if host in own]
    fault = str((this.newest("fault") or {}).get("message", ""))
    # A node can also be so broken that it kills its ranks, in the preflight or before they have said a word.
    killed = exit_code > 128 and exit_code != Interrupted.exit_code and not terminated and not this.newest("start")
    if exit_code == PreflightFault.exit_code or killed:
        unfit, found = _unfit(this, job, plan, before)
        if unfit or not killed:
            bad += unfit
            fault = "; ".join(found.splitlines()[:2])
            print(found, file=sys.stderr)
    outcome = Outcome(
        exit_code=exit_code,
        finished=is_finished(run, plan.recipe.n_steps),
        cancelled=run.cancelled.exists(),
        terminated=terminated,
        left_s=None if job.end_time_s is None else job.end_time_s - end_s,
        first_step=job.first_step,
        last_step=_newest_commit(run),
        n_steps=plan.recipe.n_steps,
        fault=fault,
        newly_bad=[host for host in bad if host not in known_bad],
        log=this.log,
        in_vain=in_vain(before, job.job_id, job.first_step),
        out_of_time=stopped_at_the_deadline(this),
    )
    decision = decide(outcome)
    excluded = compress([*sorted(known_bad), *outcome.newly_bad])
    times = account(attempts, index, end_s)
    write_part(attempt / "end.json", _record(outcome, decision, excluded, times, end_s))
    earlier = [account(attempts, i, a.last_seen_s) for i, a in enumerate(before)]
    print(f"{render_times(run, this.number, times, earlier)}\n{decision.verdict}: {decision.reason}", file=sys.stderr)
    if decision.verdict == "next" and excluded:
        print(excluded)
    return decision.code


def _record(outcome: Outcome, decision: Decision, excluded: str, times: Times, end_s: float) -> End:
    return End(
        exit_code=outcome.exit_code,
        verdict=decision.verdict,
        reason=decision.reason,
        last_step=outcome.last_step,
        excluded=excluded,
        end_s=end_s,
        in_job_s=round(times.in_job_s, 3),
        training_s=round(times.training_s, 3),
        startup_s=round(times.startup_s, 3),
        unused_s=round(times.unused_s, 3),
        redone_steps=times.redone_steps,
    )


@dataclass(frozen=True)
class Outcome:
    """All that the decision after an attempt rests on.

    left_s: wall time that was left when the ranks ended, None where the limit is not known.
    first_step, last_step: newest commit when it began and when it ended.
    fault: what the ranks, or the preflight, said of the error that ended them; "" if nothing.
    newly_bad: nodes that this attempt found unfit or lost, and none before it.
    in_vain: attempts in a row before it that saved nothing.
    out_of_time: whether the ranks stopped by themselves, as the wall time was nearly over.
    """

    exit_code: int
    finished: bool
    cancelled: bool
    terminated: bool
    left_s: float | None
    first_step: int
    last_step: int
    n_steps: int
    fault: str
    newly_bad: list[str]
    log: Path
    in_vain: int = 0
    out_of_time: bool = False


@dataclass(frozen=True)
class Decision:
    """`code` is what the batch script gets; `reason` is a sentence, with what to do where it is `stop`."""

    verdict: Literal["done", "next", "stop"]
    reason: str
    code: int


def decide(outcome: Outcome) -> Decision:
    """Done, the next job, or stop."""
    o = outcome
    if o.finished:
        later = f"; afterwards {_ended(o)}" if o.exit_code else ""
        return Decision("done", f"all {o.n_steps} steps are trained and saved{later}", 0)
    if o.cancelled:
        return Decision("stop", f"the run was cancelled; {_kept(o)}; to go on, launch it again", Interrupted.exit_code)
    if _NOT_FINITE.match(o.fault):
        reason = f"{o.fault}; {_kept(o)}; take a lower optim.lr in a new run folder, or launch again to try once more"
        return Decision("stop", reason, _stop_code(o))
    if o.exit_code == UserError.exit_code:
        said = f": {o.fault}" if o.fault else ""
        return Decision("stop", f"something must be mended first{said}; see {o.log}, then launch again", _stop_code(o))
    if o.terminated and (o.left_s is None or o.left_s > _AT_THE_LIMIT_S):
        early = "" if o.left_s is None else f" {format_seconds(o.left_s)} before its time was up"
        reason = f"the job was told to end{early}, by scancel or by Slurm itself; {_kept(o)}; to go on, launch it again"
        return Decision("stop", reason, Interrupted.exit_code)
    if o.last_step > o.first_step:
        left_out = f", without {compress(o.newly_bad)}" if o.newly_bad else ""
        return Decision("next", f"{_ended(o)}; {_kept(o)}; the next job goes on from there{left_out}", SUBMIT_NEXT)
    if o.newly_bad and o.in_vain + 1 < _MOST_IN_VAIN:
        reason = f"{_ended(o)}; the next job does without {compress(o.newly_bad)}"
        return Decision("next", reason, SUBMIT_NEXT)
    if o.newly_bad:
        do = f"so did {o.in_vain} attempts before it on other nodes; see {o.log}, mend what it names, and launch again"
    elif o.exit_code == Interrupted.exit_code:
        do = f"give the job more wall time (--time), or see in {o.log} what it waited for, and launch again"
    else:
        do = f"the next job would end alike; see {o.log}, mend what it names, and launch again"
    return Decision("stop", f"no progress: {_ended(o)}, and nothing was saved; {_kept(o)}; {do}", _stop_code(o))


def _ended(o: Outcome) -> str:
    if o.out_of_time and o.exit_code == Interrupted.exit_code:
        meaning = "the wall time was nearly over"
    elif o.exit_code in _MEANING:
        meaning = _MEANING[o.exit_code]
    elif o.exit_code - 128 in {int(number) for number in signal.Signals}:
        meaning = f"the ranks were ended by {signal.Signals(o.exit_code - 128).name}"
    else:
        meaning = "the ranks failed"
    return f"{meaning} (exit code {o.exit_code}{f': {o.fault}' if o.fault else ''})"


def _kept(o: Outcome) -> str:
    return f"step {o.last_step} of {o.n_steps} is saved" if o.last_step else "there is no checkpoint yet"


def _stop_code(o: Outcome) -> int:
    """The ranks' own exit code, unless the batch script would take it for another answer."""
    return o.exit_code if 0 < o.exit_code < 256 and o.exit_code != SUBMIT_NEXT else 1


def render_times(run: RunDir, number: int, times: Times, earlier: list[Times]) -> str:
    """Where the time of an attempt went, and the share that all of them wasted."""
    parts = [f"{format_seconds(times.in_job_s)} in the job, {format_seconds(times.training_s)} of it training"]
    parts.append(f"start-up {format_seconds(times.startup_s)}")
    if times.unused_s:
        parts.append(f"{format_seconds(times.unused_s)} unused at the end")
    if times.redone_steps:
        parts.append(f"{times.redone_steps} step{'s' * (times.redone_steps > 1)} had to be redone")
    everything = [*earlier, times]
    wasted_s, slot_s = sum(t.wasted_s for t in everything), sum(t.slot_s for t in everything)
    share = f" ({format_fraction(wasted_s / slot_s)})" if slot_s else ""
    return (
        f"attempt {number} of {run.root}: {', '.join(parts)}\n"
        f"wasted so far, in {len(everything)} attempt{'s' * (len(everything) > 1)}: "
        f"{format_seconds(wasted_s)} of {format_seconds(slot_s)}{share}"
    )


def _no_work(run: RunDir, plan: Plan, job_id: str) -> str:
    """Why this job shall not train, "" where it shall."""
    if is_finished(run, plan.recipe.n_steps):
        return f"{run.root} is finished at step {plan.recipe.n_steps}; nothing to train"
    if run.cancelled.exists():
        return f"{run.root} was cancelled; to go on, launch it again, or: rm {run.cancelled}"
    jobs = job_ids(run)
    if job_id in jobs and jobs[-1] != job_id:
        return f"job {jobs[-1]} has taken over {run.root}; job {job_id} leaves it alone"
    other = _training_now(run, job_id)
    if other is not None:
        note_job(run, other)  # should Slurm start that one again, it must not step back for us
        return f"job {other} is training {run.root} right now; job {job_id} leaves it alone"
    return ""


def in_vain(before: list[Attempt], job_id: str, first_step: int) -> int:
    """How many attempts directly before one at this commit saved nothing, since somebody launched the run."""
    n = 0
    for attempt in reversed(before):
        if attempt.job is None or attempt.job.first_step != first_step:
            break
        went_on = attempt.job.job_id == job_id if attempt.end is None else attempt.end.verdict == "next"
        if not went_on:
            break
        n += 1
    return n


def _training_now(run: RunDir, job_id: str) -> str | None:
    """Another job that has an attempt under way: two would write the same checkpoints."""
    last = read_attempts(run)[-1:]
    if not last or last[0].job is None or last[0].end is not None or last[0].job.job_id == job_id:
        return None
    other = last[0].job.job_id
    try:
        return other if any(job.on_nodes for job in ask_squeue([other])) else None
    except MachineError:  # inside a container there is no squeue
        return None


def _unfit(attempt: Attempt, job: Job, plan: Plan, before: list[Attempt]) -> tuple[list[str], str]:
    """Hosts that failed the preflight, and what it found. Where all failed, the cause is not in the nodes: none."""
    hosts = expand(job.node_list)
    fitness = judge(attempt.folder, hosts, plan.layout.world_size // plan.layout.n_nodes)
    failed_before = any(a.end is not None and a.end.exit_code == PreflightFault.exit_code for a in before)
    # A single node has none beside it to compare with: the second one that fails tells.
    shared = not fitness.passing and (len(hosts) > 1 or failed_before)
    return ([] if shared else list(fitness.failing)), render_fitness(fitness)


def _newest_commit(run: RunDir) -> int:
    return max(committed_steps(run.checkpoints), default=0)
