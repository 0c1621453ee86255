"""The lines of a machine's page in a terminal, and the words for what is not known."""

from __future__ import annotations

import textwrap

from aifactory_train import units
from aifactory_train.machine.facts import FactSource
from aifactory_train.machine.machine import Machine

WIDTH = 100
LABEL = 18
NOT_KNOWN = "not known"


class Page:
    """Lines of one machine; `ref` numbers the sources as they are listed at the end."""

    def __init__(self, machine: Machine, width: int = WIDTH) -> None:
        self.machine, self.width = machine, width
        title = f"{machine.name}: {machine.title}" if machine.title else machine.name
        self.lines = [title]
        if machine.nodes is not None:
            self.lines[0] += f", {machine.nodes:,} node{'s' * (machine.nodes > 1)}{self.ref('nodes')}"

    def ref(self, *keys: str) -> str:
        """ " [1 3]": the sources that speak for these facts or for parts of them; "" where none does."""
        numbers = set()
        for i, source in enumerate(self.machine.sources, 1):
            if any(fact.startswith(f"{key}.") for key in keys for fact in source.facts):
                numbers.add(i)
        for key in keys:
            whole: FactSource | None = self.machine.source_of(key)
            if whole is not None:
                numbers.add(self.machine.sources.index(whole) + 1)
        return f" [{' '.join(map(str, sorted(numbers)))}]" if numbers else ""

    def section(self, name: str, *keys: str) -> None:
        self.lines += ["", name + self.ref(*keys)]

    def row(self, label: str, text: str, *keys: str) -> None:
        """A label, its text, and the numbers of its sources; a value that is not known has none."""
        unsourced = text in ("?", NOT_KNOWN)
        self.wrapped(f"  {label:<{LABEL}}", text + ("" if unsourced else self.ref(*keys)))

    def wrapped(self, first: str, text: str) -> None:
        self.lines += textwrap.wrap(
            text,
            self.width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [first.rstrip()]

    def table(self, rows: list[list[str]]) -> None:
        self.lines += [f"  {line}" for line in columns(rows)]


def columns(rows: list[list[str]], right: bool = False) -> list[str]:
    """Rows of equal length as lines, each column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def known(text: str) -> str:
    return NOT_KNOWN if text == "unknown" else text


def shown_bytes(value: int | None) -> str:
    return known(units.format_bytes(value))


def shown_gb_per_s(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{units.format_gb_per_s(value)} GB/s"


def shown_count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def shown_hours(value: float | None) -> str:
    return "?" if value is None else units.format_hours(value)


def yes_no(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"
