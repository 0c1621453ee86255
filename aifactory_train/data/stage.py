"""Gather what a recipe needs from elsewhere into one folder, for nodes without internet.

TO/
  recipe.yaml      the recipe, with every path below TO
  staged.json      size and sha256 of every file
  data/NAME/       the files of each source; a hub dataset as parquet
  tokenizer/       model/      the Hugging Face folders that the recipe names
  architecture/    config.json of `model.hf`, and its Python files where the recipe trusts them
  prepared/        where `aifactory-train prepare TO/recipe.yaml` writes
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml

from aifactory_train.data.progress import Progress, say
from aifactory_train.data.shards import file_sha256
from aifactory_train.data.sources import TEXT_COLUMN, list_files, open_source
from aifactory_train.errors import DataError, storage_errors
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Recipe, Source
from aifactory_train.rundir import write_atomic
from aifactory_train.units import format_bytes

MANIFEST = "staged.json"
ROWS_PER_FILE = 200_000  # a few hundred MB of web text a file
TOKENIZER_FILES = ["tokenizer*", "chat_template*", "special_tokens_map.json", "*.model", "vocab*", "merges.txt"]
WEIGHT_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]
# Taken where there are no safetensors.
PICKLED_FILES = [*WEIGHT_FILES[:2], "pytorch_model*.bin", "pytorch_model.bin.index.json"]
# ranks check the sha256 of prepared shards themselves, and raw text is not read by a job.
READ_BY_RANKS = ("tokenizer/", "architecture/", "model/")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def stage(recipe_path: Path, to: Path) -> str:
    """Gather into `to`; what is there already with the right checksum stays. Returns what to tell the user.

    Raises DataError: a source, tokenizer or model that is not there or cannot be fetched.
    """
    recipe, to = load_recipe(recipe_path), to.absolute()
    if recipe_path.absolute().parent == to:
        raise DataError("the recipe stands in the folder to stage into", where=str(to), do="give another --to DIR")
    with storage_errors("staging", to, "free some space there, or give another --to DIR, and stage again"):
        to.mkdir(parents=True, exist_ok=True)
        changed: dict[str, Any] = recipe.model_dump(mode="json")
        changed["data"]["sources"] = [_stage_source(source, to) for source in recipe.data.sources]
        changed["data"]["prepared_dir"] = str(to / "prepared")
        code = ["*.py"] if recipe.model.trust_remote_code else []
        for section, key, name, patterns in (
            (changed["data"]["tokenizer"], "path", "tokenizer", TOKENIZER_FILES),
            (changed["model"], "hf", "architecture", ["config.json", *code]),
        ):
            if section[key] is not None:
                section[key] = str(_stage_folder(section[key], to / name, patterns, f"{name}: {key}"))
        if recipe.model.init_from is not None:
            changed["model"]["init_from"] = str(_stage_weights(recipe.model.init_from, to / "model"))
        Recipe.model_validate(changed)
        write_atomic(to / "recipe.yaml", yaml.safe_dump(changed, sort_keys=False))
        files = _checksums(to)
        write_atomic(to / MANIFEST, json.dumps({"folder": str(to), "files": files}, indent=1))
    n_bytes = sum(size for size, _ in files.values())
    staged = shlex.quote(str(to / "recipe.yaml"))
    return (
        f"staged: {len(files)} files, {format_bytes(n_bytes)}, in {to}\n"
        f"next:   aifactory-train prepare {staged}\n"
        f"        aifactory-train launch {staged} --machine NAME --nodes N"
    )


def check_staged(folder: Path) -> None:
    """Refuse a staged folder that was moved or has lost something. Any other folder passes.

    Sizes of all files are compared, and the checksums of those that ranks read without a check of their own.
    """
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        manifest = json.loads(path.read_text())
        there, files = Path(manifest["folder"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{MANIFEST} cannot be read: {error}", where=str(path), do=_AGAIN) from None
    if there != folder.absolute():
        old, new = re.sub(r"([][\\.*^$|])", r"\\\1", str(there)), re.sub(r"([\\&|])", r"\\\1", str(folder.absolute()))
        raise DataError(
            f"this folder was staged as {there}, and its recipe names files there",
            where=str(path),
            do=shlex.join(["sed", "-i", f"s|{old}|{new}|g", str(folder / "recipe.yaml"), str(path)]),
        )
    faults = [fault for name, (size, digest) in files.items() if (fault := _fault(folder, name, size, digest))]
    if faults:
        more = f" (and {len(faults) - 1} more files)" if len(faults) > 1 else ""
        raise DataError(f"staged {faults[0]}{more}", where=str(path), do=_AGAIN)


_AGAIN = "aifactory-train stage RECIPE --to DIR  again: it fetches what is missing"


def _fault(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"file {name} is missing"
    found = path.stat().st_size
    if found != size:
        return f"file {name} has {found} bytes, {MANIFEST} says {size}"
    if name.startswith(READ_BY_RANKS) and file_sha256(path) != digest:
        return f"file {name} has other bytes than when it was staged (sha256 differs)"
    return None


def _stage_source(source: Source, to: Path) -> dict[str, Any]:
    """The source as the staged recipe has it. Python's own library is on every node already."""
    changed = source.model_dump(mode="json")
    if source.python_stdlib:
        return changed
    folder = to / "data" / source.name
    listing = list_files(source)
    if listing is None:
        _write_parquet(source, folder, to / ".cache")
        return {
            **changed,
            "path": str(folder),
            "hub": None,
            "hub_config": None,
            "hub_split": "train",
            "messages_key" if source.messages_key else "text_key": TEXT_COLUMN,
        }
    base = Path(os.path.commonpath([Path(f).absolute().parent for f in listing.files]))
    targets = {Path(f): folder / Path(f).absolute().relative_to(base) for f in listing.files}
    _refuse_others(folder, set(targets.values()), f"data source {source.name}")
    _copy(targets, f"data {source.name}")
    return {**changed, "path": str(folder)}


