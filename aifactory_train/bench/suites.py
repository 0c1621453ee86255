"""Suites: which programs a bench runs with which options, and what that is on a machine.

A suite file says what is wanted; suite.json of a bench folder says what was asked: the cells, one start of a program
each, that runners here and in a batch job read.
"""

from __future__ import annotations

import difflib
import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from aifactory_train.errors import RunFolderError, UserError
from aifactory_train.machine.machine import Machine
from aifactory_train.rundir import read_jsonl, write_atomic
from aifactory_train.strictyaml import Key, configs_dir, read_yaml, validate

Program = Literal[
    "gemm",
    "memory",
    "hostlink",
    "p2p",
    "collectives",
    "loader",
    "tokenization",
    "checkpoint",
    "step",
    "startup",
]
# Of a cell beside its budget: ranks that start Python from a busy parallel file system, and a last sample that is long.
START_S = 120.0
SLACK = 1.5
# What differs between two benches, and is too long to be shown.
_LONG = ("cells", "what the recipe says")


def _words(value: object) -> object:
    """Options as they are typed: "--dtype bf16 --sizes 1024" -> its words."""
    try:
        return shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{error}; write options as on a command line") from None


# A tab parts the words of a cell where a batch script reads them.
Word = Annotated[str, Field(min_length=1, pattern=r"^[^\t\n]*$")]
Options = Annotated[list[Word], BeforeValidator(_words)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(Part):
    """One program of a suite.

    ranks: one_per_device starts a rank for each device of the nodes; one starts a single rank on a node.
    scope: node runs the program on each node alone, without a word between nodes; job runs it over all of them.
    nodes: powers_of_two repeats it on 1, 2, 4 ... nodes of the job.
    least_ranks, least_nodes: with fewer of them the program has nothing to measure and is left out.
    budget_s: what it takes with all its samples; when it takes far longer it is ended.
    cpu, gpu: its options by the kind of device; left out, it does not run there.
    """

    program: Program
    ranks: Literal["one_per_device", "one"] = "one_per_device"
    scope: Literal["node", "job"]
    nodes: Literal["all", "powers_of_two"] = "all"
    least_ranks: int = Field(1, gt=0)
    least_nodes: int = Field(1, gt=0)
    budget_s: float = Field(gt=0)
    cpu: Options | None = None
    gpu: Options | None = None


class Suite(Part):
    """least_nodes, most_nodes: of one bench."""

    name: str
    about: str
    least_nodes: int = Field(1, gt=0)
    most_nodes: int | None = Field(None, gt=0)
    programs: Annotated[list[Entry], Field(min_length=1)]


class Cell(Part):
    """One start of a program. `timeout_s`: when it is taken for dead and killed."""

    number: int
    program: Program
    options: list[str]
    scope: Literal["node", "job"]
    n_nodes: int
    ranks_per_node: int
    timeout_s: float

    @property
    def log(self) -> str:
        """Its output, below the bench folder."""
        return f"logs/{self.number}-{self.program}.txt"


class Candidate(Part):
    """A layout that the recipe takes with `overlay` merged into it: `layout` and `train` keys as recipes spell them."""

    name: str
    overlay: dict[str, dict[str, Any]]
    predicted_step_s: float | None
    predicted_peak_bytes: int

    def sets(self) -> list[str]:
        """As `--set` takes it: "layout.tp=2"."""
        # YAML ends a bare word with a line that says so.
        return [
            f"{part}.{key}={yaml.safe_dump(value).splitlines()[0]}"
            for part, values in self.overlay.items()
            for key, value in values.items()
        ]

    def step_options(self, n_steps: int, change_frac: float) -> list[str]:
        """Of a cell with so many timed steps, from when two windows before them differ by less than `change_frac`."""
        own = [word for each in self.sets() for word in ("--set", each)]
        return ["--steps", str(n_steps), "--change-frac", f"{change_frac:g}", *own]


class Tuning(Part):
    """What a bench searches the best layout of.

    recipe: its file, whole path. sets: the user's own overrides. text: the recipe with them, resolved.
    n_layouts: as asked for; each comes with several micro-batches.
    """

    recipe: str
    sets: list[str]
    text: str
    n_layouts: int
    candidates: list[Candidate]


class Asked(Part):
    """suite.json. hosts: those of the job, once it has begun. left_out: program -> why.

    tuning: then the cells are those of the rounds so far.
    """

    suite: str
    machine: str
    nodes: int
    hosts: list[str] = []
    cells: list[Cell]
    left_out: list[str] = []
    tuning: Tuning | None = None


class End(Part):
    """How a cell ended; one line of ends.jsonl. began: UTC."""

    cell: int
    exit_code: int
    began: datetime
    seconds: float


def programs_dir() -> Path:
    """`benchmarks/` beside `configs/`, in a checkout and in an installed package."""
    return configs_dir().parent / "benchmarks"


def suite_names() -> list[str]:
    return sorted(p.stem for p in (programs_dir() / "suites").glob("*.yaml"))


def load_suite(name_or_path: str) -> Suite:
    """A bare name is benchmarks/suites/NAME.yaml; anything else is a YAML file.

    Raises:
        UserError: no such suite, or every fault of the file with its line.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = programs_dir() / "suites" / f"{name_or_path}.yaml"
        if not path.is_file():
            known = suite_names()
            near = difflib.get_close_matches(name_or_path.lower(), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?  " if near else ""
            do = f"{hint}one of {', '.join(known)}, or the path of a YAML file"
            raise UserError(f"unknown suite {name_or_path!r}", where=str(path.parent), do=do)
    origins: dict[Key, str] = {}
    data = {"name": path.stem, **read_yaml(path, origins, UserError)}
    return validate(Suite, data, origins, str(path), UserError, do="mend the lines named above")


def check_nodes(suite: Suite, n_nodes: int) -> None:
    """Raise UserError where the suite is not for so many nodes."""
    if suite.least_nodes <= n_nodes <= (suite.most_nodes or n_nodes):
        return
    most = "" if suite.most_nodes is None else f" to {suite.most_nodes}"
    raise UserError(
        f"suite {suite.name} on {n_nodes} node(s); it is for {suite.least_nodes}{most or ' or more'}",
        where="command line: --nodes",
        do=f"--nodes {suite.least_nodes if n_nodes < suite.least_nodes else suite.most_nodes}",
    )


def build_asked(suite: Suite, machine: Machine, n_nodes: int, ranks_per_node: int) -> Asked:
    """The cells of a suite on so many nodes of a machine.

    Args:
        ranks_per_node: of a program with one rank per device.
    """
    cells: list[Cell] = []
    left_out = []
    for entry in suite.programs:
        options = entry.cpu if machine.device.kind == "cpu" else entry.gpu
        per_node = ranks_per_node if entry.ranks == "one_per_device" else 1
        if options is None:
            left_out.append(f"{entry.program}: this suite does not run it on a {machine.device.kind} device")
            continue
        for n in _node_counts(entry, n_nodes):
            n_ranks = per_node * (1 if entry.scope == "node" else n)
            if n_ranks < entry.least_ranks or n < entry.least_nodes:
                wanted = f"{entry.least_ranks} ranks on {entry.least_nodes} node(s)"
                left_out.append(f"{entry.program}: needs {wanted}, there are {n_ranks} on {n}")
                continue
            cells.append(
                Cell(
                    number=len(cells) + 1,
                    program=entry.program,
                    options=options,
                    scope=entry.scope,
                    n_nodes=n,
                    ranks_per_node=per_node,
                    timeout_s=SLACK * entry.budget_s + START_S,
                )
            )
    return Asked(suite=suite.name, machine=machine.name, nodes=n_nodes, cells=cells, left_out=left_out)


def _node_counts(entry: Entry, n_nodes: int) -> list[int]:
    if entry.nodes == "all":
        return [n_nodes]
    return [1 << k for k in range(n_nodes.bit_length())]


def cell_words(cell: Cell, asked: Asked, folder: Path) -> list[str]:
    """The program of a cell and its arguments, without the Python that runs it."""
    common = ["--machine", str(machine_file(asked, folder)), "--suite", asked.suite, "--out", str(folder)]
    alone = ["--alone"] if cell.scope == "node" else []
    if asked.tuning is not None and cell.program in ("gemm", "step"):
        common += ["--recipe", str(recipe_file(folder))]
    program = programs_dir() / f"{cell.program}.py"
    # A suite names files of ours as they stand in the checkout.
    options = [str(configs_dir().parent / word) if word.startswith("configs/") else word for word in cell.options]
    return [str(program), *options, *common, *alone]


def machine_file(asked: Asked, folder: Path) -> Path:
    """The machine as it was then; programs call it by the name of this file."""
    return folder / f"{asked.machine}.yaml"


def recipe_file(folder: Path) -> Path:
    """The recipe that is tuned, as it was then."""
    return folder / "recipe.yaml"


def join_folder(asked: Asked, folder: Path) -> Asked:
    """What is to be done in that folder: of the same bench, a tuning goes on with the cells that it had come to.

    Raises:
        RunFolderError: it holds another bench, or something else.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError("the bench folder is a file", where=str(folder), do="give a folder: --out DIR")
    if not (folder / "suite.json").exists():
        if folder.exists() and any(p.name != ".lock" for p in folder.iterdir()):
            do = "give an empty or new folder: --out DIR"
            raise RunFolderError("the folder holds files but no bench", where=str(folder), do=do)
        return asked
    before = load_asked(folder)
    theirs, ours = _identity(before), _identity(asked)
    for name in theirs | ours:
        there, now = theirs.get(name), ours.get(name)
        if there != now:
            shown = f" ({there!r} there, {now!r} now)" if name not in _LONG else ""
            raise RunFolderError(
                f"the folder belongs to another bench; different: {name}{shown}",
                where=str(folder / "suite.json"),
                do="take another folder: --out DIR",
            )
    return asked if asked.tuning is None else before


def _identity(asked: Asked) -> dict[str, Any]:
    """What makes two benches the same. Predictions, and with them candidates, change when rates are measured anew."""
    same = {name: getattr(asked, name) for name in ("suite", "machine", "nodes")}
    if asked.tuning is None:
        return same | {"tuned recipe": None, "cells": asked.cells}
    tuning = asked.tuning
    same |= {"tuned recipe": tuning.recipe, "overrides": tuning.sets, "layouts": tuning.n_layouts}
    return same | {"ranks on a node": asked.cells[-1].ranks_per_node, "what the recipe says": tuning.text}


def load_asked(folder: Path) -> Asked:
    """Raises RunFolderError where the folder is none of a bench."""
    path = folder / "suite.json"
    try:
        return Asked.model_validate_json(path.read_bytes())
    except OSError as error:
        what, do = f"no bench folder: {error.strerror}", "aifactory-train bench SUITE --out DIR  makes one"
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        what = f"suite.json is damaged: {'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        do = "take another folder: --out DIR"
    raise RunFolderError(what, where=str(path), do=do)


def write_asked(asked: Asked, folder: Path) -> None:
    write_atomic(folder / "suite.json", asked.model_dump_json(indent=1) + "\n")


def read_ends(folder: Path) -> dict[int, End]:
    """Cell number -> how it ended last."""
    return {end.cell: end for end in (End(**row) for row in read_jsonl(folder / "ends.jsonl"))}


def cells_to_run(asked: Asked, folder: Path) -> list[Cell]:
    """Those that have not ended well before, in this folder."""
    ends = read_ends(folder)
    return [cell for cell in asked.cells if cell.number not in ends or ends[cell.number].exit_code]
