"""config.json of tiny models of many families, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
WINDOW = {"sliding_window": 16, "query_pre_attn_scalar": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# model_type and what it needs beside the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "eurollm": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {**WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", WINDOW),
    "phi3": ("phi3", {"pad_token_id": 2}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "olmo2": ("olmo2", {}),
    "apertus": ("apertus", {"rope_parameters": LLAMA3}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}),
}


def save_config(name: str, folder: Path) -> Path:
    """As transformers writes it."""
    from transformers import AutoConfig

    kind, more = FAMILIES[name]
    sizes = TINY if kind != "gpt2" else {k: v for k, v in TINY.items() if k == "vocab_size" or k.endswith("token_id")}
    AutoConfig.for_model(kind, **{**sizes, **more}).save_pretrained(folder)
    return folder
