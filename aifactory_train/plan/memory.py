"""Bytes per device by named term at the moment when they are most, and bytes of a node's host memory.

A step is looked at in the moments that can be its peak: the loss, the backward pass of the last block and of the
first, the reduction of the last gradients, the optimizer. Between the two blocks everything changes evenly, so no
other moment holds more. The peak is the largest over these and over the pipeline's stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from aifactory_train.machine.machine import Machine
from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.shape import BYTES, FP32_BYTES
from aifactory_train.plan.work import OURS, Software, Work

DeviceKind = Literal["cpu", "cuda", "rocm"]
Terms = dict[str, int]

# A layout counts as fitting up to this share of the memory; the rest is what the driver keeps and no term names.
FIT_FRAC = 0.95

_MIB = 1024**2
# Python, torch and its kernels: on a CPU the resident size after `import torch` and one step (2.13, x86-64); on a
# GPU its context with the kernels of cuBLAS and NCCL loaded (CUDA 12 on A100 and H100; BigScience counted 1.1 GB).
RUNTIME_BYTES = {"cpu": 400 * _MIB, "cuda": 1024 * _MIB, "rocm": 1024 * _MIB}
# Buffers of one communicator: Gloo pairs on a CPU; NCCL and RCCL take 4 MiB per channel, peer and protocol.
COMMUNICATOR_BYTES = {"cpu": 32 * _MIB, "cuda": 256 * _MIB, "rocm": 256 * _MIB}
# Of what comes and goes within a step, this share is lost to blocks of the allocator that fit nothing else.
FRAGMENTATION_FRAC = {"cpu": 0.0, "cuda": 0.05, "rocm": 0.05}
# DeepSpeed's stages 2 and 3 gather gradients in a bucket of so many elements before they are reduced.
DEEPSPEED_BUCKET = 500_000_000
# Of one rank in host memory: Python, torch, the driver's mappings and pinned buffers of NCCL.
HOST_RUNTIME_BYTES = 3 * 1024 * _MIB
# Of one rank: batches made ahead and the mapped pages of the shards that they come from.
HOST_DATA_BYTES = 256 * _MIB


@dataclass(frozen=True)
class Memory:
    """terms_bytes: of the worst device at its peak, adding up to peak_bytes. peak_at: which stage, when.

    host_bytes: of a node by term; on a CPU these are the ranks themselves.
    """

    terms_bytes: Terms
    peak_bytes: int
    peak_at: str
    host_bytes: Terms


def memory_per_rank_bytes(machine: Machine, ranks_per_node: int) -> int | None:
    """Memory that one rank may use: the device's, or on a CPU its share of the host's. None if unknown."""
    if machine.device.kind != "cpu":
        return machine.device.memory_bytes
    host_bytes = machine.host.memory_bytes or machine.device.memory_bytes
    return None if host_bytes is None else host_bytes // ranks_per_node


def estimate_memory(work: Work, device_kind: DeviceKind, layout: Layout, software: Software = OURS) -> Memory:
    """Peak bytes of the worst device of a layout.

    Of the inner stages the second holds most: as many layers as any, and more micro-batches than those after it.
    """
    peak_bytes, peak_at, peak_terms = -1, "", {}
    states: Terms = {}
    for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1}):
        rank = _Rank(work, device_kind, layout, software, stage)
        for when, terms in rank.moments():
            total_bytes = sum(terms.values())
            if total_bytes > peak_bytes:
                peak_bytes, peak_at, peak_terms = total_bytes, when, terms
                states = rank.saved_states()
                if layout.pp > 1:
                    peak_at = f"stage {stage} of {layout.pp}, {when}"
    host = _host_bytes(work, device_kind, layout, states, peak_bytes)
    return Memory({name: n for name, n in peak_terms.items() if n}, peak_bytes, peak_at, host)


def micro_batches_in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a rank of pp keeps at most, by 1F1B or interleaved 1F1B.

    Interleaved: a rank warms up with 2 (pp - stage - 1) + (v - 1) pp of its v parts (Narayanan et al.,
    arXiv:2104.04473, section 2.2; Korthikanti et al., arXiv:2205.05198, section 4.2.3), so it may be a fraction.
    """
    pp, v = layout.pp, layout.stages_per_rank
    if v == 1:
        return min(pp - stage, layout.accumulation)
    return min(2 * (pp - stage - 1) + (v - 1) * pp + 1, layout.accumulation * v) / v


