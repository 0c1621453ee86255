"""Packing: rows over concatenated documents, nothing lost, borders kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aifactory_train.data.packing import IGNORE, pack_rows, rows_per_epoch
from aifactory_train.data.shards import Shard, SourceEntry, TokenStream, write_shard

EOS = 0


def build_stream(folder: Path, shards: list[list[int]]) -> tuple[TokenStream, np.ndarray, list[int]]:
    """Shards of documents of the given lengths (their eos included); tokens count up from 1."""
    written: list[Shard] = []
    everything, ends, n = [], [], 0
    for i, lengths in enumerate(shards):
        tokens, local_ends = [], []
        for length in lengths:
            tokens += [*range(n + len(tokens) + 1, n + len(tokens) + length), EOS]
            local_ends.append(len(tokens))
        wanted = {"name": f"shard-{i:05d}", "made_from": "", "first_row": 0, "end_row": 0, "n_text_bytes": 0}
        written.append(write_shard(folder, wanted, np.array(tokens, np.uint16), np.array(local_ends, np.int64)))
        ends += [n + e for e in local_ends]
        n += len(tokens)
        everything += tokens
    entry = SourceEntry(
        name="s",
        read_from="",
        input_digest="",
        n_documents=len(ends),
        n_tokens=n,
        n_text_bytes=0,
        unigram_entropy_nats=0.0,
        shards=written,
    )
    return TokenStream(folder, entry, "uint16"), np.array(everything), ends


LAYOUTS = [
    [[3, 5, 2, 9], [4, 4], [], [1, 1, 7]],
    [[20]],
    [[2]],
    [[1, 1], [1, 1, 1]],
    [[8], [8], [9]],
    [[8], [8], [8]],
]


def by_hand(tokens: np.ndarray, ends: list[int], row: int, S: int, mask: bool) -> tuple[list[int], ...]:
    """The definition, token by token."""
    first = row * S
    inputs, targets, documents, positions = [], [], [], []
    document = position = 0
    for t in range(S):
        at = first + t
        if t > 0 and at in ends:
            document, position = document + 1, 0
        has_target = at + 1 < len(tokens)
        inputs.append(int(tokens[at]) if has_target else EOS)
        targets.append(int(tokens[at + 1]) if has_target and not (mask and at + 1 in ends) else IGNORE)
        documents.append(document)
        positions.append(position)
        position += 1
    return inputs, targets, documents, positions


@pytest.mark.parametrize("S", [1, 2, 4, 7, 8, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_equal_the_definition_written_token_by_token(tmp_path: Path, layout: list[list[int]], S: int) -> None:
    stream, tokens, ends = build_stream(tmp_path, layout)
    n_rows = rows_per_epoch(len(tokens), S)
    for mask in (True, False):
        rows = pack_rows(stream, np.arange(n_rows)[::-1], S, mask, EOS)
        for i, row in enumerate(range(n_rows - 1, -1, -1)):
            inputs, targets, documents, positions = by_hand(tokens, ends, row, S, mask)
            assert rows.input_RT[i].tolist() == inputs
            assert rows.target_RT[i].tolist() == targets
            if mask:
                assert rows.document_RT is not None and rows.position_RT is not None
                assert rows.document_RT[i].tolist() == documents
                assert rows.position_RT[i].tolist() == positions


@pytest.mark.parametrize("S", [1, 3, 8, 33])
def test_without_a_mask_every_token_but_the_first_is_predicted_once(tmp_path: Path, S: int) -> None:
    stream, tokens, _ = build_stream(tmp_path, LAYOUTS[0])
    rows = pack_rows(stream, np.arange(rows_per_epoch(len(tokens), S)), S, False, EOS)
    valid = rows.target_RT[rows.target_RT != IGNORE]
    assert valid.tolist() == tokens[1:].tolist()
    assert rows.document_RT is None and rows.position_RT is None


def test_with_a_mask_only_the_first_token_of_each_document_is_not_predicted(tmp_path: Path) -> None:
    stream, tokens, ends = build_stream(tmp_path, LAYOUTS[0])
    rows = pack_rows(stream, np.arange(rows_per_epoch(len(tokens), 4)), 4, True, EOS)
    valid = rows.target_RT[rows.target_RT != IGNORE]
    assert valid.tolist() == np.delete(tokens, [0, *ends[:-1]]).tolist()


def test_types_and_shapes_are_what_the_model_takes(tmp_path: Path) -> None:
    stream, _, _ = build_stream(tmp_path, LAYOUTS[0])
    rows = pack_rows(stream, np.array([1, 0]), 4, True, EOS)
    assert rows.document_RT is not None and rows.position_RT is not None
    assert [a.dtype for a in (rows.input_RT, rows.target_RT, rows.document_RT, rows.position_RT)] == [
        np.int64,
        np.int64,
        np.int32,
        np.int64,
    ]
    assert rows.input_RT.shape == (2, 4)


@pytest.mark.parametrize(("n", "S", "rows"), [(2, 4, 1), (5, 4, 1), (6, 4, 2), (9, 4, 2), (10, 4, 3)])
def test_rows_per_epoch_covers_all_targets(n: int, S: int, rows: int) -> None:
    assert rows_per_epoch(n, S) == rows
