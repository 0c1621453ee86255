"""What `aifactory-train plan` prints, and that a plan is a page which adds up."""

from __future__ import annotations

import json
import re

import pytest

from aifactory_train.cli import main
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.constants import CONSTANTS
from aifactory_train.plan.cost import render_run_cost, run_cost_of, run_cost_range_of
from aifactory_train.plan.curve import render_nodes
from aifactory_train.plan.explain import explain, runner_up, summarize
from aifactory_train.plan.nearest import what_works
from aifactory_train.plan.nodes import build_node_table
from aifactory_train.plan.plan import Plan, make_ranked_plan
from aifactory_train.recipe.load import load_recipe
from aifactory_train.units import format_fraction
from plan_machines import DEMO, GIB, LLAMA_8B, LLAMA_70B, UNTRAINABLE, cpu, gpus

# Few layouts, so that a curve over many nodes is quick.
ONE_LAYOUT = [arg for key in ("pp", "cp", "tp", "dp_replicate") for arg in ("--set", f"layout.{key}=1")]


def test_the_explanation_names_every_term_and_every_note():
    recipe = load_recipe(LLAMA_8B, ["layout.pp=1", "layout.cp=1", "layout.tp=1", "layout.dp_replicate=1"])
    plan, ranking = make_ranked_plan(recipe, gpus(64 * GIB), n_nodes=16)
    text = explain(plan, ranking)
    for name in (*(k for k, v in plan.predicted.memory_bytes.items() if v), *plan.predicted.step_time_s):
        assert name.replace("_", " ") in text
    assert plan.notes and all(text.count(note.removeprefix("assumed: ")) == 1 for note in plan.notes)
    assert "512 rows of 8192 tokens = 64 ranks x " in text and "layouts compared" in text


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
    assert cost is not None and all(
        line in summarize(plan, ranking) for line in render_run_cost(cost, run_cost_range_of(plan))
    )


def test_the_short_page_has_layout_fit_speed_cost_and_the_runner_up_with_its_reason():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), gpus(64 * GIB), n_nodes=16)
    lines = summarize(plan, ranking).splitlines()
    names = [line.split()[0] for line in lines if line.strip()]
    wanted = ["memory", "speed", "cost", "layout", "runner-up"]
    assert [n for n in names if n in wanted] == wanted
    second = next(line for line in lines if line.startswith("  runner-up"))
    slower = runner_up(ranking).step_time_s / ranking.chosen.step_time_s - 1
    assert slower > 0.0005 and f": step time +{slower * 100:.1f} %" in second
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
    page, table = capsys.readouterr().out.split("\n\n")[:2]
    marked = [line.split()[1] for line in table.splitlines() if line.startswith("->")]
    assert len(set(marked)) == 1 and f"-> {marked[0]} node(s): the most with 80%" in table
    assert f"{marked[0]} node(s), " in page


def test_a_node_table_says_what_cannot_be_trained_what_a_hundred_is_and_what_a_budget_buys():
    table = build_node_table(load_recipe(LLAMA_70B, UNTRAINABLE), gpus(192 * GIB), 16, least_nodes=8)
    text = render_nodes(table, 1000.0)
    assert "tokens bought" in text and "trains no: launch refuses these rows" in text
    best = max(table.rows, key=lambda row: row.tokens_per_s / row.n_nodes)
    assert table.base is best and best.efficiency_frac == 1
    assert f"efficiency: 100 % = the best tokens/s per node, of {best.n_nodes} node(s)" in text
    own = build_node_table(load_recipe(LLAMA_8B, ["layout.tp=1", "layout.cp=1"]), gpus(80 * GIB), 4)
    assert "100 % = the best trainable tokens/s per node" in render_nodes(own)


def test_under_the_table_stands_the_qos_that_gives_a_job_more_nodes(capsys):
    assert main(["plan", str(LLAMA_8B), "--machine", "leonardo-booster", *ONE_LAYOUT]) == 0
    assert "more nodes: --qos boost_qos_bprod (256 nodes, 24 h a job)" in capsys.readouterr().out


@pytest.mark.parametrize("render", [summarize, explain])
def test_a_plan_that_cannot_be_trained_says_so_first_with_the_nearest_that_can(render):
    recipe, machine = load_recipe(LLAMA_8B, UNTRAINABLE), gpus(64 * GIB)
    plan, ranking = make_ranked_plan(recipe, machine, n_nodes=16)
    text = render(plan, ranking)
    warning = text.index("  warning       launch refuses this plan: zbv with reshard_after_forward")
    assert text.index("  machine") < warning < text.index("  memory")
    assert "trainable: --set layout.pipeline_schedule=auto or --set layout.reshard_after_forward=auto" in text
    assert "not trainable: " not in text, "it is said once"
    assert "warning" not in render(*make_ranked_plan(load_recipe(LLAMA_8B), machine, n_nodes=16))


def test_a_key_that_training_refuses_is_named_where_it_alone_is_in_the_way():
    recipe = load_recipe(LLAMA_8B, [*UNTRAINABLE, "layout.tp=2"])
    said = what_works(recipe, gpus(), 4, 1, to_train=True)
    assert said == "--set layout.pipeline_schedule=auto or --set layout.reshard_after_forward=auto"


