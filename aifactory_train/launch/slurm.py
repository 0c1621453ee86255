"""A machine as a batch script. Nothing that a user gives is rendered: it reaches the script as an argument."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

import jinja2

from aifactory_train.errors import MachineError
from aifactory_train.launch.env import job_variables
from aifactory_train.machine.facts import Variable
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.site import Container, Slurm
from aifactory_train.strictyaml import configs_dir
from aifactory_train.units import format_slurm_time

# Long enough to get somewhere, short enough to be backfilled; --time wins, and the chain goes on after it.
DEFAULT_TIME_H = 12.0
LINE_CHARS = 118
Line = tuple[str, str]  # an option, and why; "" where it says so itself


def launchers_dir() -> Path:
    """`launchers/` beside `configs/`, in a checkout and in an installed package."""
    return configs_dir().parent / "launchers"


def render_job(machine: Machine) -> str:
    """The batch script that trains on a machine. Raises MachineError where it has no Slurm."""
    slurm = _slurm_of(machine)
    by_srun = slurm.starter == "srun"
    return _render(
        "job.sbatch.j2",
        machine,
        why_time="of one job; the run goes on in the next",
        start=_srun(machine, slurm) if by_srun else _mpirun(machine, '"$SLURM_NTASKS"', str(machine.device.per_node)),
        # A rank that finds its node unfit must not end those that are still looking.
        keep_going=" --kill-on-bad-exit=0" if by_srun else "",
        end_together=" --kill-on-bad-exit=1" if by_srun else "",
        in_ranks="${aifactory_train[@]}",
    )


def render_bench(machine: Machine) -> str:
    """The batch script that runs a bench on a machine. Raises MachineError where it has no Slurm."""
    slurm = _slurm_of(machine)
    by_srun, n_ranks = slurm.starter == "srun", '"$((n_nodes * per_node))"'
    of_cell = [
        ('--nodes="$n_nodes"', ""),
        (f"--ntasks={n_ranks}", ""),
        ('--ntasks-per-node="$per_node"', ""),
        ('--kill-on-bad-exit="$together"', ""),
    ]
    return _render(
        "bench.sbatch.j2",
        machine,
        why_time="aifactory-train bench gives what the suite needs",
        start=[*_srun(machine, slurm), *of_cell] if by_srun else _mpirun(machine, n_ranks, "$per_node"),
        together=by_srun,
        in_ranks="${python[@]}",
    )


def _render(template: str, machine: Machine, why_time: str, in_ranks: str, **of_template: object) -> str:
    """in_ranks: what a rank runs, as an array of bash."""
    slurm = _slurm_of(machine)
    loader = jinja2.FileSystemLoader(launchers_dir() / "templates")
    env = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters.update(quoted=shlex.quote, assigned=_assigned, remark=_remark, reasoned=_reasoned)
    container = machine.container
    pyxis = container is not None and container.runtime == "pyxis"
    return env.get_template(template).render(
        machine=machine,
        slurm=slurm,
        title=machine.title or machine.name,
        wanted=_wanted(slurm),
        directives=_directives(machine, slurm, why_time),
        container=container,
        in_container=_in_container(container) if container else "",
        variables=job_variables(machine, cpus_per_rank(machine)),
        rendezvous=machine.rendezvous,
        ranks_python='"${in_ranks[@]}"' if pyxis else f'"{in_ranks}"',
        **of_template,
    )


def cpus_per_rank(machine: Machine) -> int:
    """Cores of one rank: by the site's rule, else an even share of the node."""
    given = machine.slurm.cpus_per_task if machine.slurm is not None else None
    return given or max(1, machine.host.cores // machine.device.per_node)


def core_mask(cores: list[int]) -> str:
    """[1, 2] -> "0x6", as srun --cpu-bind=mask_cpu takes it."""
    return hex(sum(1 << core for core in cores))


def _slurm_of(machine: Machine) -> Slurm:
    if machine.slurm is None:
        raise MachineError(
            f"machine {machine.name} has no Slurm",
            where="machine file: slurm",
            do="aifactory-train launch RECIPE --machine local  starts the ranks on this node",
        )
    return machine.slurm


def _wanted(slurm: Slurm) -> str:
    """The options that the user has to give, as they stand in the example."""
    account = "--account=PROJECT " if slurm.account_required is not False else ""
    return account + ("--qos=QOS " if slurm.qos_required and slurm.default_qos is None else "")


def _directives(machine: Machine, slurm: Slurm, why_time: str) -> list[Line]:
    most_h = min(p for p in (slurm.partition.max_time_h, _default_qos_time_h(slurm), DEFAULT_TIME_H) if p is not None)
    lines = [
        (f"--partition={slurm.partition.name}", ""),
        *([(f"--qos={slurm.default_qos}", "")] if slurm.default_qos else []),
        ("--nodes=1", "give --nodes to sbatch: it wins"),
        (f"--time={format_slurm_time(most_h * 3600)}", why_time),
        (f"--ntasks-per-node={machine.device.per_node}", "one rank per device"),
        (f"--cpus-per-task={cpus_per_rank(machine)}", ""),
    ]
    if slurm.devices is not None:
        lines.append((slurm.devices.option, slurm.devices.why))
    if slurm.memory is not None:
        lines.append((f"--mem={slurm.memory}", "of a node"))
    if slurm.exclusive:
        lines.append(("--exclusive", "whole nodes: the ranks use all of their links"))
    return lines + [(o.option, o.why) for o in slurm.directives]


def _default_qos_time_h(slurm: Slurm) -> float | None:
    return next((q.max_time_h for q in slurm.qos if q.name == slurm.default_qos), None)


def _srun(machine: Machine, slurm: Slurm) -> list[Line]:
    cpus = cpus_per_rank(machine)
    lines = [("srun", ""), ("--distribution=block:block", "ranks of a node are neighbours, also on its sockets")]
    if slurm.cpus_per_task_again:
        lines.append((f"--cpus-per-task={cpus}", "srun does not inherit it from sbatch"))
    if slurm.mpi is not None:
        lines.append((f"--mpi={slurm.mpi}", "the ranks find each other at MASTER_ADDR" if slurm.mpi == "none" else ""))
    if slurm.cpu_bind == "map":
        masks = ",".join(core_mask(place.core_list()) for place in machine.topology.places)
        lines.append((f"--cpu-bind=mask_cpu:{masks}", "rank i on the cores beside device i"))
    else:
        lines.append((f"--cpu-bind={slurm.cpu_bind}", ""))
    return lines + [(shlex.quote(o.option), o.why) for o in slurm.srun_options]


def _mpirun(machine: Machine, n_ranks: str, per_node: str) -> list[Line]:
    cpus = cpus_per_rank(machine)
    return [
        (shlex.quote(machine.mpi.mpirun or "mpirun"), ""),
        (f"-n {n_ranks}", ""),
        (f"--map-by ppr:{per_node}:node:PE={cpus}", "one rank per device, with its share of the cores"),
        ("--bind-to core", ""),
    ]


def _in_container(container: Container) -> str:
    """What stands before `python3` to run it in "$container", in bash."""
    options = " ".join(shlex.quote(o) for o in container.options)
    if container.runtime == "uenv":
        return " ".join(part for part in ('uenv run "$container"', options, "--") if part)
    if container.runtime == "pyxis":
        mounts = ",".join(f"{path}:{path}" for path in container.binds)
        shown = f'--container-mounts="$PWD:$PWD{"," + mounts if mounts else ""}" --container-workdir="$PWD"'
        return " ".join(part for part in ('--container-image="$container"', shown, options) if part)
    binds = ",".join(["$PWD", *container.binds])
    return " ".join(
        part for part in (f"{container.runtime} exec", f'--bind "{binds}"', options, '"$container"') if part
    )


def _assigned(variable: Variable) -> str:
    return f'"{variable.value}"' if variable.expand else shlex.quote(variable.value)


def _remark(text: str, first: str = "# ", then: str = "# ") -> str:
    return textwrap.fill(
        text, LINE_CHARS, initial_indent=first, subsequent_indent=then, break_long_words=False, break_on_hyphens=False
    )


def _reasoned(line: str, why: str, indent: str = "") -> str:
    """A line with its reason: behind it where there is room, else above."""
    if not why:
        return indent + line
    behind = f"{indent}{line}  # {why}"
    return behind if len(behind) <= LINE_CHARS else f"{_remark(why, f'{indent}# ', f'{indent}# ')}\n{indent}{line}"
