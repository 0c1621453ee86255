"""Each term of the step's time against arithmetic by hand, on a device of round numbers."""

import dataclasses

import pytest

from aifactory_train.machine.machine import ByDtype, Device, Host, Machine, Measured, Network, Topology
from aifactory_train.plan.blocktime import (
    architecture_of,
    backward_gemm_s,
    block_forward,
    device_pace,
    gemm_s,
    head_forward,
)
from aifactory_train.plan.constants import Constants
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.network import axis_links
from aifactory_train.plan.steptime import estimate_step_time_s, total_step_time_s
from aifactory_train.plan.work import OURS, Work
from aifactory_train.recipe.schema import Model

# Nothing is lost but where a test says so: half of 1e15 FLOP/s for products, a quarter for attention, all of 1e13 B/s.
PLAIN = Constants(
    gemm_frac={"other": 0.5, "other fp8": 0.25, "hopper": 0.5},
    wave_frac=1e-12,
    gemm_half_depth=1e-9,
    attention_frac={"unfused": 0.25, "flash1": 0.25, "flash2": 0.25, "flash3": 0.25},
    newer_attention_frac=1.0,
    memory_frac=1.0,
    kernel_gap_s=0.0,
    node_link_frac=1.0,
    nic_frac=1.0,
    node_latency_s=0.0,
    nic_latency_s=0.0,
    tp_overlap_frac=0.5,
    cp_overlap_frac=0.5,
    dp_overlap_frac=1.0,
    contention_frac=0.0,
    straggler_frac=0.0,
    step_host_s=0.0,
    power_exponent=0.5,
)
MODEL = Model(
    family="llama", vocab_size=10_000, hidden_size=1000, ffn_size=4000, n_layers=4, n_heads=10, n_kv_heads=5,
    head_size=100, max_seq_len_tokens=2000, rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False,
)  # fmt: skip
# One block: q 1000, k and v 500 each, o 1000, gate and up 4000 each, down 4000 columns, all by 1000.
BLOCK_WEIGHTS = 1000 * (1000 + 2 * 500 + 1000 + 3 * 4000)
WEIGHTS = 4 * (BLOCK_WEIGHTS + 2 * 1000) + 2 * 10_000 * 1000 + 1000
WORK = Work(MODEL, seq_len_tokens=2000, global_batch_rows=8)


def machine(per_node=8, name="GPU", **device):
    given = {"peak_flops_per_s": ByDtype(bf16=1e15, fp8=4e15), "memory_bytes_per_s": 1e13, **device}
    return Machine(
        name="round",
        device=Device(kind="cuda", name=name, per_node=per_node, **given),
        host=Host(cores=64),
        topology=Topology(all_to_all_bytes_per_s=100e9, host_bytes_per_s=10e9),
        network=Network(nics_per_node=1, nic_gbit_per_s=80),
    )


def layout(**changes):
    given = {"dp_shard": 1, "micro_batch_rows": 1, "accumulation": 8, "reshard_after_forward": True, "remat": "none"}
    given |= {"engine": "fsdp2", "precision": "bf16", "threads_per_rank": 1, "compile": True} | changes
    sizes = [given.get(axis, 1) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]
    world_size = sizes[0] * sizes[1] * sizes[2] * sizes[3] * sizes[4]
    return Layout(world_size=world_size, **given)


def terms(changed=None, at=None, work=WORK, software=OURS, constants=PLAIN, **changes):
    return estimate_step_time_s(work, at or machine(), changed or layout(**changes), software, constants)


def rate_of(axis, **changes):
    """Bytes per second of one rank, tested by hand in test_plan_network.py."""
    return axis_links(machine(), layout(**changes), PLAIN)[axis].bytes_per_s


def test_matrix_products_cost_six_flops_a_weight_and_token_at_the_share_of_the_peak():
    # 4 blocks x 6 x weights x 16 000 tokens at 0.5e15.
    assert terms()["matmul"] == pytest.approx(4 * 6 * BLOCK_WEIGHTS * 16_000 / 0.5e15)


