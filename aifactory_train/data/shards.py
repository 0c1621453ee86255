"""Token shards on disk, their manifest, and reading them back memory-mapped.

PREPARED_DIR/
  settings.json            what the folder is made from; written first
  manifest.json            schema aifactory-tokens/1; written last, so without it the folder is unfinished
  tokenizer/               a Hugging Face tokenizer folder
  cache/                   the text as Arrow files; not needed for training, may be deleted after prepare
  SOURCE/counts.npy        int64 [vocab_size], how often each token occurs as one that counts
  SOURCE/shard-00000.tokens  little-endian uint16 (vocabulary <= 65536) or uint32, documents one after another
  SOURCE/shard-00000.docs    little-endian int64, the end of each document, counted from the shard's start
  SOURCE/shard-00000.counted  of chats only: uint8, 1 for each token that counts: what the assistant says
  SOURCE/shard-00000.json    counts and sha256 of these; written last, so without it there is no shard
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aifactory_train.data.settings import check_settings
from aifactory_train.errors import DataError
from aifactory_train.recipe.schema import Data
from aifactory_train.rundir import write_atomic
from aifactory_train.units import format_bytes, format_count

MANIFEST_SCHEMA = "aifactory-tokens/1"
DOC_BYTES = 8
READ_BYTES = 1 << 24  # piece in which a file is read for its checksum

Fit = Literal["uint16", "uint32"]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Shard(Part):
    """The sidecar of one shard: rows [first_row, end_row) of the source's text column.

    n_counted_tokens, counted_sha256: of chats; otherwise all tokens count and neither is written.
    """

    name: str
    made_from: str
    first_row: int
    end_row: int
    n_text_bytes: int
    n_documents: int
    n_tokens: int
    tokens_sha256: str
    docs_sha256: str
    n_counted_tokens: int | None = Field(None, exclude_if=lambda value: value is None)
    counted_sha256: str | None = Field(None, exclude_if=lambda value: value is None)

    @property
    def files(self) -> dict[str, str]:
        """Suffix -> sha256 of each file."""
        of = {".tokens": self.tokens_sha256, ".docs": self.docs_sha256}
        return of if self.counted_sha256 is None else of | {".counted": self.counted_sha256}


class SourceEntry(Part):
    name: str
    read_from: str
    input_digest: str
    n_documents: int
    n_tokens: int
    n_text_bytes: int
    unigram_entropy_nats: float
    shards: list[Shard]

    @property
    def n_counted_tokens(self) -> int:
        return sum(s.n_tokens if s.n_counted_tokens is None else s.n_counted_tokens for s in self.shards)


class Manifest(Part):
    schema_: Literal["aifactory-tokens/1"] = "aifactory-tokens/1"
    fingerprint: str
    settings: dict[str, Any]
    dtype: Fit
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    sources: list[SourceEntry]

    @property
    def n_tokens(self) -> int:
        return sum(s.n_tokens for s in self.sources)

    @property
    def n_documents(self) -> int:
        return sum(s.n_documents for s in self.sources)

    def counted(self) -> str:
        """ ", of which 1.20 M count", or nothing where all do."""
        n = sum(s.n_counted_tokens for s in self.sources)
        return "" if n == self.n_tokens else f", of which {format_count(n).strip()} count"


# ---------------------------------------------------------------- writing


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def dtype_for(vocab_size: int) -> Fit:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(
    folder: Path, shard: dict[str, Any], tokens: np.ndarray, ends: np.ndarray, counted: np.ndarray | None = None
) -> Shard:
    """Write the files and, after all are on the disk, the sidecar that makes them a shard.

    Args:
        counted: of chats, whether each token counts.
    """
    sidecar = folder / f"{shard['name']}.json"
    sidecar.unlink(missing_ok=True)
    token_bytes = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
    end_bytes = ends.astype("<i8").tobytes()
    write_atomic(folder / f"{shard['name']}.tokens", token_bytes)
    write_atomic(folder / f"{shard['name']}.docs", end_bytes)
    of_chats: dict[str, Any] = {}
    if counted is not None:
        counted_bytes = counted.astype(np.uint8).tobytes()
        write_atomic(folder / f"{shard['name']}.counted", counted_bytes)
        of_chats = {"n_counted_tokens": int(counted.sum()), "counted_sha256": hashlib.sha256(counted_bytes).hexdigest()}
    whole = Shard(
        **shard,
        n_documents=len(ends),
        n_tokens=len(tokens),
        tokens_sha256=hashlib.sha256(token_bytes).hexdigest(),
        docs_sha256=hashlib.sha256(end_bytes).hexdigest(),
        **of_chats,
    )
    write_atomic(sidecar, whole.model_dump_json(indent=1) + "\n")
    return whole


def finished_shard(folder: Path, wanted: dict[str, Any], dtype: Fit) -> Shard | None:
    """The shard that an earlier prepare finished, if it holds what is `wanted` and its files have their sizes."""
    try:
        shard = Shard.model_validate_json((folder / f"{wanted['name']}.json").read_text())
    except (OSError, ValidationError):
        return None
    same = all(getattr(shard, key) == value for key, value in wanted.items())
    return shard if same and shard_fault(folder, shard, dtype) is None else None


def shard_fault(folder: Path, shard: Shard, dtype: Fit) -> str | None:
    """What is wrong with the sizes of a shard's files, naming the file; None if nothing."""
    sizes = {
        ".tokens": shard.n_tokens * np.dtype(dtype).itemsize,
        ".docs": shard.n_documents * DOC_BYTES,
        ".counted": shard.n_tokens,
    }
    for suffix in shard.files:
        wanted = sizes[suffix]
        path = folder / f"{shard.name}{suffix}"
        try:
            size = path.stat().st_size
        except OSError:
            return f"shard {path} is missing"
        if size != wanted:
            return f"shard {path} has {size} bytes, its manifest says {wanted} ({format_bytes(wanted)})"
    return None


