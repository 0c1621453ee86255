"""Chats: what the assistant says counts and nothing else does, from prepare to the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from aifactory_train.data.loader import Loader
from aifactory_train.data.packing import IGNORE
from aifactory_train.data.prepare import prepare
from aifactory_train.data.shards import entropy_nats, load_prepared
from aifactory_train.errors import DataError
from aifactory_train.recipe.schema import Data
from prepared_data import build_data, tokenize_here

# The same chats: one says what counts, of the other it is found by rendering.
PLAIN = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATS = [
    [("system", "be short"), ("user", "what is a rank"), ("assistant", "one process of a run")],
    [("user", "and"), ("assistant", "a row"), ("user", "äöü 漢字"), ("assistant", "naïve 🙂 tokens\nof two lines")],
    [("user", "say nothing"), ("assistant", "")],
    [("user", "long " * 60), ("assistant", "a long answer, too, " * 30), ("user", "a question without an answer")],
]
TEXT = "a rank is one process of a run and reads rows of tokens " * 50


def rows_of(chats: list[list[tuple[str, str]]]) -> list[dict[str, Any]]:
    return [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in chats]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tokenizer, trained here, without a template."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text(TEXT)
    prepare(build_data(folder / "p", {"text": folder / "text.txt"}, tokenizer={"train_vocab_size": 300}))
    return folder / "p" / "tokenizer"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "in_workers" not in request.node.name:
        monkeypatch.setattr("aifactory_train.data.prepare.tokenize_units", tokenize_here)


def chat_data(folder: Path, words: Path, template: str | None, path: Path, **keys: Any) -> Data:
    """Settings to prepare the chats of a file by a template; its control tokens are tokens of their own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(words)
    control = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "instruct")
    source = {"name": "chats", "path": str(path), "messages_key": "messages"}
    base = {"sources": [source], "tokenizer": {"path": str(folder / "instruct")}, "seq_len_tokens": 16, "workers": 1}
    return build_data(folder / "prepared", {}, **(base | keys))