def test_attention_is_the_causal_half_forward_and_two_and_a_half_times_that_backward():
    # Forward: 2 products x 2 FLOPs x 2000 keys x 1000 wide / 2, per token and block; at 0.25e15.
    assert terms()["attention"] == pytest.approx(3.5 * 4 * 2 * 2000 * 1000 * 16_000 / 0.25e15)


def test_scores_that_are_written_cost_memory_traffic_and_the_masked_half():
    pace = device_pace(machine(), layout(), OURS, PLAIN)
    unfused = dataclasses.replace(OURS, attention="unfused")
    # The whole square of products, and 10 heads x 2000 x 2000 scores of 2 bytes moved 4 times by fused kernels.
    products_s, scores_s = 4 * 2000 * 2000 * 1000 / 0.25e15, 10 * 2000 * 2000 * 2 * 4 / 1e13
    aligned = dataclasses.replace(WORK, model=MODEL.model_copy(update={"n_heads": 10, "head_size": 104}))
    wide = block_forward(aligned, layout(), unfused, pace).attention_s
    assert wide == pytest.approx(products_s * 1.04 + scores_s)
    # Heads of 100 are no multiple of 8: their products take four times as long.
    assert block_forward(WORK, layout(), unfused, pace).attention_s == pytest.approx(4 * products_s + scores_s)


def test_a_product_loses_part_of_its_last_wave_and_never_runs_faster_than_its_bytes():
    # 100 multiprocessors of a device that no table knows take 100 tiles of 256 x 128 at once; half of that is lost.
    waves = dataclasses.replace(PLAIN, wave_frac=0.5)
    pace = device_pace(machine(), layout(), OURS, waves)
    tiles = 100 * 256 * 128
    assert gemm_s(tiles / 1000, 1000, 1e6, 1.0, pace) == pytest.approx(2 * tiles * 1e6 * 1.5)
    assert gemm_s(tiles, 1000, 1e6, 1.0, pace) == pytest.approx(2 * tiles * 1000 * 1e6 * (1 + 0.5 / 1000))
    shallow = device_pace(machine(), layout(), OURS, dataclasses.replace(PLAIN, gemm_half_depth=64.0))
    assert gemm_s(1e6, 1e6, 64, 1.0, shallow) == pytest.approx(2 * 1e12 * 64 * 2)
    plain = device_pace(machine(memory_bytes_per_s=1e12), layout(), OURS, PLAIN)
    # 1 x 1000 by 1000 x 1000 reads a million weights of 2 bytes for only 2 MFLOP.
    assert gemm_s(1, 1000, 1000, 0.5e15, plain) == pytest.approx((1000 + 1000 * 1000 + 1000) * 2 / 1e12)


def test_the_gradients_of_a_product_are_two_products_of_its_turned_sides():
    waves = device_pace(machine(), layout(), OURS, dataclasses.replace(PLAIN, wave_frac=0.5))
    sides_s = gemm_s(2000, 1000, 4000, 1e15, waves) + gemm_s(1000, 4000, 2000, 1e15, waves)
    assert backward_gemm_s(2000, 4000, 1000, 1e15, waves) == pytest.approx(sides_s)


def test_what_lies_between_the_products_moves_bytes():
    # Forward, fused, per token: 8 x 1000 for norms and sums, 2 x 1500 for RoPE, 3 x 4000 for the MLP; 2 bytes each.
    assert terms()["elementwise"] == pytest.approx(3 * 4 * 16_000 * (8000 + 3000 + 12_000) * 2 / 1e13)
    # One by one: 2 x 5 x 1000, 6 x 1500, 5 x 4000.
    assert terms(compile=False)["elementwise"] == pytest.approx(3 * 4 * 16_000 * (10_000 + 9000 + 20_000) * 2 / 1e13)


