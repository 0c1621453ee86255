"""The loader: the same rows at step k for any number of ranks, before and after a restart."""

from __future__ import annotations

import gc
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aifactory_train.data.loader import PREFETCH_STEPS, Batch, Loader
from aifactory_train.data.order import SLOTS
from aifactory_train.data.packing import rows_per_epoch
from aifactory_train.data.shards import Manifest, Prepared, SourceEntry, TokenStream, write_shard
from aifactory_train.errors import DataError
from aifactory_train.recipe.schema import Data

EOS = 0
SEQ = 32
ROWS = 8
N_TOKENS = {"a": 5000, "b": 1700}


def build_data(**keys: Any) -> Data:
    sources = [{"name": "a", "path": "x", "weight": 0.75}, {"name": "b", "path": "x", "weight": 0.25}]
    base = {"sources": sources, "tokenizer": {"train_vocab_size": 300}, "prepared_dir": "x", "seq_len_tokens": SEQ}
    return Data.model_validate(base | keys)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Two sources of tokens that tell where they stand: a counts 1 .. 29999, b 30001 .. 59999."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    streams = []
    for name, first in (("a", 1), ("b", 30001)):
        (folder / name).mkdir()
        shards = []
        for i, size in enumerate(np.diff([0, N_TOKENS[name] // 3, N_TOKENS[name]]).tolist()):
            tokens = (first + 10_000 * i + np.arange(size)).astype(np.uint16)
            ends = np.unique([*rng.integers(1, size, size // 40), size])
            tokens[ends - 1] = EOS
            wanted = {"name": f"shard-{i:05d}", "made_from": "", "first_row": 0, "end_row": 0, "n_text_bytes": 0}
            shards.append(write_shard(folder / name, wanted, tokens, ends))
        n_documents = sum(s.n_documents for s in shards)
        entry = SourceEntry(
            name=name,
            read_from="",
            input_digest="",
            n_documents=n_documents,
            n_tokens=N_TOKENS[name],
            n_text_bytes=0,
            unigram_entropy_nats=0,
            shards=shards,
        )
        streams.append(TokenStream(folder / name, entry, "uint16"))
    manifest = Manifest(
        fingerprint="",
        settings={},
        dtype="uint16",
        vocab_size=60_000,
        eos_id=EOS,
        tokenizer_sha256="",
        sources=[s.entry for s in streams],
    )
    return Prepared(folder, manifest, (0.75, 0.25), tuple(streams))


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [t for t in (batch.input_BT, batch.target_BT, batch.document_BT, batch.position_BT) if t is not None]


def take(loader: Loader, first_step: int, n_steps: int) -> list[Batch]:
    batches = loader.batches(first_step)
    try:
        return list(islice(batches, n_steps))
    finally:
        batches.close()  # type: ignore[attr-defined]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_same_rows_at_any_world_size(
    prepared: Prepared, world_size: int, document_mask: bool
) -> None:
    data = build_data(document_mask=document_mask)
    n_steps = 60  # more than an epoch of each source
    alone = take(Loader(prepared, data, 3, ROWS), 0, n_steps)
    ranks = [take(Loader(prepared, data, 3, ROWS, r, world_size), 0, n_steps) for r in range(world_size)]
    for step in range(n_steps):
        parts = [tensors(ranks[r][step]) for r in range(world_size)]
        assert_equal([torch.cat(t) for t in zip(*parts, strict=True)], tensors(alone[step]))
        assert sum(ranks[r][step].n_valid_tokens for r in range(world_size)) == alone[step].n_valid_tokens


@pytest.mark.parametrize("first_step", [0, 1, 7, 40, 2**33])
def test_a_restart_at_any_step_reads_what_the_first_run_would_have_read(prepared: Prepared, first_step: int) -> None:
    data = build_data()
    before = Loader(prepared, data, 3, ROWS, 1, 2)
    there = take(before, max(0, first_step - 3), 10)[first_step - max(0, first_step - 3) :]
    after = take(Loader(prepared, data, 3, ROWS, 1, 2), first_step, len(there))
    for one, other in zip(there, after, strict=True):
        assert_equal(tensors(one), tensors(other))


def test_each_epoch_predicts_every_token_that_counts_exactly_once(prepared: Prepared) -> None:
    loader = Loader(prepared, build_data(document_mask=False), 5, ROWS)
    rows = {n: rows_per_epoch(N_TOKENS[n], SEQ) for n in N_TOKENS}
    n_steps = -(-2 * max(rows["a"] / 0.75, rows["b"] / 0.25) // ROWS) + SLOTS // ROWS
    seen: dict[int, list[int]] = {0: [], 1: []}
    for step, batch in enumerate(take(loader, 0, int(n_steps))):
        source, epoch, _ = loader.order.locate(np.arange(step * ROWS, (step + 1) * ROWS))
        for i in range(ROWS):
            if epoch[i] == 1:
                seen[int(source[i])] += [t for t in batch.target_BT[i].tolist() if t != -100]
    for i, stream in enumerate(prepared.streams):
        assert sorted(seen[i]) == sorted(stream.tokens(1, stream.n_tokens).tolist())


def test_valid_tokens_are_the_targets_that_count(prepared: Prepared) -> None:
    for document_mask in (True, False):
        for batch in take(Loader(prepared, build_data(document_mask=document_mask), 0, ROWS), 0, 30):
            assert batch.n_valid_tokens == int((batch.target_BT != -100).sum())
            assert (batch.document_BT is None) == (not document_mask) == (batch.position_BT is None)
            inner = batch.target_BT[:, :-1]
            valid = inner != -100
            assert torch.equal(inner[valid], batch.input_BT[:, 1:][valid])
            if batch.document_BT is not None and batch.position_BT is not None:
                assert batch.document_BT.dtype == torch.int32 and batch.position_BT.dtype == torch.int64
                new = batch.document_BT.diff(dim=1) == 1
                assert torch.equal(new, batch.position_BT[:, 1:] == 0)
                assert not valid[new].any() and (batch.input_BT[:, :-1][new] == EOS).all()


def test_another_seed_reads_other_rows(prepared: Prepared) -> None:
    one, other = (take(Loader(prepared, build_data(), seed, ROWS), 0, 1)[0] for seed in (0, 1))
    assert not torch.equal(one.input_BT, other.input_BT)


def test_rows_that_do_not_divide_over_the_ranks_are_refused_with_the_next_that_does(prepared: Prepared) -> None:
    with pytest.raises(DataError, match=f"8 rows .* 3 data-parallel ranks(.|\n)*global_batch_tokens={9 * SEQ}$"):
        Loader(prepared, build_data(), 0, ROWS, 0, 3)


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "loader"]


def test_the_thread_ends_when_the_iterator_is_closed_or_forgotten(prepared: Prepared) -> None:
    loader = Loader(prepared, build_data(), 0, ROWS)
    batches = loader.batches(0)
    next(batches)
    assert len(loader_threads()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert not loader_threads()
    batches = loader.batches(0)
    next(batches)
    del batches
    gc.collect()
    assert not loader_threads()


def test_it_reads_ahead_but_not_without_bound(prepared: Prepared) -> None:
    loader = Loader(prepared, build_data(), 0, ROWS)
    read: list[int] = []
    batch = loader.batch
    loader.batch = lambda step: (read.append(step), batch(step))[1]  # type: ignore[method-assign]
    batches = loader.batches(5)
    next(batches)
    time.sleep(0.3)
    assert read == list(range(5, 5 + PREFETCH_STEPS + 2))  # one consumed, the queue full, one in the hand
    batches.close()  # type: ignore[attr-defined]


def test_a_fault_in_the_thread_reaches_the_consumer_after_the_good_batches(prepared: Prepared) -> None:
    loader = Loader(prepared, build_data(), 0, ROWS)
    batch = loader.batch

    def failing(step: int) -> Batch:
        if step == 2:
            raise DataError("the disk is gone")
        return batch(step)

    loader.batch = failing  # type: ignore[method-assign]
    got: list[Batch] = []
    with pytest.raises(DataError, match="the disk is gone"):
        for one in loader.batches(0):
            got.append(one)
    assert len(got) == 2 and not loader_threads()


def test_waiting_for_slow_data_is_measured(prepared: Prepared) -> None:
    loader = Loader(prepared, build_data(), 0, ROWS)
    batch = loader.batch

    def slow(step: int) -> Batch:
        time.sleep(0.05)
        return batch(step)

    loader.batch = slow  # type: ignore[method-assign]
    take(loader, 0, 4)
    assert 0.15 < loader.wait_s < 2


def test_reading_does_not_import_torch_before_the_first_batch() -> None:
    import subprocess
    import sys

    code = "import sys, aifactory_train.data.loader, aifactory_train.data.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
