"""YAML files and --set overrides to one Recipe, with file and line of every fault.

`extends:` names one file or several, relative to the file that says it; later ones win, the file itself
wins over all of them, `--set` wins over the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from aifactory_train.errors import RecipeError
from aifactory_train.recipe.schema import Recipe
from aifactory_train.strictyaml import Key, parse_yaml, read_yaml, validate


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe. Raises RecipeError that lists every fault with its file, line and key."""
    origins: dict[Key, str] = {}
    data = _read_extended(Path(path), origins, ())
    for text in overrides or []:
        _apply_override(data, text, origins)
    return validate(Recipe, data, origins, str(path), RecipeError)


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
    bases = own.pop("extends", [])
    merged: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(merged, _read_extended(path.parent / str(base), origins, (*chain, path)))
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
        raise RecipeError(f"--set {text} has no value", where="command line", do="--set optim.lr=3e-4")
    parts = tuple(name.strip().split("."))
    try:
        parsed = parse_yaml(value, parts, "--set", {})
    except yaml.YAMLError:
        raise RecipeError(
            f"--set {text}: the value is not valid YAML", where="command line", do="quote it: --set 'key=[1, 2]'"
        ) from None
    node = data
    for part in parts[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[parts[-1]] = parsed
    for i in range(len(parts)):
        origins[parts[: i + 1]] = f"--set {text}"
