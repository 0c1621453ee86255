from aifactory_train.plan import shape
from aifactory_train.recipe.schema import Lora, Model

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


def test_flops_with_adapters_leave_out_the_gradients_of_frozen_weights():
    q_adapter = 3 * 2 * (8 + 16)
    flops = shape.model_flops_per_token(TINY, 64, Lora(rank=2, alpha=4.0, targets=["q_proj"]))
    assert flops == shape.model_flops_per_token(TINY, 64) - 2 * shape.n_matmul_parameters(TINY) + 6 * q_adapter
    lora = Lora(rank=2, alpha=4.0)
    assert shape.build_shape(TINY, 64, lora).model_flops_per_token == shape.model_flops_per_token(TINY, 64, lora)


def test_a_linear_that_is_named_twice_has_one_adapter():
    def n_weights(*targets):
        return shape.n_adapter_parameters(TINY, Lora(rank=2, alpha=4.0, targets=list(targets)))

    assert n_weights("q_proj", "self_attn.q_proj", "q_proj") == n_weights("q_proj") == 2 * (8 + 16)
    assert n_weights("attn.c_proj", "mlp.c_proj", "attn.c_proj") == 2 * n_weights("attn.c_proj")


def test_full_remat_adds_a_forward_of_the_blocks_but_for_down_and_selective_every_second_product():
    q_o, k_v, mlp = 2 * 8 * 16, 2 * 8 * 8, 3 * 8 * 16
    attention = 2 * 64 * 4 * 4
    full = 3 * (2 * (q_o + k_v + mlp - 8 * 16) + attention)
    assert shape.recomputed_flops_per_token(TINY, 64, "full") == full
    k_o_up = 8 * 8 + 16 * 8 + 8 * 16
    assert shape.recomputed_flops_per_token(TINY, 64, "selective") == 3 * 2 * k_o_up
    assert shape.recomputed_flops_per_token(TINY, 64, "none") == 0
    assert shape.hardware_flops_per_token(TINY, 64, "full") == shape.model_flops_per_token(TINY, 64) + full


class Plain(Model):
    n_mlp_matrices: int = 2


PLAIN = Plain(
    family="llama",
    vocab_size=100,
    hidden_size=1024,
    ffn_size=4096,
    n_layers=2,
    n_heads=16,
    n_kv_heads=16,
    head_size=64,
    max_seq_len_tokens=2048,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_embeddings=True,
)


def test_a_plain_mlp_has_two_matrices():
    assert shape.n_block_matrix_parameters(PLAIN) == 12 * 1024**2


def test_tp_divides_matrices_and_vocabulary_but_leaves_a_kv_head_and_the_norms():
    # q, o: 16 / 4 = 4 wide; k, v: one of two heads, 4 wide; gate, up, down: 16 / 4.
    matrices = 2 * 8 * 4 + 2 * 8 * 4 + 3 * 8 * 4
    assert shape.n_block_matrix_parameters(TINY, tp=4) == matrices
    assert shape.n_block_parameters(TINY, tp=4) == matrices + 2 * 8
    assert shape.n_root_parameters(TINY, tp=4) == 2 * 25 * 8 + 8


def kept(model=TINY, tokens=64, **how):
    given = {"precision": "bf16", "device_kind": "cuda", "document_mask": False} | how
    return shape.block_kept_bytes_per_token(model, tokens, shape.Kept(**given))


def test_activations_of_a_block_on_a_gpu_are_the_tensors_that_backward_needs():
    elements = 4 * 8 + (16 + 2 * 8) + 16 + 4 * 16
    assert sum(kept().values()) == 2 * elements + 4 * 4
    # Fused, silu(gate) is not kept; with RMSNorm in Python an fp32 copy and the normed input are, twice.
    assert sum(kept(elementwise="fused").values()) == sum(kept().values()) - 2 * 16
    assert sum(kept(elementwise="separate").values()) == sum(kept().values()) + 2 * (4 * 8 + 2 * 8)
    # qwen3 keeps q and k before their norms too.
    assert sum(kept(variant(family="qwen3")).values()) == sum(kept().values()) + 2 * (16 + 8)


