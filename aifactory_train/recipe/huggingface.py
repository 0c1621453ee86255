"""`model: {hf: FOLDER or hub id}` to the fields of a Model, from config.json alone, and back.

The numbers are for counting; what the model computes is the code of `transformers`, or our own decoder where that does
exactly the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aifactory_train.errors import RecipeError
from aifactory_train.recipe.schema import Model

# model_type of config.json -> class of transformers, for what our decoder computes.
OWN = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
# Trained here and exported again by the tests. Their code is that of transformers even where a folder brings its own.
TESTED = (*OWN, "phi3", "gpt2", "olmo2", "apertus", "smollm3", "mixtral", "qwen3_moe", "gemma2", "gemma3_text")
# Up and down without a gate.
_PLAIN_MLP = {
    *("gpt2", "gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "falcon", "phi", "codegen", "mpt", "xglm"),
    *("starcoder2", "nemotron", "persimmon", "apertus", "biogpt"),
}
# What a config that does not say it has: the default of its class. Every other class ties.
_UNTIED = {
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo", "olmo2", "olmo3", "apertus", "mixtral", "qwen2_moe"),
    *("qwen3_moe", "deepseek_v2", "deepseek_v3", "phi", "gptj", "gpt_neox"),
}
_NAMES = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "model_dim"),
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "n_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "n_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "head_size": ("head_dim",),
    "max_seq_len_tokens": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
    "ffn_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "n_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "n_active_experts": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"),
}
# A head that config.json does not size: the default of its class. Every other class divides hidden_size.
_HEAD_SIZE = {"qwen3": 128, "qwen3_moe": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
# Keys that a recipe may give beside `hf`.
_BESIDE = ("hf", "init_from", "trust_remote_code", "init_std")
_DEFAULT_STD = 0.02  # std of weights where config.json names none, as in transformers


def expand(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The `model` of a recipe with all its fields, where it names `hf` and is not expanded yet.

    Raises:
        RecipeError: no such folder or model, a key beside `hf` that config.json decides, and all of `model_fields`.
    """
    if "hf" not in given or given["hf"] is None or given.get("hf_config") is not None:
        return given
    beside = [key for key in given if key not in _BESIDE]
    if beside:
        raise RecipeError(
            f"model.hf takes the shape of the model from config.json, and the recipe gives {', '.join(beside)} too",
            where=where,
            do=f"remove model.{beside[0]}, or model.hf; beside model.hf stand {', '.join(_BESIDE[1:])}",
        )
    path = _find_config(str(given["hf"]), where)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"config.json cannot be read: {error}", where=str(path), do="download it again") from None
    if not isinstance(config, dict):
        raise RecipeError("config.json holds no keys and values", where=str(path), do="download it again")
    trusted = given.get("trust_remote_code") is True
    return {**model_fields(config, str(path), trust_remote_code=trusted), **given, "hf_config": config}


