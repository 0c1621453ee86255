"""`layout.deepspeed` as a path: the options that DeepSpeed's JSON holds stand in the recipe."""

from __future__ import annotations

import json

import pytest

from aifactory_train.errors import RecipeError
from aifactory_train.plan.plan import load_plan, make_plan
from aifactory_train.recipe.load import dump_recipe, load_recipe
from plan_machines import DEMO, cpu

OPTIONS = {"zero_optimization": {"stage": "auto", "overlap_comm": True}, "wall_clock_breakdown": True}


def recipe_with(folder, value):
    path = folder / "recipe.yaml"
    path.write_text(f"extends: {DEMO}\nlayout:\n  zero_stage: 2\n  deepspeed: {value}\n")
    return path


def test_a_path_is_relative_to_the_recipe_file_and_on_the_command_line_to_the_shell(tmp_path, monkeypatch):
    (tmp_path / "ds.json").write_text(json.dumps(OPTIONS))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    named = load_recipe(recipe_with(tmp_path, "ds.json"))
    assert named.layout.deepspeed == OPTIONS
    assert load_recipe(recipe_with(tmp_path, json.dumps(OPTIONS))) == named
    monkeypatch.chdir(tmp_path)
    assert load_recipe(DEMO, ["layout.deepspeed=ds.json", "layout.zero_stage=2"]).layout == named.layout
    (tmp_path / "resolved.yaml").write_text(dump_recipe(named))
    assert load_recipe(tmp_path / "resolved.yaml") == named


def test_the_plan_holds_the_options_and_not_the_path(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(OPTIONS))
    plan = make_plan(load_recipe(recipe_with(tmp_path, "ds.json")), cpu(), cpu_ranks=2)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "plan.json").recipe.layout.deepspeed == OPTIONS


@pytest.mark.parametrize(
    ("text", "what"),
    [(None, "cannot read"), ("{stage: 2}", "not valid JSON"), ("[1]", "expected the keys and values")],
)
def test_a_file_that_is_missing_or_no_json_object_is_named(tmp_path, text, what):
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_with(tmp_path, "ds.json"))
    said = caught.value.render()
    assert what in said and str(tmp_path / "ds.json") in said
    if text is None:
        assert "recipe.yaml:4" in said
