"""Text sources: local files, a hub dataset or Python's own standard library, each as one column of documents.

A document of a source of chats is the JSON text of its messages.

Everything becomes a memory-mapped Arrow file below `cache_dir`, so that a corpus may be larger than memory.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from aifactory_train.data.chat import chat_json
from aifactory_train.data.lines import read_lines
from aifactory_train.errors import AifactoryError, DataError, storage_fault
from aifactory_train.recipe.schema import Source

if TYPE_CHECKING:
    import datasets

TEXT_COLUMN = "text"
SUFFIXES = {".txt": "txt", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".parquet": "parquet"}
READABLE = ", ".join(SUFFIXES)
ARROW_BATCH_ROWS = 256  # rows held in memory before they are written; a row may be a file of many MB

Kind = Literal["txt", "jsonl", "parquet", "python"]


@dataclass(frozen=True)
class Listing:
    """The files of a local source in reading order; `digest` changes with their names, sizes or times."""

    kind: Kind
    files: tuple[str, ...]
    digest: str
    described: str


def list_files(source: Source) -> Listing | None:
    """The files of `source`, None for a hub dataset.

    Raises DataError: nothing there, unknown suffix, several formats in one source.
    """
    if source.hub:
        return None
    if source.python_stdlib:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = []
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if name not in ("site-packages", "dist-packages")]
            files += [Path(folder, name) for name in names if name.endswith(".py")]
        return _listing("python", files, f"Python standard library {sysconfig.get_python_version()}", source)
    root = Path(str(source.path)).expanduser()
    if root.is_dir():
        found = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
        files = [p for p in found if p.is_file() and _kind(p)]
        if not files:
            raise _empty(source, f"folder {root} holds no file that ends in {READABLE}")
    elif root.is_file():
        files = [root]
    else:
        files = [Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file()]
        if not files:
            raise DataError(
                f"data source {source.name}: no such file or folder, and no file matches: {source.path}",
                where=f"data.sources, name {source.name}, key path",
                do="correct the path; a relative one starts at the folder you call from",
            )
    kinds: dict[str, Path] = {}
    for path in files:
        kind = _kind(path)
        if kind is None:
            raise DataError(
                f"data source {source.name}: cannot read {path.name}: unknown suffix {path.suffix or '(none)'}",
                where=str(path),
                do=f"give files that end in one of {READABLE}",
            )
        kinds.setdefault(kind, path)
    if len(kinds) > 1:
        examples = ", ".join(f"{kind} ({path.name})" for kind, path in sorted(kinds.items()))
        raise DataError(
            f"data source {source.name} mixes formats: {examples}",
            where=str(source.path),
            do="make one source of each format, for instance path: FOLDER/**/*.jsonl",
        )
    return _listing(next(iter(kinds)), files, str(source.path), source)  # type: ignore[arg-type]


def open_source(source: Source, cache_dir: Path) -> datasets.Dataset:
    """Read `source` into one memory-mapped column "text", one row a document; a second call reuses the cache.

    Raises DataError: an empty corpus, or the file, and where it can the line, of what could not be read.
    Disk errors of the cache pass through for `errors.storage_errors`.
    """
    listing = list_files(source)
    if source.messages_key and listing is not None and listing.kind == "txt":
        raise _unreadable(source, listing.files[0], "a text file holds no chats, and messages_key asks for them")
    with _quiet_datasets(), _source_errors(source):
        if listing is None:
            dataset = _open_hub(source, cache_dir)
        elif listing.kind == "parquet" and source.messages_key is None:
            dataset = _open_parquet(source, listing, cache_dir)
        else:
            dataset = _open_rows(source, listing, cache_dir)
        if not text_lengths(dataset).any():
            raise _empty(source, "all its documents are empty")
        return dataset


def text_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Bytes of each document, int64; a null has none."""
    import pyarrow.compute as pc

    lengths = pc.fill_null(pc.binary_length(dataset.data.column(TEXT_COLUMN)), 0)
    return np.asarray(lengths.to_numpy(), np.int64)


