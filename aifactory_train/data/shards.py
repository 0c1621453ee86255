"""Token shards on disk, their manifest, and reading them back memory-mapped.

PREPARED_DIR/
  settings.json            what the folder is made from; written first
  manifest.json            schema aifactory-tokens/1; written last, so without it the folder is unfinished
  tokenizer/               a Hugging Face tokenizer folder
  cache/                   the text as Arrow files; not needed for training, may be deleted after prepare
  SOURCE/counts.npy        int64 [vocab_size], how often each token occurs
  SOURCE/shard-00000.tokens  little-endian uint16 (vocabulary <= 65536) or uint32, documents one after another
  SOURCE/shard-00000.docs    little-endian int64, the end of each document, counted from the shard's start
  SOURCE/shard-00000.json    counts and sha256 of the two; written last, so without it there is no shard
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

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
    """The sidecar of one shard: rows [first_row, end_row) of the source's text column."""

    name: str
    made_from: str
    first_row: int
    end_row: int
    n_text_bytes: int
    n_documents: int
    n_tokens: int
    tokens_sha256: str
    docs_sha256: str


class SourceEntry(Part):
    name: str
    read_from: str
    input_digest: str
    n_documents: int
    n_tokens: int
    n_text_bytes: int
    unigram_entropy_nats: float
    shards: list[Shard]


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


def data_settings(data: Data) -> dict[str, Any]:
    """What the tokens depend on: sources by name and the tokenizer, not how rows are cut or mixed."""
    sources = {s.name: s.model_dump(mode="json", exclude={"name", "weight"}) for s in data.sources}
    return {"sources": sources, "tokenizer": data.tokenizer.model_dump(mode="json")}


def settings_fingerprint(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_settings(there: dict[str, Any], data: Data) -> None:
    """Raise DataError that names each key in which a prepared folder differs from the recipe."""
    faults = list(_differences("", there, data_settings(data)))
    if faults:
        raise DataError(
            f"{data.prepared_dir} was prepared from other data settings:\n" + "\n".join(f"  {f}" for f in faults),
            where=f"data.prepared_dir {data.prepared_dir}",
            do="--set data.prepared_dir=ANOTHER_FOLDER, or delete that folder and prepare anew",
        )


def _differences(key: str, there: Any, wanted: Any) -> list[str]:
    if isinstance(there, dict) and isinstance(wanted, dict):
        out = []
        for name in sorted({*there, *wanted}):
            out += _differences(f"{key}.{name}".lstrip("."), there.get(name), wanted.get(name))
        return out
    return [] if there == wanted else [f"{key}: folder has {_short(there)}, recipe has {_short(wanted)}"]


def _short(value: Any) -> str:
    return "nothing" if value is None else "something else" if isinstance(value, dict) else repr(value)


# ---------------------------------------------------------------- writing


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def dtype_for(vocab_size: int) -> Fit:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_shard(folder: Path, shard: dict[str, Any], tokens: np.ndarray, ends: np.ndarray) -> Shard:
    """Write the two files and, after both are on the disk, the sidecar that makes them a shard."""
    sidecar = folder / f"{shard['name']}.json"
    sidecar.unlink(missing_ok=True)
    token_bytes = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
    end_bytes = ends.astype("<i8").tobytes()
    write_atomic(folder / f"{shard['name']}.tokens", token_bytes)
    write_atomic(folder / f"{shard['name']}.docs", end_bytes)
    whole = Shard(
        **shard,
        n_documents=len(ends),
        n_tokens=len(tokens),
        tokens_sha256=hashlib.sha256(token_bytes).hexdigest(),
        docs_sha256=hashlib.sha256(end_bytes).hexdigest(),
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
    width = np.dtype(dtype).itemsize
    for suffix, wanted in ((".tokens", shard.n_tokens * width), (".docs", shard.n_documents * DOC_BYTES)):
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


@dataclass
class TokenStream:
    """All documents of one source, one after another across its shards. Shards are mapped at first use."""

    folder: Path
    entry: SourceEntry
    dtype: Fit
    _maps: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_tokens = self.entry.n_tokens
        self._bounds = np.concatenate([[0], np.cumsum([s.n_tokens for s in self.entry.shards])]).astype(np.int64)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        parts = [self._map(i)[0][a:b] for i, a, b in self._overlaps(start, stop)]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

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

    def _map(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        if i not in self._maps:
            shard = self.entry.shards[i]
            ends = np.memmap(self.folder / f"{shard.name}.docs", "<i8", "r")
            self._maps[i] = map_tokens(self.folder, shard, self.dtype), ends
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
        return f"{found} of {n} shards, {tokens} tokens, {documents} documents".replace("  ", " ")

    def unigram_entropy_nats(self) -> float:
        """Entropy of the token distribution of the recipe's mixture: the loss of the best model without context."""
        weights = {s.entry.name: w for s, w in zip(self.streams, self.weights, strict=True)}
        return unigram_entropy_nats(self.manifest, weights, self.folder)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every shard i with i % world_size == rank and compare its sha256.

        Raises DataError that names the damaged file. Together all ranks read every shard once.
        """
        files = [
            (self.folder / s.name / f"{shard.name}{suffix}", digest)
            for s in self.manifest.sources
            for shard in s.shards
            for suffix, digest in ((".tokens", shard.tokens_sha256), (".docs", shard.docs_sha256))
        ]
        for i, (path, digest) in enumerate(files):
            if i // 2 % world_size == rank and file_sha256(path) != digest:
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
    """Entropy in nats of the token distribution of sources mixed by `weights` (source name -> weight)."""
    total = sum(weights.values())
    mixed = np.zeros(manifest.vocab_size)
    for entry in manifest.sources:
        counts = _load_counts(folder / entry.name / "counts.npy", manifest.vocab_size)
        mixed += counts * (weights[entry.name] / total / counts.sum())
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
