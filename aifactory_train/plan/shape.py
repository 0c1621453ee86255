"""Counts from a model's shapes: parameters, FLOPs, bytes. The only place for these formulas.

Legend: B rows of a micro-batch, T tokens of a row, D hidden_size, F ffn_size, H query heads,
K key/value heads, h head_size, V vocabulary, L layers. The decoder has no biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aifactory_train.plan.contract import Shape
from aifactory_train.recipe.schema import Model

# Outside the matrix products fp8 training holds everything in bf16.
BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}
# Tokens per chunk of the loss (models/loss.py), so that the logits of a whole micro-batch are never held.
LOSS_CHUNK_TOKENS = 1024
# Longest rows for which attention on a CPU goes in chunks that keep their weights (models/attention.py).
CPU_CHUNKED_ROW_TOKENS = 1024


@dataclass(frozen=True)
class Kept:
    """What decides the bytes of a kept activation, beside the shapes."""

    precision: Literal["fp32", "bf16", "fp8"]
    device_kind: Literal["cpu", "cuda", "rocm"]
    document_mask: bool
    remat: Literal["none", "selective", "full"] = "none"


def n_block_matrix_parameters(model: Model) -> int:
    """Weights of the seven matrices of one block: q, k, v, o, gate, up, down."""
    d, q, kv = model.hidden_size, model.n_heads * model.head_size, model.n_kv_heads * model.head_size
    return d * q + 2 * d * kv + q * d + 3 * d * model.ffn_size


def n_block_parameters(model: Model) -> int:
    """All weights of one block: matrices, two RMSNorms, and the norms of q and k where the family has them."""
    return n_block_matrix_parameters(model) + 2 * model.hidden_size + (2 * model.head_size if model.qk_norm else 0)


def n_root_parameters(model: Model) -> int:
    """Weights outside the blocks: embedding, final norm, and the head unless it is tied to the embedding."""
    tables = 1 if model.tied_embeddings else 2
    return tables * model.vocab_size * model.hidden_size + model.hidden_size


def n_parameters(model: Model) -> int:
    """All weights; tied ones count once."""
    return model.n_layers * n_block_parameters(model) + n_root_parameters(model)


def n_matmul_parameters(model: Model) -> int:
    """Weights that every token is multiplied with: all matrices and the output head, also where it is tied.

    Not counted: the embedding (a lookup) and the norms.
    """
    return model.n_layers * n_block_matrix_parameters(model) + model.vocab_size * model.hidden_size


def model_flops_per_token(model: Model, seq_len_tokens: int) -> float:
    """FLOPs of forward and backward per token by the convention `model_causal_v1`.

    6 per matmul parameter (2 forward, 4 backward), and attention at the causal half: forward
    2 * 2 * T * H * h per layer (scores, and scores times values), halved, times 3 with the backward.
    Recomputation is not counted; document boundaries do not lower it.
    """
    attention = 3 * 2 * seq_len_tokens * model.n_heads * model.head_size * model.n_layers
    return float(6 * n_matmul_parameters(model) + attention)


def recomputed_flops_per_token(model: Model, seq_len_tokens: int, remat: str) -> float:
    """FLOPs that remat adds per token: one more forward of all blocks. Not part of the model's FLOPs."""
    if remat == "none":
        return 0.0
    attention = 2 * seq_len_tokens * model.n_heads * model.head_size * model.n_layers
    return float(2 * model.n_layers * n_block_matrix_parameters(model) + attention)


def build_shape(model: Model, seq_len_tokens: int) -> Shape:
    """The counts that stand in the plan."""
    return Shape(
        n_parameters=n_parameters(model),
        n_matmul_parameters=n_matmul_parameters(model),
        model_flops_per_token=model_flops_per_token(model, seq_len_tokens),
    )


