"""The tokenizer, and tokenizing documents in parallel processes.

A unit of work is a run of documents of one source and becomes one shard, so what was finished before a kill
stays finished. Units depend on the documents alone, never on the number of workers.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait as wait_for_sentinels
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aifactory_train.data.chat import encode_chat
from aifactory_train.data.progress import Progress, say
from aifactory_train.data.shards import Fit, Shard, dtype_for, file_sha256, shard_name, write_shard
from aifactory_train.data.sources import TEXT_COLUMN, text_lengths
from aifactory_train.errors import DataError
from aifactory_train.rundir import fsync_folder
from aifactory_train.units import format_bytes

if TYPE_CHECKING:
    import datasets
    import tokenizers

EOS = "<|endoftext|>"
TRAIN_TEXT_BYTES = 20_000_000  # merges of a small vocabulary no longer change with more text, and time grows with it
UNIT_TEXT_BYTES = 16_000_000  # seconds of work: little is lost by a kill, and the workers stay evenly busy
MOST_UNITS = 4096  # per source; each shard is two memory maps in every rank, and Linux allows 65530 per process
PIECE_CHARS = 1 << 20  # `tokenizers` needs about 140 bytes of memory per byte of text that it gets at once
PIECE_SLACK_CHARS = 1 << 16
REPORT_EVERY_DOCUMENTS = 16
POLL_S = 0.2
REDO = "mend the folder that data.tokenizer.path names, delete the prepared folder, and run prepare again"

# Before a single space, or after a single newline, between words: byte-level pre-tokenizers (GPT-2's, Llama 3's)
# cut there anyway, so that a cut changes no token.
_SAFE_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S)\n(?=\S)")


@dataclass(frozen=True)
class TokenizerInfo:
    """What shards need to know; `vocab_size` is the highest id + 1, added tokens included."""

    folder: Path
    vocab_size: int
    eos_id: int
    sha256: str

    @property
    def dtype(self) -> Fit:
        return dtype_for(self.vocab_size)

    @property
    def file(self) -> Path:
        return self.folder / "tokenizer.json"


# ---------------------------------------------------------------- the tokenizer


def train_tokenizer(sources: Sequence[datasets.Dataset], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE on an even sample of all documents and save it as a Hugging Face folder.

    The same documents give the same tokenizer. A small corpus may give fewer than `vocab_size` entries.
    Raises DataError if `vocab_size` has no room for the 256 bytes and the end-of-text token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise DataError(
            f"train_vocab_size {vocab_size} is too small: {len(alphabet)} bytes and {EOS} need {len(alphabet) + 1}",
            where="data.tokenizer.train_vocab_size",
            do="--set data.tokenizer.train_vocab_size=4096",
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=alphabet,
        show_progress=sys.stderr.isatty(),
    )
    bpe.train_from_iterator(_training_sample(sources), trainer)
    say(f"tokenizer: trained, {bpe.get_vocab_size()} entries")
    _save(PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, clean_up_tokenization_spaces=False), folder)


def copy_tokenizer(path: str, folder: Path, for_chats: bool) -> None:
    """Take a Hugging Face tokenizer folder as it is.

    Raises DataError if it is none, names no eos token, or has no chat template where there are chats.
    """
    from transformers import AutoTokenizer

    where, do = f"data.tokenizer.path {path}", "give a folder that holds tokenizer.json and tokenizer_config.json"
    if not Path(path).is_dir():
        fetch = "; a tokenizer of the hub is fetched by: aifactory-train stage RECIPE --to DIR"
        raise DataError(f"tokenizer folder {path} does not exist", where=where, do=do + fetch)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # anything that a damaged folder makes the library raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot load a tokenizer from {path}: {reason}", where=where, do=do) from None
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer in {path} names no eos token, and each document must end with one",
            where=where,
            do='add "eos_token" to its tokenizer_config.json',
        )
    if for_chats and not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer in {path} has no chat template, and a source has messages_key",
            where=where,
            do="take the tokenizer of an instruct model, or put a chat_template.jinja into that folder",
        )
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer in {path} has no tokenizer.json form", where=where, do=do)
    _save(tokenizer, folder)


def load_tokenizer(folder: Path) -> TokenizerInfo:
    """Read back what `train_tokenizer` or `copy_tokenizer` saved."""
    encoder = load_encoder(folder / "tokenizer.json")
    eos = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    eos_id = encoder.token_to_id(eos if isinstance(eos, str) else eos["content"])
    if eos_id is None:
        raise DataError(f"the tokenizer in {folder} does not know its own eos token {eos}", where=str(folder), do=REDO)
    vocab_size = max(encoder.get_vocab(with_added_tokens=True).values()) + 1
    return TokenizerInfo(folder, vocab_size, eos_id, file_sha256(folder / "tokenizer.json"))


def load_encoder(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer as `tokenizers` runs it: special tokens that stand in the text are ordinary text."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(file))
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True
    return encoder


def encode(encoder: tokenizers.Tokenizer, text: str) -> Iterator[list[int]]:
    """Token ids of one document, in pieces that bound the memory; no special tokens."""
    for piece in _pieces(text):
        # A batch of one, not of many: more would start one thread per core in each of the worker processes.
        yield encoder.encode_batch_fast([piece], add_special_tokens=False)[0].ids


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARS + PIECE_SLACK_CHARS:
        cut = _SAFE_CUT.search(text, start + PIECE_CHARS, start + PIECE_CHARS + PIECE_SLACK_CHARS)
        end = cut.end() if cut else start + PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _training_sample(sources: Sequence[datasets.Dataset]) -> Iterator[str]:
    """Every k-th document of all sources, with k such that about TRAIN_TEXT_BYTES come together."""
    total = sum(int(text_lengths(s).sum()) for s in sources)
    stride = max(1, round(total / TRAIN_TEXT_BYTES))
    seen, most = 0, 2 * TRAIN_TEXT_BYTES  # a few huge documents must not make the sample huge
    with Progress("tokenizer: reading a sample", min(total // stride, most), "bytes") as progress:
        for source in sources:
            for row in range(0, len(source), stride):
                text = source[row][TEXT_COLUMN] or ""
                for piece in _pieces(text):
                    if seen >= most:
                        return
                    seen += len(piece.encode())
                    yield piece
                progress.update_to(seen)
    say(f"tokenizer: learning merges from {format_bytes(seen)} of text")


def _save(tokenizer: Any, folder: Path) -> None:
    """Save under a temporary name first, so that a folder with the right name is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tokenizer.save_pretrained(temporary)
    except Exception as error:
        if f"(os error {errno.ENOSPC})" in str(error):  # how Rust says it: `tokenizers` raises a bare Exception
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary)) from error
        raise
    fsync_folder(temporary)
    os.replace(temporary, folder)
    fsync_folder(folder.parent)