class _Rank:
    """Counts of one rank of pp, divided by tp and cp, and the terms that follow from them."""

    def __init__(self, work: Work, device_kind: DeviceKind, layout: Layout, software: Software, stage: int) -> None:
        model, tp = work.model, layout.tp
        self.work, self.kind, self.layout, self.software = work, device_kind, layout, software
        self.last = stage == layout.pp - 1
        self.size = BYTES[layout.precision]
        self.reduced_size = FP32_BYTES if software.fp32_gradients else self.size
        self.n_layers = shape.layers_by_rank(model.n_layers, layout.pp, layout.stages_per_rank)[stage]
        self.n_matrices = shape.n_block_matrix_parameters(model, tp)
        self.n_block = shape.n_block_parameters(model, tp)
        self.n_table = shape.n_table_parameters(model, tp)
        if layout.pp == 1:
            self.n_root = shape.n_root_parameters(model, tp)
        else:  # a tied table stands on both ends
            self.n_root = (stage == 0) * self.n_table + self.last * (self.n_table + model.hidden_size)
        self.n = self.n_layers * self.n_block + self.n_root
        self.tokens = -(-layout.micro_batch_rows * work.seq_len_tokens // layout.cp)
        self.in_flight = micro_batches_in_flight(layout, stage)

    def moments(self) -> Iterator[tuple[str, Terms]]:
        fixed = self._fixed()
        for when, moving in self._fsdp_moments() if self.layout.engine == "fsdp2" else self._zero_moments():
            lost = int(FRAGMENTATION_FRAC[self.kind] * sum(moving.values()))
            yield when, {**fixed, **moving, "fragmentation": lost}

    def saved_states(self) -> Terms:
        """What a checkpoint holds of this rank, with what stays resident of it."""
        layout, fp32 = self.layout, self.software.fp32_states and self.size != FP32_BYTES
        size = FP32_BYTES if self.software.fp32_states else self.size
        n_moments = 2 * self.n
        if self.work.optimizer == "muon":
            n_moments -= self.n_layers * self.n_matrices
        optimizer = self._shard(n_moments) * size
        if layout.engine == "fsdp2":
            return {"parameters": self._shard(self.n) * size, "optimizer_state": optimizer}
        held = self._shard(self.n) if layout.zero_stage == 3 else self.n
        return {
            "parameters": held * self.size,
            "optimizer_state": optimizer + (self._shard(self.n) * FP32_BYTES if fp32 else 0),
        }

    def _shard(self, n: int) -> int:
        return -(-n // self.layout.shard_degree)

    def _fixed(self) -> Terms:
        layout, states = self.layout, self.saved_states()
        copy = sum(states.values()) if self.kind == "cpu" and self.work.asynchronous_save else 0
        if layout.offload == "optimizer":
            states["optimizer_state"] = 0
        degrees = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
        n_communicators = sum(degree > 1 for degree in degrees) + (layout.world_size > 1)
        return {
            **states,
            # An asynchronous save writes from a copy in host memory, which on a CPU is the device's.
            "checkpoint_copy": copy,
            "communicators": n_communicators * COMMUNICATOR_BYTES[self.kind],
            "runtime": RUNTIME_BYTES[self.kind],
        }

    def _activations(self) -> tuple[Terms, Terms, Terms]:
        """(all that is kept, one block's part of it, what the backward pass of one block adds)."""
        layout, software, model = self.layout, self.software, self.work.model
        fused = layout.compile if software.fused_elementwise is None else software.fused_elementwise
        separate = software.fused_elementwise is False
        how = shape.Kept(
            precision=layout.precision,
            device_kind=self.kind,
            document_mask=self.work.document_mask,
            remat=layout.remat,
            elementwise="fused" if fused else "separate" if separate else "eager",
            flash_attention=software.flash_attention,
            tp=layout.tp,
            sequence_parallel=software.sequence_parallel,
        )
        seq = self.work.seq_len_tokens
        kept = shape.block_activation_bytes_per_token(model, seq, how)
        again = shape.recomputed_activation_bytes_per_token(model, seq, how)
        flows = shape.block_gradient_bytes_per_token(model, how)
        ends = shape.head_activation_bytes_per_token(model, how) if self.last else 0
        blocks = math.ceil(self.n_layers * self.in_flight) * kept
        return (
            {"activations": self.tokens * (blocks + ends)},
            {"activations": self.tokens * kept},
            {"recomputed_block": self.tokens * again, "activation_gradients": self.tokens * flows},
        )

    def _loss(self) -> tuple[int, int]:
        """(bytes of the loss at its most, bytes of the head's gradient that wait from there to the reduction)."""
        if not self.last:
            return 0, 0
        vocab = -(-self.work.model.vocab_size // self.layout.tp)
        chunk = self.software.loss_chunk_tokens
        if chunk is None:
            return shape.whole_loss_bytes(self.tokens, vocab, self.layout.precision), 0
        compiled = self.layout.compile
        return (
            shape.chunk_loss_bytes(min(chunk, self.tokens), vocab, self.n_table, self.layout.precision, compiled),
            self.n_table * self.size,
        )

    def _fsdp_moments(self) -> Iterator[tuple[str, Terms]]:
        """Shards, gathered group by group: the root (embedding, final norm, head) stays, blocks come and go."""
        layout, size, reduced = self.layout, self.size, self.reduced_size
        kept, block, backward = self._activations()
        loss, head_gradient = self._loss()
        n_blocks = self.n - self.n_root
        root, two_blocks = self.n_root * size, min(2, self.n_layers) * self.n_block * size
        blocks = two_blocks if layout.reshard_after_forward else n_blocks * size
        # Before the last micro-batch gradients add up unsharded, in the precision of the reduction.
        waiting = self.n * reduced if layout.accumulation > 1 and self.software.defers_reduction else 0
        all_shards = self._shard(self.n) * FP32_BYTES
        held = all_shards if layout.accumulation > 1 and not self.software.defers_reduction else 0
        gathered = root if layout.reshard_after_forward else root + n_blocks * size
        reducing = {"reduce_buffers": self.n_block * reduced}
        yield (
            "in the loss",
            {"gradients": held, "gathered_parameters": gathered, "unsharded_gradients": waiting, **kept,
             "logits_and_loss": loss},
        )  # fmt: skip
        gradients = waiting or head_gradient + self.n_block * size
        yield (
            "in the backward pass of the last block",
            {"gradients": held, "gathered_parameters": root + blocks, "unsharded_gradients": gradients,
             **reducing, **kept, **backward},
        )  # fmt: skip
        gradients = (self.n_root * reduced if waiting else head_gradient) + self.n_block * size
        yield (
            "in the backward pass of the first block",
            {"gradients": held or self._shard(n_blocks) * FP32_BYTES, "gathered_parameters": root + blocks,
             "unsharded_gradients": gradients, **reducing, **block, **backward},
        )  # fmt: skip
        yield (
            "in the reduction of the last gradients",
            {"gradients": all_shards, "gathered_parameters": gathered,
             "unsharded_gradients": self.n_root * (reduced if waiting else size),
             "reduce_buffers": self.n_root * reduced},
        )  # fmt: skip
        yield "in the optimizer step", {"gradients": all_shards}

    def _zero_moments(self) -> Iterator[tuple[str, Terms]]:
        """ZeRO as DeepSpeed and Megatron's distributed optimizer have it: gradients are allocated all the time."""
        layout = self.layout
        kept, _, backward = self._activations()
        loss, _ = self._loss()
        n_gradients = self.n if layout.zero_stage == 1 else self._shard(self.n)
        n_gathered = self.n_root + 2 * self.n_block if layout.zero_stage == 3 else 0
        n_bucket = min(self.n, DEEPSPEED_BUCKET) if layout.zero_stage > 1 else 0
        states = {
            "gradients": n_gradients * self.reduced_size,
            "gathered_parameters": n_gathered * self.size,
            "reduce_buffers": n_bucket * self.size,
        }
        yield "in the loss", {**states, **kept, "logits_and_loss": loss}
        yield "in the backward pass of the last block", {**states, **kept, **backward}


def _host_bytes(work: Work, kind: DeviceKind, layout: Layout, states: Terms, peak_bytes: int) -> Terms:
    """Per node. On a GPU an asynchronous save stages all states of its ranks, offload keeps and steps them there."""
    n_ranks = -(-layout.world_size // layout.n_nodes)
    if kind == "cpu":
        return {"ranks": n_ranks * peak_bytes}
    parameters, optimizer = states["parameters"], states["optimizer_state"]
    offloaded = 0
    if layout.offload == "optimizer":
        # The step there reads the gradients in fp32: half of two fp32 moments.
        offloaded = optimizer + optimizer // 2
    return {
        "runtime": n_ranks * HOST_RUNTIME_BYTES,
        "data": n_ranks * HOST_DATA_BYTES,
        "staging": n_ranks * (parameters + optimizer) if work.asynchronous_save else 0,
        "offloaded_optimizer": n_ranks * offloaded,
    }
