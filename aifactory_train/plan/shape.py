"""Counts from a model's shapes: parameters, FLOPs, bytes. The only place for these formulas.

Legend: B rows of a micro-batch, T tokens of a row, D hidden_size, F ffn_size, H query heads,
K key/value heads, h head_size, V vocabulary, L layers, E experts. Of biases those of q, k, v in Qwen2 are counted.

Of models that only `transformers` has, what is small is left out: biases, norms beyond two a block, learned positions,
parameters of activation functions. Of the 13 families of tests/cpu/test_plan_foreign_shapes.py that is less than 1 % of
the weights at the sizes that were published. Experts that see every token (DeepSeek) are not counted.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from aifactory_train.plan.contract import Shape
from aifactory_train.recipe.huggingface import TESTED
from aifactory_train.recipe.schema import Lora, Model

Remat = Literal["none", "selective", "full", "budget"]

# Outside the matrix products fp8 training holds everything in bf16.
BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "fp8_rowwise": 2}
FP32_BYTES = 4
# Tokens per chunk of the loss (models/loss.py), so that the logits of a whole micro-batch are never held.
LOSS_CHUNK_TOKENS = 1024
# Longest rows for which attention on a CPU goes in chunks that keep their weights (models/attention.py).
CPU_CHUNKED_ROW_TOKENS = 1024

# Linears of a block of our decoder; a plain MLP has no gate_proj.
OUR_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Dims(NamedTuple):
    """The numbers of a model that counts depend on, on one rank of the axis tp: a cheap key for caches."""

    d: int
    f: int
    q: int
    kv: int
    heads: int
    head_size: int
    n_layers: int
    vocab: int
    n_mlp_matrices: int
    n_experts: int
    n_active_experts: int
    qk_norm: bool
    qkv_bias: bool
    tied: bool

    @property
    def f_active(self) -> int:
        """Width of the MLP that a token goes through: of all its experts."""
        return self.f * self.n_active_experts


def dims(model: Model, tp: int = 1) -> Dims:
    """Dimensions on one rank of tp. Heads, FFN and vocabulary are divided; a rank has at least one k/v head."""
    return Dims(
        d=model.hidden_size,
        f=-(-model.ffn_size // tp),
        q=-(-model.n_heads // tp) * model.head_size,
        kv=max(1, -(-model.n_kv_heads // tp)) * model.head_size,
        heads=-(-model.n_heads // tp),
        head_size=model.head_size,
        n_layers=model.n_layers,
        vocab=-(-model.vocab_size // tp),
        n_mlp_matrices=model.n_mlp_matrices,
        n_experts=model.n_experts,
        n_active_experts=model.n_active_experts,
        qk_norm=model.qk_norm,
        qkv_bias=model.qkv_bias,
        tied=model.tied_embeddings,
    )


def n_block_matrix_parameters(model: Model, tp: int = 1) -> int:
    """Weights of the matrices of one block on one rank of tp: q, k, v, o, and of all experts gate, up, down."""
    at = dims(model, tp)
    return at.d * (2 * at.q + 2 * at.kv + at.n_experts * at.n_mlp_matrices * at.f + _router(at))


def n_active_block_matrix_parameters(model: Model) -> int:
    """Those of them that a token is multiplied with."""
    at = dims(model)
    return at.d * (2 * at.q + 2 * at.kv + at.n_mlp_matrices * at.f_active + _router(at))


def _router(at: Dims) -> int:
    """Columns of the matrix that chooses a token's experts."""
    return at.n_experts if at.n_experts > 1 else 0


def n_block_parameters(model: Model, tp: int = 1) -> int:
    """All weights of one block: matrices, two RMSNorms, and norms of q and k or biases where the family has them.

    tp does not divide the norms.
    """
    at = dims(model, tp)
    norms = 2 * at.d + 2 * at.head_size * at.qk_norm
    return n_block_matrix_parameters(model, tp) + norms + (at.q + 2 * at.kv) * at.qkv_bias


def n_adapter_parameters(model: Model, lora: Lora | None) -> int:
    """Weights of the adapters of one block, 0 without: rank x (inputs + outputs) of each linear that has one.

    `transformers` has experts in one tensor, which is no linear. A name that is not ours counts as the widest linear.
    """
    if lora is None:
        return 0
    at = dims(model)
    sides = {"q_proj": at.d + at.q, "k_proj": at.d + at.kv, "v_proj": at.d + at.kv, "o_proj": at.q + at.d}
    if at.n_experts == 1:
        sides |= {name: at.d + at.f for name in OUR_LINEARS[-at.n_mlp_matrices :]}
    names = set(sides) if lora.targets == "all-linear" else {_short(name, sides) for name in lora.targets}
    return lora.rank * sum(sides.get(name, max(sides.values())) for name in names)


