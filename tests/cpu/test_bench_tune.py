"""Tuning for real: candidates on two ranks of this node, the fastest as a recipe, and its rates for the next plan."""

from __future__ import annotations

import json

from aifactory_train.bench.tune import Round
from aifactory_train.machine.load import load_machine, write_machine
from aifactory_train.machine.machine import ByDtype, Measured
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import load_recipe
from training_runs import aifactory_here, write_recipe


def test_two_micro_batches_are_tried_and_the_recipe_that_is_left_plans_what_won(tmp_path, monkeypatch):
    rounds = (Round(6, 10.0), Round(12, 10.0))
    monkeypatch.setattr("aifactory_train.bench.rounds.ROUNDS", rounds)
    shape = {"train__global_batch_tokens": 256, "train__budget_tokens": 5120, "train__compile": False}
    fixed = {"layout__dp_shard": 2, "layout__reshard_after_forward": True, "data__document_mask": False}
    recipe = write_recipe(tmp_path, tmp_path, tmp_path, **shape, **fixed)
    # With rates it has a prediction, and none need be measured here.
    rates = Measured(matmul_flops_per_s=ByDtype(fp32=5e10), memory_bytes_per_s=1e10)
    here = tmp_path / "here.yaml"
    write_machine(load_machine("local").model_copy(update={"name": "here", "measured": rates}), here)
    out = tmp_path / "out"
    done = aifactory_here(
        "bench", "train", "--tune", "--recipe", recipe, "--machine", here, "--layouts", 1, "--out", out
    )
    assert done.returncode == 0, done.stdout + done.stderr
    search = json.loads((out / "tuning.json").read_text())
    best, *others = search["candidates"]
    assert best["name"] == search["best"] and others and all(other["stopped"] for other in others)
    assert [r["n"] >= wanted.n_steps for r, wanted in zip(best["rounds"], rounds, strict=True)] == [True, True]

    records = [json.loads(path.read_text()) for path in (out / "records").glob("*.json")]
    longest = max(records, key=lambda record: record["protocol"]["timed_steps"])
    plan = make_plan(load_recipe(out / "tuned.yaml"), load_machine(here), 1, 2)
    assert plan.layout.model_dump(mode="json") == longest["facts"]["plan"]["layout"]
    assert aifactory_here("plan", out / "tuned.yaml", "--machine", here, "--cpu-ranks", 2).returncode == 0

    measured = tmp_path / "here-measured.yaml"
    assert aifactory_here("calibrate", here, out, "--out", measured).returncode == 0
    ratio = load_machine(measured).measured.step_time_ratio.fp32
    assert ratio is not None and ratio.low <= ratio.median <= ratio.high
