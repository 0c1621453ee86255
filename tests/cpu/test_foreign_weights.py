"""Weights of Hugging Face folders in all their forms are read part by part, or refused by one message."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aifactory_train.checkpoint.huggingface import check_weights, load_weights
from aifactory_train.errors import CheckpointError, PlanError
from aifactory_train.models.build import build_model
from aifactory_train.models.flat import FlatSlice
from aifactory_train.recipe.huggingface import model_fields
from aifactory_train.recipe.schema import Model
from tiny_models import save_config


def model_of(folder: Path, **changes: object) -> Model:
    config = json.loads((folder / "config.json").read_text()) | changes
    trusted = "auto_map" in config
    fields = model_fields(config, str(folder), trust_remote_code=trusted)
    return Model(**fields, hf=str(folder), hf_config=config, trust_remote_code=trusted)


def empty(model: Model) -> dict[str, Tensor]:
    """The weights of the model, with a value that no file holds."""
    with torch.device("meta"):
        root = build_model(model, "transformers").root
    return {name: torch.full(p.shape, 7.0) for name, p in root.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Family -> (folder as transformers saves it, weights by name in its code)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def get(name: str) -> tuple[Path, dict[str, Tensor]]:
        if name not in made:
            folder = save_config(name, tmp_path_factory.mktemp(name))
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(folder)
            made[name] = folder, {n: p.detach() for n, p in model.named_parameters()}
        return made[name]

    return get


@pytest.fixture
def llama(saved, tmp_path):
    """A copy of a folder to change."""
    shutil.copytree(saved("llama")[0], tmp_path / "llama")
    return tmp_path / "llama"


def assert_loads(folder: Path, expected: dict[str, Tensor]) -> None:
    weights = empty(model_of(folder))
    load_weights(weights, model_of(folder), folder)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def refusal(folder: Path, model: Model, *words: str) -> None:
    weights = empty(model)
    with pytest.raises(CheckpointError) as caught:
        load_weights(weights, model, folder)
    text = caught.value.render()
    assert "do: " in text and all(word in text for word in words), text


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "apertus", "mixtral", "qwen3_moe"])
def test_what_transformers_saves_is_read(saved, name):
    assert_loads(*saved(name))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_one_rank_finds_for_all_what_another_would_meet(saved, tmp_path, name):
    folder, _ = saved(name)
    model = model_of(folder)
    check_weights(model, folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        check_weights(model, tmp_path / "nowhere")
    first, *others = load_file(folder / "model.safetensors").items()
    shutil.copy(folder / "config.json", tmp_path)
    save_file(dict([first]), tmp_path / "a.safetensors")
    save_file(dict(others), tmp_path / "b.safetensors")
    placed = {first[0]: "a.safetensors"} | {key: "b.safetensors" for key, _ in others}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    check_weights(model, tmp_path)
    with open(tmp_path / "b.safetensors", "rb+") as file:
        file.truncate((tmp_path / "b.safetensors").stat().st_size - 8)
    with pytest.raises(CheckpointError, match="b.safetensors cannot be read"):
        check_weights(model, tmp_path)
    index.write_text(json.dumps({"weight_map": {first[0]: "a.safetensors"}}))
    with pytest.raises(CheckpointError, match="the weights have no tensor"):
        check_weights(model, tmp_path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt2"])
def test_each_rank_reads_its_stretch_of_a_weight_and_no_more(saved, name, monkeypatch):
    folder, expected = saved(name)
    for n_ranks, rank in ((3, 0), (3, 1), (3, 2), (8, 5)):
        weights = {}
        for key, whole in expected.items():
            share = -(-whole.numel() // n_ranks)
            start = min(rank * share, whole.numel())
            local = torch.full((min(share, whole.numel() - start),), 7.0)
            weights[key] = FlatSlice(local, start, whole.shape)
        load_weights(weights, model_of(folder), folder)
        for key, part in weights.items():
            flat = expected[key].flatten()[part.start : part.start + part.local_X.numel()]
            assert torch.equal(part.local_X, flat), key


def test_experts_are_also_read_as_the_code_stacks_them(saved, tmp_path):
    folder, expected = saved("mixtral")
    shutil.copy(folder / "config.json", tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "model.safetensors")
    assert_loads(tmp_path, expected)


@pytest.mark.parametrize("name, prefix", [("llama", "model."), ("gpt2", "transformer.")])
def test_names_of_the_model_without_its_head_are_understood(saved, tmp_path, name, prefix):
    folder, expected = saved(name)
    shutil.copy(folder / "config.json", tmp_path)
    save_file(
        {n.removeprefix(prefix): t for n, t in load_file(folder / "model.safetensors").items()},
        tmp_path / "model.safetensors",
    )
    assert_loads(tmp_path, expected)


def test_files_with_an_index_and_pickled_tensors_are_read(saved, tmp_path):
    folder, expected = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    for suffix, save in ((".safetensors", save_file), (".bin", torch.save)):
        to = tmp_path / suffix
        to.mkdir()
        shutil.copy(folder / "config.json", to)
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        where = {n: f"{stem}-{i % 2}{suffix}" for i, n in enumerate(tensors)}
        for file in set(where.values()):
            save({n: t for n, t in tensors.items() if where[n] == file}, to / file)
        (to / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
        assert_loads(to, expected)
        (to / where["lm_head.weight"]).unlink()
        refusal(to, model_of(to), where["lm_head.weight"], "cannot be read")


def test_a_pickle_that_holds_more_than_tensors_is_not_opened(llama, tmp_path):
    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    (llama / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harm()}, llama / "pytorch_model.bin")
    refusal(llama, model_of(llama), "pytorch_model.bin is pickled and holds more than tensors", "safetensors")
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Harm()}))
    refusal(llama, model_of(llama), "pytorch_model.bin")
    assert not (tmp_path / "harm").exists()


def test_missing_truncated_and_other_weights_are_refused_by_name(saved, llama):
    model, file = model_of(llama), llama / "model.safetensors"
    tensors = load_file(file)
    for change, words in (
        ({"model.norm.weight": torch.ones(31)}, ("model.norm.weight has shape (31,)", "(32,)")),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, ("1 tensors that the recipe's model has not",)),
    ):
        save_file({**tensors, **change}, file)
        refusal(llama, model, *words)
    save_file({n: t for n, t in tensors.items() if "norm" not in n}, file)
    refusal(llama, model, "no tensor model.layers.0.input_layernorm.weight")
    save_file(tensors, file)
    with open(file, "rb+") as f:
        f.truncate(20_000)
    refusal(llama, model, "model.safetensors cannot be read")
    file.unlink()
    refusal(llama, model, "no weights: neither model.safetensors")
    refusal(saved("mixtral")[0], model, "model_type: weights 'mixtral', recipe 'llama'")
    refusal(llama, model_of(saved("mixtral")[0]), "model_type: weights 'llama', recipe 'mixtral'")


def test_an_expert_that_is_missing_is_told(saved, tmp_path):
    folder, _ = saved("qwen3_moe")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    refusal(tmp_path, model_of(folder), "3 tensors for model.layers.1.mlp.experts.down_proj", "stacks 4")


def test_a_key_of_the_config_that_changes_what_is_computed_is_compared(saved):
    folder, _ = saved("gemma2")
    other = model_of(folder, final_logit_softcapping=30.0)
    refusal(folder, other, "final_logit_softcapping: weights 3.0, recipe 30.0")


def test_numbers_beside_the_weights_are_not_lost_in_silence(saved, tmp_path):
    folder, _ = saved("apertus")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.act_fn.beta"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    refusal(tmp_path, model_of(folder), "not trained", "model.layers.0.mlp.act_fn.beta")


def test_a_model_with_code_of_its_own_trains_where_that_is_trusted(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    save_config("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        parts = build_model(model_of(tmp_path), "transformers")
    assert type(parts.root).__name__ == "Mine" and len(parts.blocks) == 2
    with pytest.raises(PlanError, match="our decoder does not compute what mine does"):
        build_model(model_of(tmp_path), "own")
    with pytest.raises(PlanError, match="no model_type 'mine'"):
        build_model(model_of(tmp_path).model_copy(update={"trust_remote_code": False}), "transformers")
