"""The ranks of a run as a grid, seen twice: as holders of weights and as readers of rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from aifactory_train.plan.contract import Layout


@dataclass(frozen=True)
class Mesh:
    """Both views number the ranks alike: pp outermost, then dp_replicate, dp_shard, cp, and tp innermost.

    weights: axes (pp, dp_replicate, fsdp, tp). fsdp is dp_shard and cp together: ranks of cp hold the same weights.
    rows: axes (pp, dp, cp, tp). dp is dp_replicate and dp_shard together: each of its ranks reads other rows.
    """

    weights: DeviceMesh
    rows: DeviceMesh


def build_mesh(layout: Layout, device_type: str) -> Mesh:
    """Collective over all ranks of the run: every rank arrives."""
    weights = (layout.pp, layout.dp_replicate, layout.shard_degree, layout.tp)
    rows = (layout.pp, layout.dp, layout.cp, layout.tp)
    return Mesh(
        init_device_mesh(device_type, weights, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp")),
        init_device_mesh(device_type, rows, mesh_dim_names=("pp", "dp", "cp", "tp")),
    )
