"""A small corpus of made-up words in two sources, and the settings to prepare it."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aifactory_train.data.shards import Shard
from aifactory_train.data.tokenize import TokenizerInfo, Unit, load_encoder, tokenize_unit
from aifactory_train.recipe.schema import Data

UNIT_TEXT_BYTES = 60_000  # many small shards from a small corpus


def build_data(folder: Path, corpora: dict[str, Path], **keys: Any) -> Data:
    sources = [{"name": name, "path": str(path)} for name, path in corpora.items()]
    base: dict[str, Any] = {
        "sources": sources,
        "tokenizer": {"train_vocab_size": 400},
        "prepared_dir": str(folder),
        "seq_len_tokens": 64,
        "workers": 2,
    }
    return Data.model_validate(base | keys)


def tokenize_here(units: Sequence[Unit], info: TokenizerInfo, workers: int) -> Iterator[tuple[Unit, Shard]]:
    """In place of worker processes: this one has `transformers` in memory already."""
    encoder, count = load_encoder(info.file), multiprocessing.Value("q", 0)
    for unit in units:
        yield unit, tokenize_unit(unit, encoder, info, count)


def write_corpus(path: Path, n_documents: int, seed: int) -> Path:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopäöü", k=rng.randint(1, 9))) for _ in range(500)]
    with open(path, "w") as file:
        for i in range(n_documents):
            text = "" if i % 50 == 7 else " ".join(rng.choices(words, k=rng.randint(1, 300))) + "\n<|endoftext|> 🙂"
            file.write(json.dumps({"text": text}) + "\n")
    return path
