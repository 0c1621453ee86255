"""What engines and parallel axes see of a model: its parts by name, nothing of its family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from aifactory_train.models.flat import Box, FlatSlice

# What a model computes in, by the precision of a layout.
# Matrix products in fp8 are an affair of their own modules; everything around them is bf16.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp8_rowwise": torch.bfloat16}


@dataclass(frozen=True)
class ModelParts:
    """A whole model, or what one pipeline stage holds of it.

    `root(x, target_BT, document_BT, position_BT)` takes token numbers x_BT in the first stage, otherwise the hidden
    states x_BTD of the stage before; it returns the summed loss where there is a `norm`, otherwise hidden states.

    root: everything below it that is not in `blocks` is used at both ends of a step, so the axes treat it as one group.
        Its `chunk_loss` (models/loss.py) is a module, so that it can be replaced and compiled.
    embed, norm, head: None where the stage has none. With tied embeddings there is no head, and the last stage of a
        pipeline has an `embed` of its own, whose table must stay equal to that of the first.
    blocks: by number of the layer in the whole model, ascending.
    attention_hosts: modules whose attribute `attention` (models/attention.py) says how tokens meet.
    tp_plan: what tensor parallelism does to the linears of a block, by their name in it, in the words of Hugging Face's
        `base_model_tp_plan`: "colwise" or "rowwise".
    """

    root: nn.Module
    embed: nn.Module | None
    blocks: list[nn.Module]
    norm: nn.Module | None
    head: nn.Module | None
    attention_hosts: list[nn.Module]
    tp_plan: dict[str, str]

    def block_matrices(self) -> list[nn.Parameter]:
        """The weight matrices inside the blocks that train: what Muon works on."""
        return [p for block in self.blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]


def local_part(sharded: Tensor, full: Tensor) -> Tensor:
    """This rank's part of `full`, a whole tensor of the shape of `sharded`. A view; no communication."""
    if not isinstance(sharded, DTensor):
        return full
    return full[local_slices(sharded)]


def local_slices(sharded: DTensor) -> tuple[slice, ...]:
    """Where this rank's part of a sharded tensor lies in the whole."""
    return _slices(sharded.shape, sharded.device_mesh, sharded.placements)


@cache  # Muon asks at every step, and the answer takes a few small tensors to compute
def _slices(size: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> tuple[slice, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(size, mesh, placements)
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


def local_tensor(tensor: Tensor) -> Tensor:
    """The storage of this rank: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_on_each_rank(tensor: Tensor, axis: str) -> bool:
    """Whether a tensor is split over a mesh that has `axis`, but not over that axis."""
    if not isinstance(tensor, DTensor) or axis not in (tensor.device_mesh.mesh_dim_names or ()):
        return False
    return tensor.placements[tensor.device_mesh.mesh_dim_names.index(axis)].is_replicate()


def boxes(weight: Tensor) -> list[tuple[Box, Tensor]]:
    """Which boxes of the whole tensor this rank has, and a view of its storage for each.

    Args:
        weight: whole, a DTensor, or a FlatSlice.
    """
    if isinstance(weight, FlatSlice):
        return weight.boxes()
    if isinstance(weight, DTensor):
        return [(local_slices(weight), weight.to_local())]
    return [(tuple(slice(0, n) for n in weight.shape), weight)]


@torch.no_grad()
def copy_into(weight: Tensor, full: Tensor) -> None:
    """Copy this rank's part of a whole tensor into a weight."""
    for box, view in boxes(weight):
        view.copy_(full[box])
