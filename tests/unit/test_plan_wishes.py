"""Wishes for a pipeline schedule, a form of context parallel attention, a budget of activation memory, adapters."""

from __future__ import annotations

import pytest

from aifactory_train.plan.layout import describe
from aifactory_train.plan.plan import make_plan
from aifactory_train.plan.search import search
from aifactory_train.recipe.load import load_recipe
from plan_machines import DEMO, LLAMA_8B, cpu, gpus


def layouts(*wishes, machine=None, n_nodes=4):
    return [c.layout for c in search(load_recipe(LLAMA_8B, list(wishes)), machine or gpus(), n_nodes).candidates]


@pytest.mark.parametrize(
    ("schedule", "held"),
    [
        ("interleaved-3", ("interleaved", 3)),
        ("zbv", ("zbv", 2)),
        ("dualpipev", ("dualpipev", 2)),
        ("1f1b", ("1f1b", 1)),
    ],
)
def test_a_given_schedule_is_kept(schedule, held):
    found = layouts("layout.pp=2", "train.compile=auto", f"layout.pipeline_schedule={schedule}")
    assert found and {(at.pipeline_schedule, at.stages_per_rank) for at in found} == {held}
    # A V splits the backward pass of each block, which compiled or recomputed ones do not bear.
    split = schedule in ("zbv", "dualpipev")
    assert {at.compile for at in found} == {not split} and (not split or {at.remat for at in found} == {"none"})
    assert {at.reshard_after_forward for at in found} == ({False} if split else {True, False})
    assert all(at.accumulation >= (4 if schedule == "dualpipev" else 2) for at in found)
    assert not any(at.reduce_each_micro_batch for at in found)


@pytest.mark.parametrize(
    ("wish", "note"),
    [
        ("layout.pipeline_schedule=zbv", "zbv was measured by nobody here"),
        ("layout.remat=0.5", "remat within 0.5 of activation memory is predicted linearly"),
    ],
)
def test_what_rests_on_no_measurement_is_a_note(wish, note):
    recipe = load_recipe(LLAMA_8B, ["layout.pp=2", "train.compile=auto", wish])
    assert any(note in said for said in make_plan(recipe, gpus(), n_nodes=4).notes)


def test_on_auto_schedules_are_1f1b_and_interleaved_alone():
    assert {(at.pipeline_schedule, at.stages_per_rank) for at in layouts("layout.pp=2")} == {
        ("1f1b", 1), ("interleaved", 2), ("interleaved", 4),
    }  # fmt: skip


def test_context_parallel_attention_exchanges_heads_where_they_divide():
    # 8 heads of keys and values: 4 on each of 2 ranks of tp.
    for tp, cp, form in ((2, 4, "ulysses"), (4, 4, "all_gather")):
        found = layouts(f"layout.tp={tp}", f"layout.cp={cp}")
        assert found and {at.cp_attention for at in found} == {form}
    given = layouts("layout.tp=2", "layout.cp=2", "layout.cp_attention=ring")
    assert given and {at.cp_attention for at in given} == {"ring"}


def test_a_budget_of_activation_memory_is_kept_and_compiled_on_a_cpu_too():
    (at, *_) = found = layouts("layout.remat=0.4")
    assert {(at.remat, at.remat_budget_frac, at.compile) for at in found} == {("budget", 0.4, True)}
    assert "remat within 0.4 of activation memory" in describe(at)
    here = make_plan(load_recipe(DEMO, ["layout.remat=0.4"]), cpu()).layout
    assert (here.remat, here.compile) == ("budget", True)
    assert not make_plan(load_recipe(DEMO), cpu()).layout.compile


def test_names_of_linears_are_compared_where_our_decoder_computes():
    adapters = ["model.init_from=x", "lora={rank: 4, alpha: 8, targets: [self_attn.q_proj, down_proj]}"]
    assert make_plan(load_recipe(LLAMA_8B, adapters), gpus(), n_nodes=4)
    theirs = ["model.init_from=x", "lora={rank: 4, alpha: 8, targets: [c_attn]}", "layout.model_code=transformers"]
    assert make_plan(load_recipe(LLAMA_8B, theirs), gpus(), n_nodes=4)