def test_without_flash_attention_a_block_keeps_the_bytes_of_korthikanti_without_his_dropout_on_the_stream():
    d, heads, tokens = 1024, 16, 2048
    how = {"elementwise": "fused", "flash_attention": False}
    # Table 2 of arXiv:2205.05198, of which 2 of 34 and of 10 bytes are masks of dropout on the residual stream.
    assert sum(kept(PLAIN, tokens, **how).values()) == 32 * d + 5 * heads * tokens
    alone = kept(PLAIN, tokens, **how, tp=8, sequence_parallel=False)
    assert sum(alone.values()) == 8 * d + 24 * d // 8 + 5 * heads * tokens // 8
    split = kept(PLAIN, tokens, **how, tp=8, moves_inputs_again=True)
    assert sum(split.values()) == (32 * d + 5 * heads * tokens) // 8
    # What was gathered for q, k, v and for the first product of the MLP stays whole where it is not gathered again.
    assert sum(kept(PLAIN, tokens, **how, tp=8).values()) == sum(split.values()) + 2 * 2 * d * 7 // 8


def test_remat_keeps_the_input_of_the_block_or_every_second_product_too():
    assert kept(remat="full") == {"block input": 2 * 8}
    selective = kept(remat="selective")
    assert sum(selective.values()) == 2 * (8 + 16 + 8 + 16 + 16 + 8) + 4 * 4
    assert kept(remat="full", tp=4)["block input"] == 2 * 8 // 4


def test_fp8_inputs_of_matrix_products_take_a_byte():
    saved = sum(kept(precision="fp8").values()) - sum(
        kept(precision="fp8", elementwise="fused", fp8_inputs=True).values()
    )
    # silu(gate) is gone; two normed inputs and the product are a byte each; attention's output is kept in bf16 too.
    assert saved == 2 * 16 + 2 * 8 + 16 - 16


def test_on_a_cpu_norms_keep_fp32_copies_and_attention_its_weights_on_short_rows():
    cpu = kept(device_kind="cpu")
    assert cpu["inputs of the norms"] == 2 * 8 * 2 * 4
    assert cpu["attention weights"] == 4 * 64 // 2 * (4 + 2)
    long = kept(tokens=2048, device_kind="cpu", document_mask=True)
    assert long["document mask"] == 2048 * 2 and long["k after RoPE, and v"] == 2 * 16 * 2


def test_the_chunked_loss_never_holds_more_logits_than_one_chunk():
    chunk, vocab, n_head = 1024, 100, 100 * 8

    def loss(tokens, precision="bf16", compiled=False):
        return shape.chunk_loss_bytes(tokens, chunk, vocab, n_head, precision, compiled)

    # bf16 logits and gradient, four fp32 tensors between, the gradient of the chunk before; the head's in fp32.
    assert loss(5000) == chunk * vocab * (2 + 16 + 2 + 2) + 4 * n_head
    assert loss(64) == 64 * vocab * (2 + 16 + 2) + 4 * n_head
    assert loss(5000, compiled=True) == chunk * vocab * 6 + 4 * n_head
    # fp32 needs no cast: logits, three fp32 tensors, a mask of a byte, the gradient; and that of the chunk before.
    assert loss(64, "fp32") == 64 * vocab * (4 + 12 + 1 + 4) + 4 * n_head
    assert loss(5000, "fp32") == chunk * vocab * (4 + 12 + 1 + 4 + 4) + 4 * n_head
    assert shape.chunk_loss_bytes(8, chunk, vocab, 10**6, "bf16", compiled=False) == 10 * 10**6


def test_a_loss_over_all_tokens_holds_logits_and_their_fp32_copies():
    assert shape.whole_loss_bytes(10, 100, "bf16", 3) == 10 * 100 * (2 + 12)
    assert shape.whole_loss_bytes(10, 100, "bf16", 0) == 10 * 100 * 2
