"""Start a run on this machine: check, write the run folder, start the ranks, pass their output on."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import IO, Any

from aifactory_train.data.shards import check_fits_model, load_prepared
from aifactory_train.errors import PlanError, RunFolderError, storage_errors
from aifactory_train.launch.checks import JobOptions, check_init_from, refuse_job_options
from aifactory_train.launch.env import local_environment, local_variables
from aifactory_train.launch.mpi import mpirun_command
from aifactory_train.machine.load import write_machine
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.load import dump_recipe, load_recipe
from aifactory_train.rundir import STOP_SIGNAL, RunDir, committed_steps, hold, is_finished, write_atomic

_CHUNK_BYTES = 1 << 16
# mpirun's own notice that a rank has failed stands between two such lines, below the rank's message.
_RULE = b"-" * 74 + b"\n"


def launch_local(plan: Plan, run: RunDir, options: JobOptions) -> int:
    """Run the plan here by mpirun. Returns the exit code of the ranks, 0 at once if the run is finished."""
    refuse_job_options(options)
    if plan.layout.n_nodes != 1:
        raise PlanError(
            f"{plan.layout.n_nodes} nodes, and machine {plan.machine.name} has no Slurm to start ranks on the others",
            where="command line: --nodes",
            do="--nodes 1, or name a machine that has Slurm: --machine NAME (aifactory-train machines)",
        )
    check_run_folder(plan, run)
    check_fits_model(load_prepared(plan.recipe.data).manifest, plan.recipe.model.vocab_size)
    if is_finished(run, plan.recipe.n_steps):
        print(f"{run.root} is finished at step {plan.recipe.n_steps}; nothing to train")
        return 0
    if plan.recipe.lora is not None or not committed_steps(run.checkpoints):
        check_init_from(plan.recipe.model)
    if options.dry_run:
        print(_command_text(plan, run))
        return 0
    busy = RunFolderError(
        "this run is being trained already",
        where=str(run.root),
        do="wait until it has ended, or stop it with Ctrl-C there",
    )
    do = "free space or get the permission there and launch again, or give another folder: --run RUN"
    with storage_errors("writing the run folder", run.root, do), hold(run.root, busy) as lock:
        return _start_ranks(plan, run, lock)


def _start_ranks(plan: Plan, run: RunDir, lock: IO[str]) -> int:
    write_run_folder(plan, run)
    attempt = run.attempt(run.last_attempt() + 1)
    attempt.mkdir(parents=True)
    write_atomic(attempt / "command.sh", _command_text(plan, run))
    with tempfile.TemporaryDirectory(prefix="aifactory-train-") as mpi_folder, open(attempt / "log.txt", "wb") as log:
        env = local_environment(plan.machine, plan.layout.threads_per_rank, mpi_folder)
        return _run(_command(plan, run), env, log, lock)


def _command(plan: Plan, run: RunDir) -> list[str]:
    program = [sys.executable, "-m", "aifactory_train", "train", str(run.root)]
    if sys.stdout.isatty():
        program += ["--bar", str(shutil.get_terminal_size().columns)]
    return mpirun_command(plan.machine, plan.layout.world_size, program)


def _command_text(plan: Plan, run: RunDir) -> str:
    """What is run, so that it can be typed by hand."""
    variables = local_variables(plan.machine, plan.layout.threads_per_rank)
    lines = [f"export {v.name}={shlex.quote(v.value)}  # {v.why}" for v in variables]
    return "\n".join([*lines, shlex.join(_command(plan, run)), ""])


def check_run_folder(plan: Plan, run: RunDir) -> None:
    """Refuse a folder that holds a run of another recipe; names the keys that differ.

    A run goes on in any layout: its numbers do not depend on how the ranks share the work.
    """
    if run.root.exists() and not run.root.is_dir():
        raise RunFolderError("the run folder is a file", where=str(run.root), do="give a folder: --run RUN")
    if not run.recipe.exists():
        if run.root.exists() and any(p.name != ".lock" for p in run.root.iterdir()):
            raise RunFolderError(
                "the folder holds files but no run", where=str(run.root), do="give an empty or new folder: --run RUN"
            )
        return
    # Read as a recipe: what it does not name had its default.
    before = load_recipe(run.recipe).model_dump(mode="json")
    now = plan.recipe.model_dump(mode="json")
    for recipe in (before, now):
        del recipe["layout"], recipe["train"]["micro_batch_rows"], recipe["train"]["compile"]
    changed = sorted(_differences(before, now, ""))
    if changed:
        raise RunFolderError(
            f"the run folder belongs to another recipe; different: {', '.join(changed)}",
            where=str(run.recipe),
            do="take another folder: --run RUN, or the recipe that it was started with",
        )


def _differences(a: Any, b: Any, key: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        names = {*a, *b}
        return [d for n in names for d in _differences(a.get(n), b.get(n), f"{key}.{n}" if key else n)]
    return [] if a == b else [f"{key} ({a!r} there, {b!r} now)"]


def write_run_folder(plan: Plan, run: RunDir) -> None:
    """Leave recipe, machine and plan for the ranks. Raises StorageError."""
    with storage_errors("writing the run folder", run.root, "free space or give another folder: --run RUN"):
        write_atomic(run.recipe, dump_recipe(plan.recipe))
        write_machine(plan.machine, run.machine)
        write_atomic(run.plan, plan.to_json())


def _run(command: list[str], env: dict[str, str], log: IO[bytes], lock: IO[str]) -> int:
    """Run to the end. The first Ctrl-C, SIGTERM or hang-up asks the ranks to save and stop, the second kills them."""
    # Its own session: the terminal's Ctrl-C would reach mpirun directly, which kills without saving. The lock goes
    # with it: should this launcher die, the run folder stays held for as long as the ranks live.
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lock.fileno(),),
    )
    asked = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        process.send_signal(signal.SIGTERM if asked else STOP_SIGNAL)
        if not asked and number != signal.SIGHUP:  # after a hang-up there is nobody to tell
            os.write(2, b"stopping after this step and saving; once more to kill\n")
        asked = True

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STOP_SIGNAL)}
    try:
        assert process.stdout is not None
        _pass_on(process.stdout.fileno(), log, process)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _pass_on(source: int, log: IO[bytes], process: subprocess.Popen[bytes]) -> None:
    """Output of the ranks to the log and the terminal. If one of them is gone, the run is asked to save and stop."""
    held = b""
    try:
        while chunk := os.read(source, _CHUNK_BYTES):
            log.write(chunk)
            log.flush()
            shown, held = without_notice(held + chunk)
            sys.stdout.buffer.write(shown)
            sys.stdout.buffer.flush()
        sys.stdout.buffer.write(held)
    except OSError:
        process.send_signal(STOP_SIGNAL)
        while os.read(source, _CHUNK_BYTES):  # mpirun would wait for a reader
            pass
        process.wait()
        raise


def without_notice(output: bytes) -> tuple[bytes, bytes]:
    """Split output of mpirun into what to show now and what to hold back until more has come.

    Drops the notices "prterun detected that one or more processes exited" and "prterun noticed that
    process"; any other text passes.
    """
    before, rule, after = output.partition(_RULE)
    if not rule:
        # The beginning of a rule may be all that has arrived so far.
        cut = output.rfind(b"\n") + 1
        return (output[:cut], output[cut:]) if _RULE.startswith(output[cut:]) else (output, b"")
    notice, end, rest = after.partition(_RULE)
    if not end:
        return before, rule + after
    keep = b"" if notice.startswith(b"prterun ") else rule + notice + end
    shown, held = without_notice(rest)
    return before + keep + shown, held


def default_run_folder(recipe_name: str) -> Path:
    return Path("runs") / recipe_name
