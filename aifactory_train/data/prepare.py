"""`prepare`: sources to token shards, going on where an earlier call was cut off."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aifactory_train.data.progress import say
from aifactory_train.data.settings import check_settings, data_settings, settings_fingerprint
from aifactory_train.data.shards import (
    Manifest,
    Shard,
    SourceEntry,
    entropy_nats,
    finished_shard,
    map_counted,
    map_tokens,
    read_manifest,
)
from aifactory_train.data.sources import list_files, open_source
from aifactory_train.data.tokenize import (
    TokenizerInfo,
    Unit,
    copy_tokenizer,
    count_cores,
    load_tokenizer,
    plan_units,
    tokenize_units,
    train_tokenizer,
)
from aifactory_train.errors import DataError, storage_errors
from aifactory_train.recipe.schema import Data, Source
from aifactory_train.rundir import hold, write_atomic
from aifactory_train.units import format_count

if TYPE_CHECKING:
    import datasets

OWN_NAMES = {"tokenizer", "cache", "settings.json", "manifest.json"}
COUNT_TOKENS = 1 << 24  # tokens counted at once


@dataclass(frozen=True)
class Opened:
    source: Source
    read_from: str
    digest: str
    dataset: datasets.Dataset


def prepare(data: Data) -> Manifest:
    """Make `data.prepared_dir` complete; at once where it is.

    Raises DataError (bad source or tokenizer, folder of other settings, another prepare at work) and
    StorageError (disk full, no permission). Finished shards are kept in every case.
    """
    folder = Path(data.prepared_dir)
    _check_folder(folder, data)
    do = "free space or get the permission there and run prepare again, it goes on; or --set data.prepared_dir=OTHER"
    where = f"data.prepared_dir {folder}"
    busy = DataError(f"another prepare is at work in {folder}", where=where, do="wait until it has ended")
    with storage_errors("preparing data", folder, do), hold(folder, busy):
        ready = _complete(folder)
        if ready is not None:
            _tell_of_changes(ready, data)
            say(f"prepared data in {folder} is complete and reused: {_summary(ready)}")
            return ready
        return _prepare(folder, data)


def _prepare(folder: Path, data: Data) -> Manifest:
    (folder / "manifest.json").unlink(missing_ok=True)
    settings = data_settings(data)
    write_atomic(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
    opened = [_open(source, folder / "cache") for source in data.sources]
    info = _tokenizer(folder / "tokenizer", data, [o.dataset for o in opened])
    units = [
        plan_units(o.dataset, folder / o.source.name, f"{o.digest} {info.sha256}", bool(o.source.messages_key))
        for o in opened
    ]
    shards = _make_shards([u for some in units for u in some], info, data)
    entries = [
        _entry(o, some[0].folder, [shards[u.folder, u.name] for u in some], info)
        for o, some in zip(opened, units, strict=True)
    ]
    manifest = Manifest(
        fingerprint=settings_fingerprint(settings),
        settings=settings,
        dtype=info.dtype,
        vocab_size=info.vocab_size,
        eos_id=info.eos_id,
        tokenizer_sha256=info.sha256,
        sources=entries,
    )
    write_atomic(folder / "manifest.json", manifest.model_dump_json(indent=1) + "\n")
    say(f"prepared {_summary(manifest)} in {folder}")
    return manifest


def _open(source: Source, cache_dir: Path) -> Opened:
    listing = list_files(source)
    read_from = listing.described if listing else f"hub dataset {source.hub}"
    say(f"source {source.name}: reading {read_from}" + (f", {len(listing.files):,} files" if listing else ""))
    dataset = open_source(source, cache_dir)
    return Opened(source, read_from, listing.digest if listing else dataset._fingerprint, dataset)


def _tokenizer(folder: Path, data: Data, sources: Sequence[datasets.Dataset]) -> TokenizerInfo:
    if folder.exists():
        say("tokenizer: reused")
    elif data.tokenizer.path:
        copy_tokenizer(data.tokenizer.path, folder, any(s.messages_key for s in data.sources))
    else:
        train_tokenizer(sources, data.tokenizer.train_vocab_size or 0, folder)
    return load_tokenizer(folder)


def _make_shards(units: Sequence[Unit], info: TokenizerInfo, data: Data) -> dict[tuple[Path, str], Shard]:
    """The shard of each unit; those that an earlier prepare finished are not made again."""
    shards: dict[tuple[Path, str], Shard] = {}
    missing: list[Unit] = []
    for unit in units:
        unit.folder.mkdir(exist_ok=True)
        for stale in unit.folder.glob(f".{unit.name}.*.tmp"):
            stale.unlink()
        shard = finished_shard(unit.folder, unit.wanted, info.dtype)
        if shard is None:
            missing.append(unit)
        else:
            shards[unit.folder, unit.name] = shard
    if shards:
        say(f"{len(shards)} of {len(units)} shards were finished before and are kept")
    workers = count_cores() if data.workers == "auto" else data.workers
    for unit, shard in tokenize_units(missing, info, workers):
        shards[unit.folder, unit.name] = shard
    return shards


def _entry(opened: Opened, folder: Path, shards: list[Shard], info: TokenizerInfo) -> SourceEntry:
    counts = np.zeros(info.vocab_size, np.int64)
    for shard in shards:
        tokens, counted = map_tokens(folder, shard, info.dtype), map_counted(folder, shard)
        for at in range(0, len(tokens), COUNT_TOKENS):
            some = tokens[at : at + COUNT_TOKENS]
            some = some if counted is None else some[counted[at : at + COUNT_TOKENS]]
            counts += np.bincount(some, minlength=info.vocab_size)
    if not counts.any():
        raise DataError(
            f"data source {opened.source.name}: the loss counts on no token, as the chat template marks nothing",
            where="data.tokenizer.path",
            do="put {% generation %} and {% endgeneration %} in its chat_template.jinja around what the assistant says",
        )
    buffer = io.BytesIO()
    np.save(buffer, counts)
    write_atomic(folder / "counts.npy", buffer.getvalue())
    return SourceEntry(
        name=opened.source.name,
        read_from=opened.read_from,
        input_digest=opened.digest,
        n_documents=sum(s.n_documents for s in shards),
        n_tokens=sum(s.n_tokens for s in shards),
        n_text_bytes=sum(s.n_text_bytes for s in shards),
        unigram_entropy_nats=entropy_nats(counts),
        shards=shards,
    )


def _check_folder(folder: Path, data: Data) -> None:
    """Refuse, before anything is written, a folder that is not ours or was made from other settings."""
    for source in data.sources:
        if source.name in OWN_NAMES or source.name.startswith("."):
            raise DataError(
                f"a data source cannot be named {source.name}: that name is taken in the prepared folder",
                where="data.sources",
                do=f"rename it, for instance to {source.name.strip('.') or 'text'}-text",
            )
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, not a folder", where="data.prepared_dir", do="give a folder")
    try:
        check_settings(json.loads((folder / "settings.json").read_text()), data)
    except FileNotFoundError:
        theirs = [n for n in (*OWN_NAMES, *(s.name for s in data.sources)) if (folder / n).exists()]
        if theirs:
            raise DataError(
                f"{folder} is not a prepared folder, but has {theirs[0]} in it, which prepare would overwrite",
                where=f"data.prepared_dir {folder}",
                do="--set data.prepared_dir=ANOTHER_FOLDER",
            ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read {folder / 'settings.json'}: {error}",
            where=f"data.prepared_dir {folder}",
            do="--set data.prepared_dir=ANOTHER_FOLDER, or delete that folder and prepare anew",
        ) from None


def _complete(folder: Path) -> Manifest | None:
    """The manifest, if all that it names is there in its size."""
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_manifest(folder)
    for source in manifest.sources:
        at = folder / source.name
        whole = all(finished_shard(at, s.model_dump(), manifest.dtype) is not None for s in source.shards)
        if not whole or not (at / "counts.npy").exists() or not (folder / "tokenizer").exists():
            return None
    return manifest


def _tell_of_changes(manifest: Manifest, data: Data) -> None:
    """Shards stay valid when their text has changed since or is gone, but whoever prepares should know."""
    digests = {s.name: s.input_digest for s in manifest.sources}
    for source in data.sources:
        try:
            listing = list_files(source)
        except DataError:
            say(f"source {source.name}: its files are no longer there; the prepared tokens are used")
            continue
        if listing is not None and listing.digest != digests[source.name]:
            say(
                f"source {source.name}: its files have changed since; the prepared tokens are used. "
                f"To read it anew delete {data.prepared_dir}"
            )


def _summary(manifest: Manifest) -> str:
    tokens, documents = format_count(manifest.n_tokens), f"{manifest.n_documents:,}"
    return f"{tokens} tokens{manifest.counted()}, {documents} documents, vocabulary {manifest.vocab_size}"
