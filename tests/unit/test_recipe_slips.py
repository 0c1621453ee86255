"""Slips of the keyboard in recipes and overrides, each one message."""

import pytest

from aifactory_train.errors import RecipeError
from aifactory_train.recipe.load import load_recipe
from aifactory_train.strictyaml import configs_dir

DEMO = configs_dir() / "recipes" / "demo.yaml"


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lr=1e400", "optim.lr"),
        ("train.budget_tokens=1e30", "train.budget_tokens"),
        ("train.budget_tokens=-1", "train.budget_tokens"),
        ("optim.beta2=1", "optim.beta2"),
        ("name=..", "name"),
        ("optim=5", "optim: expected keys and values"),
        ("data.sources.7.weight=1.0", "'7' is no number from 0 to 0"),
        ("data.sources.one.weight=1.0", "'one' is no number from 0 to 0"),
        ("=3", "has no key"),
        ("optim.lr", "has no value"),
        ("schedule.shape=wsd", "needs schedule.decay_tokens"),
    ],
)
def test_a_slip_in_an_override_is_named(override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, [override])
    assert words in str(caught.value), caught.value


def test_an_override_reaches_into_a_list():
    recipe = load_recipe(DEMO, ["data.sources.0.weight=2.5"])
    assert recipe.data.sources[0].weight == 2.5 and recipe.data.sources[0].python_stdlib


def test_a_far_fetched_name_is_not_suggested():
    with pytest.raises(RecipeError, match="unknown key; valid here: name, model"):
        load_recipe(DEMO, ["zzz=1"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("extends: 5\n", "extends names files, given: 5"),
        ("extends: [a.yaml, 5]\n", "extends names files"),
        ("name: &x\n  b: *x\n", "nested too deeply"),
        ("? {a: b}\n: c\n", "a key must be one word"),
        ("- a\n- b\n", "expected keys and values"),
        ("", "expected keys and values"),
        ("name:\n\tdemo\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path, text, words):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert words in str(caught.value) and "broken.yaml" in str(caught.value), caught.value
