"""From a plan to a job in the queue."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from aifactory_train.errors import MachineError, RunFolderError, storage_errors
from aifactory_train.launch.chain import note_job
from aifactory_train.launch.checks import NO_CONTAINER, JobOptions, check_job, image_of, partition_of, qos_of
from aifactory_train.launch.env import submit_environment, user_defaults
from aifactory_train.launch.local import check_run_folder, write_run_folder
from aifactory_train.launch.slurm import DEFAULT_TIME_H, render_job
from aifactory_train.launch.status import live_jobs
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.cost import render_cost
from aifactory_train.plan.plan import Plan
from aifactory_train.rundir import RunDir, is_finished, write_atomic
from aifactory_train.units import format_slurm_time, parse_slurm_time_s

_SBATCH_SECONDS = 120


def launch_job(plan: Plan, run: RunDir, options: JobOptions, recipe_path: Path) -> str:
    """Check, render, write the run folder, submit. Returns what to tell the user.

    A dry run prints script and command before it checks, and writes and submits nothing.
    """
    options = with_defaults(options)
    script, command = render_job(plan.machine), sbatch_command(plan, run, options)
    if options.dry_run:
        print(script)
    check_job(plan, options, recipe_path)
    check_run_folder(plan, run)
    if is_finished(run, plan.recipe.n_steps):
        return f"{run.root} is finished at step {plan.recipe.n_steps}; nothing to train"
    if options.dry_run:
        return "\n".join(f"# {line}" for line in ["would be submitted by:", shlex.join(command), *_cost(plan, options)])
    live, folder = live_jobs(run), shlex.quote(str(run.root))
    if live:
        raise RunFolderError(
            f"job {', '.join(live)} has this run already",
            where=str(run.root),
            do=f"aifactory-train status {folder}, or first: aifactory-train cancel {folder}",
        )
    with storage_errors("writing the run folder", run.root, "free space or give another folder: --run RUN"):
        write_run_folder(plan, run)
        write_atomic(run.job_script, script)
        run.cancelled.unlink(missing_ok=True)
    job_id = submit(command, plan.machine, options)
    note_job(run, job_id)
    rows = [
        ("job", job_id),
        ("run", str(run.root)),
        *[("cost", line) for line in _cost(plan, options)],
        ("follow", f"aifactory-train status {folder}"),
        # By its name: while the job waits there is no such file, and a pattern would never match it.
        ("", f"tail -F {shlex.quote(str(run.attempt(run.last_attempt() + 1) / 'log.txt'))}"),
        ("end", f"aifactory-train cancel {folder}"),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in rows)


def with_defaults(options: JobOptions) -> JobOptions:
    """What the command line leaves open, as the user has set it for sbatch."""
    unset = {name: value for name, value in user_defaults().items() if getattr(options, name) is None}
    return JobOptions(**{**vars(options), **unset})


def sbatch_command(plan: Plan, run: RunDir, options: JobOptions) -> list[str]:
    """Each value is a word of its own, so that no shell ever reads it."""
    # The script's own wall time is right for the default partition and QoS only.
    time = options.time or format_slurm_time(default_time_s(plan.machine, options))
    words = job_words(plan.recipe.name, plan.layout.n_nodes, time, run.root, options)
    return ["sbatch", "--parsable", *words, str(run.job_script), str(run.recipe), str(run.root), str(run.machine)]


def job_words(name: str, n_nodes: int, time: str, folder: Path, options: JobOptions) -> list[str]:
    """What sbatch is told of a job whose output goes into `folder`."""
    given = {
        "job-name": name,
        "nodes": str(n_nodes),
        "time": time,
        "account": options.account,
        "partition": options.partition,
        "qos": options.qos,
        # In a file name % begins a field of Slurm, and a backslash turns that off for the whole name.
        "output": str(folder).replace("%", "%%") + "/slurm-%j.out",
    }
    return [f"--{name}={value}" for name, value in given.items() if value]


def submit(command: list[str], machine: Machine, options: JobOptions) -> str:
    """The id of the new job. Raises MachineError with what Slurm says."""
    if shutil.which(command[0]) is None:
        raise MachineError(
            "sbatch is not on this node's PATH",
            where="launch",
            do="run it on a login node of the machine, or look at the script with --dry-run",
        )
    container = "" if options.container == NO_CONTAINER else options.container
    # Our own Python is of no use inside an image.
    python = options.python or (None if image_of(machine, options) else sys.executable)
    env = submit_environment(python, container)
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_SBATCH_SECONDS)
    except subprocess.TimeoutExpired:
        raise MachineError(
            f"sbatch has not answered in {_SBATCH_SECONDS} s; the job may be in the queue all the same",
            where=shlex.join(command),
            do="squeue --me  shows it if it is; else launch again. Should there be two jobs, one leaves the run alone",
        ) from None
    if done.returncode:
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise MachineError(
            f"Slurm refused the job: {said}", where=shlex.join(command), do="mend what Slurm names above"
        )
    # Some sites say more than the id, and some name the cluster behind it.
    return done.stdout.strip().rpartition("\n")[2].split(";")[0]


def default_time_s(machine: Machine, options: JobOptions) -> int:
    """Wall time of a job where the user names none: within the limits of its partition and QoS."""
    assert machine.slurm is not None
    partition, qos = partition_of(machine.slurm, options), qos_of(machine.slurm, options)
    limits_h = (partition.max_time_h if partition else None, qos.max_time_h if qos else None, DEFAULT_TIME_H)
    return int(min(h for h in limits_h if h is not None) * 3600)


def _cost(plan: Plan, options: JobOptions) -> list[str]:
    time_s = parse_slurm_time_s(options.time) if options.time else None
    time_s = time_s or default_time_s(plan.machine, options)
    return render_cost(plan, time_s, format_slurm_time(time_s))
