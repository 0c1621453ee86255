"""What `aifactory-train plan` prints, and that a plan is a page which adds up."""

from __future__ import annotations

import json

import pytest

from aifactory_train.cli import main
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.cost import render_run_cost, run_cost_of
from aifactory_train.plan.explain import explain, render_nodes, summarize
from aifactory_train.plan.nodes import build_node_table
from aifactory_train.plan.plan import Plan, make_ranked_plan
from aifactory_train.recipe.load import load_recipe
from plan_machines import DEMO, GIB, LLAMA_8B, LLAMA_70B, cpu, gpus


def test_the_explanation_names_every_term_and_every_note():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), gpus(64 * GIB), n_nodes=16)
    text = explain(plan, ranking)
    for name in (*(k for k, v in plan.predicted.memory_bytes.items() if v), *plan.predicted.step_time_s):
        assert name.replace("_", " ") in text
    assert plan.notes and all(note in text for note in plan.notes)
    assert "512 rows of 8192 tokens = 64 replicas" in text and "layouts compared" in text


def test_the_terms_of_a_plan_add_up():
    predicted = make_ranked_plan(load_recipe(LLAMA_8B), gpus(64 * GIB), n_nodes=16)[0].predicted
    assert sum(predicted.step_time_s.values()) == pytest.approx(predicted.total_step_time_s)
    assert sum(predicted.memory_bytes.values()) == pytest.approx(predicted.peak_memory_bytes, rel=1e-6)
    assert predicted.step_time_low_s < predicted.total_step_time_s < predicted.step_time_high_s
    assert predicted.tokens_per_s * predicted.total_step_time_s == pytest.approx(4_194_304)


def test_the_page_and_a_job_of_the_same_length_name_one_cost():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B, ["checkpoint.every_steps=1"]), gpus(64 * GIB), n_nodes=16)
    assert plan.predicted.step_time_s["checkpoint_stall"] > 0
    cost = run_cost_of(plan)
    assert cost is not None and all(line in summarize(plan, ranking) for line in render_run_cost(cost))


def test_the_short_page_has_layout_fit_speed_cost_and_the_runner_up_with_its_reason():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), gpus(64 * GIB), n_nodes=16)
    lines = summarize(plan, ranking).splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    assert [n for n in names if n in ("layout", "memory", "speed", "cost", "runner-up")]
    second = next(line for line in lines if line.startswith("  runner-up"))
    slower = ranking.runner_up.step_time_s / ranking.chosen.step_time_s - 1
    assert f": {slower * 100:.1f} % slower" in second
    fits = next(line for line in lines if line.startswith("  memory"))
    assert "fits: " in fits and " of 64.0 GiB per rank" in fits


def test_without_rates_the_page_claims_no_speed_and_no_cost():
    plan, ranking = make_ranked_plan(load_recipe(DEMO), cpu(), cpu_ranks=2)
    text = summarize(plan, ranking)
    assert "speed         unknown" in text and "cost" not in text and "aifactory-train probe" in text
    assert "total                        unknown" in explain(plan, ranking)


def test_json_is_one_document_with_plan_and_ranking_and_nothing_else(capsys):
    assert main(["plan", str(LLAMA_8B), "--machine", "jupiter-booster", "--nodes", "16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    plan = Plan.model_validate(document["plan"])
    assert plan.layout.world_size == 64 and document["nodes"] is None
    rows = document["ranking"]
    assert any(row["layout"] == document["plan"]["layout"] for row in rows)
    assert [r["step_time_s"] for r in rows] == sorted(r["step_time_s"] for r in rows)


def test_without_nodes_a_machine_with_slurm_has_a_table_with_the_recommended_number_marked(capsys):
    assert main(["plan", str(LLAMA_8B), "--machine", "deucalion-a100-80"]) == 0
    table, page = capsys.readouterr().out.split("\n\n", 1)
    marked = [line.split()[1] for line in table.splitlines()[:-1] if line.startswith("->")]
    assert len(marked) == 1 and f"-> {marked[0]} node(s): the most with 80%" in table
    assert f"{marked[0]} node(s), " in page


def test_a_node_table_says_what_cannot_be_trained_and_what_a_budget_buys():
    table = build_node_table(load_recipe(LLAMA_70B), gpus(80 * GIB), 8)
    text = render_nodes(table, 1000.0)
    assert "(not trainable yet)" in text and "tokens bought" in text


def test_nodes_budget_and_deadline_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(LLAMA_8B), "--nodes", "2", "--deadline", "3d"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["leonardo-booster", "vega-gpu"])
def test_what_a_machine_file_does_not_know_stands_in_the_notes_as_assumed(name):
    machine = load_machine(name)
    plan, _ = make_ranked_plan(load_recipe(LLAMA_8B), machine, n_nodes=4)
    assert any("assumed" in note for note in plan.notes)
    if machine.device.peak_flops_per_s.bf16 is None:
        assert plan.predicted.mfu_frac is None and plan.predicted.tokens_per_s is not None
