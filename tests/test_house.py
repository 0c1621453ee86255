"""The law of the house: who may import whom, where the world may be touched, how long things may be.

The checkers are in house_rules.py; the last tests here show that each of them can fail.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import house_rules as rules

ROOT = Path(__file__).resolve().parent.parent
LOOP = "aifactory_train/train/loop.py"
FLOORS_WITHOUT_TORCH = (*rules.TORCH_NEVER, "data")

SUFFIXES = (".py", ".yaml", ".sh", ".sbatch", ".j2")
Checker = Callable[[str, str], Iterator[str]]


def sources(*tops: str, suffixes: tuple[str, ...] = (".py",)) -> dict[str, str]:
    """Path -> text of all files below `tops`, which may be files."""
    found: list[Path] = []
    for top in (ROOT / t for t in tops):
        found += [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.suffix in suffixes and p.is_file())
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in found if "__pycache__" not in p.parts}


OURS = sources("aifactory_train")
ALL_PYTHON = sources("aifactory_train", "benchmarks", "examples", "tests", "setup.py")


def hold(what: str, faults: list[str], do: str) -> None:
    """Fail with what, where, do."""
    if faults:
        where = "\n         ".join(faults)
        pytest.fail(f"{what}\n  where: {where}\n  do:    {do}", pytrace=False)


def check(checker: Checker, files: dict[str, str]) -> list[str]:
    return [fault for path, source in files.items() for fault in checker(path, source)]


def test_imports_go_down_only() -> None:
    do = "move the shared part to a lower floor, or hand the value over as an argument; the table is in CONTRIBUTING.md"
    hold("an import goes up or across", check(rules.floor_faults, OURS), do)


def test_third_party_packages_stay_in_their_files() -> None:
    do = "call the function of the file that owns the package; torch-free floors get numbers, not tensors"
    hold("a package is imported outside its place", check(rules.third_party_faults, OURS), do)


def test_nothing_imports_in_a_circle() -> None:
    faults = [" -> ".join(circle) for circle in rules.cycles(OURS)]
    hold("modules import each other in a circle", faults, "move what both need into a third file below them")


def test_left_of_the_queue_no_torch_is_imported() -> None:
    modules = [p.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for p in OURS]
    modules = [m for m in modules if rules.folder_of(m) in FLOORS_WITHOUT_TORCH]
    assert len(modules) >= len(FLOORS_WITHOUT_TORCH), "a floor is missing"
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit('importing ' + name + ' imports torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    faults = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    hold("floors 0 to 3 must import on a node without torch", faults, "import it inside the function that needs it")


def test_the_environment_is_read_and_written_in_one_file_each() -> None:
    do = f"read in {rules.READS_ENVIRONMENT}, write in {rules.WRITES_ENVIRONMENT}, hand over values as arguments"
    hold("the environment is touched elsewhere", check(rules.environment_faults, OURS), do)


def test_files_and_functions_are_short() -> None:
    hold("too long", check(rules.length_faults, ALL_PYTHON), "split it along what it does, and name the parts")


def test_the_loop_is_read_on_two_screens() -> None:
    source = (ROOT / LOOP).read_text()
    branches = rules.branches(source)
    faults = list(rules.length_faults(LOOP, source, file_lines=110))
    if len(branches) > 12:
        faults.append(f"{LOOP}:{branches[-1]}: {len(branches)} branches, at most 12; at lines {branches}")
    hold("the loop grows", faults, "a variant is an engine or data, never a branch of the loop")


def test_the_recipe_is_small_and_every_field_is_read() -> None:
    from aifactory_train.recipe.schema import Recipe

    fields = list(recipe_fields(Recipe))
    schema = "aifactory_train/recipe/schema.py"
    read: set[str] = set()
    for path, source in OURS.items():
        if path != schema:
            read |= rules.attributes_read(source)
    for name, reads in rules.properties(OURS[schema]).items():
        read |= reads if name in read else set()
    faults = [f"{schema}: {key} is read nowhere" for key in fields if key.rsplit(".", 1)[-1] not in read]
    # 70 for what is ours; foreign models, adapters, chats and DeepSpeed's JSON bring 12.
    if len(fields) > 82:
        faults.append(f"{schema}: {len(fields)} fields, at most 82")
    hold("a knob that does nothing, or too many knobs", faults, "use the field or remove it")


def recipe_fields(model: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of all leaves below a pydantic model."""
    import typing

    def models_in(annotation: object) -> list[type]:
        if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
            return [annotation]
        return [m for arg in typing.get_args(annotation) for m in models_in(arg)]

    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        inner = models_in(field.annotation)
        if inner:
            yield from recipe_fields(inner[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def test_help_is_quick_and_imports_no_torch() -> None:
    command = [sys.executable, "-c", "from aifactory_train.cli import main; main()", "--help"]
    times_s = []
    for _ in range(5):
        start_s = _children_cpu_s()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        times_s.append(_children_cpu_s() - start_s)
        assert done.returncode == 0, done.stderr
    code = "import sys\ntry:\n from aifactory_train.cli import main; main()\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    torch = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=ROOT)
    faults = [] if min(times_s) < 0.3 else [f"--help takes {min(times_s):.2f} s at best of 5, at most 0.30 s"]
    faults += ["--help imports torch"] if torch.returncode else []
    hold("help is slow", faults, "python -X importtime -c 'import aifactory_train.cli' and import inside the verb")


def _children_cpu_s() -> float:
    """Not the wall clock: other tests run beside this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_site_names_stand_in_configs_and_launchers_only() -> None:
    faults = check(lambda p, s: rules.word_faults(p, s, rules.SITES, "is the name of a site"), OURS)
    hold("the library knows a site", faults, "put the fact into configs/machines/ and read it from the machine")


def test_nothing_is_left_to_do() -> None:
    files = sources("aifactory_train", "benchmarks", "configs", "launchers", "Makefile", "setup.py", suffixes=SUFFIXES)
    files = {p: s for p, s in files.items() if "/results/" not in p or p.startswith("aifactory_train")}
    faults = check(lambda p, s: rules.word_faults(p, s, "TODO|FIXME|XXX", "left in", any_case=False), files)
    hold("something is unfinished", faults, "do it, or raise an error that says what is not supported")


def test_no_error_is_swallowed() -> None:
    do = "name the exception that you expect, and say what happens then"
    hold("an error is swallowed", check(rules.silent_except_faults, ALL_PYTHON), do)


def test_files_are_named_after_what_they_hold() -> None:
    hold("a vague file name", check(rules.name_faults, ALL_PYTHON), "name it after its content")


def test_every_file_says_at_its_top_what_it_is() -> None:
    hold("a file without a word on what it is", check(rules.docstring_faults, OURS), "one sentence is enough")


PLAN, DATA, CLI = "aifactory_train/plan/x.py", "aifactory_train/data/x.py", "aifactory_train/cli.py"
LAUNCH, TRAIN, MACHINE = "aifactory_train/launch/x.py", "aifactory_train/train/x.py", "aifactory_train/machine/x.py"
RANKS, ENV = rules.READS_ENVIRONMENT, rules.WRITES_ENVIRONMENT

BAD = [
    (rules.floor_faults, PLAN, "from aifactory_train.train import loop"),
    (rules.floor_faults, PLAN, "def f():\n    from aifactory_train.machine.probe import measure"),
    (rules.floor_faults, PLAN, "from ..train import loop"),
    (rules.floor_faults, LAUNCH, "import aifactory_train.results.report"),
    (rules.floor_faults, TRAIN, "from aifactory_train import launch"),
    (rules.floor_faults, DATA, "import importlib\nimportlib.import_module('aifactory_train.plan.plan')"),
    (rules.floor_faults, MACHINE, "from aifactory_train.recipe.schema import Recipe"),
    (rules.floor_faults, "aifactory_train/units.py", "from aifactory_train.rundir import RunDir"),
    (rules.floor_faults, "aifactory_train/extras/x.py", "x = 1"),
    (rules.floor_faults, "aifactory_train/__init__.py", "from aifactory_train.plan import plan"),
    (rules.floor_faults, CLI, "from aifactory_train.train import loop"),
    (rules.third_party_faults, PLAN, "import torch"),
    (rules.third_party_faults, LAUNCH, "def f():\n    import torch.distributed"),
    (rules.third_party_faults, DATA, "from torch import Tensor"),
    (rules.third_party_faults, DATA, "def f():\n    from transformers import AutoTokenizer"),
    (rules.third_party_faults, TRAIN, "from mpi4py import MPI"),
    (rules.environment_faults, TRAIN, "import os\nos.environ['A'] = '1'"),
    (rules.environment_faults, TRAIN, "import os\nx = os.environ.get('A')"),
    (rules.environment_faults, TRAIN, "import os\nx = os.getenv('A')"),
    (rules.environment_faults, TRAIN, "from os import environ"),
    (rules.environment_faults, TRAIN, "import os\nx = dict(os.environ)"),
    (rules.environment_faults, RANKS, "import os\nos.environ.setdefault('A', '1')"),
    (rules.environment_faults, RANKS, "import os\nos.environ |= {'A': '1'}"),
    (rules.environment_faults, ENV, "import os\nx = 'A' in os.environ"),
    (rules.length_faults, PLAN, "x = 1\n" * 401),
    (rules.length_faults, PLAN, "def f():\n" + "    x = 1\n" * 60),
    (rules.silent_except_faults, PLAN, "try:\n    f()\nexcept:\n    raise"),
    (rules.silent_except_faults, PLAN, "try:\n    f()\nexcept (ValueError, Exception):\n    pass"),
    (rules.silent_except_faults, PLAN, "with contextlib.suppress(Exception):\n    f()"),
    (rules.name_faults, "aifactory_train/plan/utils.py", ""),
    (rules.docstring_faults, PLAN, "x = 1"),
]

GOOD = [
    (
        rules.floor_faults,
        PLAN,
        "from aifactory_train.machine.machine import Machine\nfrom aifactory_train import __version__",
    ),
    (
        rules.floor_faults,
        CLI,
        "from aifactory_train import errors\ndef f():\n    from aifactory_train.train import loop",
    ),
    (rules.third_party_faults, DATA, "def f():\n    import torch"),
    (rules.third_party_faults, "aifactory_train/models/hf.py", "import transformers"),
    (rules.environment_faults, ENV, "import os\nx = os.environ.copy()\ny = {**os.environ}\nos.environ['A'] = '1'"),
    (rules.environment_faults, RANKS, "import os\nx = os.environ['A'], os.getenv('B'), 'C' in os.environ"),
    (rules.environment_faults, TRAIN, "import os\nx = os.path.join('a', 'b')"),
    (rules.length_faults, PLAN, "x = 1\n" * 400),
    (
        rules.silent_except_faults,
        PLAN,
        "try:\n    f()\nexcept OSError:\n    pass\nexcept Exception as e:\n    raise E from e",
    ),
]


@pytest.mark.parametrize(("checker", "path", "source"), BAD)
def test_a_broken_rule_is_found(checker: Checker, path: str, source: str) -> None:
    assert list(checker(path, source))


@pytest.mark.parametrize(("checker", "path", "source"), GOOD)
def test_what_is_allowed_passes(checker: Checker, path: str, source: str) -> None:
    assert list(checker(path, source)) == []


def test_words_are_found_whole_and_with_their_line() -> None:
    text = "volumina\nLUMI-G\nx = lumi_partition\nvegan"
    found = list(rules.word_faults("a.py", text, rules.SITES, "is a site"))
    assert found == ["a.py:2: `LUMI` is a site", "a.py:3: `lumi` is a site"]


def test_a_circle_of_imports_is_found_but_not_a_lazy_one() -> None:
    a, b = "aifactory_train/plan/a.py", "aifactory_train/plan/b.py"
    eager = {a: "from aifactory_train.plan.b import y", b: "from aifactory_train.plan import a"}
    lazy = {a: eager[a], b: "def f():\n    from aifactory_train.plan import a"}
    assert rules.cycles(eager) and rules.cycles(lazy) == []


def test_branches_are_counted() -> None:
    source = "for x in y:\n    if x:\n        pass\n    elif y:\n        z = 1 if x else 2\nwhile x:\n    pass\n"
    assert len(rules.branches(source)) == 5
