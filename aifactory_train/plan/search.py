"""The search: every legal layout that fits, fastest first. Pure Python; 70B on thousands of devices takes about 1 s."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from aifactory_train.machine.machine import Machine
from aifactory_train.plan.calibrate import correct_step_time
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.layout import (
    Degrees,
    cp_attention,
    legal_degrees,
    micro_batches,
    model_code,
    pp_fault,
    ranks_per_node,
    schedules,
)
from aifactory_train.plan.memory import FIT_FRAC, Memory, estimate_memory, memory_per_rank_bytes
from aifactory_train.plan.placement import place
from aifactory_train.plan.rates import Precision, device_rates, rate_key
from aifactory_train.plan.stages import V_SCHEDULES
from aifactory_train.plan.steptime import estimate_step_time_s, total_step_time_s
from aifactory_train.plan.support import why_not_trainable
from aifactory_train.plan.work import Work, work_of
from aifactory_train.recipe.schema import Recipe

Remat = Literal["none", "selective", "full", "budget"]

# Where the memory is unknown: enough tokens to fill the matmuls, few enough for any device.
SAFE_MICRO_BATCH_TOKENS = 2048
# Kept activations of so many tokens fill the matmuls; to compute them again would buy nothing.
FILLING_MICRO_BATCH_TOKENS = 8192
# Layouts this close together are the same to the model of time, whose error is larger: fewest axes and the larger
# micro-batch are taken, and of those that are closer still the plainest. Chosen with TIGHT_* on published layouts, as
# FIT_FRAC is.
ALIKE_FRAC, SAME_FRAC = 0.02, 0.005
# A layout that fills more of the device counts as so much slower: predicted peaks are not exact, and an allocator at
# its limit unmaps and maps memory again and again.
TIGHT_FRAC, TIGHT_COST_FRAC = 0.88, 0.07
HOST_IS_SHORT = "does not fit into the memory of the host"
_EACH = {"reduce_each_micro_batch": True}
# Stand in for rates that nobody knows, to rank by: (matmul FLOP/s, memory bytes/s) of common parts.
_ORDER_ONLY = {"cpu": (1e12, 1e11), "cuda": (3e14, 2e12), "rocm": (3e14, 2e12)}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout that fits. Seconds and tokens/s are for the order alone where `Ranking.order_only` says so."""

    layout: Layout
    memory: Memory
    terms_s: dict[str, float | None]
    step_time_s: float
    tokens_per_s: float
    why_not: str | None  # one sentence where this version cannot train it

    @property
    def cut(self) -> tuple[Any, ...]:
        """What makes two layouts different to a reader: not how full the device is, nor how many replicas there are."""
        at = self.layout
        return at.engine, at.zero_stage, at.offload, at.remat, at.pp, at.cp, at.tp, at.dp_replicate > 1


@dataclass(frozen=True)
class Ranking:
    """Candidates, fastest first. `dropped`: reason -> number of layouts; `least`: of those that do not fit, the
    smallest, with its memory."""

    candidates: list[Candidate]
    dropped: dict[str, int]
    least: tuple[Layout, Memory] | None
    limit_bytes: int | None
    order_only: bool

    @cached_property
    def best(self) -> Candidate | None:
        return self._first_choice(self.candidates)

    @cached_property
    def chosen(self) -> Candidate | None:
        """What the plan takes: the best that this version can train, else the best.

        Nobody has measured DeepSpeed on a GPU here, so it is taken only where fsdp2 is not among what fits: the recipe
        names the engine, ZeRO 1 or 2 or offload, or nothing else fits.
        """
        trained = [c for c in self.candidates if c.why_not is None]
        plain = [c for c in trained if c.layout.engine == "fsdp2"]
        return self._first_choice(plain) or self._first_choice(trained) or self.best

    def _first_choice(self, candidates: list[Candidate]) -> Candidate | None:
        if not candidates:
            return None
        filled = [c.memory.peak_bytes / self.limit_bytes if self.limit_bytes else 0.0 for c in candidates]
        return candidates[first_choice([c.layout for c in candidates], [c.step_time_s for c in candidates], filled)]

    @cached_property
    def runner_up(self) -> Candidate | None:
        """The fastest that is cut in another way than the chosen one and no faster."""
        if self.chosen is None:
            return None
        mine, floor_s = self.chosen.cut, self.chosen.step_time_s
        return next((c for c in self.candidates if c.cut != mine and c.step_time_s >= floor_s), None)


