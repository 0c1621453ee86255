"""YAML files and --set overrides to one Recipe, with file and line of every fault.

`extends:` names one file or several, relative to the file that says it; later ones win, the file itself
wins over all of them, `--set` wins over the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from aifactory_train.errors import RecipeError
from aifactory_train.recipe.deepspeed import read_options
from aifactory_train.recipe.huggingface import expand
from aifactory_train.recipe.schema import Recipe
from aifactory_train.strictyaml import Key, parse_yaml, read_yaml, validate


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe. Raises RecipeError that lists every fault with its file, line and key."""
    origins: dict[Key, str] = {}
    data = _read_extended(Path(path), origins, ())
    for text in overrides or []:
        _apply_override(data, text, origins)
    read_options(data, Path.cwd(), origins.get(("layout", "deepspeed"), "command line"))
    if isinstance(data.get("model"), dict):
        where = origins.get(("model", "hf"), str(path))
        data["model"] = expand(_without_stale(data["model"], origins), where)
    return validate(Recipe, data, origins, str(path), RecipeError)


def _without_stale(model: dict[str, Any], origins: dict[Key, str]) -> dict[str, Any]:
    """Of an expanded model that was given another `hf` later: without what the config.json of the former one said."""
    layers = {key: _layer(origins.get(("model", key), "")) for key in model}
    if model.get("hf") is None or model.get("hf_config") is None or layers["hf_config"] in (layers["hf"], "--set"):
        return model
    kept = ("hf", "init_from", "trust_remote_code")
    return {k: v for k, v in model.items() if k in kept or layers[k] != layers["hf_config"]}


def _layer(origin: str) -> str:
    """The file that a value is from, or --set."""
    return "--set" if origin.startswith("--set ") else origin.rpartition(":")[0]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _read_extended(path: Path, origins: dict[Key, str], chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.absolute()
    if path in chain:
        loop = " -> ".join(p.name for p in (*chain, path))
        raise RecipeError(f"extends goes round in a circle: {loop}", where=str(path), do="remove one of the extends")
    own_origins: dict[Key, str] = {}
    own = read_yaml(path, own_origins, RecipeError)
    read_options(own, path.parent, own_origins.get(("layout", "deepspeed"), str(path)))
    bases = own.pop("extends", [])
    merged: dict[str, Any] = {}
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise RecipeError(
            f"extends names files, given: {bases!r}",
            where=own_origins.get(("extends",), str(path)),
            do="extends: ../models/llama3-8b.yaml, or a list of such",
        )
    for base in bases:
        _merge(merged, _read_extended(path.parent / base, origins, (*chain, path)))
    origins.update(own_origins)
    _merge(merged, own)
    return merged


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _apply_override(data: dict[str, Any], text: str, origins: dict[Key, str]) -> None:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        lacks = "value" if name.strip() else "key"
        raise RecipeError(f"--set {text} has no {lacks}", where="command line", do="--set optim.lr=3e-4")
    parts = tuple(name.strip().split("."))
    try:
        parsed = parse_yaml(value, parts, "--set", {})
    except yaml.YAMLError:
        raise RecipeError(
            f"--set {text}: the value is not valid YAML", where="command line", do="quote it: --set 'key=[1, 2]'"
        ) from None
    node: Any = data
    for part in parts[:-1]:
        if isinstance(node, list):
            node = _item(node, part, text)
            continue
        if not isinstance(node.get(part), dict | list):
            node[part] = {}
        node = node[part]
    if isinstance(node, list):
        _item(node, parts[-1], text)
        node[int(parts[-1])] = parsed
    else:
        node[parts[-1]] = parsed
    key = tuple(int(part) if part.isdigit() else part for part in parts)
    for i in range(len(key)):
        origins[key[: i + 1]] = f"--set {text}"


def _item(items: list[Any], part: str, text: str) -> Any:
    if part.isdigit() and int(part) < len(items):
        return items[int(part)]
    raise RecipeError(
        f"--set {text}: {part!r} is no number from 0 to {len(items) - 1}",
        where="command line",
        do="give the number of the list's entry, as in data.sources.0.weight=2.0",
    )
