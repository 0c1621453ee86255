"""The tables of the command and of its page: the same lines, once for a terminal and once in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from aifactory_train.units import format_difference
from benchmarks.plan_accuracy.rows import Row
from benchmarks.plan_accuracy.scores import SIZES, Key, Line, Scored, size_of, tabulate


def hardware_of(row: Row) -> str:
    """Name of the device, and fp8 where the products run in it."""
    precision = " fp8" if row.layout.precision == "fp8" else ""
    return row.machine.device.name + precision


# (title, names of the key's parts, key of a row)
TABLES: tuple[tuple[str, tuple[str, ...], Callable[[Row], Key]], ...] = (
    ("By hardware and model size", ("hardware", "parameters"), lambda row: (hardware_of(row), size_of(row))),
    ("By source", ("source",), lambda row: (row.source,)),
    ("By tier", ("tier",), lambda row: (row.tier,)),
)
COLUMN_WORDS = """\
speed: median of predicted over measured tokens/s, less 1, with its 10th and 90th percentile; abs: median without the
sign. memory: median of predicted over measured peak, less 1, each row by its own way to measure. no fit: how many the
planner calls too large, of those that ran and of those that ran out of memory."""
COLUMNS = ("rows", "speed", "p10", "p90", "abs", "rows", "memory", "no fit/ran", "no fit/OOM")


def table_of(scored: Sequence[Scored], names: tuple[str, ...], key_of: Callable[[Row], Key]) -> list[list[str]]:
    """Header and lines as cells. speed: signed median error of tokens/s; abs: its absolute median; memory: signed."""
    return [[*names, *COLUMNS]] + [_cells(line) for line in tabulate(scored, key_of)]


def _cells(line: Line) -> list[str]:
    return [
        *(SIZES[part] if isinstance(part, int) else part for part in line.key),
        str(line.n_speed or ""),
        percent(line.speed_median),
        percent(line.speed_p10),
        percent(line.speed_p90),
        percent(line.speed_absolute).lstrip("+"),
        str(line.n_memory or ""),
        percent(line.memory_median),
        f"{line.n_false_unfit}/{line.n_ran}" if line.n_ran else "",
        f"{line.n_oom_found}/{line.n_oom}" if line.n_oom else "",
    ]


def percent(value: float) -> str:
    """Signed; "" for nan."""
    return "" if math.isnan(value) else format_difference(value)


def render_table(cells: list[list[str]], n_keys: int) -> str:
    """Columns side by side, keys to the left, figures to the right."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < n_keys else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def render_markdown(cells: list[list[str]], n_keys: int) -> str:
    rule = ["---"] * n_keys + ["---:"] * (len(cells[0]) - n_keys)
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]])