def _degrees(layout: Layout) -> Degrees:
    return Degrees(layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)


def first_choice(layouts: Sequence[Layout], step_times_s: Sequence[float], filled_fracs: Sequence[float]) -> int:
    """Index of the layout to take: the fastest that is not tight, or a like one of fewer axes or a larger micro-batch.

    Fewer axes wait less for each other, and fewer micro-batches start fewer kernels and collectives, so they depend
    less on what the model of time does not see: host, launcher, other jobs. So do fewer reductions.

    Args:
        filled_fracs: predicted peak of each layout over the memory of the device; 0 where that is unknown.
    """
    costs_s = [
        seconds * (1 + TIGHT_COST_FRAC * (filled > TIGHT_FRAC))
        for seconds, filled in zip(step_times_s, filled_fracs, strict=True)
    ]
    alike = [i for i, cost_s in enumerate(costs_s) if cost_s <= min(costs_s) * (1 + ALIKE_FRAC)]
    fewest = min(_n_axes(layouts[i]) for i in alike)
    alike = [i for i in alike if _n_axes(layouts[i]) == fewest]
    if any(layouts[i].engine == "fsdp2" and not layouts[i].reduce_each_micro_batch for i in alike):
        alike = [i for i in alike if not layouts[i].reduce_each_micro_batch]
    rows = [layout.micro_batch_rows / layout.cp for layout in layouts]
    most_rows = max(rows[i] for i in alike)
    alike = [i for i in alike if rows[i] == most_rows]
    same_s = min(costs_s[i] for i in alike) * (1 + SAME_FRAC)
    return min((i for i in alike if costs_s[i] <= same_s), key=lambda i: _complexity(layouts[i]))


def _n_axes(layout: Layout) -> int:
    return (layout.pp > 1) + (layout.cp > 1) + (layout.tp > 1)


def _complexity(layout: Layout) -> tuple[Any, ...]:
    """Fewer axes first, then the plainer engine and kept activations."""
    degrees = _degrees(layout)
    return (
        sum(d > 1 for d in degrees._replace(dp_shard=1)),
        layout.engine != "fsdp2",
        layout.offload != "none",
        layout.stages_per_rank,
        ("none", "selective", "full", "budget").index(layout.remat),
        layout.pp * layout.tp * layout.cp,
        layout.dp_replicate,
        -layout.zero_stage,
        layout.reduce_each_micro_batch,
        layout.reshard_after_forward,
        degrees,
    )


def search(
    recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int = 1, precision: Precision | None = None
) -> Ranking:
    """Rank every layout that the recipe allows on `n_nodes` nodes and that fits.

    Offload of the optimizer is tried only where nothing else fits but by reducing gradients in each micro-batch, or
    where the recipe names it; that of the parameters only where the recipe does.

    Args:
        cpu_ranks: ranks per node on a machine without GPUs; without meaning on others.
        precision: None for that of the recipe, or on auto what the device computes in.
    """
    found = _Search(recipe, machine, n_nodes, cpu_ranks, precision or choose_precision(recipe, machine))
    wish = recipe.layout.offload
    candidates = found.run("none" if wish == "auto" else wish)
    if wish == "auto" and all(c.layout.engine == "fsdp2" and c.layout.reduce_each_micro_batch for c in candidates):
        candidates += [] if found.on_cpu else found.run("optimizer")
    candidates.sort(key=lambda c: (c.step_time_s, _complexity(c.layout)))
    return Ranking(candidates, dict(found.dropped), found.least, found.limit_bytes, found.order_only)


