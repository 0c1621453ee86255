"""What to type instead of something that does not work. Each proposal is searched before it is named."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aifactory_train.machine.machine import Machine
from aifactory_train.plan.layout import divisors, ranks_per_node
from aifactory_train.plan.limits import job_limits
from aifactory_train.plan.search import Candidate, search
from aifactory_train.recipe.schema import Recipe

# So many sizes are tried below and above the one that was asked for.
MOST_TRIES = 12


def find(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, to_train: bool) -> Candidate | None:
    """The layout that a plan would take; with `to_train` only one that this version trains."""
    chosen = search(recipe, machine, n_nodes, cpu_ranks).chosen
    return None if to_train and chosen is not None and chosen.why_not is not None else chosen


def with_layout(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"layout": recipe.layout.model_copy(update=values)})


def with_train(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=values)})


def given_keys(recipe: Recipe) -> list[str]:
    """Keys of the layout and the micro-batch that are not on auto."""
    given = recipe.layout.model_dump(exclude={"deepspeed"})
    keys = [f"layout.{key}" for key, value in given.items() if value != "auto"]
    return keys + ["train.micro_batch_rows"] * (recipe.train.micro_batch_rows != "auto")


def drop_wishes(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, to_train: bool) -> str | None:
    """The given keys that stand in the way, as options that set them to auto; None where that does not help."""

    def freed(keys: Iterable[str]) -> Recipe:
        after = with_layout(recipe, **{key.removeprefix("layout."): "auto" for key in keys if key[:6] == "layout"})
        return with_train(after, micro_batch_rows="auto") if "train.micro_batch_rows" in keys else after

    keys = given_keys(recipe)
    alone = [f"--set {key}=auto" for key in keys if find(freed([key]), machine, n_nodes, cpu_ranks, to_train)]
    if alone:
        return " or ".join(alone)
    if len(keys) > 1 and find(freed(keys), machine, n_nodes, cpu_ranks, to_train):
        return " ".join(f"--set {key}=auto" for key in keys)
    return None


def nearest_sizes(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, to_train: bool) -> list[str]:
    """Options that name the nearest size below and above which works: nodes, or ranks of a CPU without Slurm."""
    if machine.slurm is None and (machine.device.kind == "cpu" or to_train):
        if machine.device.kind != "cpu":
            return []
        most = max(machine.host.cores, cpu_ranks)
        tries = _around(cpu_ranks, most, recipe.global_batch_rows, 1)
        return [
            f"--cpu-ranks {ranks}"
            for side in tries
            for ranks in [next((r for r in side if find(recipe, machine, n_nodes, r, to_train)), None)]
            if ranks is not None
        ]
    per_node = ranks_per_node(machine, cpu_ranks)
    found = []
    for side in _around(n_nodes, machine.nodes or 16_384, recipe.global_batch_rows, per_node):
        for n in side:
            option = node_option(machine, n, n_nodes)
            if option is not None and find(recipe, machine, n, cpu_ranks, to_train):
                found.append(option)
                break
    return found


def _around(asked: int, most: int, rows: int, per_node: int) -> tuple[list[int], list[int]]:
    """Sizes below and above, nearest first: powers of two, and those whose ranks divide the rows."""
    sizes = {2**k for k in range(most.bit_length())} | {d // per_node for d in divisors(rows) if d % per_node == 0}
    sizes = {size for size in sizes if size <= most}
    return (
        sorted((s for s in sizes if s < asked), reverse=True)[:MOST_TRIES],
        sorted(s for s in sizes if s > asked)[:MOST_TRIES],
    )


def node_option(machine: Machine, n_nodes: int, asked: int) -> str | None:
    """`--nodes N` with the partition or QoS that gives a job so many; None where none does."""

    def allowed(n: int, partition: str | None, qos: str | None) -> bool:
        limits = job_limits(machine, partition, qos)
        return (limits.min_nodes or 1) <= n and (limits.max_nodes is None or n <= limits.max_nodes)

    if machine.slurm is None:
        return f"--nodes {n_nodes}"
    if allowed(n_nodes, None, None):
        # Who asks for what the default does not give has named a partition or a QoS.
        return f"--nodes {n_nodes}" + ("" if allowed(asked, None, None) else " without --partition and --qos")
    for qos in machine.slurm.qos:
        if allowed(n_nodes, None, qos.name):
            return f"--nodes {n_nodes} --qos {qos.name}"
    for partition in machine.slurm.partitions:
        if allowed(n_nodes, partition.name, None):
            return f"--nodes {n_nodes} --partition {partition.name}"
    return None


def nearest_batches(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, to_train: bool) -> list[str]:
    """Options that name the nearest global batch below and above which works."""
    micro = recipe.train.micro_batch_rows
    step = ranks_per_node(machine, cpu_ranks) * n_nodes * (1 if micro == "auto" else micro)
    seq, below = recipe.data.seq_len_tokens, recipe.global_batch_rows // step * step
    found = []
    for rows in (below, below + step):
        changed = with_train(recipe, global_batch_tokens=rows * seq)
        if rows not in (0, recipe.global_batch_rows) and find(changed, machine, n_nodes, cpu_ranks, to_train):
            found.append(f"--set train.global_batch_tokens={rows * seq}")
    return found


def what_works(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int, to_train: bool = False) -> str:
    """Everything of the above that works, joined by "or"; of each kind what this version trains is preferred."""
    asked = (recipe, machine, n_nodes, cpu_ranks)
    goals = list(dict.fromkeys((True, to_train)))
    ways = [next((way for goal in goals if (way := drop_wishes(*asked, goal))), None)]
    for nearest in (nearest_sizes, nearest_batches):
        ways += next((found for goal in goals if (found := nearest(*asked, goal))), [])
    return ", or ".join(way for way in ways if way)