def _find_config(name: str, where: str) -> Path:
    """config.json of a folder, of the hub's cache on this machine, or of the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RecipeError(f"model.hf {name}: no config.json", where=str(folder), do="name a Hugging Face folder")
        return folder / "config.json"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise RecipeError(
            f"model.hf {name}: no such folder", where=where, do="name a folder, or a hub id such as org/name"
        )
    from huggingface_hub import hf_hub_download

    reason = ""
    for offline in (True, False):
        try:
            return Path(hf_hub_download(name, "config.json", local_files_only=offline))
        except Exception as error:  # the library raises many kinds, for one answer to the user
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise RecipeError(
        f"model.hf {name}: no such folder, not in the hub's cache here, and the hub did not give it: {reason}",
        where=where,
        do="where there is a network: aifactory-train stage RECIPE --to DIR  (gated models need: hf auth login); "
        "or name a local folder",
    )


def model_fields(config: dict[str, Any], where: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Fields of Model from config.json.

    Args:
        where: of config.json, for messages.
        trust_remote_code: the model may run Python files of its folder.

    Raises:
        RecipeError: a key is missing, or the model is none that can be trained.
    """
    _refuse(config, where, trust_remote_code)
    runs_own_code = "auto_map" in config and trust_remote_code
    hidden, heads = _whole(config, "hidden_size", where), _whole(config, "n_heads", where)
    experts = _whole(config, "n_experts", where, 1)
    ffn_size = _whole(config, "ffn_size", where, 4 * hidden)
    if experts > 1 and isinstance(config.get("moe_intermediate_size"), int):
        ffn_size = config["moe_intermediate_size"]
    kind = config["model_type"]
    # Classes differ in these defaults, and our decoder has none.
    needs = () if kind not in OWN else ("norm_eps",) if kind == "llama" else ("norm_eps", "n_kv_heads")
    for field in needs:
        if _first(config, field) is None:
            raise _missing(field, where)
    fields = {
        "family": kind if not runs_own_code and _is_ours(config) else "other",
        "vocab_size": _whole(config, "vocab_size", where),
        "hidden_size": hidden,
        "ffn_size": ffn_size,
        "n_layers": _whole(config, "n_layers", where),
        "n_heads": heads,
        "n_kv_heads": _whole(config, "n_kv_heads", where, heads),
        "head_size": _whole(config, "head_size", where, _HEAD_SIZE.get(kind, hidden // heads)),
        "max_seq_len_tokens": _whole(config, "max_seq_len_tokens", where),
        "rope_theta": rope_of(config)["rope_theta"],
        "rope_scaling": _scaling(config),
        "norm_eps": float(_first(config, "norm_eps") or 1e-5),
        "tied_embeddings": bool(config.get("tie_word_embeddings", kind not in _UNTIED)),
        "init_std": float(config.get("initializer_range") or _DEFAULT_STD),
        "n_mlp_matrices": 2 if kind in _PLAIN_MLP else 3,
        "n_experts": experts,
        "n_active_experts": _whole(config, "n_active_experts", where, 1) if experts > 1 else 1,
    }
    if fields["family"] == "other":
        fields["rope_scaling"] = None
    return fields


def _refuse(config: dict[str, Any], where: str, trust_remote_code: bool) -> None:
    kind = config.get("model_type")
    if "auto_map" in config and not trust_remote_code and kind not in TESTED:
        raise RecipeError(
            f"the model runs its own Python code: config.json has auto_map, model_type {kind!r}",
            where=f"{where}: auto_map",
            do="read that code, and then: --set model.trust_remote_code=true; or take a model of transformers itself",
        )
    if not isinstance(kind, str):
        raise RecipeError(
            "config.json has no model_type", where=f"{where}: model_type", do="give the config.json of a model"
        )
    if "text_config" in config:
        raise RecipeError(
            f"{kind} is a model of more than text: config.json keeps the sizes of its text part in text_config",
            where=f"{where}: text_config",
            do="take the text-only model of that family, or save its language model alone by transformers",
        )
    if config.get("is_encoder_decoder"):
        raise RecipeError(
            f"{kind} has an encoder and a decoder; what is trained here predicts the next token of one text",
            where=f"{where}: is_encoder_decoder",
            do="take a model that AutoModelForCausalLM loads",
        )
    if config.get("quantization_config"):
        raise RecipeError(
            "the weights are quantized, and such weights are not trained",
            where=f"{where}: quantization_config",
            do="take the folder of the same model in bfloat16",
        )


def _first(config: dict[str, Any], field: str) -> Any:
    """The value under the first of the field's names that is there and not null."""
    return next((config[name] for name in _NAMES[field] if config.get(name) is not None), None)


def _whole(config: dict[str, Any], field: str, where: str, default: int | None = None) -> int:
    value = _first(config, field)
    value = default if value is None else value
    if value is None:
        raise _missing(field, where)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        name = next(name for name in _NAMES[field] if config.get(name) is not None)
        raise RecipeError(
            f"config.json: {name} is {value!r}, expected a whole number above 0",
            where=f"{where}: {name}",
            do="mend config.json",
        )
    return value


def _missing(field: str, where: str) -> RecipeError:
    names = _NAMES[field]
    others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
    return RecipeError(
        f"config.json has no {names[0]}{others}", where=f"{where}: {names[0]}", do="add it to config.json"
    )


def _is_ours(config: dict[str, Any]) -> bool:
    """Whether our decoder computes exactly what transformers does with this config."""
    kind = config["model_type"]
    if kind not in OWN:
        return False
    has_window = config.get("use_sliding_window", kind == "mistral")
    window = config.get("sliding_window", 4096) if has_window else None
    rope, rotated = rope_of(config), config.get("rope_parameters") or config
    wanted_rope = {"default": 2, "llama3": 6}.get(rope["rope_type"])
    return (
        config.get("hidden_act", "silu") in ("silu", "swish")
        and not config.get("mlp_bias")
        and (kind == "qwen2" or not config.get("attention_bias"))
        and (window is None or window >= (_first(config, "max_seq_len_tokens") or 0))
        and all(layer == "full_attention" for layer in config.get("layer_types") or ())
        and len(rope) == wanted_rope
        and rotated.get("partial_rotary_factor", 1.0) == 1.0
    )


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """What decides the angles, from either form: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    names = () if kind == "default" else tuple(k for k in given if k not in ("rope_type", "type", "rope_theta"))
    return {
        "rope_theta": float(config.get("rope_theta") or given.get("rope_theta") or 10000.0),
        "rope_type": kind,
        **{k: float(given[k]) for k in names if isinstance(given[k], int | float)},
    }


def _scaling(config: dict[str, Any]) -> dict[str, Any] | None:
    rope = rope_of(config)
    if rope["rope_type"] != "llama3" or len(rope) != 6:
        return None
    names = ("factor", "low_freq_factor", "high_freq_factor")
    original = int(rope["original_max_position_embeddings"])
    return {**{name: rope[name] for name in names}, "original_max_seq_len_tokens": original}


def huggingface_config(model: Model) -> dict[str, Any]:
    """config.json of a model: as it was read, or for one of our families made of its fields."""
    if model.hf_config is None:
        return own_config(model)
    config = dict(model.hf_config)
    if "initializer_range" in config or model.init_std != _DEFAULT_STD:
        config["initializer_range"] = model.init_std
    return config


def own_config(model: Model) -> dict[str, Any]:
    """The fields of config.json that describe a model of our own families."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        s = model.rope_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_seq_len_tokens,
        }
    config = {
        "architectures": [OWN[model.family] + "ForCausalLM"],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.max_seq_len_tokens,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        # Version 5 of transformers reads rope_parameters, version 4 the two older fields.
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.rope_scaling is None else rope,
    }
    if model.family != "qwen2":  # whose three biases are not an option
        config["attention_bias"] = False
    if model.family == "mistral":
        config["sliding_window"] = None
    return config
