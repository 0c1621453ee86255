"""From a suite to its programs: started here one after another, or by a batch job."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from aifactory_train.bench.finish import finish
from aifactory_train.bench.rounds import Wish, begin_cells, build_tuning, longest_s, next_cells
from aifactory_train.bench.suites import (
    Asked,
    Cell,
    End,
    Suite,
    build_asked,
    cell_words,
    check_nodes,
    join_folder,
    load_asked,
    machine_file,
    recipe_file,
    write_asked,
)
from aifactory_train.bench.tuned import tell_candidates
from aifactory_train.errors import PlanError, RunFolderError, storage_errors
from aifactory_train.hostlist import expand
from aifactory_train.launch.checks import JobOptions, job_faults, refuse_job_options
from aifactory_train.launch.env import local_environment, local_variables
from aifactory_train.launch.mpi import mpirun_command
from aifactory_train.launch.slurm import render_bench
from aifactory_train.launch.submit import default_time_s, job_words, submit, with_defaults
from aifactory_train.machine.load import write_machine
from aifactory_train.machine.machine import Machine
from aifactory_train.rundir import append_jsonl, hold, write_atomic
from aifactory_train.units import format_slurm_time

# Of a job beside its cells: the checks at its begin, the report at its end.
AROUND_S = 300
# From the request to end to the kill: the program notes what it was at.
_GRACE_S = 5.0
_TIMED_OUT = 124  # as `timeout` of coreutils says it
_DO_FOLDER = "free space or get the permission there, or give another folder: --out DIR"


def launch_bench(
    suite: Suite,
    machine: Machine,
    n_nodes: int | None,
    cpu_ranks: int,
    out: Path | None,
    options: JobOptions,
    wish: Wish | None = None,
) -> int:
    """Run a suite on this node, or submit it where the machine has Slurm. Returns the exit code.

    Args:
        n_nodes: None for the fewest that the suite takes.
        cpu_ranks: ranks of a program with one per device, where the machine has neither GPU nor Slurm.
        out: bench folder, None for a new one below bench-results/.
        wish: what to tune with the step program of the suite, in the place of all its programs.
    """
    n_nodes = suite.least_nodes if n_nodes is None else n_nodes
    if machine.slurm is None and n_nodes != 1:
        raise PlanError(
            f"{n_nodes} nodes, and machine {machine.name} has no Slurm to start ranks on the others",
            where=f"command line: --nodes, or suite {suite.name}: least_nodes",
            do="--nodes 1, or name a machine that has Slurm: --machine NAME (aifactory-train machines)",
        )
    check_nodes(suite, n_nodes)
    free_ranks = machine.slurm is None and machine.device.kind == "cpu"
    per_node = cpu_ranks if free_ranks else machine.device.per_node
    if wish is None:
        asked = build_asked(suite, machine, n_nodes, per_node)
    else:
        asked = build_tuning(suite, machine, n_nodes, per_node, wish)
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    folder = (out or Path("bench-results") / f"{suite.name}-{machine.name}-{stamp}").absolute()
    if machine.slurm is None:
        refuse_job_options(options)
        asked = join_folder(asked, folder)
        if options.dry_run:
            print(_local_text(asked, machine, folder))
            return 0
        return _run_here(asked, machine, folder)
    print(_submit(asked, machine, folder, with_defaults(options)))
    return 0


def _submit(asked: Asked, machine: Machine, folder: Path, options: JobOptions) -> str:
    """Check, render, write the bench folder, submit. Returns what to tell the user."""
    faults = job_faults(machine, asked.nodes, options)
    script = render_bench(machine)
    time_text = options.time or format_slurm_time(_time_s(asked, machine, options))
    words = job_words(f"bench-{asked.suite}", asked.nodes, time_text, folder, options)
    command = ["sbatch", "--parsable", *words, str(folder / "job.sbatch"), str(folder)]
    if options.dry_run:
        print(script)
    if faults:
        raise PlanError(
            "\n".join([f"{len(faults)} thing{'s' * (len(faults) > 1)} would end this job", *faults]),
            where=f"suite {asked.suite} on {asked.nodes} node(s) of machine {machine.name}",
            do="mend the lines above and try again; nothing was submitted",
        )
    asked = join_folder(asked, folder)
    if options.dry_run:
        cells = [shlex.join(["python", *cell_words(cell, asked, folder)]) for cell in asked.cells]
        lines = ["would be submitted by:", shlex.join(command), *_candidates(asked), "and would run:", *cells]
        lines += asked.left_out
        return "\n".join(f"# {line}" for line in lines)
    with storage_errors("writing the bench folder", folder, _DO_FOLDER):
        _write_folder(asked, machine, folder)
        write_atomic(folder / "job.sbatch", script)
    job_id = submit(command, machine, options)
    rows = [
        ("job", job_id),
        ("bench", str(folder)),
        ("follow", f"tail -F {shlex.quote(f'{folder}/slurm-{job_id}.out')}"),
    ]
    return "\n".join(f"{name:<8}{text}" for name, text in rows)


def _time_s(asked: Asked, machine: Machine, options: JobOptions) -> int:
    """Enough for every cell to hang until its time-out, within what the partition allows."""
    return min(default_time_s(machine, options), int(longest_s(asked) + AROUND_S))


def begin_job(folder: Path, node_list: str) -> list[str]:
    """Note the hosts of the job that runs now. Returns a line for each cell that is still to run, tabs between words.

    The words: number, program, time-out in seconds, nodes, ranks on each, scope, then the program and its arguments.
    """
    asked = load_asked(folder).model_copy(update={"hosts": expand(node_list)})
    if len(asked.hosts) != asked.nodes:
        raise RunFolderError(
            f"the bench was made for {asked.nodes} node(s), the job has {len(asked.hosts)}",
            where=str(folder / "suite.json"),
            do=f"sbatch --nodes={asked.nodes}, or aifactory-train bench {asked.suite} --nodes {len(asked.hosts)}",
        )
    with storage_errors("writing the bench folder", folder, _DO_FOLDER):
        write_asked(asked, folder)
        (folder / "logs").mkdir(exist_ok=True)
        return _lines(*begin_cells(asked, folder), folder)


def go_on_job(folder: Path) -> list[str]:
    """As `begin_job`, when all of those have been run: a line for each cell of the next round, none after the last."""
    with storage_errors("writing the bench folder", folder, _DO_FOLDER):
        return _lines(*next_cells(load_asked(folder), folder), folder)


def _lines(asked: Asked, todo: list[Cell], folder: Path) -> list[str]:
    return [
        "\t".join(
            [
                *(str(cell.number), cell.program, f"{cell.timeout_s:.0f}"),
                *(str(cell.n_nodes), str(cell.ranks_per_node), cell.scope),
                *cell_words(cell, asked, folder),
            ]
        )
        for cell in todo
    ]


def _write_folder(asked: Asked, machine: Machine, folder: Path) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    if asked.tuning is not None:
        write_atomic(recipe_file(folder), asked.tuning.text)
    write_asked(asked, folder)
    write_machine(machine, machine_file(asked, folder))


def _candidates(asked: Asked) -> list[str]:
    return [] if asked.tuning is None else tell_candidates(asked.tuning)


def _run_here(asked: Asked, machine: Machine, folder: Path) -> int:
    asked = asked.model_copy(update={"hosts": [platform.node().split(".")[0]]})
    busy = RunFolderError(
        "this bench is being run already", where=str(folder), do="wait until it has ended, or give another --out DIR"
    )
    with storage_errors("writing the bench folder", folder, _DO_FOLDER), hold(folder, busy):
        _write_folder(asked, machine, folder)
        asked, todo = begin_cells(asked, folder)
        print(f"bench {folder}: {len(todo)} of {len(asked.cells)} programs to run")
        for line in [*_candidates(asked), *(f"left out: {line}" for line in asked.left_out)]:
            print(line)
        # A SIGTERM, as of `timeout` or CI, would leave the ranks behind: it ends us as Ctrl-C does.
        before = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGTERM, signal.SIGHUP)}
        try:
            while todo:
                for cell in todo:
                    _run_cell(cell, _local_command(cell, asked, machine, folder), machine, folder)
                asked, todo = next_cells(asked, folder)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return finish(folder)


def _threads(machine: Machine, cell: Cell) -> int:
    return max(1, machine.host.cores // cell.ranks_per_node)


def _local_command(cell: Cell, asked: Asked, machine: Machine, folder: Path) -> list[str]:
    program = [sys.executable, *cell_words(cell, asked, folder)]
    if cell.ranks_per_node == 1:
        return program
    return mpirun_command(machine, cell.ranks_per_node, program, outlive=True)


def _local_text(asked: Asked, machine: Machine, folder: Path) -> str:
    """What would be run, so that it can be typed by hand; of a tuning the first round."""
    lines = [f"# {line}" for line in _candidates(asked)]
    for cell in asked.cells:
        lines.append(f"# {cell.program}, killed after {cell.timeout_s:.0f} s")
        lines += [f"export {v.name}={shlex.quote(v.value)}" for v in local_variables(machine, _threads(machine, cell))]
        lines.append(shlex.join(_local_command(cell, asked, machine, folder)))
    return "\n".join([*lines, *(f"# left out: {line}" for line in asked.left_out)])


def _run_cell(cell: Cell, command: list[str], machine: Machine, folder: Path) -> None:
    """Run a program to its end or its time-out, and note how it ended; its lines are shown when it is over."""
    print(f"{cell.program} ...", flush=True)
    began, begin_s = datetime.now(UTC), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="aifactory-train-") as mpi_folder, open(folder / cell.log, "wb") as log:
        env = local_environment(machine, _threads(machine, cell), mpi_folder)
        # Its own session: what it has started can be ended with it.
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=cell.timeout_s)
        except subprocess.TimeoutExpired:
            code = _TIMED_OUT
        finally:
            _end_session(process)
    seconds = round(time.monotonic() - begin_s, 3)
    end = End(cell=cell.number, exit_code=code, began=began, seconds=seconds)
    append_jsonl(folder / "ends.jsonl", end.model_dump(mode="json"))
    print((folder / cell.log).read_text(errors="replace"), end="")
    if code:
        print(f"{cell.program} ended with exit code {code} after {seconds:.0f} s")


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Ask whatever is left of it to end, then kill it: also ranks whose mpirun is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        end_s = time.monotonic() + _GRACE_S
        while number == signal.SIGTERM and process.poll() is None and time.monotonic() < end_s:
            time.sleep(0.05)
    process.wait()