def _write_parquet(source: Source, folder: Path, cache: Path) -> None:
    column = source.messages_key or source.text_key
    whole, origin = folder / "whole", json.dumps([source.hub, source.hub_config, source.hub_split, column])
    if whole.exists() and whole.read_text() == origin:
        return
    if not whole.exists():  # it was cut off and is written again, in another number of files perhaps
        for part in folder.glob("[0-9]*-of-[0-9]*.parquet"):
            part.unlink()
    _refuse_others(folder, set(), f"data source {source.name}")
    dataset = open_source(source, cache)
    n_files = -(-len(dataset) // ROWS_PER_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(n_files):
        dataset.shard(n_files, index, contiguous=True).to_parquet(folder / f"{index:05d}-of-{n_files:05d}.parquet")
    write_atomic(whole, origin)
    shutil.rmtree(cache, ignore_errors=True)


def _stage_weights(name: str, folder: Path) -> Path:
    local, key = Path(name).expanduser(), "model: init_from"
    if not local.is_dir():
        _stage_folder(name, folder, WEIGHT_FILES, key)
        if any(folder.glob("*.safetensors")):
            return folder
    elif any(local.glob("*.safetensors")):
        return _stage_folder(name, folder, WEIGHT_FILES, key)
    return _stage_folder(name, folder, PICKLED_FILES, key)


def _stage_folder(name: str, folder: Path, patterns: list[str], key: str) -> Path:
    """A local Hugging Face folder is copied; what looks like a hub id is fetched."""
    local = Path(name).expanduser()
    if local.is_dir():
        found = {p: folder / p.name for pattern in patterns for p in sorted(local.glob(pattern)) if p.is_file()}
        if not found:
            raise DataError(
                f"{key} {name}: no file like {', '.join(patterns)}", where=str(local), do="name a Hugging Face folder"
            )
        _refuse_others(folder, set(found.values()), key)
        _copy(found, key)
        return folder
    if not _HUB_ID.fullmatch(name):
        raise DataError(
            f"{key} {name}: no such folder", where="recipe", do="name a folder, or a hub id such as org/name"
        )
    from huggingface_hub import snapshot_download

    say(f"{key}: fetching {name} from the hub")
    try:
        snapshot_download(name, allow_patterns=patterns, local_dir=folder)
    except Exception as error:  # the library raises many kinds; a full disk passes through
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{key} {name}: no such folder, and the hub did not give it: {reason}",
            where="recipe",
            do="run stage where there is a network (gated models need: hf auth login), or name a local folder",
        ) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return folder


def _refuse_others(folder: Path, wanted: set[Path], what: str) -> None:
    """What was staged here from elsewhere would be read as well: the recipe names the folder."""
    others = sorted(p for p in folder.rglob("*") if p.is_file() and p not in wanted and not p.name.startswith("."))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise DataError(
            f"{what}: the folder to stage into holds files that are not of it: {others[0].name}{more}",
            where=str(folder),
            do=f"stage into another folder, or first: rm -r {shlex.quote(str(folder))}",
        )


def _copy(files: dict[Path, Path], what: str) -> None:
    """Copy what is not there yet with the same bytes; a file appears only when it is whole."""
    total = sum(p.stat().st_size for p in files)
    with Progress(what, total, "B") as progress:
        done = 0
        for source, target in files.items():
            same = target.is_file() and filecmp.cmp(source, target, shallow=False)
            if not same:
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(f".{target.name}.part")
                shutil.copy2(source, part)
                part.replace(target)
            done += source.stat().st_size
            progress.update_to(done)


def _checksums(to: Path) -> dict[str, list[Any]]:
    """[bytes, sha256] of every staged file by its path below `to`, without what prepare makes."""
    names = sorted(
        p for top in ("data", "tokenizer", "architecture", "model") for p in (to / top).rglob("*") if p.is_file()
    )
    return {p.relative_to(to).as_posix(): [p.stat().st_size, file_sha256(p)] for p in names}