def test_kernel_starts_grow_with_micro_batches_not_with_tokens():
    gaps = dataclasses.replace(PLAIN, kernel_gap_s=1e-6)
    # 14 kernels forward and twice that backward, 4 blocks.
    assert terms(constants=gaps)["kernel_starts"] == pytest.approx(8 * 4 * 3 * 14e-6)
    assert terms(constants=gaps, micro_batch_rows=8, accumulation=1)["kernel_starts"] == pytest.approx(4 * 3 * 14e-6)


def test_head_and_loss_multiply_the_vocabulary_and_pass_over_its_logits():
    pace = device_pace(machine(), layout(), OURS, PLAIN)
    head = head_forward(WORK, layout(), OURS, pace)
    assert head.gemm_s == pytest.approx(2 * 2000 * 10_000 * 1000 / 0.5e15)
    assert head.elementwise_s == pytest.approx(2000 * 10_000 * (2 + 4 * 4) / 1e13)
    assert terms()["head_and_loss"] == pytest.approx(8 * 3 * (head.gemm_s + head.elementwise_s))
    gathered = dataclasses.replace(OURS, vocab_parallel_loss=False)
    assert head_forward(WORK, layout(tp=5), gathered, pace).elementwise_s == pytest.approx(head.elementwise_s)
    assert head_forward(WORK, layout(tp=5), OURS, pace).elementwise_s == pytest.approx(head.elementwise_s / 5)


def test_full_remat_is_one_more_forward_of_all_blocks_and_selective_every_second_product():
    pace = device_pace(machine(), layout(), OURS, PLAIN)
    block = block_forward(WORK, layout(), OURS, pace)
    # torch stops before the last product, 1000 x 4000 weights, whose result nothing needs.
    down_s = 2 * 2000 * 1000 * 4000 / 0.5e15
    assert terms(remat="full")["recomputation"] == pytest.approx(8 * 4 * (block.total_s - down_s))
    whole = dataclasses.replace(OURS, stops_recomputing_early=False)
    assert terms(remat="full", software=whole)["recomputation"] == pytest.approx(8 * 4 * block.total_s)
    # Every second of q, k, v, o, gate, up, down: 500, 1000 and 4000 columns by 1000.
    selective = 8 * 4 * (2 * 2000 * 1000 * (500 + 1000 + 4000) / 0.5e15 + block.elementwise_s)
    assert terms(remat="selective")["recomputation"] == pytest.approx(selective)
    assert "recomputation" not in terms()


def test_tensor_parallel_gathers_and_scatters_four_times_a_block_and_once_at_each_end():
    # Of 2000 x 1000 x 2 bytes 4/5 leave each rank.
    link_bytes_per_s = rate_of("tp", tp=5)
    once_s = 4 / 5 * 2000 * 1000 * 2 / link_bytes_per_s
    # All-reduces send twice 4/5: three fp32 numbers for each of 2000 tokens of the loss, and once per step 9 norms.
    small_s = 2 * 4 / 5 * (8 * 3 * 2000 * 4 + 9 * 1000 * 4) / link_bytes_per_s
    assert terms(tp=5)["tensor_parallel"] == pytest.approx(8 * (4 * 8 + 4) * once_s + small_s)
    # Full remat gathers both inputs again and sums up what o makes; selective keeps the sums.
    assert terms(tp=5, remat="full")["tensor_parallel"] == pytest.approx(8 * (4 * 11 + 4) * once_s + small_s)
    assert terms(tp=5, remat="selective")["tensor_parallel"] == pytest.approx(8 * (4 * 10 + 4) * once_s + small_s)
    overlapped = dataclasses.replace(OURS, overlap_tp=True)
    found = terms(tp=5, software=overlapped)["tensor_parallel"]
    assert found == pytest.approx(8 * (4 * 8 + 4) * once_s / 2 + small_s)


