"""Bytes per device by named term, for FSDP alone."""

from __future__ import annotations

from aifactory_train.machine.machine import Machine
from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.recipe.schema import Recipe

# A layout counts as fitting below this share of the memory; the rest is for fragmentation and what no term names.
FIT_FRAC = 0.9

_MIB = 1024**2
# Python, torch and its kernels: on a CPU the resident size after `import torch` and one step (2.13, x86-64); on a
# GPU its context (CUDA 12 on A100 and H100).
RUNTIME_BYTES = {"cpu": 400 * _MIB, "cuda": 600 * _MIB, "rocm": 600 * _MIB}
# Buffers of the collectives: Gloo pairs on a CPU; NCCL and RCCL take 4 MiB per channel, peer and protocol.
COMMUNICATOR_BYTES = {"cpu": 32 * _MIB, "cuda": 512 * _MIB, "rocm": 512 * _MIB}


def estimate_memory_bytes(recipe: Recipe, machine: Machine, layout: Layout) -> dict[str, int]:
    """Peak bytes of one device by term. All terms are alive at the end of the last micro-batch's forward."""
    model, kind, size = recipe.model, machine.device.kind, shape.BYTES[layout.precision]
    n_all, n_root, n_block = (f(model) for f in (shape.n_parameters, shape.n_root_parameters, shape.n_block_parameters))
    n_working = min(n_all, n_root + 2 * n_block)  # the root group, the block at work and the one fetched ahead
    n_gathered = n_working if layout.reshard_after_forward else n_all
    kept = shape.Kept(layout.precision, kind, recipe.data.document_mask, layout.remat)
    # Micro-batches before the last add up their gradients unsharded, in the precision of the reduction.
    gradients_bytes = n_all * shape.BYTES["fp32"] if layout.accumulation > 1 else n_working * size
    state_bytes = _shard(n_all, layout) * shape.BYTES["fp32"] + optimizer_state_bytes(recipe, layout)
    rows, tokens = layout.micro_batch_rows, recipe.data.seq_len_tokens
    return {
        "parameters": _shard(n_all, layout) * shape.BYTES["fp32"],
        "gradients": _shard(n_all, layout) * shape.BYTES["fp32"],
        "optimizer_state": optimizer_state_bytes(recipe, layout),
        "gathered_parameters": n_gathered * size,
        "unsharded_gradients": gradients_bytes,
        "activations": shape.activation_bytes(model, rows, tokens, kept),
        "loss_chunk": shape.loss_chunk_bytes(model, rows, tokens, layout.precision),
        # An asynchronous save writes from a copy in host memory, which on a CPU is the device's.
        "checkpoint_copy": state_bytes if kind == "cpu" and recipe.checkpoint.asynchronous else 0,
        "communicators": COMMUNICATOR_BYTES[kind] if layout.world_size > 1 else 0,
        "runtime": RUNTIME_BYTES[kind],
    }


def optimizer_state_bytes(recipe: Recipe, layout: Layout) -> int:
    """fp32 moments of one device's shard: two per weight for AdamW, one for the block matrices under Muon."""
    n_moments = 2 * shape.n_parameters(recipe.model)
    if recipe.optim.name == "muon":
        n_moments -= recipe.model.n_layers * shape.n_block_matrix_parameters(recipe.model)
    return _shard(n_moments, layout) * shape.BYTES["fp32"]


def memory_per_rank_bytes(machine: Machine, ranks_per_node: int) -> int | None:
    """Memory that one rank may use: the device's, or on a CPU its share of the host's. None if unknown."""
    if machine.device.kind != "cpu":
        return machine.device.memory_bytes
    host_bytes = machine.host.memory_bytes or machine.device.memory_bytes
    return None if host_bytes is None else host_bytes // ranks_per_node


def _shard(n: int, layout: Layout) -> int:
    return -(-n // layout.dp_shard)
