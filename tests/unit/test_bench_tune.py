"""Tuning without a clock: which candidates are tried, which are given up and why, and what the winner becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aifactory_train.bench.record import Record, Validity, build_metric
from aifactory_train.bench.suites import Asked, Candidate, Tuning
from aifactory_train.bench.tune import STEP_DURATION, Round, Trial, choose_candidates, most_runs, overlay_of, replay
from aifactory_train.bench.tuned import document, render_overlay, render_search
from aifactory_train.errors import PlanError
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import dump_recipe, load_recipe

RECIPE = "configs/recipes/llama3-8b.yaml"


def a_candidate(name):
    overlay = {"layout": {"tp": 1}, "train": {"micro_batch_rows": 2}}
    return Candidate(name=name, overlay=overlay, predicted_step_s=1.0, predicted_peak_bytes=10**9)


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


def searched(outcomes, spread=0.01, rounds=(10, 30, 100)):
    """The search to its end, on a machine with these seconds a step, records, or reasons not to run; and its runs.

    A pair stands for what comes out at first, and what later.
    """
    candidates, found, asked = [a_candidate(name) for name in outcomes], {}, []

    def outcome_of(run):
        return found.get((run.candidate.name, run.round.n_steps))

    while wanted := (search := replay(candidates, outcome_of, [Round(n, 0.05) for n in rounds])).wanted:
        for run in wanted:
            name = run.candidate.name
            outcome = outcomes[name]
            if isinstance(outcome, tuple):
                outcome = outcome[name in [n for n, _ in asked]]
            asked.append((name, run.round.n_steps))
            made = outcome if isinstance(outcome, str | Record) else a_record(outcome, run.round.n_steps, spread)
            found[name, run.round.n_steps] = made
    return search, asked


def stopped(search):
    return {trial.candidate.name: trial.stopped for trial in search.trials}


def test_the_fastest_wins_and_what_is_clearly_slower_gets_one_short_round():
    search, asked = searched({"slow": 2.0, "fast": 1.0, "slower": 3.0})
    assert search.best.candidate.name == "fast" and search.best.stopped is None
    assert asked == [("slow", 10), ("fast", 10), ("slower", 10), ("fast", 100)]
    said = stopped(search)["slow"]
    assert "slower in round 1: 1.99" in said and "the best 0.99" in said
    assert search.best.measured.n == 100, "the number that is reported is of the longest round"


def test_candidates_that_cannot_be_told_apart_are_halved_and_the_end_says_so():
    search, asked = searched({"a": 1.00, "b": 1.01, "c": 1.02, "d": 1.03}, spread=0.5)
    assert [n for _, n in asked] == [10, 10, 10, 10, 30, 30, 100]
    assert len(asked) <= most_runs(4, 3)
    assert search.best.candidate.name == "a"
    assert stopped(search)["d"] == "place 4 of 4 after round 1; the first 2 went on"
    assert stopped(searched({"a": 1.00, "b": 1.01}, spread=0.5)[0])["a"] is None


def test_finalists_with_overlapping_intervals_are_not_said_to_be_slower():
    search, _ = searched({"a": 1.01, "b": 1.0}, spread=0.5, rounds=(20,))
    assert search.best.candidate.name == "b" and "as fast as far as 20 steps can tell" in stopped(search)["a"]


def test_a_search_that_was_broken_off_asks_for_what_it_lacks_and_comes_to_the_same_end():
    candidates, short, long = [a_candidate(name) for name in "ab"], Round(10, 0.05), Round(100, 0.01)
    found = {("a", short): a_record(2.0, 10)}

    def search_now():
        return replay(candidates, lambda run: found.get((run.candidate.name, run.round)), [short, long])

    search = search_now()
    assert [(run.candidate.name, run.round) for run in search.wanted] == [("b", short)] and search.best is None
    found |= {("b", short): a_record(1.0, 10), ("b", long): a_record(1.0, 100)}
    search = search_now()
    assert search.wanted == [] and search.best.candidate.name == "b"


def test_what_runs_out_of_memory_or_is_refused_is_kept_with_its_reason_and_not_run_again():
    fault = "the step does not fit on cuda:0: out of memory"
    search, asked = searched({"large": a_record(1.0, 8, metrics=[], fault=fault), "refused": "no compiler", "ok": 2.0})
    assert search.best.candidate.name == "ok"
    assert list(stopped(search).values()) == [fault, "no compiler", None]
    assert [name for name, _ in asked].count("large") == 1
    page = render_search(ASKED, TUNING, search)
    assert fault in page and "not measured" in page and "**best**" in page


def test_when_the_last_one_fails_the_next_best_takes_its_place():
    search, asked = searched({"fast": (1.0, "killed after 600 s"), "slow": 2.0, "slower": 3.0})
    assert search.best.candidate.name == "slow" and search.best.measured.n == 100
    assert stopped(search)["fast"] == "killed after 600 s"
    assert asked[-2:] == [("fast", 100), ("slow", 100)]
    search, _ = searched({"a": (1.0, "gone"), "b": (2.0, "gone")})
    assert search.best is None and search.wanted == []


def test_a_fast_candidate_whose_loss_is_not_finite_does_not_win():
    broken = a_record(0.5, 10, validity=Validity(loss_finite=False))
    search, _ = searched({"broken": broken, "ok": 1.0})
    assert search.best.candidate.name == "ok" and stopped(search)["broken"] == "its loss was not finite"


TUNING = Tuning(recipe="/recipes/r.yaml", sets=[], text="name: r\n", n_layouts=2, candidates=[])
ASKED = Asked(suite="train", machine="m", nodes=1, cells=[], tuning=TUNING)


def test_where_nothing_ran_there_is_no_best_and_the_report_says_why():
    search, _ = searched({"a": "no route to host", "b": "out of memory"})
    assert search.best is None
    read = json.loads(json.dumps(document(ASKED, TUNING, search)))
    assert read["best"] is None and read["finished"]
    assert [c["stopped"] for c in read["candidates"]] == ["no route to host", "out of memory"]
    assert "No candidate ran." in render_search(ASKED, TUNING, search)


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


def tuned(folder, candidate, sets):
    """The overlay for a candidate of RECIPE, as a recipe."""
    text = dump_recipe(load_recipe(RECIPE, sets))
    tuning = Tuning(recipe=RECIPE, sets=sets, text=text, n_layouts=1, candidates=[candidate])
    best = Trial(candidate, [a_record(1.0, 100).metrics[0]])
    path = folder / "tuned.yaml"
    path.write_text(render_overlay(tuning, best, str(Path(RECIPE).resolve())))
    return load_recipe(path)


def test_an_overlay_has_the_users_own_overrides_and_exactly_the_layout(chosen, tmp_path):
    machine = load_machine("jupiter-booster")
    for candidate in chosen:
        recipe = tuned(tmp_path, candidate, ["optim.lr=1e-4", "train.seed=7"])
        assert (recipe.optim.lr, recipe.train.seed) == (1e-4, 7)
        assert overlay_of(make_plan(recipe, machine, 4).layout) == candidate.overlay
        given = load_recipe(RECIPE, ["optim.lr=1e-4", "train.seed=7", *candidate.sets()])
        assert recipe == given


def test_an_override_of_an_entry_of_a_list_comes_with_the_whole_list(chosen, tmp_path):
    sources = load_recipe(RECIPE).data.sources
    recipe = tuned(tmp_path, chosen[0], ["data.sources.0.weight=2.5"])
    assert [source.name for source in recipe.data.sources] == [source.name for source in sources]
    assert recipe.data.sources[0].weight == 2.5


def test_a_candidate_is_run_by_the_step_benchmark_with_its_overrides():
    assert a_candidate("a").step_options(30, 0.05) == [
        "--steps", "30", "--change-frac", "0.05", "--set", "layout.tp=1", "--set", "train.micro_batch_rows=2",
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

    found = choose_candidates(load, load_machine("jupiter-booster"), 4, 1, 4)
    assert found
    assert {(c.overlay["layout"]["tp"], c.overlay["train"]["micro_batch_rows"]) for c in found} == {(2, 1)}


def test_a_recipe_that_does_not_fit_at_all_is_refused_as_plan_does():
    with pytest.raises(PlanError):
        choose_candidates(lambda sets: load_recipe(RECIPE, sets), load_machine("h200-node"), 1, 1, 4)
