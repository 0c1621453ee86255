"""Which layers make a stage of the pipeline, and which stages a rank holds. The plan and the training ask the same.

The stages of a layout are pp * stages_per_rank. The first one holds the embedding too, the last one norm and head.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise

from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.recipe.schema import Model

V_SCHEDULES = ("zbv", "dualpipev")
# Of the schedules that leave no choice; interleaved has 2 or more.
STAGES_PER_RANK = {"1f1b": 1, "zbv": 2, "dualpipev": 2}


def layers_by_stage(model: Model, n_stages: int, counts_head: bool = True) -> tuple[range, ...]:
    """Numbers of the layers of each stage, in order; the slowest stage is as fast as it can be.

    The head counts as many layers as its matrix product costs, the embedding as none. Where several splits are
    equally fast, the most even one is taken, and what does not divide goes to the second stage and those after it:
    the first keeps the most activations.

    Args:
        n_stages: at least 1, at most model.n_layers.
        counts_head: False for software that counts blocks alone, or embedding and head as a layer each: there the
            ends may have a table alone, so that n_stages is at most n_layers + 2.
    """
    head = shape.n_table_parameters(model) / shape.n_block_matrix_parameters(model) if counts_head else 0.0
    return _layers_by_stage(model.n_layers, n_stages, head)


@lru_cache(maxsize=1024)
def _layers_by_stage(n_layers: int, n_stages: int, head: float) -> tuple[range, ...]:
    n_bare = max(0, n_stages - n_layers)
    if n_stages < 1 or n_bare > (0 if head else 2):
        raise ValueError(f"{n_layers} layers do not make {n_stages} stages of at least one layer")
    if n_stages == 1:
        return (range(n_layers),)
    if n_bare:
        blocks = tuple(range(i, i + 1) for i in range(n_layers))
        return (range(0),) * (n_bare - 1) + blocks + (range(0),)
    before = n_stages - 1

    def slowest(n_last: int) -> tuple[float, int]:
        return max(n_last + head, -(-(n_layers - n_last) // before)), -n_last

    # The last stage never has more than its even share: the head is no less than nothing.
    n_last = min(range(1, n_layers // n_stages + 1), key=slowest)
    least, more = divmod(n_layers - n_last, before)
    counts = [least + (0 < stage <= more) for stage in range(before)] + [n_last]
    return tuple(range(start, end) for start, end in pairwise(accumulate(counts, initial=0)))


def layers_by_rank(model: Model, layout: Layout, counts_head: bool = True) -> tuple[int, ...]:
    """Number of layers of each rank of pp, over all its stages."""
    if layout.pp == 1:
        return (model.n_layers,)
    layers = layers_by_stage(model, layout.pp * layout.stages_per_rank, counts_head)
    return tuple(sum(len(layers[stage]) for stage in stages_of_rank(layout, rank)) for rank in range(layout.pp))


def stages_of_rank(layout: Layout, pp_rank: int) -> tuple[int, ...]:
    """Stages of one rank of pp, ascending. In a V the second half of the stages comes back over the ranks."""
    if layout.pipeline_schedule in V_SCHEDULES:
        return pp_rank, 2 * layout.pp - 1 - pp_rank
    return tuple(range(pp_rank, layout.pp * layout.stages_per_rank, layout.pp))
