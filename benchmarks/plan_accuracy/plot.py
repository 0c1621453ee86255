"""Predicted against measured tokens/s, as SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.plan_accuracy.scores import Scored

# Okabe and Ito's colours, told apart by all eyes; shapes repeat what colours say.
STYLES = {
    "A100": ("#0072B2", "o"),
    "H100": ("#D55E00", "s"),
    "H200": ("#E69F00", "v"),
    "GH200": ("#CC79A7", "P"),
    "Blackwell": ("#009E73", "D"),
    "AMD": ("#000000", "X"),
    "V100": ("#56B4E9", "^"),
    "Max 1550": ("#999999", "*"),
    "other": ("#F0E442", "h"),
}
# Start of a device's name -> its family; the first that fits.
FAMILIES = {"GB": "Blackwell", "B2": "Blackwell", "B3": "Blackwell", "GH": "GH200", "A8": "A100", "A1": "A100"}
FAMILIES |= {"H200": "H200", "H": "H100", "MI": "AMD", "V": "V100", "Max": "Max 1550"}


def family_of(device_name: str) -> str:
    return next((family for start, family in FAMILIES.items() if device_name.startswith(start)), "other")


def draw_scatter(scored: Sequence[Scored], path: Path) -> None:
    """Both axes logarithmic; lines at equality and at 30 % around it. The file is the same for the same rows."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for s in scored:
        measured, predicted = s.row.tokens_per_s_per_device, s.tokens_per_s_per_device
        if measured is not None and predicted is not None:
            points[family_of(s.row.machine.device.name)].append((measured, predicted))
    with matplotlib.rc_context({"svg.hashsalt": "planner-accuracy", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8, 7))
        every = [value for pairs in points.values() for pair in pairs for value in pair] or [1.0, 10.0]
        low, high = min(every) / 1.5, max(every) * 1.5
        axes.fill_between([low, high], [0.7 * low, 0.7 * high], [1.3 * low, 1.3 * high], color="#dddddd", linewidth=0)
        axes.plot([low, high], [low, high], color="#555555", linewidth=1)
        for name, (colour, marker) in STYLES.items():
            if pairs := points.get(name):
                xs, ys = zip(*pairs, strict=True)
                label = f"{name} ({len(pairs)})"
                axes.scatter(xs, ys, s=22, c=colour, marker=marker, alpha=0.6, linewidths=0, label=label)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel("measured, tokens/s of one device")
        axes.set_ylabel("predicted without its source, tokens/s of one device")
        axes.set_title("Published runs (rows); grey: within 30 %")
        axes.legend(loc="upper left", frameon=False)
        axes.grid(True, which="major", color="#eeeeee")
        axes.set_axisbelow(True)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