def choose_precision(recipe: Recipe, machine: Machine) -> Precision:
    """fp8 only where the recipe asks: what it does to the numbers is the user's decision."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "bf16" if machine.device.native_bf16 else "fp32"


@dataclass
class _Search:
    recipe: Recipe
    machine: Machine
    n_nodes: int
    cpu_ranks: int
    precision: Precision
    dropped: Counter[str] = field(default_factory=Counter)
    least: tuple[Layout, Memory] | None = None

    def __post_init__(self) -> None:
        self.work: Work = work_of(self.recipe)
        self.orders: dict[int, list[int]] = {}
        self.per_node = ranks_per_node(self.machine, self.cpu_ranks)
        self.limit_bytes = memory_per_rank_bytes(self.machine, self.per_node)
        self.rated = _with_rates(self.machine, self.precision)
        self.order_only = self.rated is not self.machine
        self.measured_ratio = correct_step_time(self.machine, self.precision, 1.0).expected_s
        self.on_cpu = self.machine.device.kind == "cpu"
        remat = self.recipe.layout.remat
        self.budget_frac = remat if isinstance(remat, float) else None

    def run(self, offload: Literal["none", "optimizer", "parameters"]) -> list[Candidate]:
        found: list[Candidate] = []
        axes_on_auto = not self.on_cpu and self.limit_bytes is not None
        world_size = self.per_node * self.n_nodes
        for degrees in legal_degrees(self.recipe, world_size, self.per_node, axes_on_auto):
            for base, micros in self._bases(degrees, offload):
                found += [self._timed(layout, memory) for layout, memory in self._fitting(base, micros)]
        return found

    def _compiles(self, schedule: str) -> bool:
        wish = self.recipe.train.compile
        if wish != "auto":
            return wish
        if schedule in V_SCHEDULES:  # contradictions.check_kind says why
            return False
        # On a CPU it needs a C++ compiler, which not every machine has.
        return not self.on_cpu or self.budget_frac is not None

    def _bases(self, degrees: Degrees, offload: str) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """The fields of a layout without micro-batch and remat, and the micro-batches that are legal with them."""
        ranks = self.per_node * self.n_nodes
        common = degrees._asdict() | {
            "world_size": ranks,
            "n_nodes": self.n_nodes,
            "cp_attention": cp_attention(self.recipe, degrees),
            "remat_budget_frac": self.budget_frac,
            "precision": self.precision,
            "offload": offload,
            "model_code": model_code(self.recipe),
            "threads_per_rank": max(1, self.machine.host.cores // self.per_node),
            "device_order": self._device_order(degrees),
        }
        for schedule, stages in schedules(self.recipe):
            if (stages > 1 and degrees.pp == 1) or pp_fault(self.recipe.model, degrees.pp, stages):
                continue
            micros = micro_batches(self.recipe, degrees, schedule)
            if not micros:
                self.dropped["too few micro-batches for the pipeline"] += 1
                continue
            for engine, zero_stage, reshard in self._engines(degrees, offload):
                if reshard and schedule in V_SCHEDULES and self.recipe.layout.reshard_after_forward == "auto":
                    continue  # support.why_not_trainable says why
                kind = {"engine": engine, "zero_stage": zero_stage, "reshard_after_forward": reshard}
                # DeepSpeed holds its share of the gradients alone from stage 2 on, so they have nowhere to wait.
                kind["reduce_each_micro_batch"] = engine == "deepspeed" and zero_stage > 1
                kind |= {"pipeline_schedule": schedule, "stages_per_rank": stages, "compile": self._compiles(schedule)}
                yield common | kind, micros

    def _device_order(self, degrees: Degrees) -> list[int]:
        """The innermost axis decides it, so that it is looked for once per degree of that."""
        innermost = next((d for d in reversed(degrees) if d > 1), 1)
        if innermost not in self.orders:
            layout = Layout.model_construct(
                world_size=self.per_node * self.n_nodes, n_nodes=self.n_nodes, device_order=[], **degrees._asdict()
            )
            self.orders[innermost] = place(self.machine, layout)[0]
        return self.orders[innermost]

    def _engines(self, degrees: Degrees, offload: str) -> Iterator[tuple[str, int, bool]]:
        """(engine, ZeRO stage, reshard after forward). DeepSpeed's stage 3 is fsdp2's, so only a recipe names it."""
        wish = self.recipe.layout
        if wish.engine != "deepspeed" and wish.zero_stage in ("auto", 3) and offload == "none":
            # One rank has nothing to gather.
            reshards = (True, False) if degrees.dp_shard * degrees.cp > 1 else (False,)
            for reshard in reshards if wish.reshard_after_forward == "auto" else (wish.reshard_after_forward,):
                yield "fsdp2", 3, reshard
        if wish.engine == "fsdp2" or not degrees.is_dp_shard_alone or rate_key(self.precision) == "fp8":
            return
        named = wish.engine == "deepspeed" or offload != "none"
        if self.work.optimizer != "adamw" or (self.on_cpu and not named and wish.zero_stage == "auto"):
            return
        for zero_stage in (3,) if offload == "parameters" else (1, 2, 3) if named else (1, 2):
            asked, given = (wish.zero_stage, wish.reshard_after_forward), (zero_stage, zero_stage == 3)
            if all(a in ("auto", g) for a, g in zip(asked, given, strict=True)):
                yield "deepspeed", zero_stage, zero_stage == 3

    def _fitting(self, base: dict[str, Any], micros: list[int]) -> Iterator[tuple[Layout, Memory]]:
        """For each remat the largest micro-batch that fits and the next smaller ones; no remat where none is needed.

        Gradients that may be reduced in each micro-batch are, where that makes room for larger ones.
        """
        remats = self._remats(base["pipeline_schedule"])
        if self.limit_bytes is None:
            yield self._unlimited(base | {"remat": remats[0]}, micros)
            return
        # One micro-batch alone holds no gradients between micro-batches, so it may fit where smaller ones do not.
        least = base | {"remat": remats[-1]}
        smallest = min((self._sized(least, m) for m in {micros[0], micros[-1]}), key=lambda s: s[1].peak_bytes)
        may_reduce = self._may_reduce_each(base)
        if may_reduce and not self._fits(smallest):
            smallest = min(smallest, self._sized(least | _EACH, micros[0]), key=lambda s: s[1].peak_bytes)
        if not self._fits(smallest):
            self.dropped["does not fit"] += 1
            if self.least is None or smallest[1].peak_bytes < self.least[1].peak_bytes:
                self.least = smallest
            return
        if self._host_is_short(smallest[1]):
            self.dropped[HOST_IS_SHORT] += 1
            return
        n_sizes = 3 if base["pp"] > 1 else 2  # a pipeline may gain by more and smaller micro-batches
        for remat in remats:
            fitting = list(itertools.islice(self._largest_first(base | {"remat": remat}, micros), n_sizes))
            yield from fitting
            if may_reduce:
                roomy_rows = next((at.micro_batch_rows for at, memory in fitting if not self._is_tight(memory)), 0)
                larger = [m for m in micros if roomy_rows < m < self._replica_rows(base)]
                yield from itertools.islice(self._largest_first(base | _EACH | {"remat": remat}, larger), 2)
            if fitting and self._is_full(fitting[0][0], micros[-1]):
                return

    def _remats(self, schedule: str) -> list[Remat]:
        wish = self.recipe.layout.remat
        if wish == "auto":
            return ["none"] if schedule in V_SCHEDULES else ["none", "selective", "full"]
        return ["budget"] if isinstance(wish, float) else [wish]

    def _may_reduce_each(self, base: dict[str, Any]) -> bool:
        """torch's pipelines reduce once per step (stage.backward_maybe_with_nosync)."""
        return base["engine"] == "fsdp2" and base["pp"] == 1 and base["dp_shard"] * base["cp"] > 1

    def _is_full(self, layout: Layout, most: int) -> bool:
        tokens = layout.micro_batch_rows * self.work.seq_len_tokens // layout.cp
        return tokens >= FILLING_MICRO_BATCH_TOKENS or layout.micro_batch_rows == most

    def _largest_first(self, base: dict[str, Any], micros: list[int]) -> Iterator[tuple[Layout, Memory]]:
        """Those that fit; memory grows with the micro-batch up to the last but one."""
        below = len(micros)
        if micros and self._fits(whole := self._sized(base, micros[-1])):
            yield whole
            below -= 1
        low, high = 0, below
        while low < high:
            middle = (low + high) // 2
            if self._fits(self._sized(base, micros[middle])):
                low = middle + 1
            else:
                high = middle
        yield from (self._sized(base, m) for m in reversed(micros[:low]))

    def _unlimited(self, base: dict[str, Any], micros: list[int]) -> tuple[Layout, Memory]:
        """The memory is unknown: a micro-batch that fits on any device, parameters gathered block by block."""
        seq = self.work.seq_len_tokens
        micro = next((m for m in micros if m * seq >= SAFE_MICRO_BATCH_TOKENS), micros[-1])
        return self._sized(base, micro)

    def _sized(self, base: dict[str, Any], micro: int) -> tuple[Layout, Memory]:
        # Unchecked, because every field is ours: validation would be a third of the time of a search.
        layout = Layout.model_construct(**base, micro_batch_rows=micro, accumulation=self._replica_rows(base) // micro)
        return layout, estimate_memory(self.work, self.machine.device.kind, layout)

    def _replica_rows(self, base: dict[str, Any]) -> int:
        return self.work.global_batch_rows // (base["dp_replicate"] * base["dp_shard"])

    def _is_tight(self, memory: Memory) -> bool:
        assert self.limit_bytes is not None
        return memory.peak_bytes > TIGHT_FRAC * self.limit_bytes

    def _fits(self, sized: tuple[Layout, Memory]) -> bool:
        assert self.limit_bytes is not None
        return sized[1].peak_bytes <= FIT_FRAC * self.limit_bytes

    def _host_is_short(self, memory: Memory) -> bool:
        """On a CPU the ranks themselves are all that is there, and their share has been looked at."""
        there = self.machine.host.memory_bytes
        return there is not None and not self.on_cpu and sum(memory.host_bytes.values()) > FIT_FRAC * there

    def _timed(self, layout: Layout, memory: Memory) -> Candidate:
        terms_s = estimate_step_time_s(self.work, self.rated, layout)
        modelled_s = total_step_time_s(terms_s)
        assert modelled_s is not None, "a machine with rates has a time"
        step_time_s = modelled_s * self.measured_ratio
        rate = self.work.global_batch_tokens / step_time_s
        return Candidate(layout, memory, terms_s, step_time_s, rate, why_not_trainable(layout))


def _with_rates(machine: Machine, precision: Precision) -> Machine:
    """The machine itself where every rate is known, else a copy with rates to rank by in the place of unknown ones."""
    device, rates = machine.device, device_rates(machine, precision)
    if rates.peak_flops_per_s is not None and rates.memory_bytes_per_s is not None:
        return machine
    flops_per_s, bytes_per_s = _ORDER_ONLY[device.kind]
    peak = device.peak_flops_per_s.model_copy(update={rate_key(precision): rates.peak_flops_per_s or flops_per_s})
    rated = {"peak_flops_per_s": peak, "memory_bytes_per_s": rates.memory_bytes_per_s or bytes_per_s}
    return machine.model_copy(update={"device": device.model_copy(update=rated)})