def test_megatron_gathers_once_more_what_it_did_not_keep_and_sums_logits_only_where_it_is_told():
    link_bytes_per_s = rate_of("tp", tp=5)
    once_s = 4 / 5 * 2000 * 1000 * 2 / link_bytes_per_s
    again = dataclasses.replace(OURS, moves_inputs_again=True)
    plain = terms(tp=5)["tensor_parallel"]
    for remat, more in (("none", 2), ("selective", 2), ("full", 5)):
        found = terms(tp=5, software=again, remat=remat)["tensor_parallel"]
        assert found == pytest.approx(plain + 8 * 4 * more * once_s)
    alike = dataclasses.replace(again, sequence_parallel=False)
    assert terms(tp=5, software=alike)["tensor_parallel"] == pytest.approx(plain)
    whole = dataclasses.replace(OURS, vocab_parallel_loss=False)
    logits_s = 8 * (4 / 5 * 2000 * 10_000 * 2 - 2 * 4 / 5 * 3 * 2000 * 4) / link_bytes_per_s
    assert terms(tp=5, software=whole)["tensor_parallel"] == pytest.approx(plain + logits_s)


def test_an_empty_pipeline_waits_for_as_many_micro_batches_as_it_has_stages_less_one():
    slow_head = terms(pp=2)
    # The last stage has 2 blocks and the head: it is the slowest, the other idles beside the head.
    micro_s = (slow_head["matmul"] + slow_head["attention"] + slow_head["elementwise"] + slow_head["head_and_loss"]) / 8
    head_s = slow_head["head_and_loss"] / 8
    transfers_s = slow_head["pipeline_transfers"] / 8
    other_s = micro_s - head_s
    assert slow_head["pipeline_bubble"] == pytest.approx((micro_s + transfers_s) * other_s / micro_s)
    assert terms(pp=2, stages_per_rank=2)["pipeline_bubble"] < slow_head["pipeline_bubble"]


def test_stages_that_do_not_divide_wait_for_the_longest_of_them():
    # 4 blocks over 3 stages: the first has 2, unless the head of the last takes longer than a block.
    assert terms(pp=3)["matmul"] == pytest.approx(2 * 6 * BLOCK_WEIGHTS * 16_000 / 0.5e15)
    assert "head_and_loss" in terms(pp=3) and terms(pp=3)["head_and_loss"] == 0


def test_a_pipeline_sends_activations_on_and_gradients_back():
    found = terms(pp=2)["pipeline_transfers"]
    once_s = 2000 * 1000 * 2 / rate_of("pp", pp=2)
    assert found == pytest.approx(8 * 2 * once_s)
    assert terms(pp=2, stages_per_rank=2)["pipeline_transfers"] == pytest.approx(8 * 2 * 2 * once_s)
    # Each rank of tp sends its part, to a neighbour that is five devices away.
    beside_tp = terms(pp=2, tp=4)["pipeline_transfers"]
    assert beside_tp == pytest.approx(8 * 2 * 2000 * 1000 * 2 / 4 / rate_of("pp", pp=2, tp=4))


def test_what_data_parallelism_sends_and_no_computation_hides_is_waited_for():
    never = dataclasses.replace(OURS, overlap_dp=False)
    # Half leaves of 2 gathers of bf16 blocks and one of the rest in each of 4 micro-batches, and of one fp32 reduction.
    found = terms(dp_shard=2, accumulation=4, software=never)["data_parallel"]
    gather_s, reduce_s = (WEIGHTS * size / 2 / rate_of("fsdp", dp_shard=2) for size in (2, 4))
    root_s = (2 * 10_000 * 1000 + 1000) * 2 / 2 / rate_of("fsdp", dp_shard=2)
    assert found == pytest.approx(4 * (2 * gather_s - root_s) + reduce_s)
    # Left gathered, the weights are gathered once a step; ZeRO 1 does the same after its optimizer.
    kept = terms(dp_shard=2, accumulation=4, software=never, reshard_after_forward=False)["data_parallel"]
    assert kept == pytest.approx(gather_s + reduce_s)
    zero = terms(dp_shard=2, accumulation=4, software=never, zero_stage=1, engine="deepspeed")["data_parallel"]
    assert zero == pytest.approx(gather_s + reduce_s)
    # ZeRO 2 has no room for a whole gradient, so it reduces in each micro-batch.
    split = terms(
        dp_shard=2, accumulation=4, software=never, zero_stage=2, engine="deepspeed", reshard_after_forward=False,
        reduce_each_micro_batch=True,
    )  # fmt: skip
    assert split["data_parallel"] == pytest.approx(gather_s + 4 * reduce_s)
    each = {"dp_shard": 2, "accumulation": 4, "reduce_each_micro_batch": True}
    assert terms(software=never, **each)["data_parallel"] == pytest.approx(4 * (2 * gather_s - root_s + reduce_s))
    kept = terms(software=never, reshard_after_forward=False, **each)["data_parallel"]
    assert kept == pytest.approx(gather_s + 4 * reduce_s)


