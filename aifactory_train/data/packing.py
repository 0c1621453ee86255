"""Rows over the concatenation of all documents of a source.

Row r reads tokens [r*S, r*S + S) and predicts tokens [r*S + 1, r*S + S + 1); the last row is padded. Every
token but the first is predicted once in each epoch, and none is lost.

Shapes: R rows, T tokens of a row (T = S).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aifactory_train.data.shards import TokenStream

IGNORE = -100  # a target that does not count; the value torch's cross entropy passes over by default


@dataclass(frozen=True)
class Rows:
    """input and target int64, document int32 (0 for the first one in the row), position int64 (restarts with it)."""

    input_RT: np.ndarray
    target_RT: np.ndarray
    document_RT: np.ndarray | None
    position_RT: np.ndarray | None


def rows_per_epoch(n_tokens: int, seq_len_tokens: int) -> int:
    """ceil((N - 1) / S): the last token is only predicted, never read from."""
    return max(1, -(-(n_tokens - 1) // seq_len_tokens))


def pack_rows(stream: TokenStream, rows_R: np.ndarray, seq_len_tokens: int, document_mask: bool, eos_id: int) -> Rows:
    """Cut the rows with numbers `rows_R` out of a source.

    A target that does not count in its source is IGNORE. With `document_mask` so is the target that would reach over
    the border of a document, and document and position are given; without it such targets count, and both are None.
    """
    S = seq_len_tokens
    tokens_RU = np.full((len(rows_R), S + 1), eos_id, np.int64)  # U = T + 1: inputs and targets overlap
    real_RU = np.zeros(tokens_RU.shape, bool)
    counted_RU = np.zeros(tokens_RU.shape, bool)
    start_RU = np.zeros(tokens_RU.shape, bool)
    for i, row in enumerate(rows_R.tolist()):
        first = row * S
        some = stream.tokens(first, min(first + S + 1, stream.n_tokens))
        tokens_RU[i, : len(some)] = some
        counted_RU[i, : len(some)] = stream.counted(first, first + len(some))
        real_RU[i, : len(some)] = True
        if document_mask:
            start_RU[i, stream.document_starts(first, min(first + S, stream.n_tokens)) - first] = True
    counts_RT = counted_RU[:, 1:] & ~start_RU[:, 1:]
    input_RT = np.where(real_RU[:, 1:], tokens_RU[:, :-1], eos_id)
    target_RT = np.where(counts_RT, tokens_RU[:, 1:], IGNORE)
    if not document_mask:
        return Rows(input_RT, target_RT, None, None)
    start_RT = start_RU[:, :-1]
    document_RT = np.cumsum(start_RT, axis=1, dtype=np.int32)
    T = np.arange(S, dtype=np.int64)
    position_RT = T - np.maximum.accumulate(np.where(start_RT, T, 0), axis=1)
    return Rows(input_RT, target_RT, document_RT, position_RT)
