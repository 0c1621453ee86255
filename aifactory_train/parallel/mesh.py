"""The mesh of devices: one axis per kind of parallelism, nested in the order of the plan."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from aifactory_train.plan.contract import Layout


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """A mesh with the axis `dp_shard`. All ranks arrive here."""
    return init_device_mesh(device_type, (layout.dp_shard,), mesh_dim_names=("dp_shard",))