def test_a_pipeline_reduces_after_its_last_backward_pass_where_nothing_hides_it():
    # The slowest of 2 ranks has 2 blocks and the head; all of what it gathers hides but for one of 2 blocks.
    free = {"pp": 2, "dp_shard": 2, "accumulation": 8}
    n_weights = 2 * (BLOCK_WEIGHTS + 2 * 1000) + 10_000 * 1000 + 1000
    gather_s, reduce_s = (n_weights * size / 2 / rate_of("fsdp", **free) for size in (2, 4))
    kept = terms(reshard_after_forward=False, **free)["data_parallel"]
    assert kept == pytest.approx(gather_s / 2 + reduce_s)


def test_replicas_all_reduce_their_shards_and_some_software_broadcasts_its_weights():
    never = dataclasses.replace(OURS, overlap_dp=False)
    shape = {"dp_replicate": 2, "dp_shard": 2, "accumulation": 2, "zero_stage": 1}
    links = axis_links(machine(), layout(**shape), PLAIN)
    shard_s = WEIGHTS * (2 + 4) / 2 / links["fsdp"].bytes_per_s
    # Half of the fp32 gradients; a ring of two sends half of them twice.
    replicas_s = 2 * WEIGHTS * 4 / 2 / 2 / links["dp_replicate"].bytes_per_s
    assert terms(software=never, **shape)["data_parallel"] == pytest.approx(shard_s + replicas_s)
    broadcasts = dataclasses.replace(never, gathers_by_broadcast=True)
    slow = dataclasses.replace(PLAIN, broadcast_s=0.5)
    found = terms(software=broadcasts, constants=slow, **shape)["data_parallel"]
    assert found == pytest.approx(shard_s + replicas_s + 2 * 0.5)


def test_heads_of_keys_and_values_are_not_split_further_than_there_are():
    pace = device_pace(machine(), layout(), OURS, PLAIN)
    # tp 10 leaves one q head and one of 5 kv heads on each rank: 100 + 2 x 100 columns, 100, 800 and 400.
    columns = 100 + 2 * 100 + 100 + 800 + 400
    assert block_forward(WORK, layout(tp=10), OURS, pace).gemm_s == pytest.approx(2 * 2000 * 1000 * columns / 0.5e15)


def test_overlap_leaves_the_first_block_and_what_computation_is_too_short_for():
    never = dataclasses.replace(OURS, overlap_dp=False)
    long = {"dp_shard": 2, "micro_batch_rows": 4, "accumulation": 1}
    bare = terms(software=never, **long)["data_parallel"]
    # All but a quarter (one of 4 blocks) hides behind a long computation.
    assert terms(**long)["data_parallel"] == pytest.approx(bare / 4)
    contended = dataclasses.replace(PLAIN, contention_frac=0.1)
    assert terms(constants=contended, **long)["data_parallel"] == pytest.approx(bare / 4 + 0.1 * bare * 3 / 4)
    # Behind a thousandth of the computation no more than that.
    short = dataclasses.replace(PLAIN, dp_overlap_frac=1e-3)
    found = terms(**long)
    compute_s = sum(found[name] for name in ("matmul", "attention", "elementwise", "head_and_loss"))
    assert terms(constants=short, **long)["data_parallel"] == pytest.approx(bare - 1e-3 * compute_s)


