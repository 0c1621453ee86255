"""The search: what is legal, what fits, what is taken, and the sentence where nothing is left."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from aifactory_train.errors import PlanError
from aifactory_train.machine.load import load_machine
from aifactory_train.machine.machine import ByDtype
from aifactory_train.plan.layout import Degrees, describe, legal_degrees, micro_batches
from aifactory_train.plan.memory import FIT_FRAC
from aifactory_train.plan.nodes import build_node_table, choose_nodes, nodes_for_budget, tokens_bought
from aifactory_train.plan.plan import make_plan, make_ranked_plan
from aifactory_train.plan.search import ALIKE_FRAC, Ranking, first_choice, search
from aifactory_train.plan.support import refuse_untrainable, why_not_trainable
from aifactory_train.recipe.load import load_recipe
from plan_machines import DEMO, GIB, LLAMA_8B, LLAMA_70B, UNTRAINABLE, cpu, gpus

ONE_LAYOUT = ["layout.pp=1", "layout.cp=1", "layout.tp=1", "layout.dp_replicate=1"]


def refusal(recipe, *args, **kwargs) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(recipe, *args, **kwargs)
    return caught.value.render()


def test_every_candidate_keeps_the_arithmetic_of_a_layout_and_fits():
    recipe, machine = load_recipe(LLAMA_8B), gpus(40 * GIB)
    ranking = search(recipe, machine, 4)
    assert len(ranking.candidates) > 50
    for candidate in ranking.candidates:
        at = candidate.layout
        assert at.pp * at.dp_replicate * at.dp_shard * at.cp * at.tp == at.world_size == 16
        assert at.dp * at.accumulation * at.micro_batch_rows == 512
        assert 8 % at.tp == 0 and at.tp <= 4 and 8192 % (2 * at.cp) == 0
        assert at.pp * at.stages_per_rank <= 32 and (at.pp == 1 or at.accumulation >= at.pp)
        assert candidate.memory.peak_bytes <= FIT_FRAC * 40 * GIB
    times = [c.step_time_s for c in ranking.candidates]
    assert times == sorted(times)
    assert len({c.layout.model_dump_json() for c in ranking.candidates}) == len(times), "none is there twice"


def test_degrees_are_all_ways_to_share_the_ranks():
    # 8 ranks on 2 nodes of 4; 16 rows; kv heads 2 allow tp 1 and 2; 256 tokens allow no cp on auto.
    found = set(legal_degrees(load_recipe(DEMO), 8, 4, axes_on_auto=True))
    assert found == {
        *(Degrees(1, 1, 8, 1, 1), Degrees(1, 4, 2, 1, 1), Degrees(1, 1, 4, 1, 2), Degrees(1, 4, 1, 1, 2)),
        *(Degrees(2, 1, 4, 1, 1), Degrees(2, 4, 1, 1, 1), Degrees(2, 1, 2, 1, 2), Degrees(4, 1, 2, 1, 1)),
        Degrees(4, 1, 1, 1, 2),
    }
    assert set(legal_degrees(load_recipe(DEMO), 8, 4, axes_on_auto=False)) == {Degrees(1, 1, 8, 1, 1)}


def test_a_pipeline_has_a_micro_batch_for_each_rank_and_an_interleaved_one_whole_rounds():
    recipe = load_recipe(LLAMA_8B)  # 512 rows of 8192 tokens
    at = Degrees(pp=4, dp_replicate=1, dp_shard=32, cp=1, tp=1)  # 16 rows for each replica
    assert micro_batches(recipe, at, "1f1b") == [1, 2, 4]
    assert micro_batches(recipe, at._replace(dp_shard=128), "1f1b") == [1]
    fourteen = load_recipe(LLAMA_8B, [f"train.global_batch_tokens={14 * 32 * 8192}"])  # rows for each replica
    assert micro_batches(fourteen, at, "1f1b") == micro_batches(fourteen, at, "zbv") == [1, 2]
    assert micro_batches(fourteen, at, "interleaved") == [2], "3 rounds do not share 14; 7 make one"
    assert micro_batches(fourteen, at, "dualpipev") == [1], "fewer than its 8 stages"


def test_a_given_degree_is_kept_and_the_rest_is_chosen_around_it():
    recipe = load_recipe(LLAMA_8B, ["layout.tp=2", "layout.pp=2", "layout.remat=full"])
    ranking = search(recipe, gpus(), 4)
    assert ranking.candidates
    assert {(c.layout.tp, c.layout.pp, c.layout.remat) for c in ranking.candidates} == {(2, 2, "full")}


def test_the_plan_takes_the_best_that_can_be_trained():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), gpus(), n_nodes=4)
    refused = replace(ranking.chosen, step_time_s=0.9 * ranking.chosen.step_time_s, why_not="no")
    assert why_not_trainable(plan.layout) is None
    assert Ranking([refused, *ranking.candidates], {}, None, None, False).chosen == ranking.chosen


def test_deepspeed_is_taken_where_the_recipe_names_it_and_told_of_where_it_would_be_faster():
    machine = load_machine("jupiter-booster")
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B, ONE_LAYOUT), machine, n_nodes=16)
    assert plan.layout.engine == "fsdp2" and ranking.best.layout.engine == "deepspeed"
    assert ranking.best.tokens_per_s > 1.01 * ranking.chosen.tokens_per_s
    (note,) = (note for note in plan.notes if "faster would be" in note)
    asked = [*ONE_LAYOUT, *(word for word in note.split() if word.startswith("layout."))]
    assert make_plan(load_recipe(LLAMA_8B, asked), machine, n_nodes=16).layout == ranking.best.layout
    trained = [c for c in ranking.candidates if c.layout.engine == "fsdp2"]
    assert ranking.chosen.step_time_s <= min(c.step_time_s for c in trained) * (1 + ALIKE_FRAC)
    assert ranking.runner_up.cut != ranking.chosen.cut
    assert ranking.runner_up.step_time_s >= ranking.chosen.step_time_s


def test_where_none_can_be_trained_the_best_is_shown_and_marked_and_launch_has_the_same_sentence():
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B, UNTRAINABLE), gpus(80 * GIB), n_nodes=16)
    assert ranking.chosen is ranking.best and ranking.best.why_not == why_not_trainable(plan.layout)
    assert any(note.startswith(f"not trainable: {ranking.best.why_not}") for note in plan.notes)
    with pytest.raises(PlanError) as caught:
        refuse_untrainable(plan.layout, where="here")
    assert caught.value.what == ranking.best.why_not


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"engine": "deepspeed", "tp": 2, "dp_replicate": 2}, "deepspeed with dp_replicate 2, tp 2: it splits over"),
        ({"engine": "deepspeed", "precision": "fp8"}, "deepspeed with precision fp8"),
        ({"engine": "deepspeed", "zero_stage": 2, "offload": "parameters"}, "only stage 3 splits parameters"),
        ({"zero_stage": 2}, "fsdp2 with zero_stage 2"),
        ({"model_code": "transformers", "pp": 2, "cp": 2}, "pp 2, cp 2 with model_code transformers: its own code"),
        ({"model_code": "transformers", "precision": "fp8"}, "precision fp8 with model_code transformers: only"),
        ({"remat": "budget", "remat_budget_frac": 0.5, "compile": False}, "remat budget needs compile"),
        ({"offload": "optimizer"}, "fsdp2 with offload optimizer"),
        ({"pp": 2, "pipeline_schedule": "zbv", "reshard_after_forward": True}, "zbv with reshard_after_forward"),
    ],
)
def test_each_thing_that_training_has_not_is_a_sentence(change, sentence):
    layout = make_plan(load_recipe(DEMO), cpu(), cpu_ranks=2).layout
    assert why_not_trainable(layout) is None
    assert sentence in why_not_trainable(layout.model_copy(update=change))


@pytest.mark.parametrize(
    "change",
    [
        {"pp": 2, "dp_shard": 1}, {"dp_replicate": 2, "dp_shard": 1}, {"cp": 2, "dp_shard": 1},
        {"tp": 2, "dp_shard": 1},
        {"pipeline_schedule": "zbv", "stages_per_rank": 2, "reshard_after_forward": False},
        {"precision": "fp8_rowwise"}, {"remat": "selective"},
        {"remat": "budget", "remat_budget_frac": 0.5, "compile": True},
        {"engine": "deepspeed", "zero_stage": 1}, {"engine": "deepspeed", "zero_stage": 2, "offload": "optimizer"},
        {"engine": "deepspeed", "offload": "parameters"}, {"model_code": "transformers", "dp_replicate": 2},
    ],
)  # fmt: skip
def test_every_axis_schedule_remat_zero_stage_and_offload_trains(change):
    layout = make_plan(load_recipe(DEMO), cpu(), cpu_ranks=2).layout
    assert why_not_trainable(layout.model_copy(update=change)) is None


def test_gradients_are_reduced_in_each_micro_batch_where_that_spares_recomputation():
    leonardo = load_machine("leonardo-booster")  # 64 GB devices, 4 a node
    ranking = search(load_recipe(LLAMA_8B, ONE_LAYOUT), leonardo, 16)
    chosen = ranking.chosen
    once = next(c for c in ranking.candidates if c.why_not is None and not c.layout.reduce_each_micro_batch)
    assert chosen.layout.reduce_each_micro_batch and chosen.layout.remat != "full"
    assert chosen.layout.accumulation > 1 and "gradients reduced in each micro-batch" in describe(chosen.layout)
    each = next(c for c in ranking.candidates if c.why_not is None and c.layout.reduce_each_micro_batch)
    assert each.step_time_s < 0.96 * once.step_time_s and once.layout.remat != "none"
    # 8.03e9 fp32 gradients, which the other holds whole.
    assert chosen.memory.terms_bytes["gradients"] == pytest.approx(4 * 8.03e9 / 64, rel=1e-3)


def test_gradients_are_reduced_once_where_that_fits_and_is_as_fast():
    for machine in (gpus(192 * GIB), load_machine("jupiter-booster")):
        assert not search(load_recipe(LLAMA_8B, ONE_LAYOUT), machine, 4).chosen.layout.reduce_each_micro_batch
    assert not search(load_recipe(DEMO), cpu(), 1, cpu_ranks=2).chosen.layout.reduce_each_micro_batch


def test_a_layout_that_fits_by_more_reductions_alone_stands_beside_offload():
    ranking = search(load_recipe(LLAMA_8B), gpus(40 * GIB), 1)
    assert {(c.layout.offload, c.layout.engine == "fsdp2") for c in ranking.candidates} == {
        ("none", True), ("optimizer", False),
    }  # fmt: skip
    assert all(c.layout.reduce_each_micro_batch for c in ranking.candidates if c.layout.engine == "fsdp2")


def test_offload_is_taken_only_where_nothing_else_fits():
    recipe = load_recipe(LLAMA_70B)
    # 70.6e9 weights: 16 bytes each in states and gradients are 1.13 TB, 12 of them moments and master weights.
    tight, roomy = search(recipe, gpus(64 * GIB), 4), search(recipe, gpus(64 * GIB), 32)
    assert {c.layout.offload for c in tight.candidates} == {"optimizer"}
    assert {c.layout.offload for c in roomy.candidates} == {"none"}
    assert tight.dropped["does not fit"] > 10


def test_fp8_is_taken_only_where_the_recipe_asks_and_the_device_has_it():
    machine = gpus()
    peaks = machine.device.peak_flops_per_s.model_copy(update={"fp8": 2e15})
    eight = machine.model_copy(update={"device": machine.device.model_copy(update={"peak_flops_per_s": peaks})})
    plan = make_plan(load_recipe(LLAMA_8B, ["train.precision=auto"]), eight, n_nodes=4)
    assert plan.layout.precision == "bf16"
    assert any(note.startswith("fp8 would make this layout") for note in plan.notes)
    theirs = ["train.precision=auto", "layout.model_code=transformers"]
    assert not any("fp8" in note for note in make_plan(load_recipe(LLAMA_8B, theirs), eight, n_nodes=4).notes)
    assert make_plan(load_recipe(LLAMA_8B, ["train.precision=fp8"]), eight, n_nodes=4).layout.precision == "fp8"
    assert "has no fp8 units" in refusal(load_recipe(LLAMA_8B, ["train.precision=fp8"]), machine, n_nodes=4)


def test_the_same_arguments_give_the_same_plan():
    one, two = (make_plan(load_recipe(LLAMA_8B), gpus(), n_nodes=4).to_json() for _ in range(2))
    assert one == two


def test_70b_on_a_thousand_nodes_is_searched_in_two_seconds():
    recipe, machine = load_recipe(LLAMA_70B), load_machine("jupiter-booster")
    search(recipe, machine, 1)
    start_s = time.process_time()
    ranking = search(recipe, machine, 1024)
    assert time.process_time() - start_s < 2.0
    assert ranking.best is not None and ranking.best.layout.world_size == 4096


def test_a_wish_for_tp_over_the_kv_heads_names_the_nearest_that_works():
    text = refusal(load_recipe(DEMO, ["layout.tp=4"]), gpus())
    assert "layout.tp 4: model.n_kv_heads 2 is no multiple of it" in text
    assert "--set layout.tp=2, the nearest that works: dp_shard 2, tp 2" in text
    assert make_plan(load_recipe(DEMO, ["layout.tp=2"]), gpus()).layout.tp == 2


def test_a_wish_for_tp_beyond_a_node_names_the_node():
    text = refusal(load_recipe(LLAMA_8B, ["layout.tp=8"]), gpus(), n_nodes=2)
    assert "the 4 devices of a node are no multiple of it" in text and "--set layout.tp=4" in text


def test_a_wish_for_cp_that_does_not_cut_the_rows_names_the_nearest_that_works():
    text = refusal(load_recipe(LLAMA_8B, ["layout.cp=3"]), gpus(), n_nodes=3)
    assert "layout.cp 3: data.seq_len_tokens 8192 is no multiple of 2 x 3 = 6 chunks" in text
    value = int(text.split("--set layout.cp=")[1].split(",")[0])
    assert make_plan(load_recipe(LLAMA_8B, [f"layout.cp={value}"]), gpus(), n_nodes=3).layout.cp == value


def test_a_wish_for_more_stages_than_layers_names_the_nearest_that_works():
    text = refusal(load_recipe(LLAMA_8B, ["layout.pp=64"]), gpus(), n_nodes=16)
    assert "model.n_layers 32 are fewer than its 64 stages" in text and "--set layout.pp=32" in text


def test_degrees_that_do_not_make_the_ranks_are_refused():
    assert "layout.pp 3 does not divide the 8 ranks" in refusal(
        load_recipe(LLAMA_8B, ["layout.pp=3"]), gpus(), n_nodes=2
    )
    text = refusal(load_recipe(LLAMA_8B, [*ONE_LAYOUT, "layout.dp_shard=4"]), gpus(), n_nodes=2)
    assert "is not the 8 ranks" in text and "--set layout.dp_shard=8" in text


def test_a_batch_that_no_number_of_replicas_divides_names_the_good_values():
    wishes = [*ONE_LAYOUT, "train.global_batch_tokens=81920"]  # 10 rows for 8 ranks
    text = refusal(load_recipe(LLAMA_8B, wishes), gpus(), n_nodes=2)
    assert "81920 is 10 rows of 8192 tokens" in text and f"{8 * 8192} or {16 * 8192}" in text
    assert make_plan(load_recipe(LLAMA_8B, [*ONE_LAYOUT, f"train.global_batch_tokens={16 * 8192}"]), gpus(), n_nodes=2)


def test_70b_on_four_devices_names_the_fewest_nodes_that_hold_it():
    text = refusal(load_recipe(LLAMA_70B), gpus(64 * GIB))
    assert "do not fit; the closest" in text and "gradients" in text
    ranks = int(text.split("do:    use ")[1].split()[0])
    assert make_plan(load_recipe(LLAMA_70B), gpus(64 * GIB), n_nodes=ranks // 4).layout.world_size == ranks


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        (["layout.engine=fsdp2", "layout.zero_stage=2"], "layout.zero_stage 2 is deepspeed's"),
        (["layout.engine=fsdp2", "layout.offload=optimizer"], "layout.offload optimizer is deepspeed's"),
        (["layout.engine=deepspeed", "layout.tp=2"], "layout.tp above 1 with deepspeed"),
        (["layout.zero_stage=1", "optim.name=muon"], "optim.name muon with deepspeed"),
        (["layout.offload=parameters", "layout.zero_stage=2"], "layout.offload parameters with zero_stage 2"),
        (["layout.offload=parameters", "layout.engine=fsdp2"], "layout.offload parameters is deepspeed's"),
        (["layout.zero_stage=2", "train.precision=fp8"], "train.precision fp8 with deepspeed"),
        (["layout.deepspeed={zero_optimization: {stage: 2}}"], "options of deepspeed, and layout.engine auto takes fs"),
        (
            ["layout.deepspeed={zero_optimization: {stage: 2}}", "layout.zero_stage=1"],
            "zero_optimization.stage: the plan has 1, layout.deepspeed has 2; --set layout.zero_stage=2, or take the",
        ),
        (["layout.zero_stage=2", "layout.pipeline_schedule=zbv"], "pipeline_schedule zbv with deepspeed, which here"),
        (["layout.zero_stage=1", "layout.reshard_after_forward=true"], "forward true with zero_stage 1: only stage 3"),
        (
            ["layout.engine=deepspeed", "layout.zero_stage=3", "layout.reshard_after_forward=false"],
            "layout.reshard_after_forward false with deepspeed's stage 3",
        ),
        (
            ["layout.offload=parameters", "layout.reshard_after_forward=false"],
            "layout.reshard_after_forward false with deepspeed's stage 3",
        ),
        (["layout.zero_stage=2", "layout.dp_shard=4"], "layout.dp_shard 4 with deepspeed, which splits over all 16"),
        (["layout.model_code=transformers", "layout.tp=2"], "layout.tp above 1 with layout.model_code transformers"),
        (["lora={rank: 4, alpha: 8}"], "lora without model.init_from"),
        (["lora={rank: 4, alpha: 8}", "model.init_from=x", "layout.cp=2"], "layout.cp above 1 with lora"),
        (["lora={rank: 4, alpha: 8}", "model.init_from=x", "optim.name=muon"], "optim.name muon with lora"),
        (["lora={rank: 4, alpha: 8, targets: [o_proj, c_attn]}", "model.init_from=x"], "names c_attn, and no linear"),
        (
            ["lora={rank: 4, alpha: 8}", "model.init_from=x", "train.precision=fp8"],
            "train.precision fp8 with lora: adapters are too thin for fp8 units",
        ),
        (
            ["layout.model_code=transformers", "train.precision=fp8_rowwise"],
            "train.precision fp8_rowwise with the code of transformers: only the linears of our decoder go to fp8",
        ),
        (["layout.pipeline_schedule=interleaved-2", "layout.pp=1"], "with pp 1: there is no pipeline"),
        (
            ["layout.pipeline_schedule=dualpipev", "layout.remat=full", "train.compile=auto"],
            "would compute a block again for each weight",
        ),
        (["layout.cp=4", "layout.tp=4", "layout.cp_attention=ulysses"], "shares out model.n_kv_heads 8 on each of 4"),
        (["train.precision=fp8_rowwise"], "need a GPU of compute capability 9.0 or an MI300"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(wishes, sentence):
    assert sentence in refusal(load_recipe(LLAMA_8B, wishes), gpus(), n_nodes=4)


def test_fp8_and_a_schedule_without_a_pipeline_are_refused_on_a_cpu():
    text = refusal(load_recipe(DEMO, ["train.precision=fp8"]), cpu())
    assert "CPU has no fp8 units" in text and "capability 8.9 or an MI300" in text
    text = refusal(load_recipe(DEMO, ["layout.pipeline_schedule=zbv"]), cpu(), cpu_ranks=2)
    assert "zbv with pp 1: there is no pipeline" in text and "--set layout.pp=2" in text


def test_more_nodes_than_the_partition_names_the_qos_that_gives_them():
    leonardo, recipe = load_machine("leonardo-booster"), load_recipe(LLAMA_8B)
    with pytest.raises(PlanError) as caught:
        choose_nodes(recipe, leonardo, 100)
    assert "100 nodes; partition boost_usr_prod allows 64" in caught.value.render()
    assert "--qos boost_qos_bprod (256 nodes, 24 h a job)" in caught.value.render()
    assert choose_nodes(recipe, leonardo, 100, qos="boost_qos_bprod") == (100, None)
    with pytest.raises(PlanError, match="no partition or QoS of this machine gives a job more"):
        choose_nodes(recipe, leonardo, 4000, qos="boost_qos_bprod")
    for options in ({"partition": "boost"}, {"qos": "fast"}):
        with pytest.raises(PlanError, match="is not in the machine file"):
            choose_nodes(recipe, leonardo, 2, **options)


def test_the_recommended_nodes_are_the_most_that_work_well_enough():
    table = build_node_table(load_recipe(LLAMA_8B), gpus(), 16)
    assert [row.n_nodes for row in table.rows] == [1, 2, 4, 8, 16]
    for row in table.rows:
        assert row.device_hours == pytest.approx(4 * row.n_nodes * row.run_time_s / 3600)
    good = [r.n_nodes for r in table.rows if r.efficiency_frac >= 0.8 and r.chosen.why_not is None]
    assert table.recommended == max(good)


def test_the_curve_leaves_out_the_numbers_of_nodes_that_the_given_layout_does_not_fit():
    # 512 rows are shared by 128 nodes of 4 at most, and 16 ranks are 4 nodes.
    wide = build_node_table(load_recipe(LLAMA_8B, ["layout.pp=1", "layout.cp=1", "layout.tp=1"]), gpus(), 256)
    assert [row.n_nodes for row in wide.rows][-1] == 128
    given = ["layout.pp=1", "layout.cp=1", "layout.tp=1", "layout.dp_replicate=1", "layout.dp_shard=16"]
    assert [row.n_nodes for row in build_node_table(load_recipe(LLAMA_8B, given), gpus(), 256).rows] == [4]
    with pytest.raises(PlanError, match="cannot share evenly"):
        build_node_table(load_recipe(LLAMA_8B, given[:3]), gpus(), 256, least_nodes=256)


def test_a_budget_buys_tokens_by_the_hour_of_a_device():
    table = nodes_for_budget(gpus(), build_node_table(load_recipe(LLAMA_8B), gpus(), 8), 1000.0)
    row = table.rows[-1]
    assert tokens_bought(row, 1000.0) == pytest.approx(row.tokens_per_s / 32 * 3600 * 1000)
    most = max(tokens_bought(r, 1000.0) for r in table.rows if r.chosen.why_not is None)
    chosen = next(r for r in table.rows if r.n_nodes == table.recommended)
    assert tokens_bought(chosen, 1000.0) >= 0.95 * most


def test_a_budget_of_device_hours_is_told_in_the_unit_of_the_site():
    lumi = load_machine("lumi-g")  # 8 devices a node, of which the site counts 4 GPUs
    table = nodes_for_budget(lumi, build_node_table(load_recipe(LLAMA_8B), lumi, 2), 50_000.0)
    assert table.why.endswith("; 50.0 k device-hours are 25.0 k GPU-hours (one MI250X)")


def test_a_deadline_takes_the_fewest_nodes_that_meet_it():
    machine, recipe = load_machine("leonardo-booster"), load_recipe(LLAMA_8B, ONE_LAYOUT)
    n_nodes, table = choose_nodes(recipe, machine, deadline="4d")
    times_s = {row.n_nodes: row.run_time_s for row in table.rows if row.chosen.why_not is None}
    assert times_s[n_nodes] <= 4 * 86400
    assert all(s > 4 * 86400 for n, s in times_s.items() if n < n_nodes)
    with pytest.raises(PlanError, match="cannot be done in 60 min"):
        choose_nodes(recipe, machine, deadline="1h")
    with pytest.raises(PlanError, match="is no time"):
        choose_nodes(recipe, machine, deadline="soon")


def test_a_budget_or_a_deadline_without_rates_says_what_to_measure():
    machine = load_machine("leonardo-booster")
    unknown = machine.device.model_copy(update={"name": "A new part", "peak_flops_per_s": ByDtype()})
    for wish in ({"device_hours": 100.0}, {"deadline": "10d"}):
        with pytest.raises(PlanError) as caught:
            choose_nodes(load_recipe(LLAMA_8B, ONE_LAYOUT), machine.model_copy(update={"device": unknown}), **wish)
        assert "not every rate of the devices is known" in caught.value.render()
        assert "aifactory-train probe" in caught.value.render()


def test_without_rates_layouts_are_still_ranked_and_no_time_is_claimed():
    machine = gpus(64 * GIB)
    unknown = machine.device.model_copy(update={"peak_flops_per_s": ByDtype(), "memory_bytes_per_s": None})
    machine = machine.model_copy(update={"device": unknown, "measured": cpu().measured})
    plan, ranking = make_ranked_plan(load_recipe(LLAMA_8B), machine, n_nodes=16)
    assert ranking.order_only and len(ranking.candidates) > 10
    assert plan.predicted.total_step_time_s is plan.predicted.tokens_per_s is None
    assert any("compared by rates of common parts" in note for note in plan.notes)


def test_of_layouts_that_are_alike_the_one_of_fewest_axes_is_taken_then_the_larger_micro_batch():
    plain = search(load_recipe(LLAMA_8B, ONE_LAYOUT), gpus(), 4).candidates[0].layout
    split = plain.model_copy(update={"dp_shard": plain.dp_shard // 2, "cp": 2, "micro_batch_rows": 8})
    rows = plain.model_copy(update={"micro_batch_rows": 2 * plain.micro_batch_rows})
    assert first_choice([split, plain], [1.0, 1.015], [0.5, 0.5]) == 1
    assert first_choice([split, plain], [1.0, 1.025], [0.5, 0.5]) == 0
    assert first_choice([plain, rows], [1.0, 1.015], [0.5, 0.5]) == 1
