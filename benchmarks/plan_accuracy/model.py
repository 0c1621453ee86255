"""Models of published rows, and the FLOP conventions in which others quote their speed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from pydantic import model_validator

from aifactory_train.recipe.schema import Model


class PublishedModel(Model):
    """A decoder of somebody else: two matrices in the MLP without a gate, heads of any size."""

    n_mlp_matrices: Literal[2, 3]

    @model_validator(mode="after")
    def _shapes(self) -> PublishedModel:
        """RoPE's even heads are no concern here: other position encodings take odd ones."""
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"heads {self.n_heads} is not divisible by kv_heads {self.n_kv_heads}")
        return self


def model_of(raw: Mapping[str, str], n: Mapping[str, int]) -> PublishedModel:
    """`n`: the row's numbers by column. Raises pydantic's ValidationError where the shape cannot be."""
    gated = raw["mlp_gated"] != "no"
    return PublishedModel(
        family="llama",
        vocab_size=n["vocab"],
        hidden_size=n["hidden"],
        ffn_size=n["ffn"],
        n_layers=n["layers"],
        n_heads=n["heads"],
        n_kv_heads=n["kv_heads"],
        head_size=max(1, round(n["hidden"] / n["heads"])),
        max_seq_len_tokens=n["seq_len"],
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_embeddings=is_tied(raw, gated),
        n_mlp_matrices=3 if gated else 2,
    )


def is_tied(raw: Mapping[str, str], gated: bool) -> bool:
    """Whether the head is the embedding. Rows seldom say: GPT-like models (no gate) tie, except Nemotron-4."""
    if "tied embeddings" in f"{raw['dims_src']} {raw['notes']}":
        return "untied embeddings" not in f"{raw['dims_src']} {raw['notes']}"
    return not gated and "nemotron" not in raw["model"].lower()


def n_block_weights(model: PublishedModel) -> int:
    """Weights of the matrices of one block."""
    q, kv = model.n_heads * model.head_size, model.n_kv_heads * model.head_size
    return 2 * model.hidden_size * (q + kv) + model.n_mlp_matrices * model.hidden_size * model.ffn_size


def flops_per_token(model: PublishedModel, seq_len_tokens: int, convention: str) -> float:
    """FLOPs of one token by a published convention.

    "model": 6 N + 12 L h S; "causal": attention halved; "hardware": 8 N + 16 L h S of the blocks (a second forward
    pass counted), 6 N of the head. N without the input embedding.
    """
    blocks = model.n_layers * n_block_weights(model)
    head = model.vocab_size * model.hidden_size
    attention = model.n_layers * model.n_heads * model.head_size * seq_len_tokens
    if convention == "hardware":
        return 8.0 * blocks + 16.0 * attention + 6.0 * head
    return 6.0 * (blocks + head) + (6.0 if convention == "causal" else 12.0) * attention


def convention_of(text: str, act_ckpt: str) -> str | None:
    """ "model", "causal" or "hardware" by the words of a row's `flops_convention`; None where they do not say."""
    if re.search(r"HARDWARE|recompute counted|x4", text):
        return "hardware" if act_ckpt.startswith("full") else "model"
    if re.search(r"(?i)causal attention|halved", text) and not re.search(r"(?i)non-causal", text):
        return "causal"
    if re.search(r"6 ?N|model FLOPs|(?i:non-causal)|Megatron|SC21", text):
        return "model"
    return None


def tokens_per_s_of_tflops(text: str, model: PublishedModel, seq_len_tokens: int, act_ckpt: str) -> float | None:
    """Tokens/s per TFLOP/s by the row's own convention; None where it is not named."""
    convention = convention_of(text, act_ckpt)
    return None if convention is None else 1e12 / flops_per_token(model, seq_len_tokens, convention)
