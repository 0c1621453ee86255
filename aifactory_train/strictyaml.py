"""YAML files into strict models, with file and line of every fault.

YAML is read as version 1.2: `3e-4` is a number and `no` is a word. A key that stands twice is a fault.
"""

from __future__ import annotations

import difflib
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from aifactory_train.errors import UserError

Key = tuple[str | int, ...]
M = typing.TypeVar("M", bound=BaseModel)


MAX_DEPTH = 20  # of keys below each other; our deepest has 4
MAX_VALUES = 100_000  # of a file; anchors of anchors make billions out of a few lines
MAX_SHOWN = 120  # characters of a value in a message
MAX_DIGITS = 400  # a float has no more before its point


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
    """The copy inside the installed package, or `configs/` of the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def read_yaml(path: Path, origins: dict[Key, str], error_class: type[UserError]) -> dict[str, Any]:
    """One YAML mapping; `origins` learns `file:line` of every key."""
    try:
        text = path.read_text()
    except OSError as error:
        do = _near_files(path) if isinstance(error, FileNotFoundError) else "check the path and its permissions"
        raise error_class(f"cannot read {path}: {error.strerror}", where=str(path), do=do) from None
    except UnicodeDecodeError as error:
        n_lines = error.object[: error.start].count(b"\n") + 1
        what = f"not text in UTF-8: byte 0x{error.object[error.start]:02x}"
        raise error_class(what, where=f"{path}:{n_lines}", do="give a YAML file, written as UTF-8") from None
    try:
        data = parse_yaml(text, (), str(path), origins)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        if isinstance(error, yaml.reader.ReaderError):
            line = f":{text[: error.position].count(chr(10)) + 1}"
            problem = f"character 0x{error.character:02x}, which no text holds"
        raise error_class(f"not valid YAML: {problem}", where=f"{path}{line}", do="mend that line") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else "a list" if isinstance(data, list) else f"the word {str(data)[:40]!r}"
        raise error_class(f"expected keys and values, found {found}", where=str(path), do="write `key: value` lines")
    return data


def _near_files(path: Path) -> str:
    near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, near, n=3) or near
    if not close:
        return "check the path"
    return f"one of the files there: {', '.join(close[:20])}{', ...' if len(close) > 20 else ''}"


def parse_yaml(text: str, key: Key, file: str, origins: dict[Key, str]) -> Any:
    """The value of a YAML text that stands at `key`. Raises yaml.YAMLError."""
    return _walk(yaml.compose(text, Loader=_Yaml12), key, file, origins)


def _walk(node: yaml.Node | None, key: Key, file: str, origins: dict[Key, str]) -> Any:
    if node is None:
        return None
    if len(key) > MAX_DEPTH:  # an anchor may hold itself
        raise yaml.constructor.ConstructorError(None, None, "nested too deeply", node.start_mark)
    if len(origins) > MAX_VALUES:
        raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_VALUES:,} values", node.start_mark)
    origins[key] = f"{file}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for k, v in node.value:
            if not isinstance(k, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be one word", k.start_mark)
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
    if tag in ("int", "float") and len(node.value) > MAX_DIGITS:
        problem = f"a number of {len(node.value)} characters"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    if tag == "int":
        return int(node.value.replace("_", ""))
    if tag == "float":
        return float(node.value.replace("_", ""))
    return node.value


def validate(
    cls: type[M],
    data: dict[str, Any],
    origins: dict[Key, str],
    file: str,
    error_class: type[UserError],
    do: str = "mend the lines named above, or use --set KEY=VALUE",
) -> M:
    """Build `cls`, or raise `error_class` with one line per key at fault: where, key, what, nearest valid name."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        by_key: dict[tuple[Key, bool], list[Any]] = {}
        for fault in error.errors():
            # Union branches ("int", "literal[...]") stand in pydantic's loc but not in the file.
            key = tuple(p for p in fault["loc"] if not _is_branch(p))
            by_key.setdefault((key, len(key) < len(fault["loc"])), []).append(fault)
        lines = [_fault_line(cls, key, faults, origins, file) for (key, _), faults in by_key.items()]
    head = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
    raise error_class("\n".join([f"{head} in {file}", *lines]), do=do)


def _fault_line(cls: type[BaseModel], key: Key, faults: list[Any], origins: dict[Key, str], file: str) -> str:
    name = ".".join(str(p) for p in key) or cls.__name__.lower()
    place = next((origins[key[:i]] for i in range(len(key), -1, -1) if key[:i] in origins), file)
    kind, value = faults[0]["type"], faults[0].get("input")
    if kind == "extra_forbidden":
        valid = list(_fields_at(cls, key[:-1]))
        near = _nearest(str(key[-1]), valid)
        hint = f"did you mean {near}?  " if near else ""
        return f"  {place}: {name}: unknown key; {hint}valid here: {', '.join(valid)}"
    if kind == "missing":
        return f"  {place}: {name}: missing"
    if len(faults) > 1:
        message = "expected " + " or ".join(_expected(f) for f in faults)
    else:
        plain = {"model_type": "expected keys and values", "list_type": "expected a list"}
        message = plain.get(kind, faults[0]["msg"].removeprefix("Value error, "))
    if kind == "value_error":  # a check of a whole block may begin with the key below it that is at fault
        head, _, rest = message.partition(": ")
        below = (*key, *(int(p) if p.isdigit() else p for p in head.split(".")))
        if rest and below in origins:
            place, name, message = origins[below], ".".join(map(str, below)), rest
    shown = "" if isinstance(value, dict | list | BaseModel) else f", given: {_shortened(repr(value))}"
    return f"  {place}: {name}: {message}{shown}"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _expected(fault: Any) -> str:
    """What one branch of a union would have taken, in plain words."""
    words = {"int_type": "an integer", "float_type": "a number", "bool_type": "true or false", "string_type": "text"}
    if fault["type"] == "literal_error":
        return str(fault["ctx"]["expected"]).replace("'", "")
    rest = fault["msg"].removeprefix("Input should be ")
    return words.get(fault["type"], rest if rest.startswith("a ") else f"a value {rest}")


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and (part in ("int", "float", "constrained-float", "bool", "str") or "[" in part)


def _nearest(word: str, valid: list[str]) -> str | None:
    """The valid name that is spelt much like `word`, or is its initials: learning_rate -> lr. None if none is."""
    initials = "".join(part[:1] for part in word.split("_"))
    if initials in valid:
        return initials
    return next(iter(difflib.get_close_matches(word, valid, n=1, cutoff=0.5)), None)


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