def test_the_page_begins_with_the_verdict_and_ends_with_what_it_rests_on():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), gpus(64 * GIB), n_nodes=16)
    text = explain(plan, ranking)
    parts = [
        "recipe ",
        "memory  ",
        "speed ",
        "cost ",
        "\nlayout",
        "memory per rank",
        "time per step",
        "layouts compared",
    ]
    places = [text.index(part) for part in [*parts, "what it rests on"]]
    assert places == sorted(places)
    assert (
        "dropped" not in text
        and "layouts that fit were timed" in text
        and not re.search("[+\N{MINUS SIGN}-]0[.]0 %", text)
    )


def test_two_devices_in_a_package_are_told_as_such_and_nics_by_their_published_rate():
    alone = load_recipe(LLAMA_8B, ["layout.pp=1", "layout.cp=1", "layout.tp=1", "layout.dp_replicate=1"])
    text = explain(*make_ranked_plan(alone, load_machine("lumi-g"), n_nodes=8))
    assert "8 node(s), 64 devices (AMD Instinct MI250X, one GCD each)" in text
    # Four NICs of 200 Gbit/s are 100 GB/s.
    share = format_fraction(CONSTANTS.nic_frac)
    assert f"ring over a node's NICs at {share} of the published 100 GB/s" in text


def test_a_share_of_an_assumed_peak_says_of_which():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), load_machine("leonardo-booster"), n_nodes=4)
    assert plan.predicted.mfu_frac is None
    # 312 TFLOP/s a device, 16 of them.
    share = plan.predicted.tokens_per_s * plan.shape.model_flops_per_token / (16 * 312e12)
    assert f"MFU {share * 100:.1f} % of the assumed peak, that of A100 SXM 80GB" in summarize(plan, ranking)


def test_full_recomputation_says_what_the_activations_lack():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_70B), gpus(64 * GIB), n_nodes=32)
    assert plan.layout.remat == "full"
    line = next(line for line in summarize(plan, ranking).splitlines() if line.startswith("  remat none"))
    assert "lacks " in line and "GiB per rank even with 1 row a micro-batch" in line
    given = make_ranked_plan(load_recipe(LLAMA_70B, ["layout.remat=full"]), gpus(64 * GIB), n_nodes=32)
    assert "remat none" not in summarize(*given)


def test_the_runner_up_can_be_trained_and_is_no_other_micro_batch():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), gpus(80 * GIB), n_nodes=16)
    second = runner_up(ranking)
    assert plan.layout == ranking.chosen.layout and ranking.chosen.why_not is None
    assert second.why_not is None and second.step_time_s >= ranking.chosen.step_time_s
    kept = [at.layout.reshard_after_forward for at in (ranking.chosen, second)]
    assert ranking.chosen.cut != second.cut or kept[0] != kept[1]


def test_json_has_cost_energy_jobs_basis_and_what_a_budget_buys(capsys):
    options = ["--machine", "lumi-g", "--gpu-hours", "5000", "--json", "--set", "layout.tp=1", "--set", "layout.pp=1"]
    assert main(["plan", str(LLAMA_8B), *options]) == 0
    document = json.loads(capsys.readouterr().out)
    cost = document["cost"]
    assert cost["unit"] == "GPU-hour (one MI250X)" and cost["low"] < cost["amount"] < cost["high"]
    assert document["jobs"]["low"] <= document["jobs"]["number"] <= document["jobs"]["high"]
    assert document["energy_kwh"]["low"] < document["energy_kwh"]["high"]
    assert {"term": "start of a job", "source": "assumed", "text": "3 min 00 s"} in document["basis"]
    # Two devices are one of the GPUs that this site counts: 5000 device-hours are 2500 of its hours, of 100 G tokens.
    assert document["tokens_bought"] == pytest.approx(2500 / cost["amount"] * 100e9, rel=1e-3)
    assert document["nodes"] and all(row["tokens_bought"] > 0 for row in document["nodes"])
    assert document["why_not_trainable"] is document["nearest_trainable"] is None


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


def test_the_page_says_which_code_computes_the_model_how_many_weights_work_and_how_many_are_trained():
    text = explain(*make_ranked_plan(load_recipe(LLAMA_8B), gpus(), n_nodes=4))
    assert "our decoder computes llama models and alone has every axis and fp8" in text
    assert "that of transformers is counted with +" in text
    assert "to +11.0 %: no difference is shown" in text
    asked = ["layout.model_code=transformers", "model.init_from=x", "lora={rank: 8, alpha: 16}"]
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B, asked), gpus(), n_nodes=4)
    short = summarize(plan, ranking)
    assert "model code    that of transformers: as asked; counted with +" in short
    assert "8.03 G parameters (21.0 M in adapters are trained)" in short
    assert plan.layout.pp == plan.layout.cp == plan.layout.tp == 1
    experts = {"family": "other", "n_experts": 8, "n_active_experts": 2, "hf_config": {"model_type": "mixtral"}}
    recipe = load_recipe(LLAMA_8B)
    mixtral = recipe.model_copy(update={"model": recipe.model.model_copy(update=experts)})
    short = summarize(*make_ranked_plan(mixtral, gpus(), n_nodes=8))
    assert "47.5 G parameters (13.7 G at work for each token)" in short
    assert "that of transformers: our decoder has no mixtral models" in short


def test_offload_is_a_line_of_the_page():
    text = summarize(*make_ranked_plan(load_recipe(LLAMA_8B, ["layout.offload=parameters"]), gpus(), n_nodes=4))
    assert "weights and optimizer state in host memory, weights on the device block by block" in text
