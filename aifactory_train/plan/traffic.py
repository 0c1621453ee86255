"""The collectives of one optimizer step on one rank: which axis, which kind, how many bytes, how often.

tests/cpu/test_dry_build.py counts those of the training itself and compares them one by one. Left out are messages of
less than 1 KiB (the count of valid tokens, the norm of the gradients), and what Muon gathers.

Legend: D hidden_size, V vocabulary; T tokens of a micro-batch on one rank of cp, C tokens of a chunk of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.network import Collective
from aifactory_train.plan.stages import layers_by_rank, stages_of_rank
from aifactory_train.plan.work import OURS, Software, Work

Axis = Literal["pp", "dp_replicate", "fsdp", "cp", "tp"]
LEAST_BYTES = 1024


class Transfer(NamedTuple):
    """A collective over `axis`; "fsdp" is dp_shard and cp together.

    n_bytes: as network.collective_s takes them: of the whole (gathered) tensor; of a send, of what one rank sends.
    times: per optimizer step.
    """

    axis: Axis
    kind: Collective
    n_bytes: int
    times: int


class Held(NamedTuple):
    """What a rank of pp holds of the model; n_sends: messages to its neighbours for each micro-batch."""

    n_layers: int
    has_embedding: bool
    has_head: bool
    n_sends: int


class _Cut(NamedTuple):
    """Every other number that traffic depends on: a cheap key for the cache. size: bytes of an activation."""

    pp: int
    dp_replicate: int
    shard_degree: int
    cp: int
    tp: int
    rows: int
    seq_len_tokens: int
    accumulation: int
    size: int
    gradient_size: int
    zero_stage: int
    cp_attention: str
    remat: str
    reshard_after_forward: bool
    reduces_each: bool
    sequence_parallel: bool
    moves_inputs_again: bool
    gathers_logits: bool
    chunk_tokens: int
    n_adapters: int


def traffic(work: Work, layout: Layout, software: Software = OURS, held: Held | None = None) -> tuple[Transfer, ...]:
    """Transfers of one optimizer step on one rank. Axes of one rank have none.

    Args:
        held: by `held_by`; by default that of the rank with most layers.
    """
    size = shape.BYTES[layout.precision]
    tokens = layout.micro_batch_rows * work.seq_len_tokens // layout.cp
    cut = _Cut(
        layout.pp,
        layout.dp_replicate,
        layout.shard_degree,
        layout.cp,
        layout.tp,
        layout.micro_batch_rows,
        work.seq_len_tokens,
        layout.accumulation,
        size,
        shape.FP32_BYTES if software.fp32_gradients else size,
        layout.zero_stage,
        layout.cp_attention,
        layout.remat,
        layout.reshard_after_forward,
        reduces_each(layout),
        software.sequence_parallel,
        software.moves_inputs_again,
        not software.vocab_parallel_loss,
        software.loss_chunk_tokens or tokens,
        shape.n_adapter_parameters(work.model, work.lora),
    )
    return _traffic(shape.dims(work.model, layout.tp), held or _most_held(work, layout, software), cut)


def reduces_each(layout: Layout) -> bool:
    """Whether gradients are reduced in each micro-batch; a pipeline of torch does it once, after the last of them."""
    return layout.reduce_each_micro_batch and layout.zero_stage > 1 and layout.pp == 1


def held_by(work: Work, layout: Layout, pp_rank: int, software: Software = OURS) -> Held:
    """What one rank of pp holds and sends."""
    n_layers = layers_by_rank(work.model, layout, software.stages_count_head)[pp_rank]
    stages, last = stages_of_rank(layout, pp_rank), layout.pp * layout.stages_per_rank - 1
    neighbours = [stage + step for stage in stages for step in (-1, 1)]
    n_sends = sum(0 <= stage <= last and stage not in stages for stage in neighbours)
    return Held(n_layers, stages[0] == 0, stages[-1] == last, n_sends)


def _most_held(work: Work, layout: Layout, software: Software) -> Held:
    by_rank = layers_by_rank(work.model, layout, software.stages_count_head)
    return held_by(work, layout, by_rank.index(max(by_rank)), software)


@lru_cache(maxsize=16384)
def _traffic(at: shape.Dims, held: Held, cut: _Cut) -> tuple[Transfer, ...]:
    found = (
        *_pipeline(at, held, cut),
        *_data_parallel(at, held, cut),
        *_context(at, held, cut),
        *_tensor(at, held, cut),
    )
    return tuple(transfer for transfer in found if transfer.n_bytes >= LEAST_BYTES and transfer.times)


def _pipeline(at: shape.Dims, held: Held, cut: _Cut) -> Iterator[Transfer]:
    """Activations of each micro-batch go on and their gradients back, T / tp tokens each; a tied table's once."""
    if cut.pp == 1:
        return
    n_bytes = cut.rows * cut.seq_len_tokens // (cut.cp * cut.tp) * at.d * cut.size
    yield Transfer("pp", "send", n_bytes, cut.accumulation * held.n_sends)
    if at.tied and held.has_embedding != held.has_head:
        yield Transfer("pp", "send", -(-at.vocab // cut.shard_degree) * at.d * cut.gradient_size, 1)


def _data_parallel(at: shape.Dims, held: Held, cut: _Cut) -> Iterator[Transfer]:
    """Gathers of weights and reductions of gradients, by block and by what lies around.

    FSDP (zero_stage 3) gathers before forward, and before backward what forward gave back; backward gives back all.
    In a pipeline it gives back nothing: of the forward passes only those before the first backward pass gather. Weights
    that forward does not give back are gathered once per step, as with ZeRO 1 and 2.
    """
    n, n_micro, is_pipeline = cut.shard_degree, cut.accumulation, cut.pp > 1
    n_reduced = n_micro if cut.reduces_each else 1
    of_block, of_root = 1, 1
    if cut.zero_stage == 3 and cut.reshard_after_forward:
        of_block, of_root = (n_micro + 1, 1) if is_pipeline else (2 * n_micro, n_micro)
    groups = [(_n_padded(_block(at), n) + cut.n_adapters, held.n_layers, of_block)]
    groups += [(_n_padded(root, n), 1, of_root) for root in _roots(at, held, is_pipeline)]
    for number, (n_weights, n_groups, gathered) in enumerate(groups):
        # With adapters nothing else has gradients.
        n_gradients = n_weights if not cut.n_adapters else cut.n_adapters * (number == 0)
        if n > 1:
            yield Transfer("fsdp", "all_gather", n_weights * cut.size, n_groups * gathered)
            yield Transfer("fsdp", "reduce_scatter", n_gradients * cut.gradient_size, n_groups * n_reduced)
        if cut.dp_replicate > 1:
            yield Transfer("dp_replicate", "all_reduce", n_gradients // n * cut.gradient_size, n_groups)


def _block(at: shape.Dims) -> list[tuple[int, int]]:
    """(rows, columns) of the tensors of one block on one rank of tp; `transformers` has all experts in one tensor."""
    norms = [(at.d, 1)] * 2 + [(at.head_size, 1)] * (2 * at.qk_norm)
    biases = [(at.q, 1), (at.kv, 1), (at.kv, 1)] * at.qkv_bias
    attention = [(at.q, at.d), (at.kv, at.d), (at.kv, at.d), (at.d, at.q)]
    if at.n_experts > 1:
        mlp = [(at.n_experts, at.d), (at.n_experts, at.f * at.d * (at.n_mlp_matrices - 1)), (at.n_experts, at.f * at.d)]
    else:
        mlp = [*[(at.f, at.d)] * (at.n_mlp_matrices - 1), (at.d, at.f)]
    return [*norms, *biases, *attention, *mlp]


def _roots(at: shape.Dims, held: Held, is_pipeline: bool) -> list[list[tuple[int, int]]]:
    """What lies around the blocks: one group without a pipeline, else one for each of its ends."""
    table, norm = (at.vocab, at.d), (at.d, 1)
    if not is_pipeline:
        return [[table, norm] if at.tied else [table, table, norm]]
    return [[table]] * held.has_embedding + [[table, norm]] * held.has_head


def _n_padded(tensors: list[tuple[int, int]], degree: int) -> int:
    """Weights of one group of FSDP2 once gathered: each tensor's rows are padded to a multiple of `degree`."""
    return sum(-(-rows // degree) * degree * columns for rows, columns in tensors)


def _context(at: shape.Dims, held: Held, cut: _Cut) -> Iterator[Transfer]:
    """Keys and values reach the queries of other ranks, and gradients come back; remat does the former again."""
    if cut.cp == 1:
        return
    times, forwards = held.n_layers * cut.accumulation, 1 + cut.moves_inputs_again + _gathers_in_remat(cut)
    element_bytes = cut.rows * cut.seq_len_tokens * cut.size
    if cut.cp_attention == "ulysses":
        yield Transfer("cp", "all_to_all", element_bytes * (at.q + 2 * at.kv), times * (forwards + 1))
        yield Transfer("cp", "all_to_all", element_bytes * at.q, times * (forwards + 1))
    elif cut.cp_attention == "ring":
        yield Transfer("cp", "send", element_bytes * 2 * at.kv // cut.cp, times * (cut.cp - 1) * (forwards + 1))
    else:
        yield Transfer("cp", "all_gather", element_bytes * 2 * at.kv, times * forwards)
        yield Transfer("cp", "reduce_scatter", element_bytes * 2 * at.kv, times)


def _gathers_in_remat(cut: _Cut) -> bool:
    """Selective remat keeps sums over tp and what attention made, not their inputs; Megatron's repeats attention."""
    return cut.remat == "full" or (cut.remat == "selective" and not cut.moves_inputs_again)


def _tensor(at: shape.Dims, held: Held, cut: _Cut) -> Iterator[Transfer]:
    """Activations over tp: around attention and MLP of each block, behind the embedding, before and in the loss.

    A block gathers T x D before q, k, v and before gate, up, scatters sums after o and after down, and in backward the
    other way round. Remat gathers again; full remat also scatters after o again, not after down: nothing needs that.
    """
    if cut.tp == 1:
        return
    n_micro, tokens = cut.accumulation, cut.rows * cut.seq_len_tokens // cut.cp
    gathers = 4 + 2 * (cut.moves_inputs_again and cut.sequence_parallel) + 2 * _gathers_in_remat(cut)
    scatters = 5 if cut.remat == "full" else 4
    ends = held.has_embedding + held.has_head
    stream_bytes = tokens * at.d * cut.size
    yield Transfer("tp", "all_gather", stream_bytes, n_micro * (held.n_layers * gathers + ends))
    yield Transfer("tp", "reduce_scatter", stream_bytes, n_micro * (held.n_layers * scatters + ends))
    # Each rank has the gradients of norms from its own tokens.
    yield Transfer("tp", "all_reduce", at.d * cut.gradient_size, 2 * held.n_layers + held.has_head)
    if held.has_head and cut.gathers_logits:
        yield Transfer("tp", "all_gather", tokens * at.vocab * cut.tp * cut.size, n_micro)
    elif held.has_head:
        whole, rest = divmod(tokens, cut.chunk_tokens)
        for chunk, times in ((cut.chunk_tokens, whole), (rest, 1)):
            # The greatest logit, then the sum of exponentials and the logit of the target.
            yield Transfer("tp", "all_reduce", chunk * shape.FP32_BYTES, n_micro * times)
            yield Transfer("tp", "all_reduce", 2 * chunk * shape.FP32_BYTES, n_micro * times)
