"""Staging for nodes without internet: what is gathered, and what is refused afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from aifactory_train.data.stage import MANIFEST, check_staged, stage
from aifactory_train.errors import DataError, StorageError
from aifactory_train.recipe.load import load_recipe
from aifactory_train.strictyaml import configs_dir


@pytest.fixture
def recipe(tmp_path):
    """A recipe with two sources, a tokenizer folder and weights, all of them local."""
    corpus = tmp_path / "corpus"
    for name in ("a/one.jsonl", "b/one.jsonl"):
        (corpus / name).parent.mkdir(parents=True)
        (corpus / name).write_text(json.dumps({"text": name}) + "\n")
    for folder, files in (
        ("tok", ["tokenizer.json", "tokenizer_config.json", "README"]),
        ("weights", ["config.json", "x.safetensors", "x.bin"]),
    ):
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / file).write_text(f"{folder} {file}")
    demo = load_recipe(configs_dir() / "recipes" / "demo.yaml").model_dump(mode="json")
    demo["data"]["sources"] = [
        {"name": "words", "path": str(corpus)},
        {"name": "python", "python_stdlib": True},
    ]
    demo["data"]["tokenizer"] = {"path": str(tmp_path / "tok")}
    demo["model"]["init_from"] = str(tmp_path / "weights")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(demo))
    return path


def test_everything_that_a_recipe_names_is_gathered_and_the_new_recipe_names_it_there(recipe, tmp_path):
    to = tmp_path / "to"
    text = stage(recipe, to)
    staged = load_recipe(to / "recipe.yaml")
    assert staged.data.sources[0].path == str(to / "data" / "words") and staged.data.sources[1].python_stdlib
    assert staged.data.tokenizer.path == str(to / "tokenizer") and staged.model.init_from == str(to / "model")
    assert staged.data.prepared_dir == str(to / "prepared")
    there = {p.relative_to(to).as_posix() for p in to.rglob("*") if p.is_file()}
    assert there == {
        "recipe.yaml",
        MANIFEST,
        "data/words/a/one.jsonl",
        "data/words/b/one.jsonl",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "model/config.json",
        "model/x.safetensors",
    }, "pickled weights and other files stay behind"
    assert "6 files" in text and f"aifactory-train prepare {to}/recipe.yaml" in text
    check_staged(to)
    before = {p: p.stat().st_ino for p in to.rglob("*.json*") if p.name != MANIFEST}
    stage(recipe, to)
    assert {p: p.stat().st_ino for p in before} == before, "what is there is not copied again"


def flip(to):
    """Other bytes, same size and time: what a bad disk does."""
    path = to / "tokenizer/tokenizer.json"
    before = path.stat()
    path.write_text("TOK tokenizer.json")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda to: (to / "model/x.safetensors").unlink(), "file model/x.safetensors is missing"),
        (lambda to: (to / "model/x.safetensors").write_text("short"), "has 5 bytes, staged.json says 21"),
        (flip, "sha256 differs"),
        (lambda to: (to / "data/words/a/one.jsonl").unlink(), "file data/words/a/one.jsonl is missing"),
        (lambda to: (to / MANIFEST).write_text("{"), "cannot be read"),
    ],
)
def test_a_staged_folder_that_lost_something_is_refused(recipe, tmp_path, harm, what):
    to = tmp_path / "to"
    stage(recipe, to)
    harm(to)
    with pytest.raises(DataError, match=what):
        check_staged(to)
    stage(recipe, to)
    check_staged(to)


@pytest.mark.parametrize("name", ["elsewhere", "a.b|c & d $(touch pwned)"])
def test_a_moved_folder_is_refused_with_the_command_that_mends_it(recipe, tmp_path, name):
    to, moved = tmp_path / "to|.*", tmp_path / name
    stage(recipe, to)
    shutil.move(to, moved)
    with pytest.raises(DataError, match="was staged as") as caught:
        check_staged(moved)
    subprocess.run(["bash", "-c", caught.value.do], check=True, cwd=tmp_path)
    assert not (tmp_path / "pwned").exists()
    check_staged(moved)
    assert str(load_recipe(moved / "recipe.yaml").data.prepared_dir) == str(moved / "prepared")


def test_the_architecture_is_staged_beside_pickled_weights_and_python_files_where_they_are_trusted(recipe, tmp_path):
    sizes = {"vocab_size": 8192, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    files = {
        "config.json": json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}, **sizes}),
        "mine.py": "", "pytorch_model.bin": "weights", "optimizer.bin": "",
    }  # fmt: skip
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    plain = yaml.safe_load(recipe.read_text())
    plain["model"] = {"hf": str(folder), "init_from": str(folder), "trust_remote_code": True}
    recipe.write_text(yaml.safe_dump(plain))
    to = tmp_path / "to"
    for _ in range(2):
        stage(recipe, to)
    staged = load_recipe(to / "recipe.yaml").model
    assert (staged.hf, staged.init_from) == (str(to / "architecture"), str(to / "model"))
    there = {p.relative_to(to).as_posix() for top in ("architecture", "model") for p in (to / top).iterdir()}
    assert there == {"architecture/config.json", "architecture/mine.py", "model/config.json", "model/pytorch_model.bin"}
    (to / "architecture" / "mine.py").write_text("harm")
    with pytest.raises(DataError, match=r"architecture/mine\.py"):
        check_staged(to)


def test_a_folder_that_was_never_staged_passes(tmp_path):
    check_staged(tmp_path)


def changed(recipe: Path, **keys) -> Path:
    data = yaml.safe_load(recipe.read_text())
    for key, value in keys.items():
        section, name = key.split("__")
        data[section][name] = value
    recipe.write_text(yaml.safe_dump(data))
    return recipe


def test_what_is_not_there_is_refused_by_name(recipe, tmp_path):
    with pytest.raises(DataError, match="tokenizer: path .*nowhere: no such folder"):
        stage(changed(recipe, data__tokenizer={"path": "./nowhere"}), tmp_path / "to")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file like"):
        stage(changed(recipe, data__tokenizer={"path": str(tmp_path / "empty")}), tmp_path / "to")
    with pytest.raises(DataError, match="no such file or folder"):
        stage(changed(recipe, data__sources=[{"name": "x", "path": "/nowhere/*.jsonl"}]), tmp_path / "to")


def test_the_recipes_own_folder_and_a_folder_that_cannot_be_made_are_refused(recipe, tmp_path):
    with pytest.raises(DataError, match="stands in the folder"):
        stage(recipe, recipe.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, DataError)):
        stage(recipe, tmp_path / "file" / "to")


def test_what_was_staged_from_elsewhere_is_not_mixed_in(recipe, tmp_path):
    to = tmp_path / "to"
    stage(recipe, to)
    (tmp_path / "corpus/b/one.jsonl").unlink()
    with pytest.raises(DataError, match="data source words: .* not of it: one.jsonl") as caught:
        stage(recipe, to)
    subprocess.run(["bash", "-c", caught.value.do.partition("first: ")[2]], check=True)
    stage(recipe, to)
    assert not (to / "data/words/b").exists()
    (tmp_path / "weights/x.safetensors").rename(tmp_path / "weights/y.safetensors")
    with pytest.raises(DataError, match="not of it: x.safetensors"):
        stage(recipe, to)


class Rows(list):
    """As much of a dataset as staging uses."""

    def shard(self, n, index, contiguous):
        return Rows(self[index::n])

    def to_parquet(self, path):
        path.write_text(" ".join(self))


def test_a_hub_dataset_is_staged_once_and_never_taken_for_another(recipe, tmp_path, monkeypatch):
    to, opened = tmp_path / "to", []
    monkeypatch.setattr("aifactory_train.data.stage.ROWS_PER_FILE", 2)
    monkeypatch.setattr("aifactory_train.data.stage.open_source", lambda *_: opened.append(1) or Rows("abc"))
    stage(changed(recipe, data__sources=[{"name": "web", "hub": "org/web"}]), to)
    stage(recipe, to)
    folder = to / "data/web"
    assert len(opened) == 1 and sorted(p.name for p in folder.glob("*.parquet"))[0] == "00000-of-00002.parquet"
    with pytest.raises(DataError, match="data source web: .* not of it"):
        stage(changed(recipe, data__sources=[{"name": "web", "hub": "org/web", "hub_split": "test"}]), to)
    (folder / "whole").unlink()
    monkeypatch.setattr("aifactory_train.data.stage.ROWS_PER_FILE", 3)
    stage(recipe, to)
    assert [p.name for p in folder.glob("*.parquet")] == ["00000-of-00001.parquet"], "what was cut off is gone"
