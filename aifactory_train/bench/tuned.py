"""What a tuning leaves: the winner as a recipe overlay, the search as pages, and what to type next."""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from aifactory_train.bench.suites import Asked, Tuning, machine_file
from aifactory_train.bench.tune import Search, Trial
from aifactory_train.machine.load import LOCAL, load_machine, machine_names
from aifactory_train.rundir import write_atomic
from aifactory_train.units import format_seconds

OVERLAY, PAGE, DOCUMENT = "tuned.yaml", "tuning.md", "tuning.json"


def write_search(asked: Asked, tuning: Tuning, search: Search, folder: Path) -> None:
    """All three files; no overlay without a winner."""
    write_atomic(folder / PAGE, render_search(asked, tuning, search))
    write_atomic(folder / DOCUMENT, json.dumps(document(asked, tuning, search), indent=1, allow_nan=False) + "\n")
    if search.best is not None:
        extends = os.path.relpath(tuning.recipe, folder.resolve())
        write_atomic(folder / OVERLAY, render_overlay(tuning, search.best, extends))


def render_overlay(tuning: Tuning, best: Trial, extends: str) -> str:
    """A recipe that takes the best layout, with the user's own overrides.

    Args:
        extends: the recipe that was tuned, as seen from the folder of the overlay.
    """
    merged: dict[str, Any] = {"extends": extends, **_overrides(tuning)}
    for part, values in best.candidate.overlay.items():
        merged[part] = merged.get(part, {}) | values
    head = f"# The fastest of {len(tuning.candidates)} layouts that were tried: {best.candidate.name}.\n"
    return f"{head}# {_measured(best)}.\n{yaml.safe_dump(merged, sort_keys=False)}"


def _overrides(tuning: Tuning) -> dict[str, Any]:
    """What they came to in the recipe; where they change an entry of a list, the whole list."""
    whole: dict[str, Any] = yaml.safe_load(tuning.text)
    found: dict[str, Any] = {}
    for text in tuning.sets:
        source, target = whole, found
        *path, last = text.partition("=")[0].strip().split(".")
        for part in path:
            if not isinstance(source[part], dict):
                last = part
                break
            source, target = source[part], target.setdefault(part, {})
        target[last] = source[last]
    return found


def _measured(trial: Trial) -> str:
    at = trial.measured
    interval = "too few for an interval" if at.ci95 is None else f"{at.ci95[0]:.4g} to {at.ci95[1]:.4g} s"
    worst = "" if at.worst_rank is None else f", worst rank {at.worst_rank.rank} on {at.worst_rank.host}"
    return f"{at.median:.4g} s a step ({interval}), n = {at.n}{worst}"


def render_search(asked: Asked, tuning: Tuning, search: Search) -> str:
    """The search in Markdown: every candidate with what was predicted and measured, and why it was given up."""
    lines = [
        f"# Tuning of {tuning.recipe}",
        "",
        f"{_result(search)} On {asked.nodes} node(s) of {asked.machine}"
        + (f", with {shlex.join(tuning.sets)}." if tuning.sets else "."),
        "",
        "Seconds a step: the median of the slowest rank, with its 95 % interval, of the last round of each candidate.",
        "",
        "| layout | predicted | measured | 95 % interval | steps | worst rank | outcome |",
        "|---|---|---|---|---|---|---|",
    ]
    for trial in _in_order(search):
        predicted_s = trial.candidate.predicted_step_s
        predicted = "unknown" if predicted_s is None else f"{predicted_s:.4g}"
        measured = "not measured | | 0 | "
        if trial.rounds:
            at = trial.measured
            interval = "too few steps" if at.ci95 is None else f"{at.ci95[0]:.4g} to {at.ci95[1]:.4g}"
            worst = "" if at.worst_rank is None else f"{at.worst_rank.rank} on {at.worst_rank.host}"
            measured = f"{at.median:.4g} | {interval} | {at.n} | {worst}"
        outcome = _outcome(trial, search).replace("|", "/")
        lines.append(f"| {trial.candidate.name} | {predicted} | {measured} | {' '.join(outcome.split())} |")
    return "\n".join(lines) + "\n"


def _outcome(trial: Trial, search: Search) -> str:
    if trial is search.best:
        return "**best**"
    return trial.stopped or "still in"


def _result(search: Search) -> str:
    if search.wanted:
        return f"Not finished: {len(search.wanted)} runs of this round are left."
    if search.best is None:
        return "No candidate ran."
    return f"Best: {search.best.candidate.name}, {_measured(search.best)}."


def document(asked: Asked, tuning: Tuning, search: Search) -> dict[str, Any]:
    """The search as JSON values. best: a name; None without a winner. finished: nothing is left to be run."""
    return {
        "schema": "aifactory-tuning/1",
        "recipe": tuning.recipe,
        "sets": tuning.sets,
        "machine": asked.machine,
        "nodes": asked.nodes,
        "finished": not search.wanted,
        "best": None if search.best is None else search.best.candidate.name,
        "candidates": [
            {
                **trial.candidate.model_dump(mode="json"),
                "rounds": [metric.model_dump(mode="json") for metric in trial.rounds],
                "stopped": trial.stopped,
            }
            for trial in _in_order(search)
        ],
    }


def _in_order(search: Search) -> list[Trial]:
    """The best, then those that got as far, by what was measured; last those that never ran."""

    def place(trial: Trial) -> tuple[bool, int, float]:
        median = trial.measured.median if trial.rounds else math.inf
        return trial is not search.best, -len(trial.rounds), median

    return sorted(search.trials, key=place)


def tell_candidates(tuning: Tuning) -> list[str]:
    """A line for each, before any of them runs."""
    return [
        f"candidate {candidate.name}: {format_seconds(candidate.predicted_step_s)} a step predicted"
        for candidate in tuning.candidates
    ]


def tell_search(asked: Asked, search: Search, folder: Path) -> list[str]:
    """What came out, where it can be read, and what to type next."""
    lines = [f"{trial.candidate.name}: {_outcome(trial, search)}" for trial in _in_order(search)]
    lines += [_result(search)]
    if search.wanted:
        lines.append("the same command with the same --out goes on with them")
    lines.append(f"search: {folder / PAGE}")
    if search.best is None:
        return lines
    machine, overlay = _machine_word(asked, folder), shlex.quote(str(folder / OVERLAY))
    return [
        *lines,
        f"recipe: {folder / OVERLAY}",
        f"next:   aifactory-train calibrate {machine} {shlex.quote(str(folder))}",
        f"        aifactory-train launch {overlay} {_where(asked, folder, machine)}",
    ]


def _machine_word(asked: Asked, folder: Path) -> str:
    """As `--machine` takes it: its name where that means the same machine, else the file in the folder."""
    name, file = asked.machine, machine_file(asked, folder)
    if name == LOCAL or (name in machine_names() and load_machine(name) == load_machine(file)):
        return name
    return shlex.quote(str(file))


def _where(asked: Asked, folder: Path, machine_word: str) -> str:
    """Options of plan and launch for the ranks that were tuned on."""
    machine = load_machine(machine_file(asked, folder))
    free_ranks = machine.slurm is None and machine.device.kind == "cpu"
    ranks = f" --cpu-ranks {asked.cells[-1].ranks_per_node}" if free_ranks else ""
    return f"--machine {machine_word} --nodes {asked.nodes}{ranks}"
