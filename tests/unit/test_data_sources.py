"""Reading text: every format, and one clear message for every bad input."""

from __future__ import annotations

import gzip
import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from aifactory_train.data.sources import list_files, open_source
from aifactory_train.errors import DataError
from aifactory_train.recipe.schema import Source

TEXTS = ["first document\r\nwith two lines", "zweites: äöü 漢字 🙂", "third"]


def read(tmp_path: Path, **keys: Any) -> list[str]:
    dataset = open_source(Source(name="src", **keys), tmp_path / "cache")
    assert dataset.column_names == ["text"] and dataset.cache_files  # one column, memory-mapped
    return [text for text in dataset["text"] if text]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    # The other column changes its type from line to line, as it does in real files.
    rows = [{key: text, "meta": i if i % 2 else {"i": [i]}} for i, text in enumerate(texts)]
    raw = "\n".join(json.dumps(row) for row in rows).encode()
    opened = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, lambda b: b)
    path.write_bytes(opened(raw))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path: Path, name: str) -> None:
    assert read(tmp_path, path=str(write_jsonl(tmp_path / name, TEXTS))) == TEXTS


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    frames = [zstandard.ZstdCompressor().compress(json.dumps({"text": t}).encode() + b"\n") for t in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path, path=str(tmp_path / "a.jsonl.zst")) == TEXTS


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "deep[er]"
    folder.mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "in" / "README.md").write_text("not a document")
    (tmp_path / "in" / ".hidden").mkdir()
    (tmp_path / "in" / ".hidden" / "x.txt").write_text("not a document either")
    assert read(tmp_path, path=str(tmp_path / "in")) == TEXTS


def test_parquet_is_read_also_from_folders_with_brackets_and_with_other_columns(tmp_path: Path) -> None:
    folder = tmp_path / "in [v1]"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1, 2], "body": TEXTS[:2]}), folder / "0.parquet")
    pq.write_table(pa.table({"body": pa.array(TEXTS[2:], pa.large_string())}), folder / "1.parquet")
    assert read(tmp_path, path=str(folder), text_key="body") == TEXTS


def test_a_glob_takes_the_files_that_match_in_order(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        write_jsonl(tmp_path / f"part-{i}.jsonl", [text])
    (tmp_path / "other.txt").write_text("no")
    assert read(tmp_path, path=str(tmp_path / "**" / "part-*.jsonl")) == TEXTS


def test_changed_files_are_read_anew_not_from_the_cache(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["old"])
    assert read(tmp_path, path=str(path)) == ["old"]
    write_jsonl(path, ["other"])
    assert read(tmp_path, path=str(path)) == ["other"]
    table = tmp_path / "a.parquet"
    for text in ("old", "newer"):
        pq.write_table(pa.table({"text": [text]}), table)
        time.sleep(0.01)
        assert read(tmp_path, path=str(table)) == [text]


def test_the_standard_library_is_listed_without_installed_packages() -> None:
    listing = list_files(Source(name="std", python_stdlib=True))
    assert listing is not None and len(listing.files) > 500
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [str(Path(f).relative_to(root)) for f in listing.files]
    assert "json/decoder.py" in names and names == sorted(names)
    assert not any("site-packages" in n or "dist-packages" in n for n in names)


def test_undecodable_library_files_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "bad.py").write_bytes(b"# \xff\xfe")
    (tmp_path / "lib" / "good.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    assert read(tmp_path, python_stdlib=True) == ["x = 1\n"]


def refuse(tmp_path: Path, match: str, **keys: Any) -> str:
    with pytest.raises(DataError, match=match) as caught:
        open_source(Source(name="src", **keys), tmp_path / "cache")
    assert ("src" in str(caught.value) and caught.value.__suppress_context__) or caught.value.__cause__ is None
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refuse(tmp_path, "no such file.*nowhere.txt", path=str(tmp_path / "nowhere.txt"))


def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    assert ".jsonl.zst" in refuse(tmp_path, "unknown suffix .csv", path=str(tmp_path / "a.csv"))


def test_a_folder_without_readable_files_is_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README.md").write_text("hi")
    refuse(tmp_path, "empty corpus: data source src", path=str(tmp_path / "in"))


def test_mixed_formats_are_refused_with_an_example_of_each(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hi")
    write_jsonl(tmp_path / "in" / "b.jsonl", ["x"])
    refuse(tmp_path, r"mixes formats: jsonl \(b.jsonl\), txt \(a.txt\)", path=str(tmp_path / "in"))


def test_a_missing_column_is_refused_with_the_columns_there_are(tmp_path: Path) -> None:
    jsonl = write_jsonl(tmp_path / "a.jsonl", TEXTS, key="body")
    assert f"{jsonl}:1" in refuse(tmp_path, "no column 'text'; there are: body, meta", path=str(jsonl))
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    refuse(tmp_path, "no column 'text'; there are: id, body", path=str(tmp_path / "a.parquet"))


def test_a_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    refuse(tmp_path, r"a.jsonl:2: 'text' holds int, not text", path=str(tmp_path / "a.jsonl"))
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    refuse(tmp_path, "'text' holds int64, not text", path=str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "raw", "match"),
    [
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl:3: not a JSON line"),
        ("a.jsonl", b'{"text": "x\\ud800"}\n', "a.jsonl:1: .*surrogate"),
        ("a.jsonl", b'["text"]\n', "no column 'text'"),
        ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-20], "a.jsonl.gz: Compressed file ended"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst: damaged zstd"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(b'{"text": "x"}\n' * 9999)[:-9], "a.jsonl.zst: .*cut off"),
        ("a.parquet", b"no parquet at all", "a.parquet: .*[Pp]arquet"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, raw: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(raw)
    refuse(tmp_path, match, path=str(tmp_path / name))


@pytest.mark.parametrize("raw", [b"", b"\n\n", b'{"text": ""}\n{"text": null}\n'])
def test_json_lines_without_text_are_an_empty_corpus(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    refuse(tmp_path, "empty corpus: data source src", path=str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("texts", [[], ["", None]])
def test_parquet_without_text_is_an_empty_corpus(tmp_path: Path, texts: list[str | None]) -> None:
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "a.parquet")
    refuse(tmp_path, "empty corpus: data source src", path=str(tmp_path / "a.parquet"))


def test_empty_text_files_are_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    refuse(tmp_path, "empty corpus: data source src", path=str(tmp_path / "a.txt"))


def test_a_hub_dataset_that_cannot_be_had_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda s: None)  # the library's waits between its retries
    message = refuse(tmp_path, "cannot get dataset", hub="no-such-owner-for-a-test/no-such-dataset")
    assert "no-such-owner-for-a-test/no-such-dataset" in message and "give path instead" in message
