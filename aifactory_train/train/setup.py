"""From a run folder to a Run: everything that the loop needs, built in one visible order."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aifactory_train.checkpoint.dcp import rng_state, set_rng_state, stored_tensors
from aifactory_train.checkpoint.huggingface import check_weights, load_weights
from aifactory_train.checkpoint.manager import CheckpointManager, Commit
from aifactory_train.data.loader import Loader
from aifactory_train.data.shards import Prepared, check_fits_model, load_prepared
from aifactory_train.errors import AifactoryError, PlanError, RunFolderError, storage_errors
from aifactory_train.faults.deadline import Deadline, estimate_save_s, measured_saves_s
from aifactory_train.faults.signals import StopAgreement
from aifactory_train.faults.stopflag import StopFlag
from aifactory_train.metrics.meter import Meter
from aifactory_train.metrics.sinks import Sinks
from aifactory_train.models.build import build_model, init_weights
from aifactory_train.models.lora import apply_lora, init_adapters, split_weights
from aifactory_train.models.parts import ModelParts
from aifactory_train.parallel.apply import apply_parallelism, refuse_old_torch
from aifactory_train.parallel.mesh import build_mesh
from aifactory_train.parallel.precision import refuse_fp8
from aifactory_train.plan.placement import device_of
from aifactory_train.plan.plan import Plan, load_plan
from aifactory_train.plan.stages import layers_by_stage, stages_of_rank
from aifactory_train.plan.support import refuse_untrainable
from aifactory_train.recipe.schema import Recipe
from aifactory_train.results.provenance import provenance
from aifactory_train.rundir import RunDir, hold, log_event, read_jsonl, step_folder
from aifactory_train.train.engine import Engine
from aifactory_train.train.engine_torch import TorchEngine
from aifactory_train.train.ranks import RENDEZVOUS_TIMEOUT_S, Ranks, check_world_size, join
from aifactory_train.units import format_bytes, format_count, format_seconds

LEAST_DEEPSPEED = (0, 16)


@dataclass(frozen=True)
class Run:
    """What the loop works with. `first_step` steps are done already; `sinks` is None except on rank 0."""

    folder: RunDir
    plan: Plan
    ranks: Ranks
    engine: Engine
    loader: Loader
    meter: Meter
    sinks: Sinks | None
    checkpoints: CheckpointManager
    stop: StopAgreement
    deadline: Deadline
    first_step: int
    held: ExitStack

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and random states; the step is in the commit, and it is all that the data needs."""
        return {**self.engine.state_dict(), "rng": rng_state(self.ranks.rank)}

    def is_out_of_time(self, step: int) -> bool:
        """Whether to stop after `step` steps, so that a save is whole before the job's time is up."""
        return self.deadline.is_near(step, self.checkpoints.under_way_s())

    def close(self) -> None:
        self.stop.close()
        self.engine.close()
        if self.sinks is not None:
            self.sinks.close()
        self.held.close()


