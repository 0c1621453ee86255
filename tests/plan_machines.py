"""Made-up machines and the recipes for the tests of the planner."""

from __future__ import annotations

from aifactory_train.machine.machine import ByDtype, Device, Host, Machine, Measured
from aifactory_train.strictyaml import configs_dir

GIB = 1024**3
NOTHING_MEASURED = Measured()
DEMO = configs_dir() / "recipes" / "demo.yaml"
LLAMA_8B = configs_dir() / "recipes" / "llama3-8b.yaml"
LLAMA_70B = configs_dir() / "recipes" / "llama3-70b.yaml"
# What a recipe may ask for and this version does not train.
UNTRAINABLE = [
    *("train.compile=auto", "layout.pp=2", "layout.pipeline_schedule=zbv", "layout.reshard_after_forward=true"),
]


def cpu(memory_bytes=24 * GIB, measured=NOTHING_MEASURED, bf16=True, peak=None):
    device = Device(
        kind="cpu", name="CPU", per_node=1, memory_bytes=memory_bytes, native_bf16=bf16,
        peak_flops_per_s=ByDtype(bf16=peak),
    )  # fmt: skip
    return Machine(name="local", device=device, host=Host(cores=8, memory_bytes=memory_bytes), measured=measured)


def gpus(memory_bytes=80 * GIB, per_node=4, **measured):
    device = Device(
        kind="cuda", name="GPU", per_node=per_node, memory_bytes=memory_bytes, native_bf16=True,
        peak_flops_per_s=ByDtype(bf16=1e15), memory_bytes_per_s=2e12,
    )  # fmt: skip
    rates = Measured(matmul_flops_per_s=ByDtype(bf16=6e14), **measured)
    return Machine(name="gpus", device=device, host=Host(cores=64), measured=rates)
