"""Why no layout is left: the sentence that says what to change, and the nearest layout that works."""

from __future__ import annotations

import math
from collections.abc import Iterable

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.contradictions import asks_for_deepspeed, check_kind
from aifactory_train.plan.layout import (
    Degrees,
    cp_fault,
    data_parallel_alone,
    describe,
    divisors,
    pp_fault,
    ranks_per_node,
    schedules,
    tp_fault,
)
from aifactory_train.plan.memory import FIT_FRAC
from aifactory_train.plan.nearest import drop_wishes, given_keys, nearest_sizes, what_works, with_layout
from aifactory_train.plan.search import HOST_IS_SHORT, Ranking, search
from aifactory_train.plan.support import why_not_trainable
from aifactory_train.recipe.schema import Recipe
from aifactory_train.units import format_bytes, format_fraction

MOST_NODES_TO_TRY = 16_384


def check_wishes(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int) -> None:
    """Refuse what no search can answer: given values that contradict model, batch, machine or each other.

    Raises:
        PlanError: with what to set instead.
    """
    per_node = ranks_per_node(machine, cpu_ranks)
    _check_axes(recipe, machine, n_nodes, cpu_ranks)
    _check_product(recipe, machine, n_nodes, cpu_ranks)
    _check_batch(recipe, machine, per_node * n_nodes)
    check_kind(recipe, machine)
    _check_deepspeed_ranks(recipe, machine, per_node * n_nodes)


def _check_deepspeed_ranks(recipe: Recipe, machine: Machine, world_size: int) -> None:
    degree = recipe.layout.dp_shard
    if asks_for_deepspeed(recipe) and degree not in ("auto", world_size):
        raise PlanError(
            f"layout.dp_shard {degree} with deepspeed, which splits over all {world_size} ranks",
            where=f"recipe {recipe.name} on machine {machine.name}",
            do="--set layout.dp_shard=auto",
        )


def _check_axes(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int) -> None:
    wish, model, seq = recipe.layout, recipe.model, recipe.data.seq_len_tokens
    per_node = ranks_per_node(machine, cpu_ranks)
    stages = min(stages for _, stages in schedules(recipe))
    heads_on = 1 if wish.tp == "auto" else wish.tp
    checks = {
        "tp": (wish.tp, lambda tp: tp_fault(model, seq, tp, per_node)),
        "cp": (wish.cp, lambda cp: cp_fault(model, seq, cp, heads_on, wish.cp_attention)),
        "pp": (wish.pp, lambda pp: pp_fault(model, pp, stages) if pp > 1 else None),
    }
    for axis, (given, fault) in checks.items():
        if given == "auto" or fault(given) is None:
            continue
        near = sorted(
            (d for d in divisors(per_node * n_nodes) if fault(d) is None), key=lambda d: abs(math.log(d / given))
        )
        raise PlanError(
            f"layout.{axis} {given}: {fault(given)}",
            where=f"recipe {recipe.name} on {n_nodes} node(s) of {per_node} ranks of machine {machine.name}",
            do=_nearest(recipe, machine, n_nodes, cpu_ranks, axis, near),
        )


def _nearest(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, axis: str, values: Iterable[int]) -> str:
    """The nearest value that has a layout, with that layout."""
    for value in values:
        chosen = search(with_layout(recipe, **{axis: value}), machine, n_nodes, cpu_ranks).chosen
        if chosen is not None:
            return f"--set layout.{axis}={value}, the nearest that works: {describe(chosen.layout)}"
    return what_works(recipe, machine, n_nodes, cpu_ranks) or f"--set layout.{axis}=auto"