def build_run(
    root: Path, ranks: Ranks, stop_flag: StopFlag, bar_columns: int = 0, timeout_s: float = RENDEZVOUS_TIMEOUT_S
) -> Run:
    """Read plan.json and build the run. Collective: all ranks arrive.

    Args:
        root: the run folder, with plan.json.
        stop_flag: remembers signals since the process began.
        bar_columns: width of a progress bar on rank 0; 0 for plain lines.
        timeout_s: how long ranks wait for each other at the start.
    """
    folder = RunDir(root)
    plan = load_plan(folder.plan)
    check_world_size(ranks, plan.layout.world_size)
    marks_s = {"process": _process_start_s(), "imported": time.time()}
    device = enter(plan, ranks, str(folder.plan), timeout_s)
    marks_s["met"] = time.time()
    held = _hold_folder(folder, ranks)
    prepared = load_prepared(plan.recipe.data)
    check_fits_model(prepared.manifest, plan.recipe.model.vocab_size)
    events = read_jsonl(folder.events)
    attempt = 1 + sum(e["event"] == "start" for e in events)
    deadline = _build_deadline(plan, ranks, events)

    def committed(commit: Commit, seconds: float) -> None:
        deadline.add_save(seconds)
        log_event(folder, "commit", step=commit.step, seconds=round(seconds, 3), bytes=commit.n_bytes)

    every = plan.recipe.checkpoint
    checkpoints = CheckpointManager(folder.checkpoints, every.keep, every.asynchronous, device, committed)
    checkpoints.together(lambda: prepared.verify(ranks.rank, ranks.world_size))
    commit = checkpoints.latest()
    _check_weights(plan.recipe, ranks, checkpoints, fresh=commit is None)
    engine = build_engine(plan, device, fresh=commit is None)
    if commit is not None:
        resume(plan, ranks, engine, checkpoints, commit)
    loader = build_loader(plan, ranks, prepared, pin_memory=device.type == "cuda")
    marks_s["built"] = time.time()
    first_step = commit.step if commit else 0
    if first_step < plan.recipe.n_steps:
        t0_s = time.monotonic()
        engine.rehearse(loader.batch(first_step))
        deadline.rehearsed(time.monotonic() - t0_s)
    marks_s["rehearsed"] = time.time()
    sinks = None
    hosts = _hosts(ranks)
    if ranks.rank == 0:
        with storage_errors("copying the tokenizer", folder.tokenizer, "free some space and launch again"):
            shutil.copytree(prepared.tokenizer_dir, folder.tokenizer, dirs_exist_ok=True)
        _log_start(folder, plan, prepared, hosts, device, attempt, first_step, marks_s)
        sinks = Sinks(folder, plan, first_step, bar_columns)
        for note in (_headline(plan, device), prepared.describe(), _origin(plan.recipe, folder, commit)):
            sinks.note(note)
    meter = Meter(plan, device, attempt)
    stop = StopAgreement(stop_flag)
    return Run(folder, plan, ranks, engine, loader, meter, sinks, checkpoints, stop, deadline, first_step, held)


def enter(plan: Plan, ranks: Ranks, where: str, timeout_s: float) -> torch.device:
    """Device, cores, threads, process group and seed of this rank, as the plan says. Collective: all ranks arrive.

    Raises:
        PlanError: this version, this torch or this device cannot train the layout; `where` names the plan.
    """
    device = pick_device(plan, ranks)
    bind_cores(plan, ranks)
    torch.set_num_threads(plan.layout.threads_per_rank)
    join(ranks, device, timeout_s)
    refuse_untrainable(plan.layout, where)
    refuse_old_torch(plan.layout)
    refuse_fp8(plan.layout, device)
    torch.manual_seed(plan.recipe.train.seed + ranks.rank)
    return device


def _check_weights(recipe: Recipe, ranks: Ranks, checkpoints: CheckpointManager, fresh: bool) -> None:
    """Refuse a folder of `model.init_from` once for all, before each rank reads its own part of it."""
    if recipe.model.init_from is not None and (fresh or recipe.lora is not None):
        folder = Path(recipe.model.init_from)
        # Over the whole run: all ranks arrive, since all have the same plan and commit.
        checkpoints.together(lambda: check_weights(recipe.model, folder) if ranks.rank == 0 else None)


def _hold_folder(folder: RunDir, ranks: Ranks) -> ExitStack:
    """Under Slurm, keep other jobs off the run folder until this one ends; locally the launcher does.

    Rank 0 holds it and tells all. Before anything of the folder is touched: a save that another job is writing
    looks like one that a kill left behind.
    """
    held = ExitStack()
    refused: list[AifactoryError | None] = [None]
    if ranks.rank == 0 and ranks.source == "slurm":
        busy = RunFolderError(
            "another job trains this run",
            where=str(folder.root),
            do=f"wait until it has ended, or stop it: aifactory-train cancel {folder.root}",
        )
        try:
            held.enter_context(hold(folder.root, busy))
        except AifactoryError as error:
            refused = [error]
    dist.broadcast_object_list(refused)
    if refused[0] is not None:
        refused[0].on_every_rank = True
        raise refused[0]
    return held


def _build_deadline(plan: Plan, ranks: Ranks, events: list[dict[str, Any]]) -> Deadline:
    """On rank 0 that of the job; elsewhere one that never comes, since the ranks agree and clocks differ."""
    bytes_, n_ranks = plan.predicted.memory_bytes, ranks.world_size
    return Deadline(
        ranks.end_time_s if ranks.rank == 0 else None,
        plan.recipe.checkpoint.every_steps,
        estimate_save_s(bytes_["parameters"] + bytes_["optimizer_state"], n_ranks),
        measured_saves_s(events, n_ranks),
    )


