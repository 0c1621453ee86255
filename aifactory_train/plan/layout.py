"""Which layouts are legal: what divides what, for a recipe on so many ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from aifactory_train.machine.machine import Machine
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.stages import STAGES_PER_RANK, V_SCHEDULES
from aifactory_train.recipe.schema import Model, Recipe

Schedule = Literal["1f1b", "interleaved", "zbv", "dualpipev"]
CpAttention = Literal["all_gather", "ring", "ulysses"]

# Schedules that are tried on auto. zbv and dualpipev only where asked for: nobody has measured them here, and what
# they give up for it, compiled blocks and remat, may cost more than the bubble.
SCHEDULES_ON_AUTO: tuple[tuple[Schedule, int], ...] = (("1f1b", 1), ("interleaved", 2), ("interleaved", 4))
# On auto a rank keeps at least so many tokens of a row: shorter chunks leave ring attention waiting for its neighbours.
LEAST_CP_TOKENS = 4096
# On auto dp_shard is tried in steps of this factor; what lies between is as fast, as far as the model of time can tell.
SHARD_STEP = 4
# On auto a micro-batch has at most so many tokens: larger ones only cost memory.
MOST_MICRO_BATCH_TOKENS = 131_072
# Sides of the matrices that torch._scaled_mm takes are multiples of this.
FP8_MULTIPLE = 16


class Degrees(NamedTuple):
    """Of the axes, outermost first."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def is_dp_shard_alone(self) -> bool:
        return self.pp == self.dp_replicate == self.cp == self.tp == 1


def n_devices(machine: Machine, layout: Layout) -> int:
    """Devices in the sense of the machine file: all ranks of a CPU node share one."""
    return layout.n_nodes if machine.device.kind == "cpu" else layout.world_size


