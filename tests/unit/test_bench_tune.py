"""Tuning without a clock: which candidates are tried, which are given up and why, and what the winner becomes."""

from __future__ import annotations

import json

import pytest
import yaml

from aifactory_train.bench.record import Record, Validity, build_metric
from aifactory_train.bench.tune import (
    STEP_DURATION,
    Candidate,
    Tuning,
    choose_candidates,
    document,
    overlay_of,
    render_overlay,
    render_search,
    tune,
)
from aifactory_train.errors import PlanError
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import load_recipe

RECIPE = "configs/recipes/llama3-8b.yaml"


def a_candidate(name):
    return Candidate(name, {"layout": {"tp": 1}, "train": {"micro_batch_rows": 2}}, 1.0, 10**9)


def a_record(step_s, n, spread=0.01, **parts):
    """Steps around `step_s`, evenly spread."""
    samples = [step_s * (1 + spread * (i / max(1, n - 1) - 0.5)) for i in range(n)]
    metric = build_metric(STEP_DURATION, "lower", {0: samples}, ["n1"], "max")
    fields = {
        "schema": "aifactory-bench/1", "id": "x", "benchmark": "step", "suite": "train", "machine": "m",
        "hosts": ["n1"], "started": "", "ended": "", "cell": {}, "protocol": None, "metrics": [metric],
        "provenance": {}, "samples": None,
    }  # fmt: skip
    return Record(**(fields | parts))


class Bench:
    """Stands in for the machine: seconds a step of each candidate, or why it does not run."""

    def __init__(self, outcomes, spread=0.01):
        self.outcomes, self.spread, self.asked = outcomes, spread, []

    def __call__(self, candidate, n_steps):
        self.asked.append((candidate.name, n_steps))
        outcome = self.outcomes[candidate.name]
        return outcome if isinstance(outcome, str | Record) else a_record(outcome, n_steps, self.spread)


def searched(outcomes, spread=0.01):
    bench, candidates = Bench(outcomes, spread), [a_candidate(name) for name in outcomes]
    return bench, candidates, tune(candidates, bench, rounds=(10, 30, 100))


def test_the_fastest_wins_and_what_is_clearly_slower_gets_one_short_round():
    bench, candidates, best = searched({"slow": 2.0, "fast": 1.0, "slower": 3.0})
    assert best.name == "fast" and best.stopped is None
    assert bench.asked == [("slow", 10), ("fast", 10), ("slower", 10), ("fast", 100)]
    assert "slower in round 1: 1.99" in candidates[0].stopped and "the best 0.99" in candidates[0].stopped
    assert best.measured.n == 100, "the number that is reported is of the longest round"


def test_candidates_that_cannot_be_told_apart_are_halved_and_the_end_says_so():
    bench, candidates, best = searched({"a": 1.00, "b": 1.01, "c": 1.02, "d": 1.03}, spread=0.5)
    assert [n for _, n in bench.asked] == [10, 10, 10, 10, 30, 30, 100]
    assert best.name == "a"
    assert candidates[3].stopped == "place 4 of 4 after round 1; the first 2 went on"
    bench, candidates, best = searched({"a": 1.00, "b": 1.01}, spread=0.5)
    assert [c.stopped is None for c in candidates] == [True, False]


def test_finalists_with_overlapping_intervals_are_not_said_to_be_slower():
    candidates = [a_candidate("a"), a_candidate("b")]
    best = tune(candidates, Bench({"a": 1.01, "b": 1.0}, spread=0.5), rounds=(20,))
    assert best.name == "b" and "as fast as far as 20 steps can tell" in candidates[0].stopped


def test_what_runs_out_of_memory_or_is_refused_is_kept_with_its_reason_and_not_run_again():
    fault = "the step does not fit on cuda:0: out of memory"
    bench, candidates, best = searched(
        {"large": a_record(1.0, 8, metrics=[], fault=fault), "refused": "no compiler", "ok": 2.0}
    )
    assert best.name == "ok"
    assert [c.stopped for c in candidates] == [fault, "no compiler", None]
    assert [name for name, _ in bench.asked].count("large") == 1
    report = render_search(Tuning("r", "m", candidates, best))
    assert fault in report and "not measured" in report and "**best**" in report


