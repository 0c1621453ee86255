"""Whether a Hugging Face folder is of the model that a recipe describes, by its config.json alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from aifactory_train.errors import CheckpointError
from aifactory_train.recipe.huggingface import huggingface_config, model_fields, own_config, rope_of
from aifactory_train.recipe.schema import Model

# What two config.json of one architecture may say differently.
_NO_MATTER = re.compile(
    r"dtype|version|architectures|_name_or_path|cache|_range|token_id|drop|auto_map|transformers|max_position|tokenizer"
)


def check_config(model: Model, folder: Path) -> None:
    """Raise CheckpointError where config.json is missing, damaged, or of another model; names each difference."""
    path = folder / "config.json"
    if not path.exists():
        what = "no config.json" if folder.is_dir() else "no such folder of weights"
        raise CheckpointError(what, where=str(folder), do="set model.init_from to a Hugging Face folder")
    found = read_json(path)
    wrong = _own_differences(model, found) if model.family != "other" else _foreign_differences(model, found, path)
    if wrong:
        raise CheckpointError(
            f"the weights are of another model: {'; '.join(wrong)}",
            where=str(path),
            do="take the model of these weights: model: {hf: " + str(folder) + "}, or its file of configs/models/",
        )


def _own_differences(model: Model, found: dict[str, Any]) -> list[str]:
    wanted = own_config(model)
    there, here = rope_of(found), rope_of(wanted)
    keys = ["model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    keys += ["num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"]
    # A field that is absent or null has the default of its architecture, which the tensor shapes check.
    wrong = [f"{k}: weights {found[k]!r}, recipe {wanted[k]!r}" for k in keys if found.get(k) not in (None, wanted[k])]
    wrong += [f"RoPE {k}: weights {there.get(k)!r}, recipe {here.get(k)!r}" for k in here if there.get(k) != here[k]]
    wrong += [f"RoPE {k}: weights {there[k]!r}, recipe nothing" for k in there if k not in here]
    biases = ("mlp_bias",) if model.family == "qwen2" else ("attention_bias", "mlp_bias")
    wrong += [f"{k}: weights true, our decoder has none" for k in biases if found.get(k)]
    window = found.get("sliding_window") if found.get("use_sliding_window", model.family == "mistral") else None
    if window is not None and window < model.max_seq_len_tokens:
        wrong.append(f"sliding_window: weights {window}, shorter than max_seq_len_tokens {model.max_seq_len_tokens}")
    return wrong


def _foreign_differences(model: Model, found: dict[str, Any], path: Path) -> list[str]:
    """Sizes that differ, and each key that both config.json have with different values."""
    wanted = huggingface_config(model)
    kind, wanted_kind = found.get("model_type"), wanted.get("model_type")
    if kind != wanted_kind:
        return [f"model_type: weights {kind!r}, recipe {wanted_kind!r}"]
    there = model_fields(found, str(path), trust_remote_code=True)
    keys = [k for k in there if k not in ("family", "init_std", "max_seq_len_tokens", "rope_theta", "rope_scaling")]
    wrong = [f"{k}: weights {there[k]!r}, recipe {getattr(model, k)!r}" for k in keys if there[k] != getattr(model, k)]
    both = [k for k in found if k in wanted and found[k] != wanted[k] and not _NO_MATTER.search(k)]
    return wrong or [f"{k}: weights {found[k]!r}, recipe {wanted[k]!r}" for k in both]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error}", where=str(path), do="download the folder again"
        ) from None
