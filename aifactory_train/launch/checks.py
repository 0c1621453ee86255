"""What would fail in the queue, found before a queue slot is spent."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

from aifactory_train.data.shards import check_fits_model, load_prepared
from aifactory_train.data.stage import check_staged
from aifactory_train.errors import AifactoryError, CheckpointError, MachineError, PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.site import Partition, Qos, Slurm, limits_of
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.schema import Model
from aifactory_train.recipe.weights import check_config, read_json
from aifactory_train.units import format_slurm_time, parse_slurm_time_s

NO_CONTAINER = "none"  # as --container, where the machine file names an image


@dataclass(frozen=True)
class JobOptions:
    """What the user asks of the batch system, as given on the command line."""

    time: str | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    container: str | None = None
    python: str | None = None
    dry_run: bool = False


def check_job(plan: Plan, options: JobOptions, recipe_path: Path) -> None:
    """Raise one PlanError that names every fault: limits of the site, data, settings that need the internet."""
    faults = [
        *job_faults(plan.machine, plan.layout.n_nodes, options),
        *_rank_faults(plan),
        *_online_faults(plan),
        *_data_faults(plan, recipe_path),
    ]
    if faults:
        raise PlanError(
            "\n".join([f"{len(faults)} thing{'s' * (len(faults) > 1)} would end this job before it trains", *faults]),
            where=f"recipe {plan.recipe.name} on {plan.layout.n_nodes} node(s) of machine {plan.machine.name}",
            do="mend the lines above and launch again; nothing was submitted",
        )


def job_faults(machine: Machine, n_nodes: int, options: JobOptions) -> list[str]:
    """What the site would refuse of any job of so many nodes, one entry each with what to do."""
    slurm = machine.slurm
    assert slurm is not None
    return [
        *_account_faults(machine, slurm, options),
        *_limit_faults(n_nodes, slurm, options),
        *_python_faults(machine, options),
    ]


def _fault(what: str, do: str) -> str:
    return f"  - {what}\n    do: {do}"


def partition_of(slurm: Slurm, options: JobOptions) -> Partition | None:
    """The partition that the job will be in; None where the machine file does not know it."""
    wanted = options.partition or slurm.partition.name
    return next((p for p in slurm.partitions if p.name == wanted), None)


def image_of(machine: Machine, options: JobOptions) -> str | None:
    """The image that the ranks will run in: the user's, or the site's; None for none."""
    if options.container is not None:
        return None if options.container == NO_CONTAINER else options.container
    return machine.container.image if machine.container is not None else None


def qos_of(slurm: Slurm, options: JobOptions) -> Qos | None:
    """The QoS that the job will have; None where the machine file does not know it."""
    wanted = options.qos or slurm.default_qos
    return next((q for q in slurm.qos if q.name == wanted), None)


def _account_faults(machine: Machine, slurm: Slurm, options: JobOptions) -> list[str]:
    faults = []
    if slurm.account_required and not options.account:
        faults.append(
            _fault("no account is given", f"--account PROJECT{f': {slurm.account_hint}' if slurm.account_hint else ''}")
        )
    if slurm.qos_required and not (options.qos or slurm.default_qos):
        known = ", ".join(q.name for q in slurm.qos)
        faults.append(_fault("no QoS is given", f"--qos QOS{f', one of {known}' if known else ''}"))
    if partition_of(slurm, options) is None:
        known = ", ".join(p.name for p in slurm.partitions)
        faults.append(_fault(f"partition {options.partition!r} is not in the machine file", f"one of {known}"))
    if options.container and machine.container is None:
        faults.append(_fault("a container is given, and the machine file names no runtime", "leave out --container"))
    image = image_of(machine, options)
    if image and image.startswith(("/", "./", "../")) and not Path(image).exists() and not options.dry_run:
        faults.append(_fault(f"there is no image {image}", f"--container IMAGE, or --container {NO_CONTAINER}"))
    return faults


def _rank_faults(plan: Plan) -> list[str]:
    n_nodes, per_node = plan.layout.n_nodes, plan.machine.device.per_node
    if plan.layout.world_size == n_nodes * per_node:
        return []
    what = f"{plan.layout.world_size} ranks on {n_nodes} node(s); the batch script starts {per_node} on each"
    return [_fault(what, "leave out --cpu-ranks")]


def _limit_faults(n_nodes: int, slurm: Slurm, options: JobOptions) -> list[str]:
    """More than the partition or the QoS allows."""
    partition, qos, faults = partition_of(slurm, options), qos_of(slurm, options), []
    limits = limits_of(partition, qos)
    named = f"partition {partition.name if partition else '?'}" + (f" with QoS {qos.name}" if qos else "")
    most = limits.max_nodes or (partition.nodes if partition else None)
    if most is not None and n_nodes > most:
        faults.append(_fault(f"{n_nodes} nodes; {named} allows {most}", f"--nodes {most} or less"))
    least = limits.min_nodes
    if least is not None and n_nodes < least:
        faults.append(_fault(f"{n_nodes} node(s); {named} wants {least} or more", f"--nodes {least}, or another --qos"))
    if options.time is None:
        return faults
    time_s = parse_slurm_time_s(options.time)
    most_h = limits.max_time_h
    if not time_s:
        what = f"--time {options.time!r} is no wall time in minutes, H:MM:SS or D-HH:MM:SS"
        faults.append(_fault(what, "such as --time 12:00:00"))
    elif most_h is not None and time_s > most_h * 3600:
        longest = format_slurm_time(most_h * 3600)
        what = f"--time {options.time} is {format_slurm_time(time_s)}; {named} allows {longest}"
        faults.append(_fault(what, f"--time {longest} or less: the run goes on in the next job by itself"))
    return faults


def _python_faults(machine: Machine, options: JobOptions) -> list[str]:
    here, there = platform.machine(), machine.host.architecture
    if there is None or there == here or options.python or image_of(machine, options):
        return []
    return [_fault(f"this Python is for {here}, the compute nodes are {there}", "--python FILE or --container IMAGE")]


def _online_faults(plan: Plan) -> list[str]:
    if plan.machine.internet.compute is not False or plan.recipe.metrics.wandb != "online":
        return []
    what = "metrics.wandb is online, and the compute nodes have no internet"
    return [_fault(what, "--set metrics.wandb=offline; afterwards on a login node: wandb sync RUN/wandb/offline-*")]


def _data_faults(plan: Plan, recipe_path: Path) -> list[str]:
    """Prepared shards, tokenizer and weights must be there already."""
    recipe, faults = plan.recipe, []

    def hold(check: object) -> None:
        try:
            check()  # type: ignore[operator]
        except AifactoryError as error:
            faults.append(_fault(f"{error.what} ({error.where})" if error.where else error.what, error.do))

    hold(lambda: check_fits_model(load_prepared(recipe.data).manifest, recipe.model.vocab_size))
    hold(lambda: check_staged(recipe_path.parent))
    hold(lambda: check_init_from(recipe.model))
    return faults


def check_init_from(model: Model) -> None:
    """Raise CheckpointError where `model.init_from` is no folder with this model, or a file of it is not whole.

    The names and shapes of the tensors are seen by the ranks, which have the model's code.
    """
    if model.init_from is None:
        return
    folder = Path(model.init_from).expanduser()
    what: str | None
    if not folder.is_dir():
        what = "no such folder"
    elif not (folder / "config.json").is_file():
        what = "no config.json"
    elif not any(next(folder.glob(pattern), None) for pattern in ("*.safetensors", "pytorch_model*.bin")):
        what = "no weights, neither *.safetensors nor pytorch_model.bin"
    else:
        check_config(model, folder)
        what = _damaged_file(folder)
    if what is None:
        return
    raise CheckpointError(
        f"model.init_from {model.init_from}: {what}",
        where=str(folder),
        do="--set model.init_from=FOLDER, a Hugging Face folder; for a model of the hub first: "
        "aifactory-train stage RECIPE --to DIR",
    )


def _damaged_file(folder: Path) -> str | None:
    """What is wrong with the first file of safetensors that is missing or truncated: their headers tell the length."""
    from safetensors import SafetensorError, safe_open

    index, names = folder / "model.safetensors.index.json", {path.name for path in folder.glob("model.safetensors")}
    if index.exists():
        names = set(read_json(index).get("weight_map", {}).values())
    for name in sorted(names):
        try:
            safe_open(folder / name, framework="numpy")
        except (SafetensorError, OSError) as error:
            return f"{name} cannot be read: {error}"
    return None


def refuse_job_options(options: JobOptions) -> None:
    """Where there is no batch system, what is meant for one is a mistake."""
    given = [f"--{name}" for name, value in vars(options).items() if value and name != "dry_run"]
    if given:
        raise MachineError(
            f"{', '.join(given)}: the ranks are started on this node, without a batch system",
            where="command line",
            do="leave it out, or name a machine that has Slurm: --machine NAME (aifactory-train machines)",
        )
