import pytest

from aifactory_train.plan import shape
from aifactory_train.recipe.schema import Model

TINY = Model(
    family="llama",
    vocab_size=100,
    hidden_size=8,
    ffn_size=16,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_size=4,
    max_seq_len_tokens=64,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_embeddings=False,
)


def variant(**changes):
    return Model(**{**TINY.model_dump(), **changes})


def test_parameters_are_the_sum_of_the_tensors_of_the_model():
    matrices = 8 * 16 + 8 * 8 + 8 * 8 + 16 * 8 + 3 * 8 * 16
    assert shape.n_parameters(TINY) == 3 * (matrices + 2 * 8) + 8 + 2 * 100 * 8
    assert shape.n_parameters(variant(tied_embeddings=True)) == shape.n_parameters(TINY) - 100 * 8
    assert shape.n_parameters(variant(family="qwen3")) == shape.n_parameters(TINY) + 3 * 2 * 4


def test_matmul_parameters_count_the_head_also_where_it_is_tied_and_never_the_lookup():
    matrices = 8 * 16 + 8 * 8 + 8 * 8 + 16 * 8 + 3 * 8 * 16
    assert shape.n_matmul_parameters(TINY) == 3 * matrices + 100 * 8
    assert shape.n_matmul_parameters(variant(tied_embeddings=True)) == shape.n_matmul_parameters(TINY)


def test_flops_are_six_per_matmul_parameter_and_causal_attention_at_half():
    full_attention_forward = 2 * 2 * 64 * 4 * 4 * 3
    expected = 6 * shape.n_matmul_parameters(TINY) + 3 * full_attention_forward / 2
    assert shape.model_flops_per_token(TINY, 64) == expected


@pytest.mark.parametrize(("kind", "precision"), [("cpu", "fp32"), ("cuda", "bf16")])
def test_activation_bytes_grow_with_rows_and_layers(kind, precision):
    how = shape.Kept(precision, kind, document_mask=True)
    one = shape.activation_bytes(TINY, 1, 64, how)
    assert shape.activation_bytes(TINY, 5, 64, how) == 5 * one
    block = shape.block_activation_bytes_per_token(TINY, 64, how)
    assert shape.activation_bytes(variant(n_layers=4), 1, 64, how) == one + 64 * block


def test_activations_of_a_block_on_a_gpu_are_the_tensors_that_backward_needs():
    how = shape.Kept("bf16", "cuda", document_mask=True)
    elements = 4 * 8 + (16 + 2 * 8) + 16 + 4 * 16
    assert shape.block_activation_bytes_per_token(TINY, 64, how) == 2 * elements + 4 * 4


def test_the_loss_never_holds_more_logits_than_one_chunk():
    head_bytes = 4 * 100 * 8
    assert shape.loss_chunk_bytes(TINY, 1, 64, "fp32") == 64 * 100 * 16 + head_bytes
    many = shape.loss_chunk_bytes(TINY, 64, 64, "fp32")
    assert many == shape.LOSS_CHUNK_TOKENS * 100 * 16 + head_bytes == shape.loss_chunk_bytes(TINY, 16, 64, "fp32")
