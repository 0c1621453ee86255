import dataclasses

import pytest

from aifactory_train.plan import memory, shape
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.memory import estimate_memory, micro_batches_in_flight
from aifactory_train.plan.work import OURS, Work
from aifactory_train.recipe.schema import Lora, Model

MODEL = Model(
    family="llama",
    vocab_size=1024,
    hidden_size=64,
    ffn_size=128,
    n_layers=8,
    n_heads=4,
    n_kv_heads=2,
    head_size=16,
    max_seq_len_tokens=4096,
    rope_theta=1e4,
    norm_eps=1e-5,
    tied_embeddings=False,
)
N_BLOCK = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
N_TABLE = 1024 * 64
N = 8 * N_BLOCK + 2 * N_TABLE + 64
WORK = Work(MODEL, seq_len_tokens=256, global_batch_rows=64)
EVEN = dataclasses.replace(OURS, stages_count_head=False)  # 2 layers on each of 4 stages
MEGATRON = dataclasses.replace(EVEN, loss_chunk_tokens=None, n_fp32_logits=1, fused_elementwise=True)


def layout(**changes):
    given = {
        "engine": "fsdp2", "world_size": 8, "dp_shard": 8, "micro_batch_rows": 1, "accumulation": 1,
        "reshard_after_forward": True, "remat": "none", "precision": "bf16", "threads_per_rank": 1,
    }  # fmt: skip
    return Layout(**(given | changes))


def zero(**changes):
    return layout(**({"engine": "deepspeed", "zero_stage": 1} | changes))


def terms(how, work=WORK, kind="cuda", software=OURS):
    return estimate_memory(work, kind, how, software).terms_bytes


def moment(name, how, work=WORK, kind="cuda", software=OURS, pp_rank=0):
    return dict(memory._Rank(work, kind, how, software, pp_rank).moments())[name]


@pytest.mark.parametrize(
    "how",
    [
        layout(),
        layout(remat="full", accumulation=4),
        zero(),
        zero(zero_stage=3),
        zero(pp=4, dp_shard=2, accumulation=8),
    ],
)
def test_the_terms_add_up_to_the_peak_and_none_is_empty_or_negative(how):
    found = estimate_memory(WORK, "cuda", how)
    assert sum(found.terms_bytes.values()) == found.peak_bytes
    assert all(n_bytes > 0 for n_bytes in found.terms_bytes.values())


def test_1f1b_keeps_as_many_micro_batches_as_stages_are_still_to_come():
    how = layout(pp=4, dp_shard=2, accumulation=8)
    assert [micro_batches_in_flight(how, stage) for stage in range(4)] == [4, 3, 2, 1]
    few = layout(pp=4, dp_shard=2, accumulation=2)
    assert [micro_batches_in_flight(few, stage) for stage in range(4)] == [2, 2, 2, 1]


def test_interleaving_keeps_more_on_the_first_stage():
    how = layout(pp=4, dp_shard=2, accumulation=8, pipeline_schedule="interleaved", stages_per_rank=2)
    # Korthikanti et al., section 4.2.3: p (1 + (p - 1) / (p v)) = 4 (1 + 3 / 8) micro-batches of the rank's layers.
    assert micro_batches_in_flight(how, 0) == 4 * (1 + 3 / 8)
    assert micro_batches_in_flight(how, 3) == 5 / 2


def test_fsdp_shards_fp32_weights_gradients_and_two_moments():
    how = layout()
    step = moment("in the optimizer step", how)
    assert step["parameters"] == step["gradients"] == 4 * N / 8
    assert step["optimizer_state"] == 8 * N / 8


def test_context_parallel_ranks_share_the_weights_and_the_tokens():
    alone, shared = (terms(layout(dp_shard=4, world_size=4 * cp, cp=cp, remat="full")) for cp in (1, 2))
    assert shared["parameters"] == alone["parameters"] / 2
    kept = [
        moment("in the loss", layout(dp_shard=4, world_size=4 * cp, cp=cp, cp_attention=form))["activations"]
        for cp, form in ((1, "ulysses"), (2, "ulysses"), (2, "ring"), (2, "all_gather"))
    ]
    assert kept[1] == kept[0] / 2
    # Of 128 tokens of the other rank: k and v of 32 each, in bf16, in 8 layers; in a ring half of them.
    assert kept[2] - kept[1] == (kept[3] - kept[1]) / 2 == 128 * 32 * 2 * 8


