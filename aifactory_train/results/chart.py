"""Curves as numbers between 0 and 100, which the page places by percent: sharp text at every width."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

Point = tuple[float, float]

# More points than a wide screen has columns cannot be seen.
MAX_POINTS = 800
MAX_DOTS = 40
# From this many points on, a running mean is drawn over the faint raw curve.
SMOOTH_FROM_POINTS = 60


@dataclass(frozen=True)
class Tick:
    place: float  # percent from the left or the top
    label: str


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare the curve with."""

    label: str
    place: float


@dataclass(frozen=True)
class Chart:
    title: str
    note: str
    curve: str
    smooth: str
    n_points: int
    levels: list[Level]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Tick] = field(default_factory=list)
    dots: list[float] = field(default_factory=list)


def build_chart(
    title: str,
    points: list[Point],
    label: Callable[[float], str],
    *,
    note: str = "",
    levels: dict[str, float | None] | None = None,
    base: int = 10,
    from_zero: bool = True,
    resumes: dict[int, int] | None = None,
    commits: list[int] | None = None,
) -> Chart:
    """One chart over steps.

    Args:
        points: (step, value), by step; at least one.
        label: prints a value of the y axis.
        levels: name and value of lines to compare with; those that are None are left out.
        base: 10, or 2 where ticks shall be round in KiB, MiB, GiB.
        resumes: attempt -> step from which it resumed.
        commits: steps of checkpoints.
    """
    known = {name: value for name, value in (levels or {}).items() if value is not None}
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min([*ys, *known.values()]), max([*ys, *known.values()])
    y_low, y_high, y_values = round_axis(0.0 if from_zero else low, high, base)
    x_high = max(1, *xs)

    def x_place(x: float) -> float:
        return round(100 * x / x_high, 2)

    def y_place(y: float) -> float:
        return round(100 * (y_high - y) / (y_high - y_low), 2)

    def path(curve: list[Point]) -> str:
        return " ".join(f"{x_place(x)},{y_place(y)}" for x, y in thin(curve))

    _, _, x_values = round_axis(0, x_high, 10)
    steps = [c for c in commits or [] if c <= x_high]
    return Chart(
        title=title,
        note=note,
        curve=path(points),
        smooth=path(running_mean(points)) if len(points) >= SMOOTH_FROM_POINTS else "",
        n_points=len(thin(points)),
        levels=[Level(name, y_place(value)) for name, value in known.items()],
        x_ticks=[
            Tick(x_place(x), f"{x:,.0f}" if x else "step 0") for x in x_values if x <= x_high and float(x).is_integer()
        ],
        y_ticks=[Tick(y_place(y), short_label(label(y))) for y in y_values],
        marks=[Tick(x_place(s), f"attempt {a}") for a, s in (resumes or {}).items() if 0 < s <= x_high],
        dots=[x_place(s) for s in steps[:: max(1, len(steps) // MAX_DOTS)]],
    )


def thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    n_stretches = MAX_POINTS // 2 - 1
    inner, kept = points[1:-1], [points[0]]
    for i in range(n_stretches):
        stretch = inner[i * len(inner) // n_stretches : (i + 1) * len(inner) // n_stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, points[-1]]


def running_mean(points: list[Point]) -> list[Point]:
    """Centred mean over about a thirtieth of the curve."""
    half = max(1, len(points) // 60)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)  # symmetric, so that the ends do not lag
        means.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return means


def round_axis(low: float, high: float, base: int) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis that holds low..high; ticks are round numbers."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    unit = 1024.0 ** max(0, math.floor(math.log(high, 1024))) if base == 2 and high > 0 else 1.0
    raw = (high - low) / unit / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def short_label(text: str) -> str:
    """ "4.00 GiB" -> "4 GiB", "2.50 s" -> "2.5 s"."""
    return re.sub(r"(\.\d*?)0+(?=\s|$)", r"\1", text).replace(". ", " ").rstrip(".")