# ---------------------------------------------------------------- reading


def map_tokens(folder: Path, shard: Shard, dtype: Fit) -> np.ndarray:
    """The tokens of one shard, memory-mapped; an empty file cannot be mapped."""
    if shard.n_tokens == 0:
        return np.zeros(0, dtype)
    return np.memmap(folder / f"{shard.name}.tokens", np.dtype(dtype).newbyteorder("<"), "r")


def map_counted(folder: Path, shard: Shard) -> np.ndarray | None:
    """Whether each token of a shard of chats counts (bool), memory-mapped; None where all do."""
    if shard.counted_sha256 is None:
        return None
    return np.memmap(folder / f"{shard.name}.counted", bool, "r") if shard.n_tokens else np.zeros(0, bool)


@dataclass
class TokenStream:
    """All documents of one source, one after another across its shards. Shards are mapped at first use."""

    folder: Path
    entry: SourceEntry
    dtype: Fit
    _maps: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_tokens = self.entry.n_tokens
        self._bounds = np.concatenate([[0], np.cumsum([s.n_tokens for s in self.entry.shards])]).astype(np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        parts = [self._map(i)[0][a:b] for i, a, b in self._overlaps(start, stop)]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def counted(self, start: int, stop: int) -> np.ndarray:
        """Whether each of the tokens [start, stop) counts as a target: in chats what the assistant says, else all."""
        parts = []
        for i, a, b in self._overlaps(start, stop):
            counted = self._map(i)[2]
            parts.append(np.ones(b - a, bool) if counted is None else counted[a:b])
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Token indices in (start, stop] at which a document begins (or the last one has ended), as int64."""
        parts = []
        for i, a, b in self._overlaps(start, stop):
            ends = self._map(i)[1]
            first, last = np.searchsorted(ends, [a, b], side="right")
            parts.append(np.asarray(ends[first:last], np.int64) + self._bounds[i])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first, end within the shard) of each shard that holds a part of [start, stop)."""
        first = max(0, int(np.searchsorted(self._bounds, start, side="right")) - 1)
        out = []
        for i in range(first, len(self.entry.shards)):
            low, high = int(self._bounds[i]), int(self._bounds[i + 1])
            if low >= stop:
                break
            if max(start, low) < high:
                out.append((i, max(start - low, 0), min(stop, high) - low))
        return out

    def _map(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Tokens, ends of documents and what counts of shard i."""
        if i not in self._maps:
            shard = self.entry.shards[i]
            ends = np.memmap(self.folder / f"{shard.name}.docs", "<i8", "r")
            self._maps[i] = map_tokens(self.folder, shard, self.dtype), ends, map_counted(self.folder, shard)
        return self._maps[i]


@dataclass(frozen=True)
class Prepared:
    """A complete prepared folder. `streams` and `weights` stand in the recipe's order of sources."""

    folder: Path
    manifest: Manifest
    weights: tuple[float, ...]
    streams: tuple[TokenStream, ...]

    @property
    def tokenizer_dir(self) -> Path:
        return self.folder / "tokenizer"

    def describe(self) -> str:
        """ "12 of 12 shards, 8.30 M tokens, 1,730 documents": of each, what was found at load."""
        n = sum(len(s.shards) for s in self.manifest.sources)
        found = sum(len(s.entry.shards) for s in self.streams)
        tokens, documents = format_count(self.manifest.n_tokens), f"{self.manifest.n_documents:,}"
        return f"{found} of {n} shards, {tokens} tokens{self.manifest.counted()}, {documents} documents".replace(
            "  ", " "
        )

    def unigram_entropy_nats(self) -> float:
        """Entropy of the tokens that count in the recipe's mixture: the loss of the best model without context."""
        weights = {s.entry.name: w for s, w in zip(self.streams, self.weights, strict=True)}
        return unigram_entropy_nats(self.manifest, weights, self.folder)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every shard i with i % world_size == rank and compare its sha256.

        Raises DataError that names the damaged file. Together all ranks read every shard once.
        """
        shards = [(self.folder / s.name, shard) for s in self.manifest.sources for shard in s.shards]
        for folder, shard in shards[rank::world_size]:
            for suffix, digest in shard.files.items():
                path = folder / f"{shard.name}{suffix}"
                if file_sha256(path) != digest:
                    _refuse(f"shard {path} is damaged: its sha256 is not the one in the manifest", path)


def load_prepared(data: Data) -> Prepared:
    """Open a prepared folder.

    Raises DataError: not prepared, prepared from other settings, a shard missing or of another size (by name).
    """
    folder = Path(data.prepared_dir)
    manifest = read_manifest(folder)
    check_settings(manifest.settings, data)
    entries = {s.name: s for s in manifest.sources}
    for entry in manifest.sources:
        for shard in entry.shards:
            fault = shard_fault(folder / entry.name, shard, manifest.dtype)
            if fault:
                _refuse(fault, folder / entry.name / shard.name)
    streams = tuple(TokenStream(folder / s.name, entries[s.name], manifest.dtype) for s in data.sources)
    return Prepared(folder, manifest, tuple(s.weight for s in data.sources), streams)


def read_manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    try:
        return Manifest.model_validate_json(path.read_text())
    except OSError:
        raise DataError(
            f"{folder} holds no prepared tokens: no manifest.json", where=str(path), do="aifactory-train prepare RECIPE"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"not a {MANIFEST_SCHEMA} manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(path),
            do="delete that file and run  aifactory-train prepare RECIPE  again",
        ) from None


def check_fits_model(manifest: Manifest, vocab_size: int) -> None:
    """Raise DataError if the tokenizer has more entries, added tokens included, than the model has rows."""
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {manifest.vocab_size} entries, the model's vocabulary only {vocab_size}",
            where="model.vocab_size",
            do=f"--set model.vocab_size={-(-manifest.vocab_size // 128) * 128}, or take a smaller tokenizer",
        )


def unigram_entropy_nats(manifest: Manifest, weights: dict[str, float], folder: Path) -> float:
    """Entropy in nats of the tokens that count in sources mixed by `weights` (source name -> weight).

    The weights mix rows; of those of chats only a part of the tokens count.
    """
    total = sum(weights.values())
    mixed = np.zeros(manifest.vocab_size)
    for entry in manifest.sources:
        counts = _load_counts(folder / entry.name / "counts.npy", manifest.vocab_size)
        mixed += counts * (weights[entry.name] / total / entry.n_tokens)
    return entropy_nats(mixed)


def entropy_nats(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` are proportional to."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _load_counts(path: Path, vocab_size: int) -> np.ndarray:
    try:
        counts: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        counts = np.zeros(0)
    if counts.shape != (vocab_size,):
        _refuse(f"{path} is missing or damaged: found {counts.shape[0]} counts, wanted {vocab_size}", path)
    return counts


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(READ_BYTES):
                digest.update(piece)
    except OSError as error:
        _refuse(f"cannot read {path}: {error.strerror}", path)
    return digest.hexdigest()


def _refuse(what: str, path: Path) -> NoReturn:
    stale = path if path.suffix == ".npy" else path.with_suffix(".json")
    do = f"rm -f {stale}  and then  aifactory-train prepare RECIPE  makes it anew"
    raise DataError(what, where=str(path), do=do)