def test_the_optimizer_moves_its_state_in_device_or_host_memory():
    # Reads 4 x 4 bytes, writes 3 x 4 and the bf16 copy, passes twice more over the gradient.
    assert terms()["optimizer"] == pytest.approx(WEIGHTS * 38 / 1e13)
    assert terms(dp_shard=2, accumulation=4)["optimizer"] == pytest.approx(WEIGHTS / 2 * 38 / 1e13)
    # 7 x 4 bytes at 400 GB/s of the host, 4 + 2 over the link of 10 GB/s.
    found = terms(offload="optimizer")["optimizer"]
    assert found == pytest.approx(WEIGHTS * 28 / 400e9 + WEIGHTS * 6 / 10e9)
    # Two ranks of a node share its memory, and each has its own link.
    found = terms(offload="optimizer", dp_shard=2, accumulation=4)["optimizer"]
    assert found == pytest.approx(WEIGHTS * 28 / 400e9 + WEIGHTS / 2 * 6 / 10e9)


def test_muon_makes_whole_matrices_orthogonal_on_each_rank():
    muon = dataclasses.replace(WORK, optimizer="muon")
    # Five times 4 r^2 c + 2 r^3: q and o 1000 x 1000, k and v 500 x 1000, gate, up and down 1000 x 4000; 4 blocks.
    flops = 4 * 5 * (2 * 6e9 + 2 * 1.25e9 + 3 * 18e9)
    assert terms(work=muon)["optimizer"] - terms()["optimizer"] == pytest.approx(flops / 0.5e15)
    # And gathers their fp32 momentum, half of which is on the other rank.
    apart = terms(work=muon, dp_shard=2, accumulation=4)["optimizer"] - terms(dp_shard=2, accumulation=4)["optimizer"]
    gather_s = 4 * BLOCK_WEIGHTS * 4 / 2 / rate_of("fsdp", dp_shard=2)
    assert apart == pytest.approx(flops / 0.5e15 + gather_s)


def test_norms_of_q_and_k_move_them_once_more():
    normed = dataclasses.replace(WORK, model=MODEL.model_copy(update={"family": "qwen3"}))
    for compiled, more in ((True, 2), (False, 2)):
        extra_s = 3 * 4 * 16_000 * more * 1500 * 2 / 1e13
        plain_s = terms(compile=compiled)["elementwise"]
        assert terms(work=normed, compile=compiled)["elementwise"] == pytest.approx(plain_s + extra_s)


def test_fp8_speeds_up_the_blocks_alone_and_pays_for_its_casts():
    plain, low = terms(), terms(precision="fp8")
    # 0.25 of 4e15 beside 0.5 of 1e15; head and attention stay.
    assert low["matmul"] == pytest.approx(plain["matmul"] / 2)
    assert (low["head_and_loss"], low["attention"]) == (plain["head_and_loss"], plain["attention"])
    assert low["elementwise"] > plain["elementwise"]


def test_data_and_checkpoints_cross_the_host_link():
    # 16 bytes for each of 16 000 tokens over 10 GB/s; 12 bytes a weight every 10 steps, at the 5 GB/s of staging.
    found = terms(work=dataclasses.replace(WORK, checkpoint_every_steps=10))
    assert found["data"] == pytest.approx(16 * 16_000 / 10e9)
    assert found["checkpoint_stall"] == pytest.approx(WEIGHTS * 12 / 5e9 / 10)


