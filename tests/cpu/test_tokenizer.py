"""Tokenizers: trained, taken as they are, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aifactory_train.data import tokenize
from aifactory_train.data.prepare import prepare
from aifactory_train.data.shards import check_fits_model, load_prepared
from aifactory_train.data.tokenize import encode, load_encoder
from aifactory_train.errors import DataError
from aifactory_train.recipe.schema import Data
from prepared_data import build_data

ROOT = Path(__file__).parents[2]


def test_a_hugging_face_folder_is_taken_as_it_is(whole: Data, corpora: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = tmp_path / "theirs"
    shutil.copytree(Path(whole.prepared_dir) / "tokenizer", theirs)
    data = build_data(tmp_path / "p", {"two": corpora["two"]}, tokenizer={"path": str(theirs)})
    manifest = prepare(data)
    assert manifest.tokenizer_sha256 == load_prepared(whole).manifest.tokenizer_sha256
    again = AutoTokenizer.from_pretrained(tmp_path / "p" / "tokenizer")
    assert again.eos_token == "<|endoftext|>" and again.eos_token_id == manifest.eos_id
    text = "naïve  text\n\twith <b>äöü</b> 🙂 and don't"
    ids = again(text)["input_ids"]
    assert again.decode(ids) == text
    encoder = load_encoder(tmp_path / "p" / "tokenizer" / "tokenizer.json")
    assert [i for piece in encode(encoder, text) for i in piece] == ids


def test_a_tokenizer_folder_without_eos_or_that_is_none_is_refused(whole: Data, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(Path(whole.prepared_dir) / "tokenizer", theirs)
    config = json.loads((theirs / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (theirs / "tokenizer_config.json").write_text(json.dumps(config))
    for path, match in (
        (theirs, "names no eos token"),
        (tmp_path / "nowhere", "does not exist"),
        (ROOT, "cannot load"),
    ):
        data = whole.model_copy(update={"prepared_dir": str(tmp_path / "p")})
        data = data.model_copy(
            update={"tokenizer": data.tokenizer.model_copy(update={"path": str(path), "train_vocab_size": None})}
        )
        shutil.rmtree(tmp_path / "p", ignore_errors=True)
        with pytest.raises(DataError, match=match):
            prepare(data)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(whole: Data) -> None:
    manifest = load_prepared(whole).manifest
    check_fits_model(manifest, 400)
    with pytest.raises(DataError, match="400 entries, the model's vocabulary only 399"):
        check_fits_model(manifest, 399)


def test_a_vocabulary_without_room_for_all_bytes_is_refused(corpora: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_vocab_size 256 is too small"):
        prepare(build_data(tmp_path / "p", {"two": corpora["two"]}, tokenizer={"train_vocab_size": 256}))


def test_cutting_a_long_document_changes_no_token(whole: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(Path(whole.prepared_dir) / "tokenizer" / "tokenizer.json")
    text = Path(tokenize.__file__).read_text() * 2 + "漢字かな\n" * 2000
    at_once = [i for piece in encode(encoder, text) for i in piece]
    monkeypatch.setattr(tokenize, "PIECE_CHARS", 1000)
    monkeypatch.setattr(tokenize, "PIECE_SLACK_CHARS", 2000)
    pieces = list(encode(encoder, text))
    assert len(pieces) > 10
    assert [i for piece in pieces for i in piece] == at_once
    assert "".join(tokenize._pieces("x" * 9999)) == "x" * 9999
