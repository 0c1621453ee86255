"""Bytes per device by named term at the moment when they are most, and bytes of a node's host memory.

A step is looked at in the moments that can be its peak: the loss, the backward pass of the last block and of the
first, the reduction of the last gradients, the optimizer. Between the two blocks everything changes evenly, so no
other moment holds more. The peak is the largest over these and over the pipeline's stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from aifactory_train.machine.machine import Machine
from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.shape import BYTES, FP32_BYTES
from aifactory_train.plan.stages import V_SCHEDULES, layers_by_rank, stages_of_rank
from aifactory_train.plan.work import OURS, Software, Work

DeviceKind = Literal["cpu", "cuda", "rocm"]
Terms = dict[str, int]

# A layout counts as fitting up to this share of the memory; the rest is what the driver keeps and no term names.
FIT_FRAC = 0.94

_MIB = 1024**2
# Python, torch and its kernels: on a CPU the resident size after `import torch` and one step (2.13, x86-64); on a
# GPU its context with the kernels of cuBLAS and NCCL loaded (CUDA 12 on A100 and H100; BigScience counted 1.1 GB).
RUNTIME_BYTES = {"cpu": 400 * _MIB, "cuda": 1024 * _MIB, "rocm": 1024 * _MIB}
# Buffers of one communicator: Gloo pairs on a CPU; NCCL and RCCL take 4 MiB per channel, peer and protocol.
COMMUNICATOR_BYTES = {"cpu": 32 * _MIB, "cuda": 256 * _MIB, "rocm": 256 * _MIB}
# Of what comes and goes within a step, this share is lost to blocks of the allocator that fit nothing else.
FRAGMENTATION_FRAC = {"cpu": 0.0, "cuda": 0.05, "rocm": 0.05}
# DeepSpeed collects gradients in a bucket of so many elements before they are reduced (its reduce_bucket_size).
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

    Of the inner ranks of pp the second holds most: as many layers as any, and more micro-batches than those after it.
    In a V all hold equally many micro-batches, and the last rank may have most layers.
    """
    peak_bytes, peak_at, peak_terms = -1, "", {}
    states, saved_bytes = {}, 0
    for pp_rank in sorted({0, min(1, layout.pp - 1), layout.pp - 1}):
        rank = _Rank(work, device_kind, layout, software, pp_rank)
        for when, terms in rank.moments():
            total_bytes = sum(terms.values())
            if total_bytes > peak_bytes:
                peak_bytes, peak_at, peak_terms = total_bytes, when, terms
                states, saved_bytes = rank.saved_states(), rank.saved_bytes()
                if layout.pp > 1:
                    peak_at = f"{rank.named}, {when}"
    host = {"ranks": -(-layout.world_size // layout.n_nodes) * peak_bytes}
    if device_kind != "cpu":
        host = _host_bytes(layout, states, saved_bytes if work.asynchronous_save else 0)
    return Memory({name: n for name, n in peak_terms.items() if n}, peak_bytes, peak_at, host)


def micro_batches_in_flight(layout: Layout, pp_rank: int) -> float:
    """Micro-batches whose activations a rank of pp keeps at most; a fraction where it has several stages.

    As the schedules of torch.distributed.pipelining order them. Interleaved: a rank warms up with 2 (pp - rank - 1)
    + (v - 1) r of its v stages, where r micro-batches make a round (Narayanan et al., arXiv:2104.04473, section 2.2;
    Korthikanti et al., arXiv:2205.05198, section 4.2.3). zbv: all of 2 pp stages (Qi et al., arXiv:2401.10241,
    section 6), also after their backward pass for the input, until that for the weights; dualpipev: one more.
    """
    pp, v, n_micro = layout.pp, layout.stages_per_rank, layout.accumulation
    if layout.pipeline_schedule in V_SCHEDULES:
        most = 2 * pp + (layout.pipeline_schedule == "dualpipev")
    elif v == 1:
        most = pp - pp_rank
    else:
        per_round = n_micro // max(1, n_micro // pp)
        most = 2 * (pp - pp_rank - 1) + (v - 1) * per_round + 1
    return min(most, n_micro * v) / v


def _gathered_kv(layout: Layout) -> float:
    """Ranks of cp whose keys and values each keeps: all, or in a ring the half that its queries may see."""
    return {"all_gather": layout.cp, "ring": (layout.cp + 1) / 2, "ulysses": 1}[layout.cp_attention]


class _Activations(NamedTuple):
    """Bytes of one rank: of all its blocks in flight, of one block and micro-batch, around the head; in the backward
    pass of a block what is computed again, and the gradients that flow through it."""

    blocks: int
    block: int
    head: int
    again: int
    flowing: int


class _Rank:
    """Counts of one rank of pp, divided by tp and cp, and the terms that follow from them."""

    def __init__(self, work: Work, device_kind: DeviceKind, layout: Layout, software: Software, pp_rank: int) -> None:
        model, tp = work.model, layout.tp
        self.work, self.kind, self.layout, self.software = work, device_kind, layout, software
        n_stages, stages = layout.pp * layout.stages_per_rank, stages_of_rank(layout, pp_rank)
        self.last = stages[-1] == n_stages - 1
        self.named = f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))} of {n_stages}"
        self.size = BYTES[layout.precision]
        self.reduced_size = FP32_BYTES if software.fp32_gradients else self.size
        self.n_layers = layers_by_rank(model, layout, software.stages_count_head)[pp_rank]
        self.n_matrices = shape.n_block_matrix_parameters(model, tp)
        n_adapters = shape.n_adapter_parameters(model, work.lora)
        self.n_block = shape.n_block_parameters(model, tp) + n_adapters
        self.n_table = shape.n_table_parameters(model, tp)
        if layout.pp == 1:
            self.n_root = shape.n_root_parameters(model, tp)
        else:  # a tied table stands on both ends
            self.n_root = (stages[0] == 0) * self.n_table + self.last * (self.n_table + model.hidden_size)
        self.n = self.n_layers * self.n_block + self.n_root
        # With adapters nothing else has gradients.
        self.n_block_trained, self.n_root_trained = (n_adapters, 0) if work.lora else (self.n_block, self.n_root)
        self.n_trained = self.n_layers * self.n_block_trained + self.n_root_trained
        self.n_down = 0 if work.lora else model.hidden_size * -(-model.ffn_size // tp) * model.n_experts
        self.loss_chunk_tokens = None if shape.makes_whole_logits(model) else software.loss_chunk_tokens
        self.tokens = -(-layout.micro_batch_rows * work.seq_len_tokens // layout.cp)
        self.in_flight = micro_batches_in_flight(layout, pp_rank)
        self.n_borders = sum((stage > 0) + (stage < n_stages - 1) for stage in stages)

    def moments(self) -> Iterator[tuple[str, Terms]]:
        """Every moment that may be the peak, with all its terms."""
        fixed = self._fixed()
        whole = self._fsdp_moments if self.layout.pp == 1 else self._pipelined_moments
        for when, moving in whole() if self.layout.engine == "fsdp2" else self._zero_moments():
            lost = FRAGMENTATION_FRAC[self.kind] * sum(moving.values())
            yield when, {**fixed, **moving, "fragmentation": int(lost)}

    def saved_states(self) -> Terms:
        """Parameters and optimizer state of this rank."""
        layout, fp32 = self.layout, self.software.fp32_states and self.size != FP32_BYTES
        size = FP32_BYTES if self.software.fp32_states else self.size
        n_moments = 2 * self.n_trained
        if self.work.optimizer == "muon":
            n_moments -= self.n_layers * self.n_matrices
        optimizer = self._shard(n_moments) * size
        if layout.engine == "fsdp2":
            return {"parameters": self._shard(self.n) * size, "optimizer_state": optimizer}
        held = self._shard(self.n) if layout.zero_stage == 3 else self.n
        return {
            "parameters": held * self.size,
            "optimizer_state": optimizer + (self._shard(self.n_trained) * FP32_BYTES if fp32 else 0),
        }

    def saved_bytes(self) -> int:
        """Of them what a checkpoint holds: with adapters no other parameters."""
        states = self.saved_states()
        return states["optimizer_state"] + states["parameters"] * self.n_trained // self.n

    def _shard(self, n: int) -> int:
        return -(-n // self.layout.shard_degree)

    def _fixed(self) -> Terms:
        layout, states = self.layout, self.saved_states()
        copy = self.saved_bytes() if self.kind == "cpu" and self.work.asynchronous_save else 0
        if self.kind != "cpu":
            states |= {"optimizer_state": 0} if layout.offload != "none" else {}
            states |= {"parameters": 0} if layout.offload == "parameters" else {}
        degrees = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
        n_communicators = sum(degree > 1 for degree in degrees) + (layout.world_size > 1)
        if layout.engine == "deepspeed":
            # Allocated once: Megatron's and DeepSpeed's gradients are parts of long buffers.
            n_gradients = self.n_trained if layout.zero_stage == 1 else self._shard(self.n_trained)
            states["gradients"] = n_gradients * self.reduced_size
        return {
            **states,
            # An asynchronous save writes from a copy in host memory, which on a CPU is the device's.
            "checkpoint_copy": copy,
            "communicators": n_communicators * COMMUNICATOR_BYTES[self.kind],
            "runtime": RUNTIME_BYTES[self.kind],
        }

    def _activations(self) -> _Activations:
        layout, software, model = self.layout, self.software, self.work.model
        fused = layout.compile if software.fused_elementwise is None else software.fused_elementwise
        how = shape.Kept(
            precision=layout.precision,
            device_kind=self.kind,
            document_mask=self.work.document_mask,
            remat=layout.remat,
            elementwise="fused" if fused else "separate" if software.fused_elementwise is False else "eager",
            flash_attention=software.flash_attention,
            tp=layout.tp,
            sequence_parallel=software.sequence_parallel,
            fp8_inputs=software.fp8_inputs,
            budget_frac=1.0 if layout.remat_budget_frac is None else layout.remat_budget_frac,
            moves_inputs_again=software.moves_inputs_again,
            gathered_kv=1 if software.moves_inputs_again else _gathered_kv(layout),
        )
        seq, tokens = self.work.seq_len_tokens, self.tokens
        block = tokens * shape.block_activation_bytes_per_token(model, seq, how)
        return _Activations(
            blocks=math.ceil(self.n_layers * self.in_flight) * block,
            block=block,
            head=tokens * shape.head_activation_bytes_per_token(model, how) if self.last else 0,
            again=tokens * shape.recomputed_activation_bytes_per_token(model, seq, how),
            flowing=tokens * shape.block_gradient_bytes_per_token(model, how),
        )

    def _loss_bytes(self) -> int:
        if not self.last:
            return 0
        vocab, tp, precision = self.work.model.vocab_size, self.layout.tp, self.layout.precision
        chunk = self.loss_chunk_tokens
        if chunk is not None:
            return shape.chunk_loss_bytes(
                self.tokens, chunk, -(-vocab // tp), self.n_table, precision, self.layout.compile
            )
        if self.software.vocab_parallel_loss:
            return shape.whole_loss_bytes(self.tokens, -(-vocab // tp), precision, self.software.n_fp32_logits)
        # The parts of the other ranks, and all of them in one tensor.
        gathered = 2 * self.tokens * vocab * self.size if tp > 1 else 0
        return gathered + shape.whole_loss_bytes(self.tokens, vocab, precision, self.software.n_fp32_logits)

    def _fsdp_moments(self) -> Iterator[tuple[str, Terms]]:
        """Shards, gathered group by group: the root (embedding, final norm, head) stays, blocks come and go.

        A block is gathered ahead of its turn. Its gradients are all there when its activations are gone, and the
        widest moment is at its activation function, where of its weights only down has a gradient. While a block
        works, the gradients of the one before are reduced from a copy.
        """
        kept, size, reduced = self._activations(), self.size, self.reduced_size
        root, block, n_blocks = self.n_root * size, self.n_block * size, self.n - self.n_root
        n_trained_blocks = self.n_trained - self.n_root_trained
        gathered = root + (0 if self.layout.reshard_after_forward else n_blocks * size)
        ahead = 2 * block if self.layout.reshard_after_forward else 0
        accumulates = self.layout.accumulation > 1
        each = self.layout.reduce_each_micro_batch
        # Before the last micro-batch gradients add up, unsharded in the precision of the reduction or as shards.
        waiting = self.n_trained * reduced if accumulates and not each else 0
        shards = self._shard(self.n_trained) * FP32_BYTES
        held = shards if accumulates and each else 0
        head = self.n_table * size if self.last and self.loss_chunk_tokens is not None else 0
        yield (
            "in the loss",
            {
                "gradients": held,
                "gathered_parameters": gathered + block,
                "unsharded_gradients": waiting,
                "activations": kept.blocks + kept.head,
                "logits_and_loss": self._loss_bytes(),
            },
        )
        working = kept.again + kept.flowing + self.n_down * size
        for n_done, name in ((0, "last"), (1, "last but one"), (self.n_layers - 1, "first")):
            if n_done > self.n_layers - 1:
                continue
            left = (self.n_layers - n_done) / self.n_layers
            still = head + (int((self.n_root_trained + left * n_trained_blocks) * reduced) if waiting else 0)
            # At the end of a block: all its gradients and none of its activations.
            spent = max(0, self.n_block_trained * size - working - kept.block)
            yield (
                f"in the backward pass of the {name} block",
                {
                    "gradients": held or self._shard(n_done * self.n_block_trained) * FP32_BYTES,
                    "gathered_parameters": gathered + ahead if ahead else int(root + left * n_blocks * size),
                    "unsharded_gradients": still + self.n_down * size + spent,
                    "reduce_buffers": self.n_block_trained * reduced if n_done else 0,
                    "activations": max(kept.block, kept.blocks - n_done * kept.block),
                    "recomputed_block": kept.again,
                    "activation_gradients": kept.flowing,
                },
            )
        yield (
            "in the reduction of the last gradients",
            {
                "gradients": shards,
                "unsharded_gradients": self.n_root_trained * (size + (reduced if waiting else 0)),
                "reduce_buffers": self.n_root_trained * reduced,
            },
        )
        yield "in the optimizer step", {"gradients": shards}

    def _pipelined_moments(self) -> Iterator[tuple[str, Terms]]:
        """FSDP under torch's pipelines, which free a stage's weights after a forward pass and never after a backward
        pass, and add gradients up unsharded until the end of the step.

        So of the stage at work weights are there block by block until its backward pass is done, of others all. What a
        border brings has a buffer for each micro-batch, for the whole run (PipelineStage of torch 2.13).
        """
        kept, layout = self._activations(), self.layout
        border = self.tokens * self.work.model.hidden_size // layout.tp * self.size
        received = {"pipeline_buffers": self.n_borders * layout.accumulation * border}
        block, n_blocks = self.n_block * self.size, (self.n - self.n_root) * self.size
        everything = self.n_root * self.size + n_blocks
        freed = n_blocks // layout.stages_per_rank if layout.reshard_after_forward else 0
        waiting = self.n * self.reduced_size
        yield (
            "in the loss",
            {
                **received,
                "gathered_parameters": min(everything, everything - freed + block),
                "unsharded_gradients": waiting,
                "activations": kept.blocks + kept.head,
                "logits_and_loss": self._loss_bytes(),
            },
        )
        n_before = -(-self.n_layers // layout.stages_per_rank) - 1
        for n_done, name in ((0, "last"), (n_before, "first")):
            there = everything if n_done else min(everything, everything - freed + 2 * block)
            yield (
                f"in the backward pass of the {name} block",
                {
                    **received,
                    "gathered_parameters": there,
                    "unsharded_gradients": waiting + block,
                    "activations": max(kept.block, kept.blocks - n_done * kept.block),
                    "recomputed_block": kept.again,
                    "activation_gradients": kept.flowing,
                },
            )
        shards = {**received, "gradients": self._shard(self.n) * FP32_BYTES}
        largest = max(self.n_block, self.n_root) * self.reduced_size
        reducing = {"gathered_parameters": everything, "unsharded_gradients": waiting, "reduce_buffers": largest}
        yield "in the reduction of the gradients", received | reducing
        yield "in the optimizer step", shards

    def _zero_moments(self) -> Iterator[tuple[str, Terms]]:
        """ZeRO as DeepSpeed and Megatron's distributed optimizer have it."""
        layout, kept = self.layout, self._activations()
        n_gathered = self.n_root + 2 * self.n_block if layout.zero_stage == 3 else 0
        n_bucket = min(self.n_trained, DEEPSPEED_BUCKET) if layout.zero_stage > 1 or self.software.flat_step else 0
        # Gradients in bf16 are copied to fp32 for the step, and Adam over lists of tensors makes one more of that size.
        copied = self.software.fp32_states and not self.software.fp32_gradients
        step = {"optimizer_step": 2 * self._shard(self.n_trained) * FP32_BYTES if copied else 0}
        buffers = {
            "gathered_parameters": n_gathered * self.size,
            "reduce_buffers": n_bucket * self.size,
            **(step if self.software.flat_step else {}),
        }
        loss = {"activations": kept.blocks + kept.head, "logits_and_loss": self._loss_bytes()}
        yield "in the loss", {**buffers, **loss}
        backward = {"recomputed_block": kept.again, "activation_gradients": kept.flowing}
        yield "in the backward pass of the last block", {**buffers, "activations": kept.blocks, **backward}
        yield "in the optimizer step", {**buffers, **step}


def _host_bytes(layout: Layout, states: Terms, staged_bytes: int) -> Terms:
    """Per node with GPUs. Offload keeps and steps states there.

    Args:
        staged_bytes: what an asynchronous save copies there of each rank.
    """
    n_ranks = -(-layout.world_size // layout.n_nodes)
    parameters, optimizer = states["parameters"], states["optimizer_state"]
    offloaded = 0
    if layout.offload != "none":
        # The step there reads the gradients in fp32: half of two fp32 moments.
        offloaded = optimizer + optimizer // 2
    return {
        "runtime": n_ranks * HOST_RUNTIME_BYTES,
        "data": n_ranks * HOST_DATA_BYTES,
        "staging": n_ranks * staged_bytes,
        "offloaded_optimizer": n_ranks * offloaded,
        **({"offloaded_parameters": n_ranks * parameters} if layout.offload == "parameters" else {}),
    }