def test_muon_keeps_one_moment_for_the_matrices():
    muon = terms(layout(), dataclasses.replace(WORK, optimizer="muon"))
    matrices = 8 * (N_BLOCK - 2 * 64)
    assert muon["optimizer_state"] == (8 * N - 4 * matrices) / 8


def test_zero_splits_the_optimizer_then_gradients_then_parameters():
    one, two, three = (terms(zero(zero_stage=stage)) for stage in (1, 2, 3))
    # bf16 weights; an fp32 copy and two moments of each; gradients added up in fp32.
    assert one["parameters"] == two["parameters"] == 2 * N and three["parameters"] == 2 * N / 8
    assert one["gradients"] == 4 * N and two["gradients"] == three["gradients"] == 4 * N / 8
    assert one["optimizer_state"] == two["optimizer_state"] == three["optimizer_state"] == 12 * N / 8


def test_tp_divides_the_weights_of_a_stage_but_for_the_norms_and_keeps_a_kv_head():
    held = terms(zero(tp=4, dp_shard=2))["parameters"]
    block = 2 * 64 * 16 + 2 * 64 * 16 + 3 * 64 * 32 + 2 * 64  # one of two k/v heads of 16
    assert held == 2 * (8 * block + 2 * N_TABLE // 4 + 64)


def test_pp_gives_each_stage_its_layers_and_the_ends_their_tables():
    how = zero(pp=4, dp_shard=2, accumulation=8)
    first, inner, last = (moment("in the loss", how, software=EVEN, pp_rank=rank)["parameters"] for rank in (0, 1, 3))
    assert inner == 2 * 2 * N_BLOCK
    assert first == inner + 2 * N_TABLE and last == inner + 2 * (N_TABLE + 64)
    tied = dataclasses.replace(WORK, model=MODEL.model_copy(update={"tied_embeddings": True}))
    assert moment("in the loss", how, tied, software=EVEN, pp_rank=3)["parameters"] == last, "each end has a copy"
    # The head costs as much as 1.8 layers: 2, 3, 2, 1. In a V of 8 stages the first rank has both ends.
    assert [memory._Rank(WORK, "cuda", how, OURS, rank).n_layers for rank in range(4)] == [2, 3, 2, 1]
    v = memory._Rank(WORK, "cuda", layout(pp=4, dp_shard=2, pipeline_schedule="zbv", stages_per_rank=2), OURS, 0)
    assert v.last and v.n == 2 * N_BLOCK + 2 * N_TABLE + 64


def test_activations_of_a_stage_are_layers_times_micro_batches_in_flight():
    how = zero(pp=4, dp_shard=2, accumulation=8)
    per_token = shape.block_activation_bytes_per_token(MODEL, 256, shape.Kept("bf16", "cuda", False))
    for rank, in_flight in ((0, 4), (1, 3), (3, 1)):
        kept = moment("in the backward pass of the last block", how, software=EVEN, pp_rank=rank)["activations"]
        assert kept == 256 * 2 * in_flight * per_token


def test_the_peak_names_the_worst_stage_and_the_moment():
    long_rows = dataclasses.replace(WORK, seq_len_tokens=4096)
    found = estimate_memory(long_rows, "cuda", zero(pp=4, dp_shard=2, accumulation=8), EVEN)
    assert found.peak_at == "stage 0 of 4, in the backward pass of the last block"
    large = MODEL.model_copy(update={"vocab_size": 100_000})
    found = estimate_memory(
        dataclasses.replace(long_rows, model=large), "cuda", zero(pp=4, dp_shard=2, accumulation=8), MEGATRON
    )
    assert found.peak_at == "stage 3 of 4, in the loss"


def test_full_remat_keeps_an_input_per_block_and_makes_one_block_again():
    how = moment("in the backward pass of the last block", layout(remat="full"))
    assert how["activations"] == 256 * 8 * 2 * 64
    whole = shape.block_activation_bytes_per_token(MODEL, 256, shape.Kept("bf16", "cuda", False))
    assert how["recomputed_block"] == 256 * (whole - 2 * 64)


def test_parameters_are_gathered_a_block_ahead_or_all_of_them():
    resharded, kept = (moment("in the loss", layout(reshard_after_forward=r)) for r in (True, False))
    root = 2 * (2 * N_TABLE + 64)
    assert resharded["gathered_parameters"] == root + 2 * N_BLOCK
    assert kept["gathered_parameters"] == 2 * N + 2 * N_BLOCK


def test_accumulation_holds_the_gradients_of_the_whole_model_where_they_are_reduced_once():
    how = layout(accumulation=2)
    assert moment("in the loss", how)["unsharded_gradients"] == 4 * N


def test_gradients_reduced_in_each_micro_batch_wait_as_fp32_shards():
    how = layout(accumulation=2, reduce_each_micro_batch=True)
    waiting = moment("in the loss", how)
    assert waiting["unsharded_gradients"] == 0 and waiting["gradients"] == 4 * N / 8
    # In the first block are still: bf16 gradients of its down and of the head, whose loss goes by chunks.
    first = moment("in the backward pass of the first block", how)
    assert first["unsharded_gradients"] == 2 * (64 * 128 + N_TABLE) and first["gradients"] == 4 * N / 8
    # One micro-batch has nothing to wait for.
    alone = [moment("in the loss", layout(reduce_each_micro_batch=each)) for each in (True, False)]
    assert alone[0] == alone[1] and alone[0]["gradients"] == 0


def test_the_gradients_of_the_root_are_reduced_from_a_copy_in_fp32():
    last = moment("in the reduction of the last gradients", layout())
    n_root = 2 * N_TABLE + 64
    assert last["reduce_buffers"] == 4 * n_root and last["unsharded_gradients"] == 2 * n_root


def test_logits_of_all_tokens_are_split_over_tp_or_gathered():
    how = zero(tp=4, dp_shard=2)
    assert moment("in the loss", how, software=MEGATRON)["logits_and_loss"] == 256 * 256 * (2 + 4)
    gathered = dataclasses.replace(MEGATRON, vocab_parallel_loss=False)
    assert moment("in the loss", how, software=gathered)["logits_and_loss"] == 256 * 1024 * (2 + 4 + 2 * 2)


def test_bf16_gradients_are_copied_to_fp32_for_the_step():
    software = dataclasses.replace(MEGATRON, fp32_gradients=False)
    step = moment("in the optimizer step", zero(), software=software)
    assert step["gradients"] == 2 * N and step["optimizer_step"] == 8 * N / 8
    # Where ZeRO lays them out in long tensors, they stand beside the activations.
    flat = dataclasses.replace(software, flat_step=True)
    assert moment("in the loss", zero(), software=flat)["optimizer_step"] == 8 * N / 8
    assert "optimizer_step" not in moment("in the loss", zero(), software=software)


def test_offload_moves_the_optimizer_to_the_host():
    kept, moved = (estimate_memory(WORK, "cuda", zero(offload=where, n_nodes=2)) for where in ("none", "optimizer"))
    assert "optimizer_state" not in moved.terms_bytes
    # Per node 4 ranks: copy and moments, and gradients in fp32.
    assert moved.host_bytes["offloaded_optimizer"] == 4 * (12 + 6) * N / 8
    assert kept.host_bytes["offloaded_optimizer"] == 0


def test_an_asynchronous_save_stages_the_states_of_all_ranks_of_a_node_in_host_memory():
    saved = dataclasses.replace(WORK, asynchronous_save=True)
    assert estimate_memory(saved, "cuda", layout(n_nodes=2)).host_bytes["staging"] == 4 * 12 * N / 8
    assert estimate_memory(WORK, "cuda", layout(n_nodes=2)).host_bytes["staging"] == 0


def test_on_a_cpu_the_copy_for_a_save_is_the_ranks_own_and_the_host_holds_the_ranks():
    saved = dataclasses.replace(WORK, asynchronous_save=True)
    found = estimate_memory(saved, "cpu", layout(n_nodes=2))
    assert found.terms_bytes["checkpoint_copy"] == 12 * N / 8
    assert found.host_bytes == {"ranks": 4 * found.peak_bytes}


def test_a_communicator_per_axis_and_one_for_all_ranks():
    one = memory.COMMUNICATOR_BYTES["cuda"]
    assert "communicators" not in terms(layout(world_size=1, dp_shard=1))
    assert terms(layout())["communicators"] == 2 * one
    assert terms(zero(pp=2, tp=2, dp_shard=2, accumulation=4))["communicators"] == 4 * one


def test_fsdp_in_a_pipeline_gathers_a_stage_for_good_in_its_backward_pass_and_reduces_once():
    how = layout(pp=4, dp_shard=2, accumulation=8)
    n = memory._Rank(WORK, "cuda", how, OURS, 1).n
    first, reduction = (
        moment(name, how, pp_rank=1)
        for name in ("in the backward pass of the first block", "in the reduction of the gradients")
    )
    # bf16 weights and fp32 gradients of the whole stage, beside its shards of them.
    assert first["gathered_parameters"] == reduction["gathered_parameters"] == 2 * n
    assert first["unsharded_gradients"] == 4 * n + 2 * N_BLOCK and reduction["unsharded_gradients"] == 4 * n
    # Between the forward passes a block at a time, unless they are never freed.
    kept = how.model_copy(update={"reshard_after_forward": False})
    in_loss = [moment("in the loss", at, pp_rank=1)["gathered_parameters"] for at in (how, kept)]
    assert in_loss == [2 * N_BLOCK, 2 * n]


def test_a_budget_keeps_its_share_of_what_none_keeps_and_makes_the_rest_again():
    whole, half = (
        moment("in the backward pass of the last block", layout(compile=True, **how))
        for how in ({}, {"remat": "budget", "remat_budget_frac": 0.5})
    )
    assert half["activations"] == pytest.approx(whole["activations"] / 2, rel=1e-3)
    assert half["recomputed_block"] == pytest.approx(whole["activations"] / 2 / 8, rel=1e-3)


def test_each_border_of_a_stage_has_a_buffer_for_each_micro_batch():
    how = layout(pp=4, dp_shard=2, tp=1, accumulation=16, micro_batch_rows=2)
    border = 16 * 2 * 256 * 64 * 2  # micro-batches x rows x tokens x width x bf16
    for pp_rank, n_borders in ((0, 1), (1, 2), (3, 1)):
        assert moment("in the loss", how, pp_rank=pp_rank)["pipeline_buffers"] == n_borders * border
    in_v = how.model_copy(update={"pipeline_schedule": "zbv", "stages_per_rank": 2, "reshard_after_forward": False})
    assert moment("in the loss", in_v, pp_rank=0)["pipeline_buffers"] == 2 * border, "first and last stage"
    halved = how.model_copy(update={"world_size": 16, "tp": 2})
    assert moment("in the loss", halved)["pipeline_buffers"] == border // 2


def test_offload_of_parameters_keeps_two_blocks_and_the_tables_on_the_device():
    how = zero(zero_stage=3, offload="parameters", reduce_each_micro_batch=True)
    memory = estimate_memory(WORK, "cuda", how)
    found = memory.terms_bytes
    assert "parameters" not in found and "optimizer_state" not in found
    assert found["gathered_parameters"] == 2 * (2 * N_BLOCK + 2 * N_TABLE + 64)
    assert memory.host_bytes["offloaded_parameters"] == 8 * 2 * -(-N // 8)
    kept = estimate_memory(WORK, "cuda", zero(zero_stage=3, offload="optimizer", reduce_each_micro_batch=True))
    assert kept.terms_bytes["parameters"] == 2 * -(-N // 8) and "offloaded_parameters" not in kept.host_bytes
    # On a CPU the host's memory is the device's.
    here = estimate_memory(WORK, "cpu", how).terms_bytes
    assert here["parameters"] and here["optimizer_state"]


def test_with_adapters_nothing_else_has_gradients_or_optimizer_state():
    n_adapters = 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    work = dataclasses.replace(WORK, lora=Lora(rank=4, alpha=8.0), asynchronous_save=True)
    found = terms(layout(accumulation=4), work)
    n = N + 8 * n_adapters
    assert found["parameters"] == 4 * -(-n // 8)
    assert found["optimizer_state"] == 4 * 2 * n_adapters
    waiting = moment("in the loss", layout(accumulation=4), work)["unsharded_gradients"]
    assert waiting == 4 * 8 * n_adapters
    staged = estimate_memory(work, "cuda", layout()).host_bytes["staging"]
    assert staged == pytest.approx(8 * 3 * 4 * n_adapters, rel=1e-3), "a checkpoint holds adapters alone"
    sharded = terms(zero(), work)
    assert sharded["parameters"] == 2 * n and sharded["gradients"] == 4 * 8 * n_adapters


def test_a_foreign_model_without_a_chunked_loss_holds_all_logits():
    def logits(**config):
        other = Model(**MODEL.model_dump() | {"family": "other", "hf_config": config})
        how = layout(micro_batch_rows=16, model_code="transformers")
        return moment("in the loss", how, dataclasses.replace(WORK, model=other))["logits_and_loss"]

    whole = 16 * 256 * 1024 * (2 + 3 * 4)
    assert logits(model_type="gemma2") == logits(model_type="xglm") == whole
    assert logits(model_type="mixtral", output_router_logits=True) == whole
    assert logits(model_type="gemma2", final_logit_softcapping=None) == logits(model_type="mixtral") < whole
