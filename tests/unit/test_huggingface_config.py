"""`model: {hf: ...}`: the fields of a Model from config.json alone, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aifactory_train.errors import RecipeError
from aifactory_train.recipe.huggingface import huggingface_config, model_fields
from aifactory_train.recipe.load import dump_recipe, load_recipe
from aifactory_train.recipe.schema import Model
from aifactory_train.strictyaml import configs_dir, read_yaml

DEMO = configs_dir() / "recipes" / "demo.yaml"
# config.json of meta-llama/Llama-3.1-8B, as the hub has it.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
    "n_inner": None, "layer_norm_epsilon": 1e-05, "initializer_range": 0.02,
}  # fmt: skip


def save(folder: Path, config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def recipe_of(folder: Path, model: dict[str, Any], overrides: list[str] | None = None):
    """The demo's recipe with another model: `extends` would keep the demo's sizes beside it."""
    plain = yaml.safe_load(dump_recipe(load_recipe(DEMO)))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**plain, "model": model}))
    return load_recipe(path, overrides)


def refusal(call, *words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    text = caught.value.render()
    assert "do: " in text and all(word in text for word in words), text
    return text


def test_a_llama_of_the_hub_is_the_file_that_we_ship(tmp_path):
    model = recipe_of(tmp_path, {"hf": str(save(tmp_path / "m", LLAMA))}).model
    shipped = read_yaml(configs_dir() / "models" / "llama3-8b.yaml", {}, RecipeError)["model"]
    shipped.pop("max_seq_len_tokens")  # 3.1 has a longer context, and scales RoPE for it
    assert shipped.items() <= model.model_dump().items()
    assert (model.family, model.head_size, model.rope_scaling.factor) == ("llama", 128, 8.0)


@pytest.mark.parametrize(
    "config, fields",
    [
        (MIXTRAL, {"family": "other", "n_experts": 8, "n_active_experts": 2, "ffn_size": 14336, "n_mlp_matrices": 3}),
        (
            GPT2,
            {
                "family": "other", "hidden_size": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "head_size": 64,
                "ffn_size": 3072, "max_seq_len_tokens": 1024, "n_mlp_matrices": 2, "tied_embeddings": True,
            },
        ),
        (
            {**MIXTRAL, "model_type": "qwen3_moe", "num_experts": 64, "num_local_experts": None,
             "moe_intermediate_size": 768, "head_dim": 128},
            {"n_experts": 64, "ffn_size": 768, "head_size": 128},
        ),
    ],
    ids=["mixtral", "gpt2", "qwen3_moe"],
)  # fmt: skip
def test_sizes_are_found_under_the_names_of_each_family(config, fields):
    found = model_fields(config, "config.json")
    assert {key: found[key] for key in fields} == fields
    Model(**found, hf_config=config)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"mlp_bias": True},
        {"attention_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"model_type": "mistral", "sliding_window": 4096},
        {"model_type": "mistral", "rope_scaling": None},  # whose default is a window of 4096
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 1024},
        {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"], "head_dim": 128},
    ],
    ids=str,
)
def test_what_our_decoder_does_not_compute_is_left_to_transformers(change):
    assert model_fields(LLAMA, "")["family"] == "llama"
    assert model_fields({**LLAMA, **change}, "")["family"] == "other"


def test_windows_as_long_as_the_context_are_none():
    mistral = {**LLAMA, "model_type": "mistral", "rope_scaling": None}
    for window in (None, 131072):
        assert model_fields({**mistral, "sliding_window": window}, "")["family"] == "mistral"
    unused = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 1024}
    assert model_fields(unused, "")["family"] == "qwen2"


def test_what_the_fields_say_comes_back_as_a_config():
    fields = model_fields(LLAMA, "")
    again = huggingface_config(Model(**fields))
    assert model_fields(again, "") == fields
    assert huggingface_config(Model(**fields, hf_config=LLAMA)) == LLAMA
    assert huggingface_config(Model(**{**fields, "init_std": 0.01}, hf_config=LLAMA))["initializer_range"] == 0.01


def test_a_dumped_recipe_needs_the_folder_no_more(tmp_path):
    folder = save(tmp_path / "m", MIXTRAL)
    recipe = recipe_of(tmp_path, {"hf": str(folder)})
    (folder / "config.json").unlink()
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_another_hf_for_a_dumped_recipe_is_read_anew(tmp_path):
    first, other = save(tmp_path / "m", MIXTRAL), save(tmp_path / "o", LLAMA | {"initializer_range": 0.03})
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_recipe(recipe_of(tmp_path, {"hf": str(first), "init_from": "x"})))
    wanted = recipe_of(tmp_path, {"hf": str(other), "init_from": "x"}).model
    assert load_recipe(dumped, [f"model.hf={other}"]).model == wanted and wanted.init_std == 0.03
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": dumped.name, "model": {"hf": str(other)}}))
    assert load_recipe(child).model == wanted
    assert load_recipe(dumped, [f"model.hf={other}", "model.init_std=0.01"]).model.init_std == 0.01
    refusal(lambda: load_recipe(dumped, ["model.n_layers=4", f"model.hf={other}"]), "gives n_layers too")


def test_other_keys_beside_hf_are_refused_by_name(tmp_path):
    folder = str(save(tmp_path / "m", LLAMA))
    refusal(lambda: recipe_of(tmp_path, {"hf": folder, "n_layers": 4, "hidden_size": 64}), "hidden_size, n_layers")
    assert recipe_of(tmp_path, {"hf": folder, "init_std": 0.01}).model.init_std == 0.01
    refusal(lambda: recipe_of(tmp_path, {"hf": folder}, ["data.seq_len_tokens=262144"]), "max_seq_len_tokens 131072")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": None}, ("no hidden_size", "n_embd", "config.json: hidden_size")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers is 0",)),
        ({"vocab_size": "many"}, ("vocab_size is 'many'",)),
        ({"model_type": None}, ("no model_type",)),
        ({"text_config": {}}, ("more than text", "text_config")),
        ({"is_encoder_decoder": True}, ("an encoder and a decoder",)),
        ({"quantization_config": {"bits": 4}}, ("quantized",)),
        ({"model_type": "qwen2", "num_key_value_heads": None}, ("no num_key_value_heads",)),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_trained_is_one_message(tmp_path, change, words):
    folder = save(tmp_path / "m", {**LLAMA, **change})
    refusal(lambda: recipe_of(tmp_path, {"hf": str(folder)}), *words, str(folder / "config.json"))


def test_a_model_with_python_code_of_its_own_is_refused_unless_asked_for(tmp_path):
    config = {**LLAMA, "model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    given = {"hf": str(save(tmp_path / "m", config))}
    refusal(lambda: recipe_of(tmp_path, given), "its own Python code", "--set model.trust_remote_code=true")
    model = recipe_of(tmp_path, given, ["model.trust_remote_code=true"]).model
    assert model.family == "other" and model.trust_remote_code
    # transformers has this family itself, so no code of the folder runs.
    native = {"hf": str(save(tmp_path / "n", {**LLAMA, "auto_map": {"AutoConfig": "x.Y"}}))}
    assert recipe_of(tmp_path, native).model.family == "llama"
    assert recipe_of(tmp_path, native, ["model.trust_remote_code=true"]).model.family == "other"


def test_a_folder_that_is_not_there_or_holds_no_model_is_one_message(tmp_path):
    refusal(lambda: recipe_of(tmp_path, {"hf": str(tmp_path / "nowhere")}), "no such folder", "org/name")
    (tmp_path / "empty").mkdir()
    refusal(lambda: recipe_of(tmp_path, {"hf": str(tmp_path / "empty")}), "no config.json")
    refusal(lambda: recipe_of(tmp_path, {"hf": str(save(tmp_path / "bad", "{"))}), "config.json cannot be read")
    refusal(lambda: recipe_of(tmp_path, {"hf": str(save(tmp_path / "list", "[1]"))}), "no keys and values")


def test_a_hub_id_is_looked_up_in_the_cache_and_then_says_what_to_type(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def absent(name: str, file: str, local_files_only: bool) -> str:
        asked.append((name, file, local_files_only))
        raise OSError("no network here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", absent)
    refusal(lambda: recipe_of(tmp_path, {"hf": "org/name"}), "no network here", "aifactory-train stage")
    assert asked == [("org/name", "config.json", True), ("org/name", "config.json", False)]
    cached = save(tmp_path / "cache", LLAMA) / "config.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(cached))
    assert recipe_of(tmp_path, {"hf": "org/name"}).model.vocab_size == 128256


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    folder = save(tmp_path / "m", MIXTRAL)
    code = (
        "import sys; from aifactory_train.recipe.huggingface import expand\n"
        f"assert expand({{'hf': {str(folder)!r}}}, '')['n_experts'] == 8\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
