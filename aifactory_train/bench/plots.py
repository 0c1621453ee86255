"""Plots of samples as numbers between 0 and 100, which the page places by percent; axes linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from aifactory_train.results.chart import Level, Point, Tick, round_axis, short_label, thin

Show = Callable[[float], str]

# The page has that many colours; more lines in one plot cannot be told apart.
MAX_LINES = 6
MAX_STEPS_OF_ECDF = 200
MAX_X_TICKS = 6
MAX_BOX_TICKS = 3


@dataclass(frozen=True)
class Axis:
    """`base` None: linear; 2 or 10: logarithmic, with powers of it as ticks."""

    low: float
    high: float
    ticks: list[float]
    base: int | None

    def place(self, value: float) -> float:
        """Percent of the way from low to high."""
        low, high = (self.low, self.high) if self.base is None else (math.log(self.low), math.log(self.high))
        return round(100 * ((value if self.base is None else math.log(value)) - low) / (high - low), 2)


@dataclass(frozen=True)
class Line:
    """points and band (p5 to p95, closed) are those of an SVG polyline and polygon; `style` numbers the colours."""

    label: str
    style: int
    points: str
    n_points: int
    band: str = ""


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    kind: str  # a class of the page's style
    label: str


@dataclass(frozen=True)
class Whisker:
    """An interval at one x: a vertical line from `low` to `high`."""

    x: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    title: str
    note: str
    about: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    levels: list[Level] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    whiskers: list[Whisker] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)  # class, text
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Box:
    """One row of a box plot: places in percent of the width, and what is printed beside it."""

    name: str
    median_text: str
    low: float  # 5th percentile
    first: float  # quartiles
    median: float
    third: float
    high: float  # 95th percentile
    why: str  # why this one is an outlier; "" where it is none


@dataclass(frozen=True)
class BoxPlot:
    title: str
    note: str
    boxes: list[Box]
    x_ticks: list[Tick]
    n_left_out: int


@dataclass(frozen=True)
class Curve:
    """What `build_plot` draws as one line: points by x, and for each, where known, its 5th and 95th percentile."""

    label: str
    points: list[Point]
    bands: list[tuple[float, float]] = field(default_factory=list)


def linear_axis(values: Iterable[float], *, from_zero: bool = False) -> Axis:
    """Ends and ticks are round numbers."""
    known = list(values)
    low, high, ticks = round_axis(0.0 if from_zero else min(known), max(known), 10)
    return Axis(low, high, ticks, None)


def log_axis(values: Iterable[float], base: int, *, tight: bool = False) -> Axis:
    """Powers of `base`; `tight`: the ends are those of the values. Less than two decades have 1, 2 and 5 as ticks.

    Values that are not above 0 have no place on it and are left out.
    """
    known = [value for value in values if value > 0] or [1.0]
    low, high = min(known), max(known)
    if low == high:
        low, high = low / base, high * base
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    ticks = [float(base) ** power for power in range(first, last + 1)]
    if base == 10 and last - first <= 2:
        ticks = [float(f"{m}e{power}") for power in range(first, last + 1) for m in (1, 2, 5)]
        below = [tick for tick in ticks if tick <= low * (1 + 1e-9)]
        above = [tick for tick in ticks if tick >= high * (1 - 1e-9)]
        ticks = [tick for tick in ticks if below[-1] <= tick <= above[0]]
    if not tight:
        low, high = ticks[0], ticks[-1]
    every = -(-len(ticks) // MAX_X_TICKS)
    return Axis(low, high, [tick for tick in ticks[::every] if low <= tick <= high], base)


def build_plot(
    title: str,
    curves: Sequence[Curve],
    x: tuple[Axis, Show],
    y: tuple[Axis, Show],
    *,
    about: str,
    note: str = "",
    levels: Mapping[str, float] | None = None,
    dots: Iterable[tuple[float, float, str, str]] = (),
    intervals: Iterable[tuple[float, float, float]] = (),
) -> Plot:
    """Lines in the order of `curves`, at most MAX_LINES of them; the rest is named in a remark.

    Args:
        x, y: axis, and what prints a value of it.
        about: what is drawn over what, for readers who cannot see it.
        levels: name and value of horizontal lines to compare with.
        dots: (x, y, class, label); a class "" is a dot of the first line's colour.
        intervals: (x, low, high) as vertical lines.
    """
    (x_axis, x_show), (y_axis, y_show) = x, y

    def top(value: float) -> float:
        return round(100 - y_axis.place(value), 2)

    def path(points: Iterable[Point]) -> str:
        return " ".join(f"{x_axis.place(px)},{top(py)}" for px, py in points)

    lines = []
    for style, curve in enumerate(curves[:MAX_LINES]):
        around = zip(curve.points, curve.bands, strict=True) if curve.bands else ()
        upper = [(px, high, low) for (px, _), (low, high) in around]
        band = [(px, high) for px, high, _ in upper] + [(px, low) for px, _, low in reversed(upper)]
        points = thin(curve.points)
        lines.append(Line(curve.label, style, path(points), len(points), path(band)))
    left_out = [curve.label for curve in curves[MAX_LINES:]]
    return Plot(
        title=title,
        note=note,
        about=about,
        lines=lines,
        x_ticks=[Tick(x_axis.place(tick), short_label(x_show(tick))) for tick in x_axis.ticks],
        y_ticks=[Tick(top(tick), short_label(y_show(tick))) for tick in y_axis.ticks],
        levels=[Level(name, top(value)) for name, value in (levels or {}).items()],
        dots=[Dot(x_axis.place(px), top(py), kind, label) for px, py, kind, label in dots],
        whiskers=[Whisker(x_axis.place(px), top(low), top(high)) for px, low, high in intervals],
        remarks=[f"Not drawn, for want of colours: {'; '.join(left_out)}."] if left_out else [],
    )


def ecdf(samples: Sequence[float]) -> list[Point]:
    """(value, share of samples that are at most that), as stairs; long lists at MAX_STEPS_OF_ECDF even shares."""
    ordered = sorted(samples)
    n = len(ordered)
    counts = range(1, n + 1)
    if n > MAX_STEPS_OF_ECDF:
        counts_shown = sorted({round(i * n / MAX_STEPS_OF_ECDF) for i in range(1, MAX_STEPS_OF_ECDF + 1)} | {1})
    else:
        counts_shown = list(counts)
    points, before = [], 0.0
    for count in counts_shown:
        value = ordered[count - 1]
        points += [(value, before), (value, count / n)]
        before = count / n
    return points


def box_plot(
    title: str, by_name: Mapping[str, Sequence[float]], why: Mapping[str, str], show: Show, *, note: str, max_rows: int
) -> BoxPlot:
    """Boxes from the first to the third quartile, whiskers from the 5th to the 95th percentile, over a linear axis.

    Outliers (`why`: name -> sentence) come first, the rest by name; names beyond `max_rows` are counted, not drawn.
    """
    shown = sorted(by_name, key=lambda name: (name not in why, name))[:max_rows]
    fives = {name: [float(q) for q in np.quantile(by_name[name], (0.05, 0.25, 0.5, 0.75, 0.95))] for name in shown}
    axis = linear_axis(value for five in fives.values() for value in five)
    boxes = []
    for name, five in fives.items():
        low, first, median, third, high = map(axis.place, five)
        boxes.append(Box(name, show(five[2]), low, first, median, third, high, why.get(name, "")))
    every = -(-len(axis.ticks) // MAX_BOX_TICKS)
    ticks = [Tick(axis.place(tick), short_label(show(tick))) for tick in axis.ticks[::every]]
    return BoxPlot(title, note, boxes, ticks, len(by_name) - len(shown))
