"""Writes the folder of a task: the same first weights and rows for all sides, and our own plan."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from aifactory_train.data.loader import Loader
from aifactory_train.data.shards import load_prepared
from aifactory_train.machine.machine import Machine
from aifactory_train.models.build import build_model, init_weights
from aifactory_train.plan.plan import Plan, make_plan
from aifactory_train.recipe.huggingface import huggingface_config
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Recipe
from worker import ROWS_FILE, WEIGHTS_FOLDER, Task

ROWS_OF_STEPS = 64  # more distinct rows than fit into a cache; peers begin anew after them


def build_task(recipe_path: Path, machine: Machine, processes: int, folder: Path) -> tuple[Task, Plan]:
    """The task of a recipe for that many ranks of a node, written into `folder`, which is emptied first. First weights
    lie beside it and stay.

    Raises PlanError where our plan finds no layout that fits.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = folder.parent / WEIGHTS_FOLDER
    # A learning rate that stays what it is, and the weights of all sides.
    changes = ["schedule.min_lr_frac=1.0", f"model.init_from={weights}"]
    recipe = load_recipe(recipe_path, changes)
    rows, rows_of_rank = recipe.train.micro_batch_rows, recipe.global_batch_rows // processes
    if isinstance(rows, int) and rows > rows_of_rank:
        recipe = load_recipe(recipe_path, [*changes, f"train.micro_batch_rows={rows_of_rank}"])
    if machine.device.kind != "cpu":
        machine = _of_devices(machine, processes)
    plan = make_plan(recipe, machine, cpu_ranks=processes)
    (folder / "plan.json").write_text(plan.model_dump_json())
    _write_weights(recipe, weights)
    _write_rows(recipe, folder / ROWS_FILE)
    (folder / WEIGHTS_FOLDER).symlink_to(weights, target_is_directory=True)
    task = _task(recipe, plan, processes, folder)
    task.save()
    return task, plan


def _of_devices(machine: Machine, n: int) -> Machine:
    """The machine with the first n devices of its node; what says which device is linked to what does not hold."""
    device = machine.device.model_copy(update={"per_node": n})
    topology = machine.topology.model_copy(update={"links": [], "places": []})
    return machine.model_copy(update={"device": device, "topology": topology})


def _task(recipe: Recipe, plan: Plan, processes: int, folder: Path) -> Task:
    optim, device = recipe.optim, plan.machine.device
    rows_of_rank = recipe.global_batch_rows // processes
    return Task(
        folder=folder,
        device="cpu" if device.kind == "cpu" else "cuda",
        seq_len_tokens=recipe.data.seq_len_tokens,
        global_batch_rows=recipe.global_batch_rows,
        micro_batch_rows=min(rows_of_rank, plan.layout.micro_batch_rows),
        processes=processes,
        threads=max(1, (os.cpu_count() or 1) // processes),
        recompute=plan.layout.remat != "none",
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        grad_clip_norm=optim.grad_clip_norm,
    )


def _write_rows(recipe: Recipe, path: Path) -> None:
    """The rows of the first steps in their global order, each with the target of its last token at its end."""
    loader = Loader(load_prepared(recipe.data), recipe.data, recipe.train.seed, recipe.global_batch_rows)
    rows = [loader.rows(step) for step in range(ROWS_OF_STEPS)]
    np.save(path, np.concatenate([np.hstack([r.input_RT, r.target_RT[:, -1:]]) for r in rows]).astype(np.int32))


def _write_weights(recipe: Recipe, folder: Path) -> None:
    """Our random weights, whose names are those of Hugging Face, in bf16: each side reads the same float32 ones."""
    config = huggingface_config(recipe.model)
    path = folder / "config.json"
    if (folder / "model.safetensors").exists() and path.exists() and json.loads(path.read_text()) == config:
        return
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        root = build_model(recipe.model, "own").root
    weights = {name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in root.named_parameters()}
    init_weights(weights, recipe.model, recipe.train.seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config))
