"""The checkers behind tests/test_house.py: each is a function over a path and a source text.

A path is relative to the top of the checkout, with slashes. A checker yields `path:line: fault`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

PACKAGE = "aifactory_train"

FLOOR = {
    **dict.fromkeys(("errors", "units", "rundir", "strictyaml", "hostlist"), 0),
    **dict.fromkeys(("recipe", "machine"), 1),
    "plan": 2,
    **dict.fromkeys(("launch", "results", "bench", "data", "models", "metrics"), 3),
    **dict.fromkeys(("parallel", "checkpoint", "faults"), 4),
    **dict.fromkeys(("train", "measure"), 5),
    **dict.fromkeys(("cli", "cli_options", "bench_cli", "__main__"), 6),
}

# On top of "down only": what each folder may not import from its own floor or a lower one.
NEVER = {
    "recipe": {"machine"},
    "machine": {"recipe"},
    "plan": {"machine.probe"},
    "launch": {"results", "train"},
    "results": {"launch", "bench", "train"},
    "bench": {"launch", "data", "models", "metrics"},
    "data": {"plan"},
    "models": {"launch", "metrics"},
    "metrics": {"launch", "models"},
    "parallel": {"launch", "data", "checkpoint", "faults"},
    "checkpoint": {"launch", "data", "parallel", "faults"},
    "faults": {"launch", "data", "parallel", "checkpoint"},
    "train": {"launch", "measure"},
    "measure": {"launch"},
    "cli": set(),
}

# Third-party packages that only these files of ours may import.
ONLY_IN = {
    "transformers": {"models/hf.py", "data/tokenize.py", "checkpoint/export.py", "checkpoint/huggingface.py"},
    "deepspeed": {"train/engine_deepspeed.py"},
    "wandb": {"metrics/sinks.py"},
    "mpi4py": {"train/ranks.py", "measure/control.py"},
    "torchao": {"parallel/precision.py"},
    "peft": {"models/lora.py"},
}
TORCH_NEVER = {
    *("errors", "units", "rundir", "strictyaml", "hostlist"),
    *("recipe", "machine", "plan", "launch", "results", "bench"),
}
TORCH_LAZILY = {"data", "cli"}

READS_ENVIRONMENT = "aifactory_train/train/ranks.py"
WRITES_ENVIRONMENT = "aifactory_train/launch/env.py"

SITES = (
    "lumi|leonardo|jupiter|marenostrum|karolina|vega|meluxina|deucalion|discoverer|arrhenius|juwels|jureca|alps|"
    "snellius|mahti|puhti|roihu|daedalus|booster|cineca|jülich|juelich"
)
VAGUE_NAMES = {"util.py", "utils.py", "helper.py", "helpers.py", "misc.py", "common.py"}


class Import(NamedTuple):
    module: str  # dotted, absolute; "a.b" for both `import a.b` and `from a import b`
    line: int
    lazy: bool  # inside a function or under TYPE_CHECKING


def imports(path: str, source: str) -> list[Import]:
    """Every import, also inside functions and by `import_module("name")`."""
    found: list[Import] = []
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("__init__.py"):
        package = package[:-1]

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            head = ".".join([*base, *([node.module] if node.module else [])])
            found.extend(Import(f"{head}.{alias.name}", node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found.extend(Import(name, node.lineno, lazy) for name in names)
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        inner = inner or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or inner)

    visit(ast.parse(source), False)
    return found


def folder_of(path_or_module: str) -> str:
    """`aifactory_train/plan/plan.py` and `aifactory_train.plan.plan` -> `plan`; "" for the package itself."""
    parts = path_or_module.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else ""


def floor_faults(path: str, source: str) -> Iterator[str]:
    own = folder_of(path)
    if own and own not in FLOOR:
        yield f"{path}:1: `{own}` stands on no floor"
        return
    for module, line, lazy in imports(path, source):
        if module.split(".")[0] != PACKAGE:
            continue
        other = folder_of(module)
        if other not in FLOOR or other == own:
            continue
        if own == "" or (FLOOR[own] == 0 and other != "errors"):
            yield f"{path}:{line}: {own or 'the package itself'} imports {other}"
        elif FLOOR[other] > FLOOR[own]:
            yield f"{path}:{line}: {own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})"
        elif any(f"{module}.".startswith(f"{PACKAGE}.{never}.") for never in NEVER.get(own, ())):
            yield f"{path}:{line}: {own} imports {module.removeprefix(PACKAGE + '.')}"
        elif FLOOR[own] == FLOOR["cli"] and not lazy and 0 < FLOOR[other] < FLOOR["cli"]:
            yield f"{path}:{line}: {own} imports {other} at its top; import inside the verb"


def third_party_faults(path: str, source: str) -> Iterator[str]:
    own, inside = folder_of(path), path.removeprefix(f"{PACKAGE}/")
    for module, line, lazy in imports(path, source):
        name = module.split(".")[0]
        if inside not in ONLY_IN.get(name, {inside}):
            yield f"{path}:{line}: imports {name}, which belongs to {', '.join(sorted(ONLY_IN[name]))}"
        if name == "torch" and own in TORCH_NEVER:
            yield f"{path}:{line}: {own} imports torch"
        if name == "torch" and own in TORCH_LAZILY and not lazy:
            yield f"{path}:{line}: {own} imports torch at its top; import inside the function"


def environment_faults(path: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ("environ", "environb", "getenv", "putenv", "unsetenv"):
                    yield f"{path}:{node.lineno}: from os import {alias.name}; write os.{alias.name}"
        if not (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os"):
            continue
        use = _environment_use(node, parents)
        if use == "write" and path != WRITES_ENVIRONMENT:
            yield f"{path}:{node.lineno}: writes the environment"
        if use == "read" and path != READS_ENVIRONMENT:
            yield f"{path}:{node.lineno}: reads the environment"
        if use == "copy" and path not in (READS_ENVIRONMENT, WRITES_ENVIRONMENT):
            yield f"{path}:{node.lineno}: copies the environment"


def _environment_use(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> str:
    """`write`, `read`, `copy` (the whole of it) or "" for an attribute of `os`."""
    if node.attr in ("getenv", "getenvb"):
        return "read"
    if node.attr in ("putenv", "unsetenv"):
        return "write"
    if node.attr not in ("environ", "environb"):
        return ""
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        if parent.attr in ("update", "setdefault", "pop", "popitem", "clear"):
            return "write"
        return "copy" if parent.attr == "copy" else "read"
    if isinstance(parent, ast.Subscript) and parent.value is node:
        return "read" if isinstance(parent.ctx, ast.Load) else "write"
    if isinstance(parent, ast.Dict) or (isinstance(parent, ast.Call) and ast.unparse(parent.func) == "dict"):
        return "copy"
    return "read" if isinstance(node.ctx, ast.Load) else "write"


def length_faults(path: str, source: str, file_lines: int = 400, function_lines: int = 60) -> Iterator[str]:
    lines = source.count("\n") + (not source.endswith("\n"))
    if lines > file_lines:
        yield f"{path}:{lines}: the file has {lines} lines, at most {file_lines}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > function_lines:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {function_lines}"


def branches(source: str) -> list[int]:
    """Lines of if, elif, conditional expressions, loops, except and case."""
    kinds = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)
    return sorted(getattr(n, "lineno", 0) for n in ast.walk(ast.parse(source)) if isinstance(n, kinds))


def silent_except_faults(path: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{path}:{node.lineno}: bare `except:`"
            elif _names_everything(node.type) and all(_says_nothing(s) for s in node.body):
                yield f"{path}:{node.lineno}: `except {ast.unparse(node.type)}` hides every error"
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "suppress":
            hiding = [ast.unparse(a) for a in node.args if _names_everything(a)]
            yield from (f"{path}:{node.lineno}: `suppress({name})` hides every error" for name in hiding)


def _names_everything(node: ast.expr) -> bool:
    names = node.elts if isinstance(node, ast.Tuple) else [node]
    return any(ast.unparse(n).split(".")[-1] in ("Exception", "BaseException") for n in names)


def _says_nothing(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Pass | ast.Continue | ast.Break)


def word_faults(path: str, source: str, words: str, why: str, *, any_case: bool = True) -> Iterator[str]:
    """Lines that hold one of `words` (separated by |), not as part of a longer run of letters."""
    pattern = re.compile(rf"(?<![^\W\d_])(?:{words})(?![^\W\d_])", re.IGNORECASE if any_case else 0)
    for number, line in enumerate(source.splitlines(), 1):
        match = pattern.search(line)
        if match:
            yield f"{path}:{number}: `{match.group()}` {why}"


def name_faults(path: str, source: str) -> Iterator[str]:
    if path.rsplit("/", 1)[-1] in VAGUE_NAMES:
        yield f"{path}:1: the name says nothing about what is inside"


def docstring_faults(path: str, source: str) -> Iterator[str]:
    if not ast.get_docstring(ast.parse(source)):
        yield f"{path}:1: no docstring at the top of the file"


def cycles(files: dict[str, str]) -> list[list[str]]:
    """Circles among the imports at the top of `files` (path -> source), each as a list of modules."""
    modules = {p.removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in files}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = [name for name, _, lazy in imports(path, files[path]) if not lazy]
        found = {next((m for m in (t, t.rpartition(".")[0]) if m in modules), module) for t in targets}
        graph[module] = found - {module}
    circles: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            circles.append([*trail[trail.index(module) :], module])
            return
        if module in done:
            return
        for target in sorted(graph[module]):
            walk(target, [*trail, module])
        done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return circles


def attributes_read(source: str) -> set[str]:
    """Names that stand after a dot and are read."""
    nodes = ast.walk(ast.parse(source))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


def properties(source: str) -> dict[str, set[str]]:
    """Each @property or method of a class, and the attributes that it reads."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "property" for d in node.decorator_list):
            found.setdefault(node.name, set()).update(attributes_read(ast.unparse(node)))
    return found
