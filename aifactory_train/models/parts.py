"""What engines and parallel axes see of a model: its parts by name, nothing of its family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class ModelParts:
    """`root(input_BT, target_BT, document_BT, position_BT)` returns the summed loss.

    Everything below `root` that is not in `blocks` (embedding, last norm, head) is used at both ends of a
    step, so the axes treat it as one group. `chunk_loss` holds no parameters; it is named to be compiled.
    """

    root: nn.Module
    blocks: list[nn.Module]
    chunk_loss: nn.Module

    def block_matrices(self) -> list[nn.Parameter]:
        """The weight matrices inside the blocks: what Muon works on."""
        return [p for block in self.blocks for p in block.parameters() if p.ndim == 2]


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


@torch.no_grad()
def copy_into(parameter: Tensor, full: Tensor) -> None:
    """Copy this rank's part of a whole tensor into a parameter that may be sharded."""
    local_tensor(parameter).copy_(local_part(parameter, full))
