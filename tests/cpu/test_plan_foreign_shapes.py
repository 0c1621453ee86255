"""Counts of the plan against the models of transformers themselves, built without memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from aifactory_train.plan import shape
from aifactory_train.recipe.huggingface import model_fields
from aifactory_train.recipe.schema import Lora, Model

# Sizes of the published models, as their config.json has them.
PUBLISHED = {
    "llama": ("Llama 3.1 8B", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }),
    "mistral": ("Mistral 7B", {
        "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None,
        "tie_word_embeddings": False,
    }),
    "qwen2": ("Qwen 2.5 0.5B", {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    }),
    "qwen3": ("Qwen 3 0.6B", {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }),
    "gemma2": ("Gemma 2 2B", {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
    }),
    "gemma3_text": ("Gemma 3 1B", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "tie_word_embeddings": True,
    }),
    "phi3": ("Phi-3 mini", {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
    }),
    "gpt2": ("GPT-2", {
        "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
        "tie_word_embeddings": True,
    }),
    "olmo2": ("OLMo 2 1B", {
        "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
    }),
    "apertus": ("Apertus 8B", {
        "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    }),
    "smollm3": ("SmolLM3 3B", {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": True,
    }),
    "mixtral": ("Mixtral 8x7B", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }),
    "qwen3_moe": ("Qwen 3 30B-A3B", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False,
    }),
}  # fmt: skip
EXACT = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "mixtral")
# Of what the others leave out (norms, biases, learned positions), the largest share, which is GPT-2's.
LEFT_OUT_FRAC = 0.01


def both(kind: str, **changes: object) -> tuple[Model, torch.nn.Module]:
    """The plan's model of a config, and the one of transformers."""
    given = PUBLISHED[kind][1] | changes
    config = AutoConfig.for_model(kind, **given)
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(config)
    return Model(**model_fields(config.to_dict(), "config.json"), hf_config=config.to_dict()), real


def n_real(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameters_are_those_of_the_published_models(kind):
    model, real = both(kind)
    counted, there = shape.n_parameters(model), n_real(real)
    assert counted == there if kind in EXACT else (1 - LEFT_OUT_FRAC) * there < counted <= there, (counted, there)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameters_of_tiny_models_are_right_but_for_what_is_left_out(kind):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 64}
    else:
        sizes |= {"intermediate_size": 128, "head_dim": 16, "pad_token_id": 0}
        sizes |= {"num_key_value_heads": min(2, PUBLISHED[kind][1]["num_key_value_heads"])}
        sizes |= {"moe_intermediate_size": 32} if kind == "qwen3_moe" else {}
    model, real = both(kind, **sizes)
    tables = ("bias", "wpe.weight", "act_fn.alpha_p", "act_fn.alpha_n", "act_fn.beta", "act_fn.eps")
    small = sum(p.numel() for name, p in real.named_parameters() if "norm" in name or name.endswith(tables))
    small += sum(p.numel() for name, p in real.named_parameters() if ".ln_" in name and name.endswith("weight"))
    assert 0 <= n_real(real) - shape.n_parameters(model) <= (0 if kind in EXACT else small)


@pytest.mark.parametrize(("kind", "active"), [("mixtral", 12.9e9), ("qwen3_moe", 3.35e9)])
def test_flops_and_memory_count_the_experts_at_work_and_all_of_them(kind, active):
    """12.9 and 3.3 billion active parameters are what their makers publish, the embedding among them."""
    model, real = both(kind)
    idle = sum(p.numel() for name, p in real.named_parameters() if ".experts." in name)
    idle -= idle * model.n_active_experts // model.n_experts
    lookup = model.vocab_size * model.hidden_size
    at_work = shape.n_matmul_parameters(model) + lookup
    assert at_work == pytest.approx(active, rel=0.02)
    assert at_work == pytest.approx(n_real(real) - idle, rel=1e-3)
    attention = 6 * 4096 * model.n_heads * model.head_size * model.n_layers
    assert shape.model_flops_per_token(model, 4096) == 6 * (at_work - lookup) + attention


def test_adapters_are_counted_by_the_sides_of_their_linears():
    model, real = both("qwen2", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        linears = [
            m
            for name, m in real.named_modules()
            if isinstance(m, torch.nn.Linear) and ".layers." in name
            and (targets == "all-linear" or name.rpartition(".")[2] in targets)
        ]  # fmt: skip
        expected = sum(8 * (m.in_features + m.out_features) for m in linears)
        lora = Lora(rank=8, alpha=16.0, targets=targets)
        assert shape.n_trained_parameters(model, lora) == expected > 0
    assert shape.n_trained_parameters(model, None) == shape.n_parameters(model)
