"""What the dry build cannot see: who holds what, other software, and that an estimate stays quick to ask for.

That the counts are those of the training is shown by tests/cpu/test_dry_build.py.
"""

import dataclasses

import pytest

from aifactory_train.plan.contract import Layout
from aifactory_train.plan.traffic import LEAST_BYTES, Held, Transfer, _traffic, held_by, reduces_each, traffic
from aifactory_train.plan.work import OURS, Work
from aifactory_train.recipe.schema import Model

MODEL = Model(
    family="llama", vocab_size=10_000, hidden_size=1000, ffn_size=4000, n_layers=8, n_heads=10, n_kv_heads=5,
    head_size=100, max_seq_len_tokens=2000, rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False,
)  # fmt: skip
WORK = Work(MODEL, seq_len_tokens=2000, global_batch_rows=8)
TIED = dataclasses.replace(WORK, model=MODEL.model_copy(update={"tied_embeddings": True}))
STREAM_BYTES, BLOCK = 2000 * 1000 * 2, 1000 * (2 * 1000 + 2 * 500 + 3 * 4000) + 2 * 1000


def layout(**changes):
    given = {"dp_shard": 1, "micro_batch_rows": 1, "accumulation": 8, "reshard_after_forward": True, "remat": "none"}
    given |= {"engine": "fsdp2", "precision": "bf16", "threads_per_rank": 1} | changes
    degrees = [given.get(axis, 1) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]
    world_size = degrees[0] * degrees[1] * degrees[2] * degrees[3] * degrees[4]
    return Layout(world_size=world_size, **given)


def of(axis, *args, **kwargs):
    return {(t.kind, t.n_bytes): t.times for t in traffic(*args, **kwargs) if t.axis == axis}


def test_one_rank_moves_nothing():
    assert traffic(WORK, layout()) == ()


def test_fsdp_gathers_blocks_twice_and_what_is_around_them_once_for_each_micro_batch():
    root = 2 * 10_000 * 1000 + 1000
    assert of("fsdp", WORK, layout(dp_shard=2)) == {
        ("all_gather", BLOCK * 2): 8 * 2 * 8, ("reduce_scatter", BLOCK * 4): 8,
        ("all_gather", root * 2): 8, ("reduce_scatter", root * 4): 1,
    }  # fmt: skip


def test_rows_of_weights_are_padded_to_a_multiple_of_the_shards():
    # Over 3 ranks 1000 rows become 1002, 500 become 501, 4000 become 4002.
    block = 1000 * (2 * 1002 + 2 * 501 + 2 * 4002) + 4000 * 1002 + 2 * 1002
    assert ("all_gather", block * 2) in of("fsdp", WORK, layout(dp_shard=3))


def test_zero_1_gathers_and_reduces_once_a_step_and_zero_2_may_reduce_each_time():
    one = layout(dp_shard=2, engine="deepspeed", zero_stage=1, reduce_each_micro_batch=True)
    assert set(of("fsdp", WORK, one).values()) == {8, 1} and not reduces_each(one)
    two = one.model_copy(update={"zero_stage": 2})
    found = of("fsdp", WORK, two)
    assert found["all_gather", BLOCK * 2] == 8 and found["reduce_scatter", BLOCK * 4] == 8 * 8
    assert not reduces_each(layout(pp=2, reduce_each_micro_batch=True))


def test_replicas_exchange_fp32_shards_and_other_software_what_it_keeps():
    cut = layout(dp_replicate=2, dp_shard=2)
    assert of("dp_replicate", WORK, cut)["all_reduce", BLOCK * 4 // 2] == 8
    half = dataclasses.replace(OURS, fp32_gradients=False)
    assert of("dp_replicate", WORK, cut, half)["all_reduce", BLOCK * 2 // 2] == 8


def test_the_ends_of_a_pipeline_hold_the_tables_and_send_to_one_side():
    cut = layout(pp=4)
    assert held_by(WORK, cut, 0) == Held(2, True, False, 1)
    assert held_by(WORK, cut, 1) == Held(2, False, False, 2)
    assert held_by(WORK, cut, 3) == Held(2, False, True, 1)
    assert of("pp", WORK, cut, held=held_by(WORK, cut, 1)) == {("send", STREAM_BYTES): 8 * 2}
    # A table of 40 MB in fp32 crosses once where the ends share it.
    assert of("pp", TIED, cut, held=held_by(TIED, cut, 3)) == {("send", STREAM_BYTES): 8, ("send", 40_000_000): 1}
    assert of("pp", TIED, cut, held=held_by(TIED, cut, 2)) == {("send", STREAM_BYTES): 8 * 2}


def test_a_rank_with_more_stages_sends_for_each_but_not_to_itself():
    assert held_by(WORK, layout(pp=2, stages_per_rank=2, pipeline_schedule="interleaved"), 0).n_sends == 3
    v = layout(pp=4, stages_per_rank=2, pipeline_schedule="zbv")
    assert [held_by(WORK, v, rank).n_sends for rank in range(4)] == [2, 4, 4, 2]
    assert held_by(WORK, v, 0) == Held(2, True, True, 2)
    # Both copies of a tied table are on this rank.
    assert len(of("pp", TIED, v, held=held_by(TIED, v, 0))) == 1


def test_by_default_it_is_the_rank_with_most_layers():
    small_head = dataclasses.replace(WORK, model=MODEL.model_copy(update={"n_layers": 7}))
    cut = layout(pp=2, tp=2)
    most = max((held_by(small_head, cut, rank) for rank in range(2)), key=lambda held: held.n_layers)
    assert traffic(small_head, cut) == traffic(small_head, cut, held=most)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("all_gather", {("all_gather", 2000 * 1000 * 2): 64, ("reduce_scatter", 2000 * 1000 * 2): 64}),
        ("ring", {("send", 500 * 1000 * 2): 64 * 2 * 3}),
        ("ulysses", {("all_to_all", 2000 * 2000 * 2): 64 * 2, ("all_to_all", 2000 * 1000 * 2): 64 * 2}),
    ],
)
def test_context_parallel_moves_keys_and_values_as_its_form_says(form, expected):
    assert of("cp", WORK, layout(cp=4, cp_attention=form)) == expected


def test_small_messages_are_left_out():
    narrow = MODEL.model_copy(update={"family": "qwen3"})  # its norms of heads have 100 weights
    found = traffic(dataclasses.replace(WORK, model=narrow), layout(tp=5, dp_shard=2))
    assert min(t.n_bytes for t in found) >= LEAST_BYTES and all(isinstance(t, Transfer) for t in found)


def test_layouts_that_move_the_same_are_counted_once():
    traffic(WORK, layout(dp_shard=4, tp=5))
    before = _traffic.cache_info()
    traffic(WORK, layout(dp_shard=4, tp=5, n_nodes=5, compile=True))
    after = _traffic.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
