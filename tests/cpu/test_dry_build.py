"""The collectives that the planner counts are those that the training makes: axis by axis, kind by kind, byte by byte.

One rank builds and steps under fake collectives and fake tensors (tests/dry_build.py). Nothing is left out of the
comparison but messages below LEAST_BYTES, of which a step has few: the count of valid tokens, the norm of the
gradients, and in a model this narrow the gradients of the norms of heads.
"""

from collections import Counter

import pytest

from aifactory_train.plan.contract import Layout
from aifactory_train.plan.traffic import LEAST_BYTES, held_by, traffic
from aifactory_train.plan.work import work_of
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Model
from aifactory_train.strictyaml import configs_dir
from dry_build import Seen, a_plan_of, dry_step

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
SMALL = {
    "family": "llama", "vocab_size": 1024, "hidden_size": 512, "ffn_size": 1024, "n_layers": 4, "n_heads": 16,
    "n_kv_heads": 8, "head_size": 32, "max_seq_len_tokens": 4096, "rope_theta": 1e4, "norm_eps": 1e-5,
    "tied_embeddings": False,
}  # fmt: skip
QWEN_TIED = {"family": "qwen3", "tied_embeddings": True}
KEPT = {"reshard_after_forward": False}
EACH = {"reduce_each_micro_batch": True}
DEEP = {"pp": 4, "accumulation": 4}
TWO_STAGES = {"pp": 2, "accumulation": 4, "stages_per_rank": 2}
V = {**TWO_STAGES, **KEPT}


def a_layout(**given: object) -> Layout:
    fields = {
        "engine": "fsdp2", "dp_shard": 1, "micro_batch_rows": 1, "accumulation": 2, "reshard_after_forward": True,
        "remat": "none", "precision": "bf16", "threads_per_rank": 1,
    } | given  # fmt: skip
    degrees = Layout.model_construct(**{axis: fields.get(axis, 1) for axis in AXES})
    return Layout(world_size=degrees.pp * degrees.dp * degrees.cp * degrees.tp, **fields)


def assert_counted(layout: Layout, rank: int, model: Model, seq_len_tokens: int) -> None:
    plan = a_plan_of(model, layout, seq_len_tokens)
    seen = dry_step(plan, rank)
    work, pp_rank = work_of(plan.recipe), rank // (layout.world_size // layout.pp)
    planned: Counter[Seen] = Counter()
    for transfer in traffic(work, layout, held=held_by(work, layout, pp_rank)):
        planned[Seen(transfer.axis, transfer.kind, transfer.n_bytes)] += transfer.times
    large = Counter({one: times for one, times in seen.items() if one.n_bytes >= LEAST_BYTES and one.kind != "receive"})
    assert large == planned, f"not planned: {large - planned}; planned alone: {planned - large}"
    n_small = sum(times for one, times in seen.items() if one.n_bytes < LEAST_BYTES)
    assert n_small <= 4 + 2 * model.n_layers * model.qk_norm
    # What comes over a border is as much as what goes over it in the other direction.
    came = Counter({one._replace(kind="send"): times for one, times in seen.items() if one.kind == "receive"})
    assert came == Counter({one: times for one, times in large.items() if one.axis == "pp"})


ALONE = [
    ({"dp_shard": 8}, 3, {}),
    ({"dp_shard": 8, **EACH}, 0, {}),
    ({"dp_shard": 8, **KEPT}, 7, {}),
    ({"dp_shard": 8, **KEPT, **EACH}, 7, {}),
    ({"dp_shard": 12, "remat": "full", "precision": "fp32"}, 11, QWEN_TIED),  # 12 divides no dimension
    ({"dp_replicate": 8, **EACH}, 1, {}),
    ({"tp": 8, "micro_batch_rows": 3}, 5, {}),  # a chunk and a half of the loss
    ({"tp": 8, "remat": "full"}, 0, {}),
    ({"tp": 8, "remat": "selective"}, 0, QWEN_TIED),
    ({"cp": 8}, 0, {}),
    ({"cp": 4, "remat": "selective"}, 3, {}),
    ({"cp": 8, "cp_attention": "ring"}, 7, {}),
    ({"cp": 2, "cp_attention": "ring", "remat": "full"}, 1, {}),
    ({"cp": 8, "cp_attention": "ulysses"}, 0, {}),
    ({"cp": 2, "cp_attention": "ulysses", "remat": "full"}, 1, {}),
    ({**DEEP}, 0, {}),
    ({**DEEP}, 2, {}),
    ({**DEEP}, 3, QWEN_TIED),
    ({**TWO_STAGES, "pipeline_schedule": "interleaved"}, 1, {}),
    ({**V, "pipeline_schedule": "zbv"}, 0, QWEN_TIED),
    ({**V, "pipeline_schedule": "dualpipev"}, 1, {}),
]
PAIRS = [
    ({"dp_replicate": 2, "dp_shard": 2, **EACH}, 2, {}),
    ({"dp_replicate": 2, "cp": 2}, 1, {}),
    ({"dp_replicate": 2, "tp": 2}, 3, {}),
    ({"dp_shard": 2, "cp": 2, "cp_attention": "ring"}, 3, {}),
    ({"dp_shard": 2, "tp": 2, **KEPT}, 1, QWEN_TIED),
    ({"cp": 2, "tp": 2, "cp_attention": "ulysses"}, 2, {}),
    ({"pp": 2, "dp_replicate": 2}, 3, {}),
    ({"pp": 2, "dp_shard": 2, "accumulation": 4}, 0, QWEN_TIED),
    ({"pp": 2, "dp_shard": 2, "accumulation": 4, **KEPT}, 2, {}),
    ({"dp_shard": 2, **V, "pipeline_schedule": "zbv"}, 1, {}),
    ({"pp": 2, "cp": 2, "accumulation": 3}, 3, QWEN_TIED),
    ({"pp": 2, "tp": 2, "accumulation": 3, "remat": "full"}, 0, {}),
]


@pytest.mark.parametrize(("given", "rank", "of_model"), [*ALONE, *PAIRS])
def test_the_planner_counts_the_collectives_of_a_step(given, rank, of_model):
    assert_counted(a_layout(**given), rank, Model(**SMALL | of_model), seq_len_tokens=512)


@pytest.mark.parametrize("rank", [1234, 4095])  # in the middle of the pipeline, and with the head
def test_llama_70b_on_4096_ranks_makes_the_collectives_that_are_planned(rank):
    model = load_recipe(configs_dir() / "recipes" / "llama3-70b.yaml").model
    layout = a_layout(pp=8, dp_replicate=2, dp_shard=16, cp=2, tp=8, accumulation=8, remat="selective")
    assert_counted(layout, rank, model, seq_len_tokens=8192)