def test_a_fast_candidate_whose_loss_is_not_finite_does_not_win():
    broken = a_record(0.5, 10, validity=Validity(loss_finite=False))
    _, candidates, best = searched({"broken": broken, "ok": 1.0})
    assert best.name == "ok" and candidates[0].stopped == "its loss was not finite"


def test_where_nothing_ran_there_is_no_best_and_the_report_says_why():
    _, candidates, best = searched({"a": "no route to host", "b": "out of memory"})
    assert best is None
    tuning = Tuning("r", "m", candidates, best)
    assert document(tuning)["best"] is None
    assert [c["stopped"] for c in json.loads(json.dumps(document(tuning)))["candidates"]] == [
        "no route to host",
        "out of memory",
    ]


@pytest.fixture(scope="module")
def chosen():
    return choose_candidates(lambda sets: load_recipe(RECIPE, sets), load_machine("jupiter-booster"), 4, 1, 3)


def test_the_candidates_are_the_planners_best_layouts_with_several_micro_batches(chosen):
    plan = make_plan(load_recipe(RECIPE), load_machine("jupiter-booster"), 4)
    assert plan.predicted.total_step_time_s in [c.predicted_step_s for c in chosen]
    assert len({c.name for c in chosen}) == len(chosen) >= 4
    assert len({c.overlay["train"]["micro_batch_rows"] for c in chosen}) >= 2
    cuts = {json.dumps(c.overlay["layout"] | {"reshard_after_forward": None}) for c in chosen}
    assert len(cuts) <= 3


def test_a_candidates_overrides_and_its_overlay_make_exactly_its_layout(chosen, tmp_path):
    machine = load_machine("jupiter-booster")
    for candidate in chosen:
        planned = make_plan(load_recipe(RECIPE, candidate.sets()), machine, 4)
        assert overlay_of(planned.layout) == candidate.overlay
        assert planned.predicted.total_step_time_s == candidate.predicted_step_s
    best = chosen[-1]
    best.rounds.append(a_record(1.0, 100).metrics[0])
    path = tmp_path / "tuned.yaml"
    base = load_recipe(RECIPE)
    path.write_text(render_overlay(best, str(tmp_path / "base.yaml"), ["optim.lr=1e-4"]))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base.model_dump(mode="json")))
    tuned = load_recipe(path)
    assert tuned.optim.lr == 1e-4, "what the user gave on the command line is part of what was tuned"
    assert overlay_of(make_plan(tuned, machine, 4).layout) == best.overlay


def test_a_candidate_is_run_by_the_step_benchmark_with_its_overrides():
    assert a_candidate("a").step_options(30) == [
        "--steps", "30", "--set", "layout.tp=1", "--set", "train.micro_batch_rows=2",
    ]  # fmt: skip


def test_an_overlay_spells_pipelines_budgets_and_zero_as_a_recipe_does():
    layout = make_plan(load_recipe(RECIPE), load_machine("jupiter-booster"), 4).layout
    changed = {"pp": 2, "pipeline_schedule": "interleaved", "stages_per_rank": 4, "remat": "budget"}
    pinned = overlay_of(layout.model_copy(update=changed | {"remat_budget_frac": 0.5}))["layout"]
    assert (pinned["pipeline_schedule"], pinned["remat"]) == ("interleaved-4", 0.5)
    zero = overlay_of(layout.model_copy(update={"zero_stage": 2, "reshard_after_forward": False}))["layout"]
    assert (zero["zero_stage"], zero["reshard_after_forward"]) == (2, False)
    assert "pipeline_schedule" not in zero and "cp_attention" not in zero


def test_what_the_recipe_fixes_is_not_tuned():
    def load(sets):
        return load_recipe(RECIPE, ["layout.tp=2", "train.micro_batch_rows=1", *sets])

    found = choose_candidates(load, load_machine("jupiter-booster"), 4, 1)
    assert found
    assert {(c.overlay["layout"]["tp"], c.overlay["train"]["micro_batch_rows"]) for c in found} == {(2, 1)}


def test_a_recipe_that_does_not_fit_at_all_is_refused_as_plan_does():
    with pytest.raises(PlanError):
        choose_candidates(lambda sets: load_recipe(RECIPE, sets), load_machine("h200-node"), 1, 1)
