import re

import pytest

from aifactory_train.errors import RecipeError
from aifactory_train.plan.shape import n_parameters
from aifactory_train.recipe.load import dump_recipe, load_recipe
from aifactory_train.strictyaml import configs_dir

RECIPES = sorted((configs_dir() / "recipes").glob("*.yaml"))
MODELS = sorted((configs_dir() / "models").glob("*.yaml"))
DEMO = configs_dir() / "recipes" / "demo.yaml"


def written(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def refusal(path, overrides=None):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.render()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_reads_back_equal(path, tmp_path):
    recipe = load_recipe(path)
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_model_file_has_the_number_of_parameters_that_its_comment_says(path, tmp_path):
    recipe = load_recipe(written(tmp_path, f"extends: [{DEMO}, {path}]\ndata: {{document_mask: true}}\n"))
    told = re.search(r": ([0-9 ]+) parameters\.", path.read_text().splitlines()[0])
    assert told or path.stem == "demo-3m"
    assert n_parameters(recipe.model) == (int(told.group(1).replace(" ", "")) if told else 2_361_024)


def test_an_unknown_key_is_refused_with_the_nearest_name_file_and_line(tmp_path):
    path = written(tmp_path, f"extends: {DEMO}\noptim:\n  weight_decoy: 0.2\n")
    text = refusal(path)
    assert f"{path}:3: optim.weight_decoy: unknown key; did you mean weight_decay?" in text


def test_a_key_that_names_nothing_at_the_top_lists_what_is_valid_there(tmp_path):
    text = refusal(written(tmp_path, f"extends: {DEMO}\nchekpoint: {{every_steps: 3}}\n"))
    assert "chekpoint: unknown key; did you mean checkpoint?" in text and "schedule" in text


def test_several_faults_are_told_at_once_each_with_its_line(tmp_path):
    path = written(tmp_path, f"extends: {DEMO}\ntrain:\n  seed: many\n  budget_token: 3\noptim:\n  lr: fast\n")
    text = refusal(path)
    assert text.startswith("3 faults")
    assert f"{path}:3: train.seed: Input should be a valid integer, given: 'many'" in text
    assert f"{path}:4: train.budget_token: unknown key; did you mean budget_tokens?" in text
    assert f"{path}:6: optim.lr: Input should be a valid number, given: 'fast'" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.micro_batch_rows=foo", "expected an integer or auto, given: 'foo'"),
        ("train.micro_batch_rows=0", "expected a value greater than 0 or auto, given: 0"),
        ("train.precision=fp16", "expected fp32, bf16, fp8 or fp8_rowwise or auto, given: 'fp16'"),
        ("layout.remat=1.5", "expected none, selective or full or a value less than 1 or auto, given: 1.5"),
        ("layout.pipeline_schedule=interleaved-1", "interleaved-2, "),
        ("layout.reshard_after_forward=no", "expected true or false or auto, given: 'no'"),
    ],
)
def test_a_fault_in_a_value_that_may_be_auto_is_one_line(override, expected):
    text = refusal(DEMO, [override])
    assert text.startswith("1 fault") and expected in text and f"--set {override}" in text


def test_a_fault_in_a_base_file_names_the_base_file(tmp_path):
    base = written(tmp_path, "train:\n  seed: x\n", "base.yaml")
    text = refusal(written(tmp_path, f"extends: [{DEMO}, base.yaml]\n"))
    assert f"{base}:2: train.seed" in text


def test_files_that_extend_each_other_are_refused(tmp_path):
    written(tmp_path, "extends: b.yaml\n", "a.yaml")
    b = written(tmp_path, "extends: a.yaml\n", "b.yaml")
    assert "circle: b.yaml -> a.yaml -> b.yaml" in refusal(b)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = written(tmp_path, f"extends: {DEMO}\ntrain:\n  seed: 1\n  seed: 2\n")
    text = refusal(path)
    assert "key 'seed' twice" in text and f"{path}:4" in text


def test_a_missing_file_is_refused_with_the_files_that_are_there(tmp_path):
    written(tmp_path, "name: x\n", "there.yaml")
    text = refusal(tmp_path / "gone.yaml")
    assert "No such file" in text and "there.yaml" in text


def test_broken_yaml_is_refused_with_its_line(tmp_path):
    path = written(tmp_path, "name: x\ntrain: [1, 2\noptim: 3\n")
    assert f"{path}:3" in refusal(path)


def test_an_empty_file_is_refused(tmp_path):
    assert "expected keys and values" in refusal(written(tmp_path, "# nothing\n"))


def test_set_wins_over_the_file_and_over_what_it_extends():
    assert load_recipe(DEMO).train.seed == 1
    recipe = load_recipe(DEMO, ["train.seed=7", "optim.lr=3e-4", "layout.dp_shard=2"])
    assert (recipe.train.seed, recipe.optim.lr, recipe.layout.dp_shard) == (7, 3e-4, 2)


@pytest.mark.parametrize("text", ["train.seed", "=3", "train.seed=[1, 2"])
def test_a_set_that_cannot_be_read_is_refused(text):
    assert "--set" in refusal(DEMO, [text])


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path):
    text = f"extends: {DEMO}\nname: no\noptim: {{lr: 3e-4}}\ntrain: {{budget_tokens: 2_000_000, seed: 0}}\n"
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.name == "no"
    assert recipe.optim.lr == 3e-4
    assert recipe.train.budget_tokens == 2_000_000


def test_a_sequence_longer_than_the_model_allows_is_refused_with_both_numbers():
    text = refusal(DEMO, ["data.seq_len_tokens=2048"])
    assert "2048" in text and "1024" in text


def test_a_vocabulary_larger_than_the_models_is_refused_with_both_numbers():
    text = refusal(DEMO, ["data.tokenizer.train_vocab_size=5000"])
    assert "5000" in text and "4096" in text


def test_a_budget_of_activation_memory_needs_the_compiler():
    assert load_recipe(DEMO, ["layout.remat=0.5"]).layout.remat == 0.5
    text = refusal(DEMO, ["layout.remat=0.5", "train.compile=false"])
    assert "layout.remat 0.5 is a budget for the compiler, and train.compile is false" in text