# ---------------------------------------------------------------- units of work


@dataclass(frozen=True)
class Unit:
    """Documents of one source that become one shard; `wanted` is the part of the sidecar known beforehand."""

    dataset: datasets.Dataset
    folder: Path
    wanted: dict[str, Any]
    of_chats: bool

    @property
    def name(self) -> str:
        return self.wanted["name"]

    @property
    def n_rows(self) -> int:
        return self.wanted["end_row"] - self.wanted["first_row"]


def plan_units(dataset: datasets.Dataset, folder: Path, made_from: str, of_chats: bool) -> list[Unit]:
    """Cut a source into runs of documents of about UNIT_TEXT_BYTES, or more for a source of over 65 GB."""
    lengths = text_lengths(dataset)
    starts = np.cumsum(lengths) - lengths
    target = max(UNIT_TEXT_BYTES, -(-int(lengths.sum()) // MOST_UNITS))
    first_rows = np.flatnonzero(np.diff(starts // target, prepend=-1))
    units = []
    for i, (first, end) in enumerate(zip(first_rows, [*first_rows[1:], len(lengths)], strict=True)):
        wanted = {
            "name": shard_name(i),
            "made_from": made_from,
            "first_row": int(first),
            "end_row": int(end),
            "n_text_bytes": int(lengths[first:end].sum()),
        }
        units.append(Unit(dataset, folder, wanted, of_chats))
    return units


def tokenize_unit(unit: Unit, encoder: tokenizers.Tokenizer, info: TokenizerInfo, count: Any) -> Shard:
    """Tokenize one unit and write its shard. `count.value` grows with the documents done."""
    parts: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    ends: list[int] = []
    n_tokens = 0
    rows = range(unit.wanted["first_row"], unit.wanted["end_row"])
    for at in range(0, len(rows), REPORT_EVERY_DOCUMENTS):
        some = rows[at : at + REPORT_EVERY_DOCUMENTS]
        for text in unit.dataset[some.start : some.stop][TEXT_COLUMN]:
            if not text:
                continue
            if unit.of_chats:
                ids, counts = _chat_tokens(text, info, f"data.sources, name {unit.folder.name}")
                counted.append(counts)
                pieces = [ids.astype(info.dtype)]
            else:
                pieces = [np.asarray(piece, info.dtype) for piece in encode(encoder, text)]
                pieces.append(np.asarray([info.eos_id], info.dtype))
            parts += pieces
            n_tokens += sum(map(len, pieces))
            ends.append(n_tokens)
        with count.get_lock():
            count.value += len(some)
    tokens = np.concatenate(parts) if parts else np.zeros(0, info.dtype)
    of_chats = np.concatenate([np.zeros(0, bool), *counted]) if unit.of_chats else None
    return write_shard(unit.folder, unit.wanted, tokens, np.asarray(ends, np.int64), of_chats)


def _chat_tokens(text: str, info: TokenizerInfo, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a chat and what counts. It ends with the end-of-text token, which counts only as an end of turn."""
    ids, counts = encode_chat(_chat_tokenizer(info.folder), text, place)
    if len(ids) == 0 or ids[-1] != info.eos_id:
        ids, counts = np.append(ids, info.eos_id), np.append(counts, False)
    return ids, counts


@cache  # one in each worker process
def _chat_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


# ---------------------------------------------------------------- the pool

_state: dict[str, Any] = {}  # of a worker process: set once when it starts


def count_cores() -> int:
    """Cores that this process may use, which under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def tokenize_units(units: Sequence[Unit], info: TokenizerInfo, workers: int) -> Iterator[tuple[Unit, Shard]]:
    """Tokenize in `workers` processes, with progress; yields each unit with its shard as it is finished."""
    if not units:
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the threads of tokenizers and Arrow half-way
    count = context.Value("q", 0)
    try:
        with (
            Progress("tokenizing", sum(u.n_rows for u in units), "documents") as progress,
            ProcessPoolExecutor(min(workers, len(units)), context, _start_worker, (info, count)) as pool,
        ):
            running: dict[Future[Shard], Unit] = {pool.submit(_work, unit): unit for unit in units}
            try:
                while running:
                    done, _ = wait(running, POLL_S, FIRST_COMPLETED)
                    progress.update_to(count.value)
                    for future in done:
                        yield running.pop(future), future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    except BrokenProcessPool:
        raise DataError(
            "a tokenizing process died, most likely for lack of memory; finished shards are kept",
            do=f"--set data.workers={max(1, workers // 2)}  and run prepare again; it goes on where it was",
        ) from None


def _start_worker(info: TokenizerInfo, count: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state.update(encoder=load_encoder(info.file), info=info, count=count)


def _end_with_parent() -> None:
    """A killed parent would leave its workers waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_sentinels([parent.sentinel])
        os._exit(1)


def _work(unit: Unit) -> Shard:
    return tokenize_unit(unit, _state["encoder"], _state["info"], _state["count"])