def test_context_parallel_hides_behind_the_attention():
    free = dataclasses.replace(PLAIN, cp_overlap_frac=1e-12)
    bare = terms(cp=2, constants=free)["context_parallel"]
    # 4 blocks x (1 gather + 1 reduction) of keys and values of a row, 2 x 500 wide, half of which leaves.
    assert bare == pytest.approx(8 * 4 * 2 * 2000 * 2 * 500 * 2 / 2 / rate_of("cp", cp=2))
    again = terms(cp=2, constants=free, remat="full")["context_parallel"]
    assert again == pytest.approx(bare * 3 / 2)
    # A ring of two passes its half on once, and Megatron's passes it on again in backward.
    assert terms(cp=2, constants=free, cp_attention="ring")["context_parallel"] == pytest.approx(bare)
    megatron = dataclasses.replace(OURS, moves_inputs_again=True)
    found = terms(cp=2, constants=free, cp_attention="ring", software=megatron)["context_parallel"]
    assert found == pytest.approx(bare * 3 / 2)
    # Ulysses moves q, k, v and the output, 3000 wide, of its half of the tokens, and keeps half of that.
    ulysses = terms(cp=2, constants=free, cp_attention="ulysses")["context_parallel"]
    assert ulysses == pytest.approx(8 * 4 * 2 * 2000 / 2 * 3000 * 2 / 2 / rate_of("cp", cp=2))
    assert terms(cp=2)["context_parallel"] == pytest.approx(max(bare - 0.5 * terms(cp=2)["attention"], 0.5 * bare))


def test_each_doubling_of_the_nodes_adds_its_share():
    slow = dataclasses.replace(PLAIN, straggler_frac=0.01)
    found = terms(layout(dp_shard=8, accumulation=1, n_nodes=4), constants=slow)
    rest = sum(seconds for name, seconds in found.items() if name != "stragglers")
    assert found["stragglers"] == pytest.approx(0.02 * rest)


def test_a_lower_power_limit_than_the_stock_part_slows_the_products():
    at = machine(name="NVIDIA H100 SXM", power_w=350)
    assert terms(at=at)["matmul"] == pytest.approx(terms()["matmul"] * 2**0.5)


def test_a_measured_rate_takes_the_place_of_the_share_of_the_peak():
    at = machine().model_copy(update={"measured": Measured(matmul_flops_per_s=ByDtype(bf16=0.8e15))})
    assert terms(at=at)["matmul"] == pytest.approx(terms()["matmul"] * 0.5 / 0.8)
    # Attention has its share of the peak that goes with the measured half: 1.6e15.
    assert terms(at=at)["attention"] == pytest.approx(terms()["attention"] / 1.6)
    half = dataclasses.replace(PLAIN, memory_frac=0.5)
    at = machine().model_copy(update={"measured": Measured(memory_bytes_per_s=0.8e13)})
    assert terms(at=at, constants=half)["elementwise"] == pytest.approx(terms()["elementwise"] / 0.8)
    assert terms(constants=half)["elementwise"] == pytest.approx(terms()["elementwise"] * 2)


def test_a_device_without_any_rate_has_no_time():
    unknown = machine(peak_flops_per_s=ByDtype())
    assert set(terms(at=unknown).values()) == {None}
    assert total_step_time_s(terms(at=unknown)) is None


def test_terms_add_up_and_none_is_negative():
    found = terms(dp_shard=2, accumulation=2, tp=2, cp=2, remat="full")
    assert all(seconds >= 0 for seconds in found.values())
    assert total_step_time_s(found) == pytest.approx(sum(found.values()))


def test_the_generation_of_a_device_is_read_from_its_name():
    names = {
        "NVIDIA A100-SXM-64GB": "ampere", "NVIDIA GH200 120GB": "hopper", "NVIDIA H200": "hopper",
        "NVIDIA GB200": "blackwell", "AMD Instinct MI250X": "cdna2", "Tesla V100-SXM2-16GB": "volta", "GPU": "other",
    }  # fmt: skip
    for name, generation in names.items():
        assert architecture_of(machine(name=name).device) == generation
