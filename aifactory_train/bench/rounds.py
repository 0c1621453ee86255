"""A tuning over a bench folder: its cells come in rounds, and what the folder holds says which come next.

No process keeps the search in mind, so a job or a user that comes later goes on where the last one stopped. What has
ended is not run again, however it ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aifactory_train.bench.faults import forget_faults, forget_stale_faults, is_of, why_it_died
from aifactory_train.bench.record import Record
from aifactory_train.bench.store import load_records
from aifactory_train.bench.suites import (
    SLACK,
    START_S,
    Asked,
    Cell,
    Program,
    Suite,
    Tuning,
    cells_to_run,
    read_ends,
    write_asked,
)
from aifactory_train.bench.tune import STEP_DURATION, Round, Run, Search, choose_candidates, most_runs, replay
from aifactory_train.errors import PlanError, UserError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.rates import device_rates, rate_key
from aifactory_train.plan.search import choose_precision
from aifactory_train.recipe.load import dump_recipe, load_recipe
from aifactory_train.recipe.schema import Recipe

# The first ones find what is far slower, which a step that still changes a little does not hide.
ROUNDS = (Round(10, 0.05), Round(30, 0.05), Round(100, 0.01))
# So many are tried.
LAYOUTS = 4
# Of a program that measures a rate which predictions are made of.
RATES_BUDGET_S = 120.0


@dataclass(frozen=True)
class Wish:
    """What the user wants tuned. sets: overrides of the recipe. n_layouts: how many are tried."""

    recipe: Path
    sets: list[str]
    n_layouts: int


def build_tuning(suite: Suite, machine: Machine, n_nodes: int, ranks_per_node: int, wish: Wish) -> Asked:
    """The candidates and the cells of the first round.

    Args:
        suite: its step program says how a candidate is started.

    Raises:
        UserError: a faulty recipe, one that fits nowhere, or one of which no layout can be trained.
    """
    if wish.n_layouts < 1:
        raise UserError(f"--layouts is {wish.n_layouts}", where="command line", do="1 or more, such as --layouts 4")
    if fault := next((text for text in wish.sets if not text.isprintable()), None):
        raise UserError(f"--set {fault!r} holds a tab or ends a line", where="command line", do="write it on one line")
    recipe = load_recipe(wish.recipe, wish.sets)
    candidates = choose_candidates(
        lambda more: load_recipe(wish.recipe, [*wish.sets, *more]), machine, n_nodes, ranks_per_node, wish.n_layouts
    )
    if not candidates:
        raise PlanError(
            f"this version trains no layout of recipe {recipe.name} on these ranks",
            where=f"{wish.recipe} on {n_nodes} node(s) of machine {machine.name}",
            do=f"aifactory-train launch {wish.recipe} --machine {machine.name} --nodes {n_nodes} --dry-run  says why",
        )
    tuning = Tuning(
        recipe=str(wish.recipe.resolve()),
        sets=wish.sets,
        text=dump_recipe(recipe),
        n_layouts=wish.n_layouts,
        candidates=candidates,
    )
    entry = next(entry for entry in suite.programs if entry.program == "step")
    step = Cell(
        number=0,
        program="step",
        options=[],
        scope=entry.scope,
        n_nodes=n_nodes,
        ranks_per_node=ranks_per_node,
        timeout_s=SLACK * entry.budget_s + START_S,
    )
    rates = _rate_cells(recipe, machine, step)
    asked = Asked(suite=suite.name, machine=machine.name, nodes=n_nodes, cells=rates, tuning=tuning)
    return _with_runs(asked, [Run(candidate, ROUNDS[0]) for candidate in candidates], step)


def _rate_cells(recipe: Recipe, machine: Machine, step: Cell) -> list[Cell]:
    """Of the rates that nobody measured on this machine: without them `calibrate` cannot hold steps against a plan."""
    precision = choose_precision(recipe, machine)
    known, dtype = device_rates(machine, precision), rate_key(precision)
    wanted: list[tuple[Program, list[str]]] = []
    if known.matmul_source != "measured" and dtype != "fp8":  # torch does not multiply fp8 by itself
        wanted.append(("gemm", ["--dtypes", dtype, "--sizes"]))  # no sizes: those of the recipe are all
    if known.memory_source != "measured":
        wanted.append(("memory", ["--kernels", "copy"]))
    of_rates = {"scope": "node", "timeout_s": SLACK * RATES_BUDGET_S + START_S}
    return [
        step.model_copy(update={"number": number, "program": program, "options": options, **of_rates})
        for number, (program, options) in enumerate(wanted, start=1)
    ]


def _with_runs(asked: Asked, runs: list[Run], like: Cell) -> Asked:
    """With a cell more for each run."""
    cells = [
        like.model_copy(update={"number": number, "options": run.options})
        for number, run in enumerate(runs, start=len(asked.cells) + 1)
    ]
    return asked.model_copy(update={"cells": [*asked.cells, *cells]})


def begin_cells(asked: Asked, folder: Path) -> tuple[Asked, list[Cell]]:
    """What is to be run first in that folder, without the faults of what is run again."""
    if asked.tuning is not None:
        forget_stale_faults(asked, folder)
        return next_cells(asked, folder)
    todo = cells_to_run(asked, folder)
    forget_faults(todo, folder)
    return asked, todo


def next_cells(asked: Asked, folder: Path) -> tuple[Asked, list[Cell]]:
    """What a tuning runs next, written into its suite.json; nothing where it is over, and for any other bench."""
    if asked.tuning is None:
        return asked, []
    known = [cell.options for cell in asked.cells]
    wanted = search_of(asked, asked.tuning, folder).wanted
    new = [run for run in wanted if run.options not in known]
    if new:
        asked = _with_runs(asked, new, asked.cells[-1])
        write_asked(asked, folder)
    ends = read_ends(folder)
    return asked, [cell for cell in asked.cells if cell.number not in ends]


def search_of(asked: Asked, tuning: Tuning, folder: Path) -> Search:
    """How far it has come, by the records and ends of the folder."""
    records, ends = load_records(folder), read_ends(folder)

    def outcome_of(run: Run) -> Record | str | None:
        cell = next((cell for cell in asked.cells if cell.options == run.options), None)
        if cell is None or cell.number not in ends:
            return None
        end = ends[cell.number]
        of_cell = [record for record in records if is_of(record, cell, end)]
        measured = [record for record in of_cell if any(metric.name == STEP_DURATION for metric in record.metrics)]
        return why_it_died(cell, end, of_cell) if end.exit_code or not measured else measured[-1]

    return replay(tuning.candidates, outcome_of, ROUNDS)


def longest_s(asked: Asked) -> float:
    """Until the end, were every program to hang until its time-out."""
    known_s = sum(cell.timeout_s for cell in asked.cells)
    if asked.tuning is None:
        return known_s
    n = len(asked.tuning.candidates)
    return known_s + (most_runs(n, len(ROUNDS)) - n) * asked.cells[-1].timeout_s