def ranks_per_node(machine: Machine, cpu_ranks: int) -> int:
    return cpu_ranks if machine.device.kind == "cpu" else machine.device.per_node


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """Ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))


def model_code(recipe: Recipe) -> Literal["own", "transformers"]:
    """That of the recipe; on auto our decoder for every model that it computes."""
    wish = recipe.layout.model_code
    if wish != "auto":
        return wish
    return "transformers" if recipe.model.family == "other" else "own"


def data_parallel_alone(recipe: Recipe) -> bool:
    """Whether pp, cp and tp are 1 on auto, because what is trained is not split over them."""
    return recipe.lora is not None or model_code(recipe) == "transformers"


def tp_fault(model: Model, seq_len_tokens: int, tp: int, per_node: int | None = None) -> str | None:
    """Why a model cannot be split over tp ranks of a node, None where it can. per_node None: over nodes, too."""
    if per_node is not None and per_node % tp:
        return f"the {per_node} devices of a node are no multiple of it, and tp stays inside a node"
    for name in ("n_kv_heads", "n_heads", "ffn_size", "vocab_size"):
        if getattr(model, name) % tp:
            return f"model.{name} {getattr(model, name)} is no multiple of it"
    if seq_len_tokens % tp:
        return f"data.seq_len_tokens {seq_len_tokens} is no multiple of it"
    return None


def cp_fault(
    model: Model, seq_len_tokens: int, cp: int, tp: int, cp_attention: CpAttention | Literal["auto"]
) -> str | None:
    """Why rows cannot be split over cp ranks: each takes one chunk from the front and one from the back.

    Its tokens are split over the tp ranks. Ulysses gives each of them some of the heads of a tp rank.
    """
    if cp == 1:
        return None
    if seq_len_tokens % (2 * cp):
        return f"data.seq_len_tokens {seq_len_tokens} is no multiple of 2 x {cp} = {2 * cp} chunks"
    if (tokens := seq_len_tokens // cp) % tp:
        return f"it leaves {tokens} of data.seq_len_tokens {seq_len_tokens} on a rank, no multiple of tp {tp}"
    if cp_attention == "ulysses" and not _has_heads(model, cp, tp):
        on = "" if tp == 1 else f" on each of {tp} tp ranks"
        return f"cp_attention ulysses shares out model.n_kv_heads {model.n_kv_heads}{on}, no multiple of it"
    return None


def _has_heads(model: Model, cp: int, tp: int) -> bool:
    return model.n_kv_heads // tp % cp == 0 and model.n_heads // tp % cp == 0


def fp8_fault(model: Model, tp: int) -> str | None:
    """Why fp8 units do not take the matrices of the blocks, which tp splits; None where they do."""
    heads = {name: getattr(model, name) * model.head_size // tp for name in ("n_heads", "n_kv_heads")}
    sides = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_size": model.ffn_size // tp,
        **{f"model.{name} x head_size": side for name, side in heads.items()},
    }
    for name, side in sides.items():
        if side % FP8_MULTIPLE:
            on = "" if tp == 1 or name == "model.hidden_size" else f" on each of {tp} tp ranks"
            return f"{name} is {side}{on}, and fp8 units take matrices whose sides are multiples of {FP8_MULTIPLE}"
    return None


def fp8_tokens_fault(micro_batch_rows: int, seq_len_tokens: int, cp: int) -> str | None:
    """Why fp8 units do not take the tokens of a micro-batch, a side of the products that give gradients of weights."""
    tokens = micro_batch_rows * seq_len_tokens // cp
    if tokens % FP8_MULTIPLE == 0:
        return None
    rows = f"{micro_batch_rows} row(s) of {seq_len_tokens} tokens" + (f" over cp {cp}" if cp > 1 else "")
    return f"{rows} are {tokens}, and fp8 units take matrices whose sides are multiples of {FP8_MULTIPLE}"


def cp_attention(recipe: Recipe, degrees: Degrees) -> CpAttention:
    """That of the recipe; on auto heads are exchanged for tokens where they divide: the kernel sees whole rows, and no
    rank keeps keys and values of others."""
    wish = recipe.layout.cp_attention
    if wish != "auto":
        return wish
    return "ulysses" if degrees.cp > 1 and _has_heads(recipe.model, degrees.cp, degrees.tp) else "all_gather"


def pp_fault(model: Model, pp: int, stages_per_rank: int) -> str | None:
    """Why a model cannot be cut into pipeline stages: each has at least one layer."""
    if pp * stages_per_rank > model.n_layers:
        return f"model.n_layers {model.n_layers} are fewer than its {pp * stages_per_rank} stages"
    return None


def schedules(recipe: Recipe) -> tuple[tuple[Schedule, int], ...]:
    """(schedule, stages on each rank) that the recipe allows for a pipeline."""
    wish = recipe.layout.pipeline_schedule
    if wish == "auto":
        return SCHEDULES_ON_AUTO
    if wish == "1f1b" or wish == "zbv" or wish == "dualpipev":
        return ((wish, STAGES_PER_RANK[wish]),)
    return (("interleaved", int(wish.removeprefix("interleaved-"))),)


def schedule_takes(schedule: Schedule, pp: int, n_micro: int) -> bool:
    """Whether torch.distributed.pipelining 2.13 runs so many micro-batches over pp ranks without ranks that idle.

    Interleaved: in rounds of equally many, at least pp each. dualpipev: one for each of its 2 pp stages.
    """
    if schedule == "dualpipev":
        return n_micro >= 2 * pp
    return n_micro >= pp and (schedule != "interleaved" or n_micro % (n_micro // pp) == 0)


def legal_degrees(recipe: Recipe, world_size: int, per_node: int, axes_on_auto: bool) -> Iterator[Degrees]:
    """All degrees that the recipe allows, in a fixed order.

    Args:
        per_node: ranks of a node.
        axes_on_auto: whether pp, dp_replicate, cp and tp on auto may be more than 1.
    """
    wish, model, seq = recipe.layout, recipe.model, recipe.data.seq_len_tokens
    free = divisors(world_size) if axes_on_auto and not data_parallel_alone(recipe) else (1,)
    for tp in _options(wish.tp, [d for d in free if d <= per_node]):
        if tp_fault(model, seq, tp, per_node) or (_wants_fp8(recipe) and fp8_fault(model, tp)):
            continue
        for cp in _options(wish.cp, [d for d in free if d == 1 or seq >= d * LEAST_CP_TOKENS]):
            if cp_fault(model, seq, cp, tp, wish.cp_attention) or world_size % (tp * cp):
                continue
            for pp in _options(wish.pp, [d for d in free if d <= model.n_layers]):
                if world_size % (tp * cp * pp) or pp_fault(model, pp, 1):
                    continue
                dp = world_size // (tp * cp * pp)
                if recipe.global_batch_rows % dp == 0:
                    yield from _dp_splits(recipe, Degrees(pp, 1, dp, cp, tp), per_node, axes_on_auto)


def _dp_splits(recipe: Recipe, whole: Degrees, per_node: int, axes_on_auto: bool) -> Iterator[Degrees]:
    """dp as replicas of shards. On auto a group of shards never lies across a part of a node."""
    wish, dp = recipe.layout, whole.dp_shard
    on_auto = wish.dp_shard == wish.dp_replicate == "auto"
    last = SHARD_STEP * dp
    for shard in reversed(divisors(dp)):
        replicate, devices = dp // shard, shard * whole.cp * whole.tp
        if on_auto:
            aligned = devices % per_node == 0 or per_node % devices == 0
            if replicate > 1 and not (axes_on_auto and aligned and shard * SHARD_STEP <= last):
                continue
            last = shard
        elif wish.dp_shard not in ("auto", shard) or wish.dp_replicate not in ("auto", replicate):
            continue
        yield whole._replace(dp_replicate=replicate, dp_shard=shard)


def _options(wish: int | str, free: list[int]) -> list[int]:
    return free if isinstance(wish, str) else [wish]


def micro_batches(recipe: Recipe, degrees: Degrees, schedule: Schedule) -> list[int]:
    """Legal numbers of rows in a micro-batch, ascending."""
    rows, pp = recipe.global_batch_rows // degrees.dp, degrees.pp
    given = recipe.train.micro_batch_rows
    most = max(1, MOST_MICRO_BATCH_TOKENS * degrees.cp // recipe.data.seq_len_tokens)
    return [
        m
        for m in divisors(rows)
        if (pp == 1 or schedule_takes(schedule, pp, rows // m))
        and (m == given if given != "auto" else m <= most)
        and not (_wants_fp8(recipe) and fp8_tokens_fault(m, recipe.data.seq_len_tokens, degrees.cp))
    ]


def _wants_fp8(recipe: Recipe) -> bool:
    """On auto precision never becomes fp8."""
    return recipe.train.precision in ("fp8", "fp8_rowwise")


def describe(layout: Layout) -> str:
    """The cut in a line: "dp_shard 16, tp 4, 2 x 1 rows, remat full"."""
    axes = [f"{axis} {getattr(layout, axis)}" for axis in Degrees._fields if getattr(layout, axis) > 1]
    if layout.pipeline_schedule in V_SCHEDULES:
        axes.append(layout.pipeline_schedule)
    elif layout.stages_per_rank > 1:
        axes.append(f"{layout.stages_per_rank} stages a rank")
    if layout.cp > 1:
        axes.append(layout.cp_attention.replace("_", "-"))
    if layout.engine == "deepspeed":
        axes.append(f"deepspeed zero_stage {layout.zero_stage}")
    elif layout.reduce_each_micro_batch and layout.accumulation > 1:
        axes.append("gradients reduced in each micro-batch")
    if layout.offload != "none":
        axes.append(f"offload {layout.offload}")
    axes.append(f"{layout.accumulation} x {layout.micro_batch_rows} rows")
    if layout.remat == "budget":
        axes.append(f"remat within {layout.remat_budget_frac:g} of activation memory")
    elif layout.remat != "none":
        axes.append(f"remat {layout.remat}")
    return ", ".join(axes)
