"""Tuning: the planner's best layouts and micro-batches tried on the real machine, the bad ones given up early.

Successive halving: a few steps of every candidate, more of those that are left. Nothing here starts anything: `run` is
handed in. What the recipe fixes stays fixed; `auto` is what is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from aifactory_train.bench.record import Metric, Record
from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.layout import describe
from aifactory_train.plan.plan import Plan, make_ranked_plan
from aifactory_train.recipe.schema import Recipe

STEP_DURATION = "aifactory_train_step_duration_seconds"
# Timed steps of each round.
ROUNDS = (10, 30, 100)
# Of the candidates that are left after a round, this share goes on.
KEPT_FRAC = 0.5
# Micro-batches of one layout that are tried.
MICRO_BATCHES = 3


@dataclass
class Candidate:
    """A layout that the recipe takes with `overlay` merged into it.

    overlay: `layout` and `train` keys as recipes spell them. rounds: the measured step duration of each round.
    stopped: why it was given up; None for the winner and while it is in.
    """

    name: str
    overlay: dict[str, dict[str, Any]]
    predicted_step_s: float | None
    predicted_peak_bytes: int
    rounds: list[Metric] = field(default_factory=list)
    stopped: str | None = None

    @property
    def measured(self) -> Metric:
        """Of its last round."""
        return self.rounds[-1]

    def sets(self) -> list[str]:
        """As `--set` takes it: "layout.tp=2"."""
        return [
            f"{part}.{key}={_word(value)}" for part, values in self.overlay.items() for key, value in values.items()
        ]

    def step_options(self, n_steps: int) -> list[str]:
        """For benchmarks/step.py, after --recipe and the user's own overrides."""
        return ["--steps", str(n_steps), *(word for each in self.sets() for word in ("--set", each))]


# One run of the step benchmark with so many timed steps: its record, or a sentence that says why there is none.
Run = Callable[[Candidate, int], Record | str]


@dataclass(frozen=True)
class Tuning:
    """The search. `best` is None where no candidate ran."""

    recipe: str
    machine: str
    candidates: list[Candidate]
    best: Candidate | None


def choose_candidates(
    load: Callable[[list[str]], Recipe], machine: Machine, n_nodes: int, cpu_ranks: int, n_layouts: int = 4
) -> list[Candidate]:
    """The planner's best layouts that this version trains, each with its best micro-batches, fastest first.

    Args:
        load: the recipe with these overrides on top of the user's own.

    Raises:
        PlanError: nothing fits, or the recipe contradicts itself.
    """
    found: dict[str, Candidate] = {}
    cuts: dict[tuple[Any, ...], int] = {}
    ranked = []
    for sets in _widenings(load([]), machine, n_nodes, cpu_ranks):
        try:
            ranking = make_ranked_plan(load(sets), machine, n_nodes, cpu_ranks)[1]
        except PlanError:
            if not sets:
                raise
            continue  # this micro-batch is too large, or divides nothing
        ranked += [c for c in ranking.candidates if c.why_not is None]
    for ranked_one in sorted(ranked, key=lambda c: c.step_time_s):
        cut = (ranked_one.cut, ranked_one.layout.compile)
        if (cut not in cuts and len(cuts) == n_layouts) or cuts.get(cut, 0) == MICRO_BATCHES:
            continue
        candidate = _candidate(load, machine, n_nodes, cpu_ranks, overlay_of(ranked_one.layout))
        if candidate is not None and candidate.name not in found:
            found[candidate.name] = candidate
            cuts[cut] = cuts.get(cut, 0) + 1
    return list(found.values())


