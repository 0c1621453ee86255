"""YAML files and --set overrides to one Recipe, with file and line of every fault.

`extends:` names one file or several, relative to the file that says it; later ones win, the file itself
wins over all of them, `--set` wins over the file. YAML is read as version 1.2: `3e-4` is a number and
`no` is a word.
"""

from __future__ import annotations

import difflib
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from aifactory_train.errors import RecipeError, UserError
from aifactory_train.recipe.schema import Recipe

Key = tuple[str | int, ...]
M = typing.TypeVar("M", bound=BaseModel)


class _Yaml12(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, plus `1_000_000`."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", "tf"),
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def configs_dir() -> Path:
    """`configs/` of the checkout, or the copy inside the installed package."""
    package = Path(__file__).resolve().parent.parent
    checkout = package.parent / "configs"
    return checkout if checkout.is_dir() else package / "configs"


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


def read_yaml(path: Path, origins: dict[Key, str]) -> dict[str, Any]:
    """One YAML mapping; `origins` learns `file:line` of every key."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"one of the files there: {', '.join(near)}" if near else "check the path"
        raise RecipeError(f"cannot read {path}: {reason}", where=str(path), do=hint) from None
    try:
        node = yaml.compose(text, Loader=_Yaml12)
        data = _walk(node, (), str(path), origins)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise RecipeError(f"not valid YAML: {problem}", where=f"{path}{line}", do="mend that line") from None
    if not isinstance(data, dict):
        raise RecipeError(
            f"expected keys and values, found {type(data).__name__}", where=str(path), do="write `key: value` lines"
        )
    return data


def _walk(node: yaml.Node | None, key: Key, file: str, origins: dict[Key, str]) -> Any:
    if node is None:
        return None
    origins[key] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for k, v in node.value:
            name = str(k.value)
            if name in out:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} twice", k.start_mark)
            out[name] = _walk(v, (*key, name), file, origins)
            origins[(*key, name)] = f"{file}:{k.start_mark.line + 1}"
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_walk(v, (*key, i), file, origins) for i, v in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    tag = node.tag.rsplit(":", 1)[-1]
    if tag == "null":
        return None
    if tag == "bool":
        return node.value == "true"
    if tag == "int":
        return int(node.value.replace("_", ""))
    if tag == "float":
        return float(node.value.replace("_", ""))
    return node.value


def _read_extended(path: Path, origins: dict[Key, str], chain: tuple[Path, ...]) -> dict[str, Any]:
    path = path.absolute()
    if path in chain:
        loop = " -> ".join(p.name for p in (*chain, path))
        raise RecipeError(f"extends goes round in a circle: {loop}", where=str(path), do="remove one of the extends")
    own_origins: dict[Key, str] = {}
    own = read_yaml(path, own_origins)
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
        parsed = _walk(yaml.compose(value, Loader=_Yaml12), parts, "--set", {})
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


def validate(
    cls: type[M], data: dict[str, Any], origins: dict[Key, str], file: str, error_class: type[UserError]
) -> M:
    """Build `cls`, or raise `error_class` with one line per fault: where, key, what, nearest valid name."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_fault_line(cls, e, origins, file) for e in error.errors()]
    head = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    raise error_class("\n".join([f"{head} in {file}", *lines]), do="mend the lines named above, or use --set KEY=VALUE")


def _fault_line(cls: type[BaseModel], fault: Any, origins: dict[Key, str], file: str) -> str:
    # Union branches ("int", "literal[...]") stand in pydantic's loc but not in the file.
    loc: Key = tuple(p for p in fault["loc"] if not _is_branch(p))
    name = ".".join(str(p) for p in loc) or "recipe"
    place = next((origins[loc[:i]] for i in range(len(loc), -1, -1) if loc[:i] in origins), file)
    kind, value = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        valid = list(_fields_at(cls, loc[:-1]))
        near = difflib.get_close_matches(str(loc[-1]), valid, n=1, cutoff=0.0)
        return f"  {place}: {name}: unknown key; did you mean {near[0]}?  valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"  {place}: {name}: missing"
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(value, dict | list | BaseModel) else f", given: {value!r}"
    return f"  {place}: {name}: {message}{shown}"


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and (part in ("int", "float", "bool", "str") or "[" in part)


def _fields_at(cls: Any, loc: Key) -> typing.Iterable[str]:
    """Field names of the model that sits at `loc` below `cls`."""
    for part in loc:
        if isinstance(part, int):
            continue
        cls = _model_in(cls.model_fields[part].annotation)
    return cls.model_fields


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in typing.get_args(annotation):
        found = _model_in(arg)
        if found is not None:
            return found
    return None
