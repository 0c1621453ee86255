"""One rank of many, without the others and without memory: builds and steps, and its collectives are counted.

The code is that of training (train/setup.py, TorchEngine.train_step) under torch's fake process group and fake tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from aifactory_train.data.loader import Batch
from aifactory_train.models import attention
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Model
from aifactory_train.strictyaml import configs_dir
from aifactory_train.train import setup

WHOLE_ROWS = 2**20


class Seen(NamedTuple):
    """A collective: n_bytes as network.collective_s takes them, the whole (gathered) message."""

    axis: str
    kind: str
    n_bytes: int


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside of it, by axis, kind and size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Seen] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # its own dispatch comes back here with local tensors
        found = _collective(func, args)
        if found is not None:
            group, kind, n_bytes = found
            if group.size() > 1:
                self.seen[Seen(group.group_desc.removeprefix("mesh_"), kind, n_bytes)] += 1
        return func(*args, **(kwargs or {}))


# Place of the group, place of the tensors whose bytes count.
_IN_PLACE = {
    "_allgather_base_": ("all_gather", 2, 0),
    "_reduce_scatter_base_": ("reduce_scatter", 2, 1),
    "allreduce_": ("all_reduce", 1, 0),
    "send": ("send", 1, 0),
    "recv_": ("receive", 1, 0),
}
_FUNCTIONAL = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_to_all_single": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
}


def _collective(func: Any, args: Any) -> tuple[dist.ProcessGroup, str, int] | None:
    """(group, kind, bytes) of one, None for other operators. A collective that the tables lack is an error."""
    space, name = func.namespace, func.overloadpacket.__name__
    if space == "c10d":
        kind, group_at, tensors_at = _IN_PLACE[name]
        return dist.ProcessGroup.unbox(args[group_at]), kind, _n_bytes(args[tensors_at])
    if space not in ("_c10d_functional", "_c10d_functional_autograd", "_dtensor") or name == "wait_tensor":
        return None
    kind, group, n_bytes = _FUNCTIONAL[name], _resolve_process_group(args[-1]), _n_bytes(args[0])
    if name == "all_to_all_single" and sum(n_rows > 0 for n_rows in args[2]) == 1:
        return group, "send", n_bytes  # all of it to one neighbour
    return group, kind, n_bytes * (group.size() if kind in ("all_gather", "all_to_all") else 1)


def _n_bytes(tensors: torch.Tensor | list[torch.Tensor]) -> int:
    return sum(t.numel() * t.itemsize for t in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process as one of many whose collectives do nothing, with tensors that hold nothing."""
    # A mesh over the whole world would use the world's group for more than one axis, so the world is larger.
    dist.init_process_group("fake", rank=rank, world_size=2 * world_size, store=FakeStore())
    try:
        with (
            patch.object(setup, "build_mesh", _outside_of_fakes(setup.build_mesh)),
            patch.object(DeviceMesh, "__init__", _outside_of_fakes(DeviceMesh.__init__)),
            patch.object(_PipelineSchedule, "_warmup_p2p", _all_borders_are_known),
            # Scores take no memory here, so that fewer operators do.
            patch.object(attention, "CPU_CHUNK_TOKENS", WHOLE_ROWS),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # meshes that look alike are taken for one, and this one's groups are gone


def _outside_of_fakes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Meshes read the numbers of their ranks, so those must be there."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


def _all_borders_are_known(schedule: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
    """In place of a vote, for which each rank would need the answer of its neighbour."""
    for stage in stages:
        assert not InferenceMode.needs_dynamic(stage._user_meta, has_backward)
        stage._inference_mode = InferenceMode.STATIC


def a_plan_of(model: Model, layout: Layout, seq_len_tokens: int) -> Plan:
    """A plan without predictions."""
    recipe = load_recipe(configs_dir() / "recipes" / "demo.yaml")
    rows = layout.dp * layout.accumulation * layout.micro_batch_rows
    data = recipe.data.model_copy(update={"seq_len_tokens": seq_len_tokens, "document_mask": False})
    train = recipe.train.model_copy(update={"global_batch_tokens": rows * seq_len_tokens})
    recipe = recipe.model_copy(update={"model": model, "data": data, "train": train})
    return Plan.model_construct(recipe=recipe, layout=layout)


def dry_step(plan: Plan, rank: int) -> Counter[Seen]:
    """The collectives of one optimizer step of `rank`; weights have no values, so nothing is computed."""
    layout, n_tokens = plan.layout, plan.recipe.data.seq_len_tokens
    with fake_rank(rank, layout.world_size):
        engine = setup.build_engine(plan, torch.device("cpu"), fresh=False)
        tokens_BT = torch.zeros(layout.accumulation * layout.micro_batch_rows, n_tokens, dtype=torch.long)
        with Collectives() as counted:
            engine.train_step(Batch(tokens_BT, tokens_BT, None, None, tokens_BT.numel()), 1)
        engine.close()
    return counted.seen