def _check_product(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int) -> None:
    world_size = ranks_per_node(machine, cpu_ranks) * n_nodes
    given = {axis: getattr(recipe.layout, axis) for axis in Degrees._fields}
    given = {axis: value for axis, value in given.items() if value != "auto"}
    product, named = math.prod(given.values()), " x ".join(f"{axis} {value}" for axis, value in given.items())
    complete = len(given) == len(Degrees._fields)
    if world_size % product == 0 and not (complete and product != world_size):
        return
    loosest = max(given, key=lambda axis: given[axis])
    rest = product // given[loosest]
    fits = [
        d for d in divisors(world_size) if (world_size // d) % rest == 0 and (not complete or d * rest == world_size)
    ]
    near = sorted(fits, key=lambda d: abs(math.log(d / given[loosest])))
    asked = f"layout.{named}" + (f" = {product}" if len(given) > 1 else "")
    raise PlanError(
        f"{asked} {'is not' if complete else 'does not divide'} the {world_size} ranks",
        where=f"recipe {recipe.name}, layout",
        do=_nearest(recipe, machine, n_nodes, cpu_ranks, loosest, near),
    )


def _check_batch(recipe: Recipe, machine: Machine, world_size: int) -> None:
    """Some number of replicas must divide the rows of a batch, and the given micro-batch their share."""
    wish, rows, seq = recipe.layout, recipe.global_batch_rows, recipe.data.seq_len_tokens
    replicas = replicas_allowed(recipe, machine, world_size)
    if not any(rows % dp == 0 for dp in replicas):
        dp = max((d for d in replicas if d <= rows), default=min(replicas))
        near = {max(1, rows // dp) * dp, (rows // dp + 1) * dp}
        good = " or ".join(str(r * seq) for r in sorted(near))
        raise PlanError(
            f"train.global_batch_tokens {recipe.train.global_batch_tokens} is {rows} rows of {seq} tokens, "
            f"which {world_size} ranks cannot share evenly" + ("" if dp == world_size else f" as {dp} replicas"),
            where=f"recipe {recipe.name}, train.global_batch_tokens",
            do=f"nearest good values: {good}, as in --set train.global_batch_tokens={max(near) * seq}",
        )
    micro = recipe.train.micro_batch_rows
    shares = sorted({rows // dp for dp in replicas if rows % dp == 0})
    if micro != "auto" and not any(share % micro == 0 for share in shares):
        shown = ", ".join(str(m) for m in divisors(shares[0]))
        raise PlanError(
            f"train.micro_batch_rows {micro} does not divide the {shares[0]} rows of each rank",
            where=f"recipe {recipe.name}, train.micro_batch_rows",
            do=f"one of {shown}, or --set train.micro_batch_rows=auto",
        )
    if wish.pp not in ("auto", 1) and max(shares) < int(wish.pp):
        raise PlanError(
            f"layout.pp {wish.pp} needs as many micro-batches, and a replica has {max(shares)} rows",
            where=f"recipe {recipe.name}, train.global_batch_tokens {recipe.train.global_batch_tokens}",
            do=f"--set layout.pp={max(d for d in divisors(world_size) if d <= max(shares))}, fewer nodes, or a "
            f"global batch of {wish.pp * min(replicas) * seq} tokens or more",
        )


def replicas_allowed(recipe: Recipe, machine: Machine, world_size: int) -> list[int]:
    """Numbers of replicas that the given degrees leave open; on a CPU only FSDP is taken on auto."""
    wish, alone = recipe.layout, machine.device.kind == "cpu" or data_parallel_alone(recipe)
    given = {axis: getattr(wish, axis) for axis in ("pp", "cp", "tp")}
    fixed = math.prod(value for value in given.values() if value != "auto")
    if alone or "auto" not in given.values():
        return [world_size // fixed]
    if "auto" not in (wish.dp_shard, wish.dp_replicate):
        return [int(wish.dp_shard) * int(wish.dp_replicate)]
    least = math.prod(d for d in (wish.dp_shard, wish.dp_replicate) if d != "auto")
    return [d for d in divisors(world_size // fixed) if d % least == 0]


def nothing_left(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, ranking: Ranking) -> PlanError:
    """The error for a search without a candidate."""
    world_size = ranks_per_node(machine, cpu_ranks) * n_nodes
    where = f"recipe {recipe.name} on machine {machine.name} with {world_size} ranks"
    if HOST_IS_SHORT in ranking.dropped and ranking.least is None:
        return PlanError(
            f"{ranking.dropped[HOST_IS_SHORT]} layout(s) fit on the devices, and not into the "
            f"{format_bytes(machine.host.memory_bytes)} of the host beside its copy of each checkpoint",
            where=where,
            do="--set checkpoint.asynchronous=false, or " + _fewest_nodes(recipe, machine, n_nodes, cpu_ranks),
        )
    if ranking.least is None or ranking.limit_bytes is None:
        kept = f" with {', '.join(given)}" if (given := given_keys(recipe)) else ""
        return PlanError(
            f"the {recipe.global_batch_rows} row(s) of {recipe.data.seq_len_tokens} tokens of a batch cannot be shared "
            f"by {world_size} ranks{kept}",
            where=where,
            do=what_works(recipe, machine, n_nodes, cpu_ranks)
            or "change train.global_batch_tokens: no number of nodes near this one shares it either",
        )
    layout, memory = ranking.least
    terms = sorted(memory.terms_bytes.items(), key=lambda kv: -kv[1])
    named = ", ".join(f"{k} {format_bytes(v)}" for k, v in terms if v)
    return PlanError(
        f"{ranking.dropped['does not fit']} layout(s) do not fit; the closest ({describe(layout)}) needs "
        f"{format_bytes(memory.peak_bytes)} per rank; {format_fraction(FIT_FRAC)} of its "
        f"{format_bytes(ranking.limit_bytes)} may be planned: {named}",
        where=where,
        do=_what_fits(recipe, machine, n_nodes, cpu_ranks),
    )


def _what_fits(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int) -> str:
    if (dropped := drop_wishes(recipe, machine, n_nodes, cpu_ranks, to_train=False)) is not None:
        return dropped
    if machine.device.kind == "cpu" and machine.slurm is None:
        fewer = nearest_sizes(recipe, machine, n_nodes, cpu_ranks, to_train=False)
        if fewer:
            return " or ".join(fewer)
    return _fewest_nodes(recipe, machine, n_nodes, cpu_ranks)


def _fewest_nodes(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int) -> str:
    per_node = ranks_per_node(machine, cpu_ranks)
    most = min(MOST_NODES_TO_TRY, recipe.global_batch_rows * recipe.model.n_layers * per_node)
    upper = n_nodes
    while (upper := upper * 2) <= most:
        if search(recipe, machine, upper, cpu_ranks).chosen is not None:
            break
    else:
        return (
            "take a smaller model, a shorter data.seq_len_tokens or a larger train.global_batch_tokens: "
            f"no number of devices up to {most * per_node} would fit"
        )
    # Between the last that did not fit and the first that does, by eighths: a batch seldom divides by other numbers.
    for n in sorted({upper * eighths // 8 for eighths in (5, 6, 7, 8)} - set(range(n_nodes + 1))):
        chosen = search(recipe, machine, n, cpu_ranks).chosen
        if chosen is not None:
            if machine.nodes is not None and n > machine.nodes:
                return _another_machine(recipe, machine, n_nodes, cpu_ranks, n * per_node)
            return f"use {n * per_node} ranks ({n} nodes of {per_node}), which would fit: {describe(chosen.layout)}"
    raise AssertionError("the last of them fits")


def _another_machine(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, n_devices: int) -> str:
    """What to do where all nodes of the machine are too few."""
    dropped = search(recipe, machine, n_nodes, cpu_ranks).dropped
    offload = ""
    if recipe.layout.offload == "none":
        offload = ", or --set layout.offload=auto"
    elif HOST_IS_SHORT in dropped:
        offload = (
            f" ({dropped[HOST_IS_SHORT]} layout(s) with offload fit on the devices, and not into the host's memory)"
        )
    has = (machine.nodes or 0) * ranks_per_node(machine, cpu_ranks)
    return (
        f"take a smaller model{offload}, or another machine: {n_devices} such devices would do, this machine has {has}"
    )


def shorter_run(recipe: Recipe, frac: float) -> str | None:
    """Options for a run of this share of the steps; None where that is not a step. The ramps shrink where they must."""
    steps = int(frac * recipe.n_steps)
    if steps < 1:
        return None
    tokens, ramps = steps * recipe.train.global_batch_tokens, recipe.schedule
    options = f"--set train.budget_tokens={tokens}"
    if ramps.warmup_tokens + (ramps.decay_tokens or 0) > tokens:
        for key in ("warmup_tokens", "decay_tokens"):
            if given := getattr(ramps, key):
                options += f" --set schedule.{key}={max(1, given * tokens // recipe.train.budget_tokens)}"
    return options


def refuse_launch(recipe: Recipe, machine: Machine, layout: Layout, cpu_ranks: int) -> None:
    """Refuse a layout that this version does not train, with what it trains.

    Raises:
        PlanError: with the reason why the plan is of such a layout, and what to set instead.
    """
    n_nodes = layout.n_nodes
    sentence = why_not_trainable(layout)
    if sentence is None:
        return
    where = f"recipe {recipe.name} on machine {machine.name} with {layout.world_size} ranks"
    dropped = drop_wishes(recipe, machine, n_nodes, cpu_ranks, to_train=True)
    if dropped is not None:
        raise PlanError(sentence, where=where, do=dropped)
    do = what_works(recipe, machine, n_nodes, cpu_ranks, to_train=True)
    raise PlanError(sentence, where=where, do=do or "take a smaller model or a shorter data.seq_len_tokens")
