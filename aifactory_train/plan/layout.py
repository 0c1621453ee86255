"""The layout: how many ranks, and how each rank's share of the batch is cut. FSDP alone for now."""

from __future__ import annotations

import itertools
import math
from typing import Literal

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.memory import FIT_FRAC, estimate_memory_bytes, memory_per_rank_bytes
from aifactory_train.recipe.schema import Recipe
from aifactory_train.units import format_bytes

# Micro-batch where the memory is unknown: enough tokens to fill the matmuls, few enough for any device.
SAFE_MICRO_BATCH_TOKENS = 2048


def n_devices(machine: Machine, layout: Layout) -> int:
    """Devices in the sense of the machine file: all ranks of a CPU node share one."""
    return layout.n_nodes if machine.device.kind == "cpu" else layout.world_size


def choose_layout(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, notes: list[str]) -> Layout:
    """The largest micro-batch that fits, and parameters left gathered where they fit too.

    Activations are kept as long as one row of them fits: to compute them again costs a third more FLOPs.

    Args:
        cpu_ranks: ranks per node on a machine without GPUs; without meaning on others.
        notes: gets a sentence for each choice that rests on something unknown.

    Raises:
        PlanError: the batch cannot be cut evenly, or nothing fits into the memory.
    """
    ranks_per_node = cpu_ranks if machine.device.kind == "cpu" else machine.device.per_node
    world_size = ranks_per_node * n_nodes
    rows_per_rank = _rows_per_rank(recipe, world_size)
    _check_dp_shard(recipe, world_size)
    first = Layout(
        engine="fsdp2",
        world_size=world_size,
        dp_shard=world_size,
        micro_batch_rows=1,
        accumulation=rows_per_rank,
        reshard_after_forward=True,
        remat="none",
        precision=_precision(recipe, machine, notes),
        threads_per_rank=max(1, machine.host.cores // ranks_per_node),
        n_nodes=n_nodes,
    )
    wanted = recipe.layout.reshard_after_forward
    reshards = [False, True] if wanted == "auto" else [wanted]
    remats: list[Literal["none", "full"]] = ["none", "full"] if recipe.layout.remat == "auto" else [recipe.layout.remat]
    micros = _micro_batches(recipe, rows_per_rank)
    limit_bytes = memory_per_rank_bytes(machine, ranks_per_node)
    if limit_bytes is None:
        seq = recipe.data.seq_len_tokens
        micro = next((m for m in reversed(micros) if m * seq >= SAFE_MICRO_BATCH_TOKENS), micros[0])
        notes.append(
            f"device memory is unknown: micro_batch_rows {micro} gives {micro * seq} tokens and parameters are"
            " gathered block by block; give the machine file its device.memory_bytes"
        )
        return _cut(first, rows_per_rank, micro, reshards[-1], remats[0])
    for remat, micro, reshard in itertools.product(remats, micros, reshards):
        layout = _cut(first, rows_per_rank, micro, reshard, remat)
        if _fits(recipe, machine, layout, limit_bytes):
            return layout
    least = _cut(first, rows_per_rank, micros[-1], reshards[-1], remats[-1])
    raise _does_not_fit(recipe, machine, least, limit_bytes)


def _rows_per_rank(recipe: Recipe, world_size: int) -> int:
    rows, seq = recipe.global_batch_rows, recipe.data.seq_len_tokens
    if rows % world_size == 0:
        return rows // world_size
    good_rows = {max(1, rows // world_size) * world_size, (rows // world_size + 1) * world_size}
    good = " or ".join(str(r * seq) for r in sorted(good_rows))
    raise PlanError(
        f"train.global_batch_tokens {recipe.train.global_batch_tokens} is {rows} rows of {seq} tokens, "
        f"which {world_size} ranks cannot share evenly",
        where=f"recipe {recipe.name}, train.global_batch_tokens",
        do=f"nearest good values: {good}, as in --set train.global_batch_tokens={max(good_rows) * seq}",
    )


def _check_dp_shard(recipe: Recipe, world_size: int) -> None:
    given = recipe.layout.dp_shard
    if given not in ("auto", world_size):
        raise PlanError(
            f"layout.dp_shard {given} differs from the {world_size} ranks; FSDP is the only axis, so it spans them all",
            where=f"recipe {recipe.name}, layout.dp_shard",
            do="--set layout.dp_shard=auto",
        )


def _precision(recipe: Recipe, machine: Machine, notes: list[str]) -> Literal["fp32", "bf16"]:
    if recipe.train.precision != "auto":
        return recipe.train.precision
    if machine.device.native_bf16 is None:
        notes.append("whether the device computes in bf16 is unknown: precision auto became fp32")
    return "bf16" if machine.device.native_bf16 else "fp32"


def _micro_batches(recipe: Recipe, rows_per_rank: int) -> list[int]:
    """Candidates, largest first."""
    small = [m for m in range(1, math.isqrt(rows_per_rank) + 1) if rows_per_rank % m == 0]
    divisors = sorted({*small, *(rows_per_rank // m for m in small)}, reverse=True)
    given = recipe.train.micro_batch_rows
    if given == "auto":
        return divisors
    if given not in divisors:
        shown = ", ".join(str(m) for m in reversed(divisors))
        raise PlanError(
            f"train.micro_batch_rows {given} does not divide the {rows_per_rank} rows of each rank",
            where=f"recipe {recipe.name}, train.micro_batch_rows",
            do=f"one of {shown}, or --set train.micro_batch_rows=auto",
        )
    return [given]


def _cut(layout: Layout, rows_per_rank: int, micro: int, reshard: bool, remat: Literal["none", "selective", "full"]) -> Layout:
    changes = {"micro_batch_rows": micro, "accumulation": rows_per_rank // micro, "reshard_after_forward": reshard}
    return layout.model_copy(update={**changes, "remat": remat})


def _fits(recipe: Recipe, machine: Machine, layout: Layout, limit_bytes: int) -> bool:
    return sum(estimate_memory_bytes(recipe, machine, layout).values()) <= FIT_FRAC * limit_bytes


def _does_not_fit(recipe: Recipe, machine: Machine, least: Layout, limit_bytes: int) -> PlanError:
    terms = estimate_memory_bytes(recipe, machine, least)
    named = ", ".join(f"{k} {format_bytes(v)}" for k, v in sorted(terms.items(), key=lambda kv: -kv[1]))
    world_size = _smallest_world_that_fits(recipe, machine, least, limit_bytes)
    if world_size is None:
        do = "take a smaller model, a shorter data.seq_len_tokens or a larger train.global_batch_tokens: "
        do += f"no number of devices up to the {recipe.global_batch_rows} rows of a batch would fit"
    else:
        per_node = least.world_size // least.n_nodes
        do = f"use {world_size} ranks ({world_size // per_node} nodes of {per_node}), which would fit"
    return PlanError(
        f"micro_batch_rows {least.micro_batch_rows} needs {format_bytes(sum(terms.values()))} per rank; "
        f"{FIT_FRAC:.0%} of its {format_bytes(limit_bytes)} may be planned: {named}",
        where=f"recipe {recipe.name} on machine {machine.name} with {least.world_size} ranks",
        do=do,
    )


def _smallest_world_that_fits(recipe: Recipe, machine: Machine, least: Layout, limit_bytes: int) -> int | None:
    per_node, rows, micro = least.world_size // least.n_nodes, recipe.global_batch_rows, least.micro_batch_rows
    for world_size in range(least.world_size + per_node, rows + 1, per_node):
        if rows % (world_size * micro):
            continue
        larger = least.model_copy(update={"world_size": world_size, "dp_shard": world_size})
        cut = _cut(larger, rows // world_size, micro, least.reshard_after_forward, least.remat)
        if _fits(recipe, machine, cut, limit_bytes):
            return world_size
    return None