def _short(name: str, known: Container[str]) -> str:
    """q_proj of self_attn.q_proj: one linear by two names. attn.c_proj and mlp.c_proj are two, and keep theirs."""
    last = name.rpartition(".")[2]
    return last if last in known else name


def n_trained_parameters(model: Model, lora: Lora | None) -> int:
    """Weights with gradients and optimizer state, which a checkpoint holds: all, or adapters alone."""
    return n_parameters(model) if lora is None else model.n_layers * n_adapter_parameters(model, lora)


def n_table_parameters(model: Model, tp: int = 1) -> int:
    """Weights of the embedding, or of the output head: V x D, split by vocabulary over tp."""
    return -(-model.vocab_size // tp) * model.hidden_size


def n_root_parameters(model: Model, tp: int = 1) -> int:
    """Weights outside the blocks: embedding, final norm, and the head unless it is tied to the embedding."""
    tables = 1 if model.tied_embeddings else 2
    return tables * n_table_parameters(model, tp) + model.hidden_size


def n_parameters(model: Model) -> int:
    """All weights; tied ones count once."""
    return model.n_layers * n_block_parameters(model) + n_root_parameters(model)


def n_matmul_parameters(model: Model) -> int:
    """Weights that every token is multiplied with: all matrices and the output head, also where it is tied.

    Not counted: the embedding (a lookup), the norms, and experts that a token does not go through.
    """
    return model.n_layers * n_active_block_matrix_parameters(model) + n_table_parameters(model)


def attention_flops_per_token(model: Model, seq_len_tokens: int) -> int:
    """Forward FLOPs of scores and values per token and layer at the causal half: 2 * 2 * T * H * h / 2."""
    return 2 * seq_len_tokens * model.n_heads * model.head_size


def model_flops_per_token(model: Model, seq_len_tokens: int, lora: Lora | None = None) -> float:
    """FLOPs of forward and backward per token by the convention `model_causal_v1`.

    6 per matmul parameter (2 forward, 2 each for the gradients of its input and of itself), and attention at the causal
    half, times 3 with the backward. With lora 4 per frozen parameter, whose own gradient nobody computes, and 6 per
    parameter of the adapters. Recomputation is not counted; document boundaries do not lower it.
    """
    attention = 3 * attention_flops_per_token(model, seq_len_tokens) * model.n_layers
    if lora is None:
        return float(6 * n_matmul_parameters(model) + attention)
    return float(4 * n_matmul_parameters(model) + 6 * n_trained_parameters(model, lora) + attention)


def recomputed_flops_per_token(model: Model, seq_len_tokens: int, remat: Literal["none", "selective", "full"]) -> float:
    """FLOPs of matrix products and attention that remat adds per token. Not part of the model's FLOPs.

    "full" is one more forward of all blocks but for down: torch's checkpoint stops as soon as the backward pass has
    what it needs, and nothing needs the output of a block. "selective" is every second matrix product: k, o and up.
    """
    if remat == "none":
        return 0.0
    at = dims(model)
    if remat == "selective":
        return float(model.n_layers * 2 * at.d * (at.kv + at.q + at.f_active))
    again = n_active_block_matrix_parameters(model) - at.d * at.f_active
    return float(model.n_layers * (2 * again + attention_flops_per_token(model, seq_len_tokens)))


def hardware_flops_per_token(model: Model, seq_len_tokens: int, remat: Literal["none", "selective", "full"]) -> float:
    """What the device computes per token: the model's FLOPs and what remat adds."""
    return model_flops_per_token(model, seq_len_tokens) + recomputed_flops_per_token(model, seq_len_tokens, remat)


def build_shape(model: Model, seq_len_tokens: int, lora: Lora | None = None) -> Shape:
    """The counts that stand in the plan."""
    return Shape(
        n_parameters=n_parameters(model),
        n_matmul_parameters=n_matmul_parameters(model),
        model_flops_per_token=model_flops_per_token(model, seq_len_tokens, lora),
    )


@dataclass(frozen=True)
class Kept:
    """What decides the bytes of a kept activation, beside the shapes.

    elementwise: "fused": norms, RoPE and activation function are few kernels, compiled or by hand; "eager": torch's
        own kernels, one for each norm; "separate": RMSNorm too is written in Python, as before torch 2.8.
    sequence_parallel: between the blocks activations are split over tp.
    fp8_inputs: in fp8 the inputs of matrix products are kept in fp8 alone.
    moves_inputs_again: what tp gathers for products is gathered again in the backward pass, and not kept.
    budget_frac: with remat "budget", what the compiler may keep of what "none" keeps.
    gathered_kv: keys and values of so many ranks of cp are kept on each.
    """

    precision: Literal["fp32", "bf16", "fp8", "fp8_rowwise"]
    device_kind: Literal["cpu", "cuda", "rocm"]
    document_mask: bool
    remat: Remat = "none"
    elementwise: Literal["fused", "eager", "separate"] = "eager"
    flash_attention: bool = True
    tp: int = 1
    sequence_parallel: bool = True
    fp8_inputs: bool = False
    moves_inputs_again: bool = False
    budget_frac: float = 1.0
    gathered_kv: float = 1


def block_kept_bytes_per_token(model: Model, seq_len_tokens: int, how: Kept) -> dict[str, int]:
    """Bytes per token that one block keeps from forward to backward on one rank of tp, by operator.

    "full" keeps the input of the block. "selective" keeps also what attention and every second matrix product made
    (q, v, gate and down of q, k, v, o, gate, up, down); the rest is computed again. "budget" keeps its share of what
    "none" keeps (torch's partitioner: activation_memory_budget). Without flash attention the
    scores of T tokens are kept per head (Korthikanti et al., arXiv:2205.05198, section 4.1): 2 bytes each of the
    softmax and of what dropout left of it, and 1 of the dropout mask.
    """
    return dict(_block_table(dims(model, how.tp), seq_len_tokens, how))


def block_activation_bytes_per_token(model: Model, seq_len_tokens: int, how: Kept) -> int:
    """Sum of `block_kept_bytes_per_token`."""
    return _block_bytes(dims(model, how.tp), seq_len_tokens, how)


@lru_cache(maxsize=4096)
def _block_bytes(at: Dims, seq_len_tokens: int, how: Kept) -> int:
    return sum(_block_table(at, seq_len_tokens, how).values())


def _block_table(at: Dims, seq_len_tokens: int, how: Kept) -> dict[str, int]:
    size = BYTES[how.precision]
    stream = -(-at.d * size // (how.tp if how.sequence_parallel else 1))
    gathered = stream if how.moves_inputs_again else at.d * size
    if how.remat == "full":
        return {"block input": stream}
    if how.remat == "budget":
        whole = sum(_block_table(at, seq_len_tokens, replace(how, remat="none")).values())
        return {"block input": stream, "within the budget": max(0, int(how.budget_frac * whole) - stream)}
    if how.remat == "selective":
        return {
            "block input": stream,
            "q, v": (at.q + at.kv) * size,
            "attention output": at.q * size,
            "log-sum-exp of the attention": at.heads * FP32_BYTES,
            "gate": at.f_active * size,
            **({"sum of o over tp": stream} if how.tp > 1 and not how.moves_inputs_again else {}),
            # A plain MLP's down is the sixth product, which is computed again.
            **({"output of down": stream} if at.n_mlp_matrices == 3 else {}),
        }
    # The product of gate and up is a kernel's output either way: down's weight gradient reads it.
    n_wide = {"fused": 1, "eager": 2, "separate": 2}[how.elementwise] if at.n_mlp_matrices == 3 else 1
    kept = {
        "inputs of the norms": 2 * stream,
        "input of q, k, v": gathered,
        **_attention_table(at, seq_len_tokens, how),
        "input of gate, up": gathered,
        "gate, up": (at.n_mlp_matrices - 1) * at.f_active * size,
        "activation function, product": n_wide * at.f_active * size,
    }
    if at.qk_norm:
        kept["q and k before their norms"] = (at.q + at.kv) * size
    if how.device_kind == "cpu" and how.elementwise != "fused":
        # On a CPU torch runs a norm in parts that keep two fp32 copies of its input, and not the input.
        kept["inputs of the norms"] = 2 * stream // size * 2 * FP32_BYTES
        if at.qk_norm:
            kept["q and k before their norms"] = (at.q + at.kv) * 2 * FP32_BYTES
    if how.fp8_inputs and how.precision in ("fp8", "fp8_rowwise"):
        kept |= {
            "input of q, k, v": stream // size,
            "input of gate, up": stream // size,
            "activation function, product": at.f_active,
            "attention output": at.q * (size + 1),
        }
    elif how.elementwise == "separate" and at.n_mlp_matrices == 3:
        # Gated models have RMSNorm: in Python an fp32 copy of the input, and the normed one before its weight.
        kept["copies in the norms"] = 2 * (stream // size * FP32_BYTES + stream)
    return kept


def recomputed_activation_bytes_per_token(model: Model, seq_len_tokens: int, how: Kept) -> int:
    """Bytes per token that remat makes again for the block at work: what "none" keeps, less what was kept."""
    if how.remat == "none":
        return 0
    whole = block_activation_bytes_per_token(model, seq_len_tokens, replace(how, remat="none"))
    return max(0, whole - block_activation_bytes_per_token(model, seq_len_tokens, how))


def block_gradient_bytes_per_token(model: Model, how: Kept) -> int:
    """Bytes per token of the gradients that flow through one block at its widest: of gate and up, and of the stream."""
    at, size = dims(model, how.tp), BYTES[how.precision]
    return (2 * at.f_active + 2 * at.d) * size


def head_activation_bytes_per_token(model: Model, how: Kept) -> int:
    """Bytes per token around the head: input and output of the final norm, and the gradient of that output."""
    size = BYTES[how.precision]
    width = model.hidden_size // (how.tp if how.sequence_parallel else 1)
    return width * (2 * size + (2 * FP32_BYTES if how.device_kind == "cpu" else size))


def chunk_loss_bytes(tokens: int, chunk_tokens: int, vocab: int, n_head: int, precision: str, compiled: bool) -> int:
    """Bytes of the chunked loss (models/loss.py) at its most, which is one of three moments.

    Of a chunk are alive: its logits, uncompiled four fp32 tensors of their size, and its gradient beside that of the
    chunk before; with the head's gradient in fp32. Then logits and gradient, with the chunk's part of the head's
    gradient. When the backward pass begins, the head's gradient, its scaled copy, and that in the model's precision.
    """
    size = BYTES[precision]
    n_logits = min(tokens, chunk_tokens) * vocab
    # fp32 needs no cast, but has the largest moment at `where`, with a mask of a byte.
    between = 0 if compiled else 4 * FP32_BYTES if size != FP32_BYTES else 3 * FP32_BYTES + 1
    before = size if tokens > chunk_tokens else 0
    cast = size if size != FP32_BYTES else 0
    return max(
        n_logits * (2 * size + between + before) + n_head * FP32_BYTES,
        n_logits * 2 * size + n_head * (FP32_BYTES + size),
        n_head * (2 * FP32_BYTES + cast),
    )


def makes_whole_logits(model: Model) -> bool:
    """Whether the logits of a whole micro-batch are held: models/hf.py chunks where they are a linear of the norm."""
    if model.family != "other":
        return False
    config = model.hf_config or {}
    kind = config.get("model_type")
    # Gemma 2 caps them where its config.json does not say otherwise.
    capped = config.get("final_logit_softcapping", 30.0 if kind == "gemma2" else None)
    return kind not in TESTED or model.trust_remote_code or bool(capped or config.get("output_router_logits"))


def whole_loss_bytes(tokens: int, vocab: int, precision: str, n_fp32_logits: int) -> int:
    """Bytes of a loss over all tokens at once: the logits, and their copies in fp32."""
    return tokens * vocab * (BYTES[precision] + n_fp32_logits * FP32_BYTES)


def _attention_table(at: Dims, seq_len_tokens: int, how: Kept) -> dict[str, int]:
    """On a CPU attention keeps its weights on short rows, in fp32 and in the precision of the model.

    On longer ones the kernel needs k and v repeated to H heads, leaves its output transposed (o reads a copy), and
    turns a document mask into one dense row of T numbers per token and layer.
    """
    size = BYTES[how.precision]
    cpu = how.device_kind == "cpu"
    chunked = cpu and seq_len_tokens <= CPU_CHUNKED_ROW_TOKENS
    kernel = cpu and not chunked
    kept = {
        "q after RoPE": at.q * size,
        "k after RoPE, and v": int(how.gathered_kv * 2 * (at.q if kernel else at.kv) * size),
        "attention output": at.q * size * (2 if kernel else 1),
    }
    if chunked:
        kept["attention weights"] = at.heads * seq_len_tokens // 2 * (FP32_BYTES + (size if size != 4 else 0))
    elif not how.flash_attention:
        kept["attention scores"] = 5 * at.heads * seq_len_tokens
    else:
        kept["log-sum-exp of the attention"] = at.heads * FP32_BYTES
    if cpu and how.document_mask:
        kept["document mask"] = seq_len_tokens // 2 if chunked else seq_len_tokens * size
    return kept
