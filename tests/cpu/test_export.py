"""The exported model is the trained one, through plain transformers; and it comes back in."""

import json
import shutil

import pytest
import torch

from aifactory_train.checkpoint import export
from aifactory_train.checkpoint.dcp import read_tensors
from aifactory_train.checkpoint.huggingface import load_weights
from aifactory_train.checkpoint.manager import step_folder
from aifactory_train.errors import CheckpointError
from aifactory_train.models.decoder import Decoder
from aifactory_train.plan.plan import load_plan
from aifactory_train.rundir import RunDir
from training_runs import aifactory, aifactory_here, assert_refused, launch, launched, write_recipe

SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len_tokens": 32}
FAMILIES = {
    "llama": {"model__rope_scaling": SCALING},
    "qwen3": {"model__family": "qwen3", "model__tied_embeddings": True},
    "mistral": {"model__family": "mistral"},
}


@pytest.fixture(scope="module")
def trained(words, tmp_path_factory):
    """Family -> (recipe, run folder) of a trained and exported run."""
    made = {}

    def get(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            recipe, run = write_recipe(folder, **words, **FAMILIES[family]), folder / "run"
            launched(recipe, run, 2 if family == "llama" else 1)
            done = aifactory("export", run)
            assert done.returncode == 0, done.stderr
            made[family] = recipe, run
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_gives_the_logits_of_the_checkpoint(trained, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = RunDir(trained(family)[1])
    ours = Decoder(load_plan(run.plan).recipe.model)
    state = ours.state_dict()
    read_tensors({"model": state}, step_folder(run.checkpoints, 20))
    ours.load_state_dict(state)
    theirs = AutoModelForCausalLM.from_pretrained(run.export)
    words = AutoTokenizer.from_pretrained(run.export)
    tokens = words("the ranks of a run read rows of tokens", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (theirs(tokens).logits - ours(tokens)).abs().max().item()
    assert difference < 1e-5
    assert theirs.config.eos_token_id == words.eos_token_id is not None


def test_a_second_export_reuses_the_first(trained):
    run = RunDir(trained("llama")[1])
    before = (run.export / "model.safetensors").stat().st_mtime_ns
    assert aifactory_here("export", run.root).returncode == 0
    assert (run.export / "model.safetensors").stat().st_mtime_ns == before


def test_training_from_an_export_starts_where_it_ended(words, trained, tmp_path):
    recipe, run = trained("llama")
    last = launched(recipe, run, 2)[-1]["loss"]
    changes = {**FAMILIES["llama"], "model__init_from": str(RunDir(run).export), "schedule__warmup_tokens": 10240}
    rows = {n: launched(write_recipe(tmp_path / str(n), **words, **changes), tmp_path / f"run{n}", n) for n in (1, 2)}
    assert abs(rows[1][0]["loss"] - last) < 0.5, "fresh weights would be at ln(512) = 6.2"
    assert rows[2][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=1e-6)


def test_an_export_in_several_files_reads_back(trained, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    run = RunDir(trained("llama")[1])
    monkeypatch.setattr(export, "EXPORT_FILE_BYTES", 100_000)
    shutil.copytree(run.root, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    copy = RunDir(tmp_path / "run")
    plan = load_plan(copy.plan)
    export.export_run(copy, plan)
    assert len(list(copy.export.glob("model-*.safetensors"))) > 2
    one, many = (AutoModelForCausalLM.from_pretrained(r.export).state_dict() for r in (run, copy))
    assert all(torch.equal(one[k], many[k]) for k in one)
    ours = Decoder(plan.recipe.model)
    load_weights(dict(ours.named_parameters()), plan.recipe.model, copy.export)
    assert all(torch.equal(p, one[k]) for k, p in ours.named_parameters())


def test_sample_prints_text_of_the_exported_model(trained):
    done = aifactory("sample", trained("llama")[1], "--prompt", "the ranks", "--tokens", 8)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the ranks") and len(done.stdout.split()) > 3


def test_weights_of_another_model_are_refused_by_field(words, trained, tmp_path):
    folder = RunDir(trained("llama")[1]).export
    recipe = write_recipe(tmp_path, **words, model__init_from=str(folder), model__ffn_size=96)
    assert_refused(launch(recipe, tmp_path / "run", 1), "another model", "intermediate_size: weights 128, recipe 96")


def test_a_truncated_safetensors_file_is_refused_by_name(words, trained, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(RunDir(trained("llama")[1]).export, folder)
    with open(folder / "model.safetensors", "rb+") as f:
        f.truncate(50_000)
    recipe = write_recipe(tmp_path, **words, **FAMILIES["llama"], model__init_from=str(folder))
    assert_refused(launch(recipe, tmp_path / "run", 1), "model.safetensors cannot be read", str(folder))


def test_export_without_a_checkpoint_says_so(words, tmp_path):
    done = aifactory("plan", write_recipe(tmp_path, **words), "--run", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_refused(aifactory_here("export", tmp_path / "run"), "no checkpoint to export")
    assert_refused(aifactory_here("sample", tmp_path / "run"), "no exported model")


def test_the_report_of_a_real_run_has_predicted_beside_measured(trained):
    run = RunDir(trained("llama")[1])
    done = aifactory("report", run.root)
    assert done.returncode == 0, done.stderr
    result = json.loads(run.result.read_text())
    assert result["provenance"]["git_sha"] and result["provenance"]["versions"]["torch"]
    page = run.report.read_text()
    assert "<svg" in page and str(run.report) in done.stdout


def test_weights_with_other_angles_or_with_biases_are_refused(words, trained, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(RunDir(trained("llama")[1]).export, folder)
    plain = write_recipe(tmp_path, **words, model__init_from=str(folder))
    assert_refused(launch(plain, tmp_path / "run"), "RoPE rope_type: weights 'llama3', recipe 'default'")
    # From here on without a launch: each rank of one calls this function.
    decoder = Decoder(load_plan(RunDir(trained("llama")[1]).plan).recipe.model)
    config = json.loads((folder / "config.json").read_text())
    for text, said in (
        (json.dumps({**config, "attention_bias": True}), "attention_bias: weights true"),
        ("{", "config.json cannot be read"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=said) as caught:
            load_weights(dict(decoder.named_parameters()), decoder.shape, folder)
        assert caught.value.exit_code == 2 and "do: " in caught.value.render()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--tokens", 0), "tokens must be 1 or more"),
        (("--seed", 10**30), "seed"),
        (("--tokens", 500), "pass the 128 tokens of the model"),
    ],
)
def test_a_slip_in_sample_is_named(trained, flags, said):
    assert_refused(aifactory_here("sample", trained("llama")[1], *flags), said)


def test_an_empty_prompt_starts_a_new_document(trained):
    assert aifactory_here("sample", trained("llama")[1], "--prompt", "", "--tokens", 4).returncode == 0


def test_a_folder_that_is_no_run_is_refused_by_each_verb(tmp_path):
    for verb in ("export", "report", "sample"):
        assert_refused(aifactory_here(verb, tmp_path / "nowhere"), "no run folder", str(tmp_path / "nowhere"))


def test_an_export_needs_nothing_but_the_run_folder(words, trained, tmp_path):
    run = trained("llama")[1]
    shutil.copytree(run, tmp_path / "moved", ignore=shutil.ignore_patterns("export"))
    done = aifactory("export", tmp_path / "moved")
    assert done.returncode == 0 and "exported step 20 of 20" in done.stdout
    assert (tmp_path / "moved" / "export" / "tokenizer.json").exists()
    again = aifactory_here("export", tmp_path / "moved")
    assert "step 20 is exported already" in again.stdout