def _kind(path: Path) -> Kind | None:
    return next((kind for suffix, kind in SUFFIXES.items() if path.name.endswith(suffix)), None)  # type: ignore[misc]


def _listing(kind: Kind, paths: list[Path], described: str, source: Source) -> Listing:
    paths = sorted(paths, key=lambda p: p.as_posix())
    digest = hashlib.sha256(f"{kind}\n".encode())
    try:
        for path in paths:
            stat = path.stat()
            digest.update(f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    except OSError as error:
        raise _unreadable(source, path, str(error.strerror)) from None
    return Listing(kind, tuple(str(p) for p in paths), digest.hexdigest(), described)


def _empty(source: Source, why: str) -> DataError:
    return DataError(
        f"empty corpus: data source {source.name}: {why}",
        where=f"data.sources, name {source.name}",
        do="point the source at files with text in them, or remove it from the recipe",
    )


def _unreadable(source: Source, path: Path | str, why: str) -> DataError:
    return DataError(f"data source {source.name}: cannot read {path}: {why}", do="mend or remove that file")


def _no_column(source: Source, place: str, names: list[str]) -> DataError:
    key, what = ("messages_key", "chats") if source.messages_key else ("text_key", "text")
    return DataError(
        f"data source {source.name}: no column {_column(source)!r}; there are: {', '.join(names) or 'none'}",
        where=place,
        do=f"set {key} of source {source.name} to the column that holds the {what}",
    )


def _column(source: Source) -> str:
    return source.messages_key or source.text_key


def _chat(source: Source, value: Any, place: str) -> str:
    try:
        return chat_json(value)
    except ValueError as error:
        raise _unreadable(source, place, f"{source.messages_key!r} holds {error}") from None


# ---------------------------------------------------------------- text, Python and JSON lines


def _open_rows(source: Source, listing: Listing, cache_dir: Path) -> datasets.Dataset:
    from datasets import Dataset, Features, Value

    key = f"{listing.digest} {listing.kind} {_column(source)}" + (" chats" if source.messages_key else "")
    return Dataset.from_generator(
        _rows,
        features=Features({TEXT_COLUMN: Value("large_string")}),  # 64-bit offsets: a batch may pass 2 GiB
        cache_dir=str(cache_dir),
        gen_kwargs={"source": source, "kind": listing.kind, "files": listing.files},
        fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
        writer_batch_size=ARROW_BATCH_ROWS,
    )


def _rows(source: Source, kind: Kind, files: tuple[str, ...]) -> Iterator[dict[str, str]]:
    yield {TEXT_COLUMN: ""}  # `datasets` fails on no rows at all; an empty document is passed over later
    for path in files:
        try:
            if kind == "jsonl":
                yield from _json_rows(source, path)
            elif kind == "parquet":
                yield from _parquet_chats(source, path)
            else:
                yield {TEXT_COLUMN: Path(path).read_bytes().decode("utf-8")}
        except UnicodeDecodeError as error:
            if kind != "python":  # the standard library ships a few files that are broken on purpose, for its tests
                raise _unreadable(source, path, f"not UTF-8 at byte {error.start}") from None
        except (OSError, EOFError) as error:
            raise _unreadable(source, path, getattr(error, "strerror", None) or str(error)) from None


def _json_rows(source: Source, path: str) -> Iterator[dict[str, str]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _unreadable(source, place, f"not a JSON line: {error}") from None
        if not isinstance(row, dict) or _column(source) not in row:
            raise _no_column(source, place, list(row) if isinstance(row, dict) else [])
        text = row[_column(source)]
        if source.messages_key:
            yield {TEXT_COLUMN: _chat(source, text, place)}
            continue
        if text is None:
            continue
        if not isinstance(text, str):
            raise _unreadable(source, place, f"{source.text_key!r} holds {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _unreadable(source, place, f"{source.text_key!r} holds half a surrogate pair") from None
        yield {TEXT_COLUMN: text}


# ---------------------------------------------------------------- parquet and the hub


def _open_parquet(source: Source, listing: Listing, cache_dir: Path) -> datasets.Dataset:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Value, load_dataset

    n_rows = 0
    for path in listing.files:
        try:
            n_rows += pq.read_metadata(path).num_rows
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(source, path, _first_line(error)) from None
        if source.text_key not in schema.names:
            raise _no_column(source, path, schema.names)
        kind = schema.field(source.text_key).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise _unreadable(source, path, f"column {source.text_key!r} holds {kind}, not text")
    if n_rows == 0:
        raise _empty(source, "its files hold no rows")
    dataset = load_dataset(
        "parquet",
        data_files=[glob.escape(str(Path(p).absolute())) for p in listing.files],
        split="train",
        columns=[source.text_key],
        features=Features({source.text_key: Value("large_string")}),
        cache_dir=str(cache_dir),
    )
    return _one_column(source, dataset, str(source.path))


def _parquet_chats(source: Source, path: str) -> Iterator[dict[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if _column(source) not in file.schema_arrow.names:
                raise _no_column(source, path, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(ARROW_BATCH_ROWS, columns=[_column(source)]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield {TEXT_COLUMN: _chat(source, value, f"{path}, row {number}")}
    except pa.ArrowException as error:
        raise _unreadable(source, path, _first_line(error)) from None


def _open_hub(source: Source, cache_dir: Path) -> datasets.Dataset:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source.hub, name=source.hub_config, split=source.hub_split, cache_dir=str(cache_dir))
    except Exception as error:
        if storage_fault(error):
            raise
        raise DataError(
            f"cannot get dataset {source.hub} (config {source.hub_config}, split {source.hub_split}) from the hub: "
            f"{_first_line(error)}",
            where=f"data.sources, name {source.name}, key hub",
            do="check the name, and run prepare where there is a network; or download the files and give path instead",
        ) from None
    return _one_column(source, dataset, f"hub dataset {source.hub}")


def _one_column(source: Source, dataset: datasets.Dataset, place: str) -> datasets.Dataset:
    if _column(source) not in dataset.column_names:
        raise _no_column(source, place, dataset.column_names)
    if source.messages_key:
        return _chat_column(source, dataset, place)
    kind = getattr(dataset.features[source.text_key], "dtype", "a nested type")
    if kind not in ("string", "large_string"):
        raise _unreadable(source, place, f"column {source.text_key!r} holds {kind}, not text")
    dataset = dataset.select_columns([source.text_key])
    return dataset if source.text_key == TEXT_COLUMN else dataset.rename_column(source.text_key, TEXT_COLUMN)


def _chat_column(source: Source, dataset: datasets.Dataset, place: str) -> datasets.Dataset:
    from datasets import Features, Value

    def render(row: dict[str, Any], index: int) -> dict[str, str]:
        return {TEXT_COLUMN: _chat(source, row[_column(source)], f"{place}, row {index + 1}")}

    return dataset.map(
        render,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=Features({TEXT_COLUMN: Value("large_string")}),
        # Named here, as `datasets` would else hash what `render` refers to.
        new_fingerprint=hashlib.sha256(f"{dataset._fingerprint} {source.messages_key} chats".encode()).hexdigest()[:32],
    )


# ---------------------------------------------------------------- manners of the library


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _source_errors(source: Source) -> Iterator[None]:
    """`datasets` wraps what a reader raises; bring our own error back, and name the source of any other."""
    try:
        yield
    except AifactoryError:
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__  # type: ignore[assignment]
            if isinstance(root, AifactoryError):
                raise root from None
        if storage_fault(error):
            raise
        raise DataError(
            f"cannot read data source {source.name}: {type(root).__name__}: {_first_line(root)}",
            where=str(source.path or source.hub or "the Python standard library"),
            do="mend or remove the file it complains about",
        ) from None


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Our own progress is shown instead of the bars and log lines of `datasets` and `huggingface_hub`."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    loggers: dict[logging.Logger, Any] = {logging.getLogger(n): None for n in ("datasets", "huggingface_hub")}
    for logger in loggers:
        loggers[logger] = logger.level
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        for logger, level in loggers.items():
            logger.setLevel(level)