def _widenings(recipe: Recipe, machine: Machine, n_nodes: int, cpu_ranks: int) -> list[list[str]]:
    """Overrides that make the planner look where it needs not look by itself: smaller micro-batches, no compiler."""
    rows = max(1, recipe.global_batch_rows // (n_nodes * _ranks(machine, cpu_ranks)))
    micro = [[]] if recipe.train.micro_batch_rows != "auto" else [[]] + [
        [f"train.micro_batch_rows={m}"] for m in range(1, rows + 1) if rows % m == 0
    ]  # fmt: skip
    may_compile = recipe.train.compile == "auto" and machine.device.kind == "cpu"
    compile_ = [[], ["train.compile=true"]] if may_compile else [[]]
    return [m + c for c in compile_ for m in micro]


def _ranks(machine: Machine, cpu_ranks: int) -> int:
    return cpu_ranks if machine.device.kind == "cpu" else machine.device.per_node


def _candidate(
    load: Callable[[list[str]], Recipe], machine: Machine, n_nodes: int, cpu_ranks: int, overlay: dict[str, Any]
) -> Candidate | None:
    """With the prediction for exactly what the overlay makes; None where the planner refuses that."""
    candidate = Candidate("", overlay, None, 0)
    try:
        plan = make_ranked_plan(load(candidate.sets()), machine, n_nodes, cpu_ranks)[0]
    except PlanError:
        return None
    candidate.name = _name(plan)
    candidate.predicted_step_s = plan.predicted.total_step_time_s
    candidate.predicted_peak_bytes = plan.predicted.peak_memory_bytes
    return candidate


def _name(plan: Plan) -> str:
    gathered = ", weights stay gathered" if not plan.layout.reshard_after_forward and plan.layout.dp_shard > 1 else ""
    return describe(plan.layout) + gathered + (", compiled" if plan.layout.compile else "")


def overlay_of(layout: Layout) -> dict[str, dict[str, Any]]:
    """What makes the planner take this layout, in the keys of a recipe."""
    schedule = layout.pipeline_schedule
    pinned: dict[str, Any] = {
        "engine": layout.engine,
        **{axis: getattr(layout, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")},
        "zero_stage": layout.zero_stage,
        "reshard_after_forward": layout.reshard_after_forward,
        "remat": layout.remat_budget_frac if layout.remat == "budget" else layout.remat,
        "offload": layout.offload,
    }
    if layout.pp > 1:
        interleaved = schedule == "interleaved"
        pinned["pipeline_schedule"] = f"interleaved-{layout.stages_per_rank}" if interleaved else schedule
    if layout.cp > 1:
        pinned["cp_attention"] = layout.cp_attention
    return {
        "layout": pinned,
        "train": {"micro_batch_rows": layout.micro_batch_rows, "compile": layout.compile},
    }


def tune(candidates: Sequence[Candidate], run: Run, rounds: Sequence[int] = ROUNDS) -> Candidate | None:
    """Run all candidates, then the better half for longer, and so on. Returns the best; None where none ran.

    Each candidate gets what was measured of it, and the reason why it was given up.
    """
    left = list(candidates)
    for number, n_steps in enumerate(rounds, start=1):
        for candidate in left:
            _run_one(candidate, run, n_steps)
        left = sorted((c for c in left if c.stopped is None), key=lambda c: c.measured.median)
        if not left:
            return None
        _stop_slower(left, number)
        left = [c for c in left if c.stopped is None]
        if number < len(rounds):
            kept = max(1, math.ceil(len(left) * KEPT_FRAC))
            for place, candidate in enumerate(left[kept:], start=kept + 1):
                candidate.stopped = f"place {place} of {len(left)} after round {number}; the first {kept} went on"
            left = left[:kept]
        if len(left) == 1 and number < len(rounds):
            # Nobody is left to compare it with; the last round gives the number that is reported.
            _run_one(left[0], run, rounds[-1])
            return left[0] if left[0].stopped is None else None
    for candidate in left[1:]:
        candidate.stopped = (
            f"as fast as far as {left[0].measured.n} steps can tell: intervals overlap, and its median is higher"
        )
    return left[0]


def _run_one(candidate: Candidate, run: Run, n_steps: int) -> None:
    outcome = run(candidate, n_steps)
    if isinstance(outcome, str):
        candidate.stopped = outcome
        return
    if outcome.fault is not None:
        candidate.stopped = outcome.fault
        return
    candidate.rounds += [metric for metric in outcome.metrics if metric.name == STEP_DURATION]
    if outcome.validity.loss_finite is False:
        candidate.stopped = "its loss was not finite"


def _stop_slower(ranked: Sequence[Candidate], number: int) -> None:
    """Those whose interval lies wholly above that of the first one."""
    best = _interval(ranked[0].measured)
    for candidate in ranked[1:]:
        low, high = _interval(candidate.measured)
        if low > best[1]:
            candidate.stopped = (
                f"slower in round {number}: {low:.4g} to {high:.4g} s a step, the best {best[0]:.4g} to {best[1]:.4g} s"
            )


def _interval(metric: Metric) -> tuple[float, float]:
    return metric.ci95 or (metric.min, metric.max)


def render_overlay(best: Candidate, extends: str, sets: Sequence[str]) -> str:
    """A recipe that takes the best layout.

    Args:
        extends: the recipe that was tuned, as seen from the folder of the overlay.
        sets: the user's own overrides, which the recipe was tuned with.
    """
    merged: dict[str, Any] = {"extends": extends}
    pairs = [s.partition("=")[::2] for s in (*sets, *best.sets())]
    for key, value in pairs:
        node = merged
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = yaml.safe_load(value)
    at = best.measured
    interval = "" if at.ci95 is None else f", {at.ci95[0]:.4g} to {at.ci95[1]:.4g}"
    head = f"# The fastest of the layouts that were tried: {at.median:.4g} s a step{interval}, n = {at.n}.\n"
    return head + yaml.safe_dump(merged, sort_keys=False)


def render_search(tuning: Tuning) -> str:
    """The search in Markdown: every candidate with what was predicted and measured, and why it was given up."""
    lines = [
        f"# Tuning of {tuning.recipe} on {tuning.machine}",
        "",
        "Seconds a step: the median of the slowest rank, with its 95 % interval, of the last round of each candidate.",
        "",
        "| layout | predicted | measured | 95 % interval | steps | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for candidate in _in_order(tuning):
        predicted = "unknown" if candidate.predicted_step_s is None else f"{candidate.predicted_step_s:.4g}"
        if candidate.rounds:
            at = candidate.measured
            interval = "too few steps" if at.ci95 is None else f"{at.ci95[0]:.4g} to {at.ci95[1]:.4g}"
            measured = f"{at.median:.4g} | {interval} | {at.n}"
        else:
            measured = "not measured | | 0"
        outcome = "**best**" if candidate is tuning.best else (candidate.stopped or "").replace("|", "/")
        lines.append(f"| {candidate.name} | {predicted} | {measured} | {' '.join(outcome.split())} |")
    return "\n".join(lines) + "\n"


def document(tuning: Tuning) -> dict[str, Any]:
    """The search as JSON values."""
    return {
        "schema": "aifactory-tuning/1",
        "recipe": tuning.recipe,
        "machine": tuning.machine,
        "best": None if tuning.best is None else tuning.best.name,
        "candidates": [
            {
                "name": candidate.name,
                "overlay": candidate.overlay,
                "predicted_step_s": candidate.predicted_step_s,
                "predicted_peak_bytes": candidate.predicted_peak_bytes,
                "rounds": [metric.model_dump(mode="json") for metric in candidate.rounds],
                "stopped": candidate.stopped,
            }
            for candidate in _in_order(tuning)
        ],
    }


def _in_order(tuning: Tuning) -> list[Candidate]:
    """The best, then those that got as far, by what was measured; last those that never ran."""

    def place(candidate: Candidate) -> tuple[bool, int, float]:
        median = candidate.measured.median if candidate.rounds else math.inf
        return candidate is not tuning.best, -len(candidate.rounds), median

    return sorted(tuning.candidates, key=place)


def _word(value: Any) -> str:
    """As YAML writes it on one line."""
    return str(yaml.safe_dump(value)).splitlines()[0]