def block_activation_bytes_per_token(model: Model, seq_len_tokens: int, how: Kept) -> int:
    """Bytes that one block keeps per token from forward to backward, without recomputation and without compile.

    Fused norms keep their input. On a CPU, torch runs a norm in parts that keep two fp32 copies of it. Attention
    there keeps its weights on short rows, in fp32 and in the precision of the model; on longer ones the kernel needs
    k and v repeated to H heads, leaves its output transposed (o reads a copy), and turns a document mask into
    one dense row of T numbers per token and layer.
    """
    d, f, size = model.hidden_size, model.ffn_size, BYTES[how.precision]
    q, kv = model.n_heads * model.head_size, model.n_kv_heads * model.head_size
    cpu = how.device_kind == "cpu"
    chunked = cpu and seq_len_tokens <= CPU_CHUNKED_ROW_TOKENS
    kernel = cpu and not chunked
    mask_bytes = seq_len_tokens // 2 if chunked else seq_len_tokens * size
    weights_bytes = model.n_heads * seq_len_tokens // 2 * (BYTES["fp32"] + (size if size != BYTES["fp32"] else 0))
    normed = 2 * d + (q + kv if model.qk_norm else 0)
    kept_bytes = {
        "inputs of the norms": normed * (2 * BYTES["fp32"] if cpu else size),
        "input of q, k, v": d * size,
        "q after RoPE": q * size,
        "k after RoPE, and v": 2 * (q if kernel else kv) * size,
        "attention weights": weights_bytes if chunked else 0,
        "log-sum-exp of the attention": 0 if chunked else model.n_heads * BYTES["fp32"],
        "document mask": mask_bytes if cpu and how.document_mask else 0,
        "attention output, input of o": q * size * (2 if kernel else 1),
        "input of gate, up": d * size,
        "gate, up, silu(gate), their product": 4 * f * size,
    }
    return sum(kept_bytes.values())


def activation_bytes(model: Model, micro_batch_rows: int, seq_len_tokens: int, how: Kept) -> int:
    """Bytes of all kept activations of one micro-batch: the blocks, and around them.

    With remat a block keeps its input, and one block at a time has all of its activations again.

    Around the blocks: input and output of the final norm, and the gradient of that output that the
    chunked loss gathers.
    """
    size = BYTES[how.precision]
    around = model.hidden_size * (2 * size + (2 * BYTES["fp32"] if how.device_kind == "cpu" else size))
    per_block = block_activation_bytes_per_token(model, seq_len_tokens, how)
    if how.remat == "full":
        blocks = model.n_layers * model.hidden_size * size + per_block
    else:
        blocks = model.n_layers * per_block
    per_token = blocks + around
    return micro_batch_rows * seq_len_tokens * per_token


def loss_chunk_bytes(model: Model, micro_batch_rows: int, seq_len_tokens: int, precision: str) -> int:
    """Bytes of the loss at its peak, without compile.

    Of one chunk: the logits, and in fp32 their copy, softmax, one-hot targets and gradient. Of the whole
    micro-batch: the head's weight gradient in fp32.
    """
    chunk_tokens = min(LOSS_CHUNK_TOKENS, micro_batch_rows * seq_len_tokens)
    per_logit = BYTES[precision] + (4 if precision == "bf16" else 3) * BYTES["fp32"]
    return chunk_tokens * model.vocab_size * per_logit + BYTES["fp32"] * model.vocab_size * model.hidden_size


def elementwise_bytes_per_token(model: Model, precision: str) -> int:
    """Bytes that the operations between the matmuls read and write per token, forward and backward.

    Forward per block: two norms (read, write), RoPE on q and k, silu(gate) and its product with up, two
    residual sums. The backward moves about twice as much. The loss passes over its fp32 logits four times.
    """
    d, f = model.hidden_size, model.ffn_size
    rotated = (model.n_heads + model.n_kv_heads) * model.head_size
    forward = 2 * 2 * d + 2 * rotated + 5 * f + 2 * 3 * d
    return model.n_layers * 3 * forward * BYTES[precision] + 4 * 4 * model.vocab_size