def pick_device(plan: Plan, ranks: Ranks) -> torch.device:
    """The device of this rank: its GPU, or the CPU where the plan's machine has none."""
    if plan.machine.device.kind == "cpu":
        return torch.device("cpu")
    n_seen = torch.cuda.device_count()
    # A launcher that shows each rank only its own GPU makes it number 0 everywhere.
    index = device_of(plan.layout, ranks.local_rank) if n_seen > 1 else 0
    if n_seen <= index:
        raise PlanError(
            f"the plan wants a GPU for local rank {ranks.local_rank}; torch {torch.__version__} sees {n_seen}",
            where=f"machine {plan.machine.name}: device.kind {plan.machine.device.kind}",
            do="install a torch built for these GPUs (make SITE_TORCH=1), or look at CUDA_VISIBLE_DEVICES",
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def bind_cores(plan: Plan, ranks: Ranks) -> None:
    """Move this process to the cores beside its device, where the plan gives it another than its own number.

    The launcher bound local rank n to the cores of device n: its script is older than the plan. Where that cannot be
    changed, the first node says so and training goes on, slower between host and device.
    """
    local_rank, device = ranks.local_rank, device_of(plan.layout, ranks.local_rank)
    if device == local_rank:
        return
    cores = {core for p in plan.machine.topology.places if p.device == device for core in p.core_list()}
    fault = ""
    if torch.cuda.device_count() == 1:
        fault = "it sees one GPU only, so the launcher's order holds; show all GPUs of the node to each rank"
    elif cores:
        try:
            # Each thread has a mask of its own, and libraries have started some by now.
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), cores)
        except OSError as error:
            fault = f"it stays on cores that are not beside it ({error.strerror})"
    if fault and ranks.rank == local_rank:
        print(f"[rank {ranks.rank}] the plan gives it device {device}; {fault}", file=sys.stderr)


def build_engine(plan: Plan, device: torch.device, fresh: bool) -> Engine:
    """Meta device, axes, memory, weights: in this order, so that no rank ever holds a whole model.

    Args:
        fresh: fill the weights (random or `model.init_from`); otherwise a checkpoint will. The weights below adapters
            are in no checkpoint and are always filled.
    """
    return (_build_deepspeed if plan.layout.engine == "deepspeed" else _build_torch)(plan, device, fresh)


def _build_torch(plan: Plan, device: torch.device, fresh: bool) -> TorchEngine:
    recipe, layout = plan.recipe, plan.layout
    mesh = build_mesh(layout, device.type)
    layers = layers_by_stage(recipe.model, layout.pp * layout.stages_per_rank)
    with torch.device("meta"):
        numbers = stages_of_rank(layout, mesh.rows.get_local_rank("pp"))
        stages = [_build_parts(plan, layers[s]) for s in numbers]
    for parts in stages:
        apply_parallelism(parts, mesh, layout, recipe.data.seq_len_tokens)
        parts.root.to_empty(device=device)
        if fresh or recipe.lora is not None:
            _fill(dict(parts.root.named_parameters()), recipe)
    return TorchEngine(plan, stages, mesh, device)


def _build_deepspeed(plan: Plan, device: torch.device, fresh: bool) -> Engine:
    _refuse_old_deepspeed()
    # Here, because DeepSpeed is an extra, and seconds of each rank's start.
    from aifactory_train.train.engine_deepspeed import DeepSpeedEngine

    with torch.device("meta"):
        parts = _build_parts(plan)
    engine = DeepSpeedEngine(plan, parts, device)
    if fresh or plan.recipe.lora is not None:
        _fill({**engine.weights(), **engine.frozen()}, plan.recipe)
        engine.publish()
    return engine


