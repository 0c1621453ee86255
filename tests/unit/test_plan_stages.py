"""Which layers make a stage, and where stages stand."""

from __future__ import annotations

import pytest

from aifactory_train.plan.contract import Layout
from aifactory_train.plan.stages import layers_by_rank, layers_by_stage, stages_of_rank
from aifactory_train.recipe.schema import Model

# The head, V x D, costs as much as 2.4 of these blocks: 525e6 weights against 218e6.
LLAMA_8B = Model(
    family="llama", vocab_size=128256, hidden_size=4096, ffn_size=14336, n_layers=32, n_heads=32, n_kv_heads=8,
    head_size=128, max_seq_len_tokens=8192, rope_theta=5e5, norm_eps=1e-5, tied_embeddings=False,
)  # fmt: skip


def sizes(model: Model, n_stages: int, **how: bool) -> list[int]:
    return [len(layers) for layers in layers_by_stage(model, n_stages, **how)]


def test_the_last_stage_has_fewer_layers_by_what_the_head_costs():
    assert sizes(LLAMA_8B, 4) == [8, 9, 9, 6]
    assert sizes(LLAMA_8B, 4, counts_head=False) == [8, 8, 8, 8]
    tiny = LLAMA_8B.model_copy(update={"n_layers": 2})
    assert sizes(tiny, 2) == [1, 1], "a stage without a layer"


@pytest.mark.parametrize("n_layers", [7, 32, 61])
def test_stages_are_all_layers_in_order_and_the_slowest_could_not_be_faster(n_layers: int):
    model, head = LLAMA_8B.model_copy(update={"n_layers": n_layers}), 525336576 / 218103808
    for n_stages in range(1, n_layers + 1):
        found = layers_by_stage(model, n_stages)
        assert [layer for layers in found for layer in layers] == list(range(n_layers))
        assert min(len(layers) for layers in found) >= 1
        slowest = max(len(found[-1]) + head, *(len(layers) for layers in found))
        best = min(
            max(last + head, -(-(n_layers - last) // (n_stages - 1)) if n_stages > 1 else 0)
            for last in range(1, n_layers - n_stages + 2)
            if n_stages > 1 or last == n_layers
        )
        assert slowest == pytest.approx(best)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ValueError, match="do not make 33 stages"):
        layers_by_stage(LLAMA_8B, 33)
    # Megatron may count embedding and head as layers: 32 blocks on 34 stages.
    assert sizes(LLAMA_8B, 33, counts_head=False) == [1] * 32 + [0]
    assert sizes(LLAMA_8B, 34, counts_head=False) == [0] + [1] * 32 + [0]
    with pytest.raises(ValueError, match="do not make 35 stages"):
        layers_by_stage(LLAMA_8B, 35, counts_head=False)


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank", "found"),
    [
        ("1f1b", 1, [(0,), (1,), (2,), (3,)]),
        ("interleaved", 3, [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]),
        ("zbv", 2, [(0, 7), (1, 6), (2, 5), (3, 4)]),
        ("dualpipev", 2, [(0, 7), (1, 6), (2, 5), (3, 4)]),
    ],
)
def test_stages_stand_in_turn_or_in_a_v(schedule: str, stages_per_rank: int, found: list[tuple[int, ...]]):
    layout = Layout(
        engine="fsdp2", world_size=4, pp=4, dp_shard=1, pipeline_schedule=schedule, stages_per_rank=stages_per_rank,
        micro_batch_rows=1, accumulation=8, reshard_after_forward=True, remat="none", precision="bf16",
        threads_per_rank=1,
    )  # fmt: skip
    assert [stages_of_rank(layout, rank) for rank in range(4)] == found
    layers = [len(layers) for layers in layers_by_stage(LLAMA_8B, 4 * stages_per_rank)]
    assert layers_by_rank(LLAMA_8B, layout) == tuple(sum(layers[stage] for stage in held) for held in found)
