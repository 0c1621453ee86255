"""Tuning: the planner's best layouts and micro-batches tried on the real machine, the bad ones given up early.

Successive halving: a few steps of every candidate, more of those that are left. Nothing here starts anything: what was
measured so far says which runs come next, so a search goes on wherever it was broken off. What the recipe fixes stays
fixed; `auto` is what is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aifactory_train.bench.record import Metric, Record
from aifactory_train.bench.suites import Candidate
from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.layout import describe, ranks_per_node
from aifactory_train.plan.plan import Plan, make_ranked_plan
from aifactory_train.recipe.schema import Recipe

STEP_DURATION = "aifactory_train_step_duration_seconds"
# Of the candidates that are left after a round, this share goes on.
KEPT_FRAC = 0.5
# Micro-batches of one layout that are tried.
MICRO_BATCHES = 3


class Round(NamedTuple):
    """Timed steps of each run, and below which change the steps before them count as steady."""

    n_steps: int
    change_frac: float


class Run(NamedTuple):
    """One start of the step benchmark."""

    candidate: Candidate
    round: Round

    @property
    def options(self) -> list[str]:
        return self.candidate.step_options(*self.round)


# What came of a run: its record, or a sentence that says why there is none; None: it has not been run.
OutcomeOf = Callable[[Run], Record | str | None]


@dataclass
class Trial:
    """What became of a candidate.

    rounds: the measured step duration of each round. stopped: why it was given up; None for the winner and while it is
    in. failed: it did not run as it should, so it cannot win.
    """

    candidate: Candidate
    rounds: list[Metric] = field(default_factory=list)
    stopped: str | None = None
    failed: bool = False

    @property
    def measured(self) -> Metric:
        """Of its last round."""
        return self.rounds[-1]


@dataclass(frozen=True)
class Search:
    """A search so far. best: the winner; None before the end, and where no candidate ran. wanted: the next runs."""

    trials: list[Trial]
    best: Trial | None
    wanted: list[Run]


def choose_candidates(
    load: Callable[[list[str]], Recipe], machine: Machine, n_nodes: int, cpu_ranks: int, n_layouts: int
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
    rows = max(1, recipe.global_batch_rows // (n_nodes * ranks_per_node(machine, cpu_ranks)))
    micro = [[]] if recipe.train.micro_batch_rows != "auto" else [[]] + [
        [f"train.micro_batch_rows={m}"] for m in range(1, rows + 1) if rows % m == 0
    ]  # fmt: skip
    may_compile = recipe.train.compile == "auto" and machine.device.kind == "cpu"
    compile_ = [[], ["train.compile=true"]] if may_compile else [[]]
    return [m + c for c in compile_ for m in micro]


def _candidate(
    load: Callable[[list[str]], Recipe], machine: Machine, n_nodes: int, cpu_ranks: int, overlay: dict[str, Any]
) -> Candidate | None:
    """With the prediction for exactly what the overlay makes; None where the planner refuses that."""
    candidate = Candidate(name="", overlay=overlay, predicted_step_s=None, predicted_peak_bytes=0)
    try:
        plan = make_ranked_plan(load(candidate.sets()), machine, n_nodes, cpu_ranks)[0]
    except PlanError:
        return None
    return Candidate(
        name=_name(plan),
        overlay=overlay,
        predicted_step_s=plan.predicted.total_step_time_s,
        predicted_peak_bytes=plan.predicted.peak_memory_bytes,
    )


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


def replay(candidates: Sequence[Candidate], outcome_of: OutcomeOf, rounds: Sequence[Round]) -> Search:
    """All candidates run, then the better half for longer, and so on; asks for the runs that it needs and lacks.

    The same outcomes give the same search, so what had been decided before is decided again.
    """
    trials = [Trial(candidate) for candidate in candidates]
    left, number = trials, 0
    while number < len(rounds):
        # Nobody is left to compare it with; the last round gives the number that is reported.
        number = len(rounds) if number and len(left) == 1 else number + 1
        runs = {id(trial): Run(trial.candidate, rounds[number - 1]) for trial in left}
        missing = [trial for trial in left if not _note(trial, outcome_of(runs[id(trial)]))]
        if missing:
            return Search(trials, None, [runs[id(trial)] for trial in missing])
        left = sorted((trial for trial in left if not trial.failed), key=lambda trial: trial.measured.median)
        if left:
            left = _go_on(left, number, last=number == len(rounds))
        elif left := _second_best(trials):
            number = len(rounds) - 1
    for trial in left[1:]:
        trial.stopped = (
            f"as fast as far as {left[0].measured.n} steps can tell: intervals overlap, and its median is higher"
        )
    return Search(trials, left[0] if left else None, [])


def most_runs(n_candidates: int, n_rounds: int) -> int:
    """Of a search in which none fails and none is clearly slower."""
    return sum(math.ceil(n_candidates * KEPT_FRAC**place) for place in range(n_rounds))


def _note(trial: Trial, outcome: Record | str | None) -> bool:
    """Whether there is an outcome."""
    if outcome is None:
        return False
    if isinstance(outcome, Record):
        trial.rounds += [metric for metric in outcome.metrics if metric.name == STEP_DURATION]
        outcome = outcome.fault or ("its loss was not finite" if outcome.validity.loss_finite is False else "")
    if outcome:
        trial.stopped, trial.failed = outcome, True
    return True


def _go_on(ranked: list[Trial], number: int, *, last: bool) -> list[Trial]:
    """Those that are not clearly slower than the first; the better half of them, unless the round is the last."""
    _stop_slower(ranked, number)
    left = [trial for trial in ranked if trial.stopped is None]
    if last:
        return left
    kept = math.ceil(len(left) * KEPT_FRAC)
    for place, trial in enumerate(left[kept:], start=kept + 1):
        trial.stopped = f"place {place} of {len(left)} after round {number}; the first {kept} went on"
    return left[:kept]


def _second_best(trials: Sequence[Trial]) -> list[Trial]:
    """The one that got farthest of those that only were slower than what has failed since; none where all failed."""
    slower = [trial for trial in trials if not trial.failed]
    if not slower:
        return []
    best = min(slower, key=lambda trial: (-len(trial.rounds), trial.measured.median))
    best.stopped = None
    return [best]


def _stop_slower(ranked: Sequence[Trial], number: int) -> None:
    """Those whose interval lies wholly above that of the first one."""
    best = _interval(ranked[0].measured)
    for trial in ranked[1:]:
        low, high = _interval(trial.measured)
        if low > best[1]:
            trial.stopped = (
                f"slower in round {number}: {low:.4g} to {high:.4g} s a step, the best {best[0]:.4g} to {best[1]:.4g} s"
            )


def _interval(metric: Metric) -> tuple[float, float]:
    return metric.ci95 or (metric.min, metric.max)
