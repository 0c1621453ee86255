"""A state to save and load: float32 weights and both Adam moments of a Llama-shaped model, of a given size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

# Its number of layers makes the parameters.
VOCAB_SIZE = 32000
MOMENTS = ("exp_avg", "exp_avg_sq")
BYTES_PER_PARAMETER = 4 * (1 + len(MOMENTS))


def weight_shapes(n_parameters: float) -> dict[str, tuple[int, int]]:
    """Matrices of about so many parameters, 4e6 at least."""
    width = 2048 if n_parameters >= 5e8 else 512 if n_parameters >= 5e7 else 64
    ffn = 4 * width
    block = {"qkv": (3 * width, width), "out": (width, width), "up_gate": (2 * ffn, width), "down": (width, ffn)}
    n_ends = 2 * VOCAB_SIZE * width
    n_layers = max(1, round((n_parameters - n_ends) / sum(rows * columns for rows, columns in block.values())))
    layers = {f"layers.{i}.{name}": shape for i in range(n_layers) for name, shape in block.items()}
    return {"embed": (VOCAB_SIZE, width), **layers, "head": (VOCAB_SIZE, width)}


def build_state(n_parameters: float, n_ranks: int, device: str = "cpu") -> dict[str, Any]:
    """Rows split over all ranks as FSDP does. Random: nothing to compress."""
    mesh = init_device_mesh(device, (n_ranks,), mesh_dim_names=("dp_shard",))

    def sharded(rows: int, columns: int) -> DTensor:
        return DTensor.from_local(torch.rand(rows // n_ranks, columns, device=device), mesh, [Shard(0)])

    shapes = weight_shapes(n_parameters)
    return {
        "model": {name: sharded(*shape) for name, shape in shapes.items()},
        "optim": {name: {key: sharded(*shape) for key in MOMENTS} for name, shape in shapes.items()},
    }


def locals_of(state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """This rank's part of each tensor."""
    for value in state.values():
        if isinstance(value, dict):
            yield from locals_of(value)
        else:
            yield value.to_local()


def drop_from_cache(folder: Path) -> None:
    """So that the disk is read, not memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