def by_hand(words: Path, chats: list[list[tuple[str, str]]]) -> tuple[list[int], list[bool]]:
    """Token by token: each message is its role, its text and an end; of the assistant's, text and end count."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(words)
    ids, counts = [], []
    for chat in chats:
        for role, content in chat:
            text = tokenizer(content, add_special_tokens=False)["input_ids"]
            ids += [
                *tokenizer.convert_tokens_to_ids([f"<|{role}|>"]),
                *text,
                tokenizer.convert_tokens_to_ids("<|end|>"),
            ]
            counts += [False, *[role == "assistant"] * (len(text) + 1)]
        ids.append(tokenizer.eos_token_id)
        counts.append(False)
    return ids, counts


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by rendering", "by generation blocks"])
def test_what_counts_is_what_the_assistant_says_and_its_end(tmp_path: Path, words: Path, template: str) -> None:
    data = chat_data(tmp_path, words, template, write_rows(tmp_path / "c.jsonl", rows_of(CHATS)))
    manifest = prepare(data)
    prepared = load_prepared(data)
    stream = prepared.streams[0]
    ids, counts = by_hand(tmp_path / "instruct", CHATS)
    assert stream.tokens(0, stream.n_tokens).tolist() == ids
    assert stream.counted(0, stream.n_tokens).tolist() == counts
    assert manifest.n_documents == len(CHATS) and manifest.sources[0].n_counted_tokens == sum(counts)
    assert f"{len(ids)} tokens, of which {sum(counts)} count" in prepared.describe()
    said = np.bincount(np.asarray(ids)[counts])
    assert prepared.unigram_entropy_nats() == pytest.approx(entropy_nats(said), abs=1e-12)
    assert (prepared.folder / "chats" / "shard-00000.counted").stat().st_size == len(ids)


@pytest.mark.parametrize("mask", [True, False])
def test_rows_are_those_of_text_and_other_targets_are_ignored(tmp_path: Path, words: Path, mask: bool) -> None:
    """Turns are cut by the ends of rows; what counts goes on in the next one."""
    path = write_rows(tmp_path / "c.jsonl", rows_of(CHATS))
    data = chat_data(tmp_path, words, MARKED, path, document_mask=mask)
    prepare(data)
    prepared = load_prepared(data)
    ids, counts = by_hand(tmp_path / "instruct", CHATS)
    n_rows = -(-(len(ids) - 1) // 16)
    batch = Loader(prepared, data, seed=0, global_batch_rows=n_rows).batch(0)
    seen = sorted(zip(batch.input_BT.tolist(), batch.target_BT.tolist(), strict=True))
    wanted = []
    for row in range(n_rows):
        at = np.arange(row * 16, row * 16 + 16)
        real = at + 1 < len(ids)
        here, there = at[real], at[real] + 1
        padding = [prepared.manifest.eos_id] * (16 - len(here))
        targets = [ids[t] if counts[t] else IGNORE for t in there]
        wanted.append(([ids[t] for t in here] + padding, targets + [IGNORE] * len(padding)))
    assert seen == sorted(wanted)
    assert batch.n_valid_tokens == sum(counts)


def test_chats_come_from_parquet_and_as_json_text(tmp_path: Path, words: Path) -> None:
    lines = chat_data(tmp_path / "a", words, MARKED, write_rows(tmp_path / "c.jsonl", rows_of(CHATS)))
    prepare(lines)
    for name, column in (
        ("nested", [row["messages"] for row in rows_of(CHATS)]),
        ("text", [json.dumps(row["messages"]) for row in rows_of(CHATS)]),
    ):
        pq.write_table(pa.table({"id": list(range(len(CHATS))), "messages": column}), tmp_path / f"{name}.parquet")
        data = chat_data(tmp_path / name, words, MARKED, tmp_path / f"{name}.parquet")
        prepare(data)
        for suffix in (".tokens", ".docs", ".counted"):
            file = f"chats/shard-00000{suffix}"
            assert Path(data.prepared_dir, file).read_bytes() == Path(lines.prepared_dir, file).read_bytes()


def test_chats_beside_text_and_text_alone_as_before(tmp_path: Path, words: Path) -> None:
    """Of text all counts, and nothing on the disk tells that chats exist."""
    write_rows(tmp_path / "c.jsonl", rows_of(CHATS))
    (tmp_path / "t.txt").write_text(TEXT)
    both = chat_data(tmp_path, words, MARKED, tmp_path / "c.jsonl")
    sources = [*both.model_dump()["sources"], {"name": "text", "path": str(tmp_path / "t.txt"), "weight": 3.0}]
    both = Data.model_validate(both.model_dump() | {"sources": sources})
    prepare(both)
    prepared = load_prepared(both)
    chats, text = prepared.streams
    assert text.counted(0, text.n_tokens).all() and not chats.counted(0, chats.n_tokens).all()
    assert not (prepared.folder / "text" / "shard-00000.counted").exists()
    assert "counted" not in (prepared.folder / "text" / "shard-00000.json").read_text()
    assert "messages_key" not in prepared.manifest.settings["sources"]["text"]
    batch = Loader(prepared, both, seed=0, global_batch_rows=64).batch(0)
    assert 0 < batch.n_valid_tokens < 64 * 16
    # Rows are mixed 1 : 3; of those of chats a part of the tokens count.
    share = [0.25 * prepared.manifest.sources[0].n_counted_tokens / chats.n_tokens, 0.75]
    counts = [np.load(prepared.folder / name / "counts.npy") for name in ("chats", "text")]
    mixed = sum(s * c / c.sum() for s, c in zip(share, counts, strict=True))
    assert prepared.unigram_entropy_nats() == pytest.approx(entropy_nats(mixed), abs=1e-12)


def test_prepare_in_workers_goes_on_and_damage_is_found(tmp_path: Path, words: Path) -> None:
    data = chat_data(tmp_path, words, MARKED, write_rows(tmp_path / "c.jsonl", rows_of(CHATS)))
    prepare(data)
    counted = Path(data.prepared_dir) / "chats" / "shard-00000.counted"
    whole = counted.read_bytes()
    load_prepared(data).verify()
    counted.write_bytes(bytes([1 - whole[0]]) + whole[1:])
    with pytest.raises(DataError, match="shard-00000.counted is damaged"):
        load_prepared(data).verify()
    counted.unlink()
    with pytest.raises(DataError, match="shard-00000.counted is missing"):
        load_prepared(data)
    prepare(data)
    assert counted.read_bytes() == whole


@pytest.mark.parametrize(
    ("row", "words_of_it"),
    [
        ({"text": "hello"}, ["no column 'messages'", ":2"]),
        ({"messages": "hello"}, [":2", "not a list of messages"]),
        ({"messages": {"role": "user"}}, [":2", "dict, not a list"]),
        ({"messages": None}, [":2", "NoneType, not a list"]),
        ({"messages": [{"role": "human", "content": "x"}]}, [":2", "role 'human'", "known are system"]),
        ({"messages": [{"role": "user", "content": ["x"]}]}, [":2", "list as content"]),
        ({"messages": [{"role": "user", "content": "x"}]}, [":2", "without a turn of the assistant"]),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, [":2", "surrogate"]),
    ],
)
def test_a_row_that_is_no_chat_is_refused_with_file_and_row(
    tmp_path: Path, words: Path, row: Any, words_of_it: list[str]
) -> None:
    data = chat_data(tmp_path, words, MARKED, write_rows(tmp_path / "c.jsonl", [rows_of(CHATS)[0], row]))
    with pytest.raises(DataError) as caught:
        prepare(data)
    for word in ["c.jsonl", *words_of_it]:
        assert word in caught.value.render()


def test_a_row_of_parquet_is_refused_with_file_and_row(tmp_path: Path, words: Path) -> None:
    column = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]] * 2
    column.append([{"role": "user", "content": "x"}])
    pq.write_table(pa.table({"messages": column}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="c.parquet, row 3.*without a turn of the assistant"):
        prepare(chat_data(tmp_path, words, MARKED, tmp_path / "c.parquet"))


REFUSED = {
    "a template that shows earlier turns otherwise": (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.last %}!{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["message 3 looks different when more follows", "{% generation %}", "name chats", "be short"],
    ),
    "a template that refuses a chat": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}",
        ["no system, please", "name chats", "be short"],
    ),
    "a template that marks nothing": (
        MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>").replace(
            "{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}"
        ),
        ["the loss counts on no token", "{% generation %}"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_does_not_tell_what_counts_is_refused(tmp_path: Path, words: Path, name: str) -> None:
    template, said = REFUSED[name]
    with pytest.raises(DataError) as caught:
        prepare(chat_data(tmp_path, words, template, write_rows(tmp_path / "c.jsonl", rows_of(CHATS))))
    for word in said:
        assert word in caught.value.render()


def test_a_tokenizer_without_a_template_is_refused_until_it_has_one(tmp_path: Path, words: Path) -> None:
    data = chat_data(tmp_path, words, None, write_rows(tmp_path / "c.jsonl", rows_of(CHATS)))
    with pytest.raises(DataError, match="no chat template.*\n.*\n.*instruct model"):
        prepare(data)
    (tmp_path / "instruct" / "chat_template.jinja").write_text(MARKED)
    assert prepare(data).sources[0].n_counted_tokens > 0


def test_chats_are_refused_where_there_is_no_template_to_be(tmp_path: Path, words: Path) -> None:
    chats = {"name": "chats", "path": "x", "messages_key": "messages"}
    with pytest.raises(ValidationError, match="needs the chat template of a tokenizer"):
        build_data(tmp_path, {}, sources=[chats])
    with pytest.raises(ValidationError, match="not to python_stdlib"):
        build_data(tmp_path, {}, sources=[chats | {"path": None, "python_stdlib": True}])
    (tmp_path / "c.txt").write_text("text")
    with pytest.raises(DataError, match="a text file holds no chats"):
        prepare(chat_data(tmp_path, words, MARKED, tmp_path / "c.txt"))
