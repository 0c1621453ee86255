"""Sizes that tp, cp or fp8 do not take: refused before the queue, in a recipe and in a plan that was edited."""

from __future__ import annotations

import json

import pytest

from aifactory_train.errors import PlanError
from aifactory_train.plan.plan import load_plan, make_plan
from aifactory_train.plan.search import search
from aifactory_train.recipe.load import load_recipe
from plan_machines import DEMO, LLAMA_8B, cpu, gpus

EIGHT_HEADS = {"n_heads": 8, "n_kv_heads": 8}


def eight_bits(per_node=4):
    machine = gpus(per_node=per_node)
    peaks = machine.device.peak_flops_per_s.model_copy(update={"fp8": 2e15})
    return machine.model_copy(update={"device": machine.device.model_copy(update={"peak_flops_per_s": peaks})})


def refusal(recipe, machine, **kwargs) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(recipe, machine, **kwargs)
    return caught.value.render()


@pytest.mark.parametrize(
    ("layout", "model", "sentence"),
    [
        ({"tp": 4, "n_nodes": 2}, {}, "tp 4: model.n_kv_heads 2 is no multiple of it"),
        ({"tp": 2}, {"vocab_size": 4097}, "tp 2: model.vocab_size 4097 is no multiple of it"),
        ({"cp": 3}, {}, "cp 3: data.seq_len_tokens 256 is no multiple of 2 x 3 = 6 chunks"),
        ({"cp": 4, "cp_attention": "ulysses"}, {}, "cp 4: cp_attention ulysses shares out model.n_kv_heads 2, no"),
        ({"cp": 64, "tp": 8}, EIGHT_HEADS, "cp 64: it leaves 4 of data.seq_len_tokens 256 on a rank, no"),
        ({"pp": 2, "reduce_each_micro_batch": True}, {}, "and with pp 2 gradients are reduced once a step"),
        ({"tp": 8, "precision": "fp8"}, EIGHT_HEADS | {"head_size": 24}, "n_heads x head_size is 24 on each of 8 tp"),
        ({"cp": 32, "precision": "fp8_rowwise"}, {}, "fp8_rowwise: 1 row(s) of 256 tokens over cp 32 are 8, and fp8"),
    ],
)  # fmt: skip
def test_a_plan_edited_into_sizes_that_do_not_divide_is_refused(tmp_path, layout, model, sentence):
    plan = json.loads(make_plan(load_recipe(DEMO), cpu()).to_json())
    ranks = layout.get("pp", 1) * layout.get("cp", 1) * layout.get("tp", 1)
    plan["layout"] |= {"micro_batch_rows": 1, "accumulation": 16, "world_size": ranks} | layout
    plan["recipe"]["model"] |= model
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert sentence in caught.value.what and len(caught.value.what.splitlines()) == 1


def test_a_plan_whose_sizes_divide_is_read_with_tp_over_nodes_too(tmp_path):
    plan = json.loads(make_plan(load_recipe(DEMO), cpu()).to_json())
    split = {"cp": 2, "tp": 2, "world_size": 4, "n_nodes": 4, "micro_batch_rows": 1, "accumulation": 16}
    plan["layout"] |= split | {"precision": "fp8", "reduce_each_micro_batch": True}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert load_plan(path).layout.tp == 2


def test_tokens_of_a_rank_of_cp_that_tp_does_not_divide_are_refused_with_their_number():
    wishes = ["data.seq_len_tokens=24", f"train.global_batch_tokens={24 * 16}", "layout.cp=4", "layout.tp=8"]
    recipe = load_recipe(DEMO, [*wishes, "model.n_heads=8", "model.n_kv_heads=8", "schedule.warmup_tokens=384"])
    text = refusal(recipe, gpus(per_node=8), n_nodes=4)
    assert "layout.cp 4: it leaves 6 of data.seq_len_tokens 24 on a rank, no multiple of tp 8" in text


@pytest.mark.parametrize(
    ("wishes", "sentence"),
    [
        (["model.hidden_size=200"], "fp8: model.hidden_size is 200, and fp8 units take"),
        (["model.ffn_size=544", "layout.tp=2"], None),
        (["model.ffn_size=528", "layout.tp=2"], "fp8: model.ffn_size is 264 on each of 2 tp ranks"),
        (["data.seq_len_tokens=8", "train.micro_batch_rows=1"], "fp8: 1 row(s) of 8 tokens are 8, and fp8 units take"),
        (["data.seq_len_tokens=8", "train.micro_batch_rows=2"], None),
        (["data.seq_len_tokens=24", "train.global_batch_tokens=3096"], "fp8: 129 row(s) of 24 tokens are 3096"),
    ],
)
def test_sizes_that_fp8_units_do_not_take_are_refused_before_the_queue(wishes, sentence):
    recipe = load_recipe(DEMO, ["train.precision=fp8", *wishes])
    if sentence is None:
        assert make_plan(recipe, eight_bits(per_node=2)).layout.precision == "fp8"
    else:
        text = refusal(recipe, eight_bits(per_node=2))
        assert sentence in text and "--set train.precision=bf16" in text


def test_on_auto_fp8_takes_neither_a_tp_nor_a_micro_batch_that_its_units_do_not():
    heads = ["model.n_heads=8", "model.n_kv_heads=4", "model.head_size=24", "model.n_layers=4"]
    rows = ["data.seq_len_tokens=8184", f"train.global_batch_tokens={8184 * 72}", "layout.cp=1", "layout.pp=1"]
    recipes = [load_recipe(LLAMA_8B, [*heads, *rows, f"train.precision={name}"]) for name in ("bf16", "fp8")]
    bf16, fp8 = ([c.layout for c in search(recipe, eight_bits(), 1).candidates] for recipe in recipes)
    assert {at.tp for at in bf16} == {1, 2, 4} and {at.tp for at in fp8} == {1, 2}
    assert any(at.micro_batch_rows % 2 for at in bf16) and all(at.micro_batch_rows % 2 == 0 for at in fp8)