def _refuse_old_deepspeed() -> None:
    """Raise PlanError where the package is missing or older than 0.16."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or tuple(map(int, found.split(".")[:2])) < LEAST_DEEPSPEED:
        least = ".".join(map(str, LEAST_DEEPSPEED))
        error = PlanError(
            f"engine deepspeed needs the package deepspeed {least} or newer, here is {found or 'none'}",
            where="plan.json: layout.engine",
            do="pip install 'aifactory-train[deepspeed]' -c constraints.txt, or --set layout.engine=fsdp2",
        )
        error.on_every_rank = True  # the ranks of a run have the same installation
        raise error


def _build_parts(plan: Plan, layers: range | None = None) -> ModelParts:
    parts = build_model(plan.recipe.model, plan.layout.model_code, layers)
    if plan.recipe.lora is not None:
        apply_lora(parts, plan.recipe.lora)
    return parts


def _fill(weights: Mapping[str, Tensor], recipe: Recipe) -> None:
    """First weights: from a folder, or random. Adapters begin as nothing."""
    base, adapters = split_weights(weights)
    if recipe.model.init_from:
        load_weights(base, recipe.model, Path(recipe.model.init_from))
    else:
        init_weights(base, recipe.model, recipe.train.seed)
    init_adapters(adapters, recipe.train.seed)


def build_loader(plan: Plan, ranks: Ranks, prepared: Prepared, pin_memory: bool) -> Loader:
    recipe = plan.recipe
    part, n_parts = plan.layout.data_rank(ranks.rank), plan.layout.dp
    rows = recipe.global_batch_rows
    return Loader(prepared, recipe.data, recipe.train.seed, rows, part, n_parts, pin_memory=pin_memory)


def resume(plan: Plan, ranks: Ranks, engine: Engine, checkpoints: CheckpointManager, commit: Commit) -> None:
    """Load a commit, written by any number of ranks. A rank that was not there keeps its seeded random state."""
    checkpoints.check(commit, plan.recipe.checkpoint_model())
    stored = stored_tensors(step_folder(checkpoints.folder, commit.step))
    rng = {k: v for k, v in rng_state(ranks.rank).items() if f"rng.{k}" in stored}
    state = {**engine.state_dict(), "rng": rng}
    checkpoints.load(commit, state)
    engine.load_state_dict(state)
    if rng:
        set_rng_state(rng, ranks.rank)


def _hosts(ranks: Ranks) -> list[str]:
    hosts: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    return sorted(set(hosts))


def _log_start(
    folder: RunDir,
    plan: Plan,
    prepared: Prepared,
    hosts: list[str],
    device: torch.device,
    attempt: int,
    step: int,
    marks_s: dict[str, float],
) -> None:
    """marks_s: when this rank came how far, seconds since the epoch: process, imported, met, built, rehearsed."""
    log_event(
        folder,
        "start",
        attempt=attempt,
        step=step,
        world_size=plan.layout.world_size,
        hosts=hosts,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        unigram_entropy_nats=prepared.unigram_entropy_nats(),
        n_parameters=plan.shape.n_parameters,
        provenance=provenance(),
        marks_s={name: round(at_s, 3) for name, at_s in marks_s.items()},
    )


def _process_start_s() -> float:
    """When this process began, seconds since the epoch, by the kernel's clock ticks (proc(5): stat, uptime)."""
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age_s = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def _origin(recipe: Recipe, folder: RunDir, commit: Commit | None) -> str:
    """Where the weights come from: one who names `hf: FOLDER` may expect those of the folder."""
    if commit is not None:
        return f"resumed at step {commit.step} from {step_folder(folder.checkpoints, commit.step)}"
    return f"weights: {recipe.model.init_from or 'random; model.init_from: FOLDER takes those of a folder'}"


def _headline(plan: Plan, device: torch.device) -> str:
    layout, predicted = plan.layout, plan.predicted
    bound = "at least " if None in predicted.step_time_s.values() and predicted.run_time_s is not None else ""
    return (
        f"{plan.recipe.name}: {format_count(plan.shape.n_parameters)} parameters, {layout.world_size} rank(s) on "
        f"{device.type}, {layout.engine_name}, {layout.precision}, "
        f"{layout.accumulation} x {layout.micro_batch_rows} rows a rank; "
        f"predicted: peak {format_bytes(predicted.peak_memory_bytes)}, "
        f"step {bound}{format_seconds(predicted.total_step_time_s)}, run {bound}{format_seconds(predicted.run_time_s)}"
    )
