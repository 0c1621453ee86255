"""docs/planner-accuracy.md and its picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from aifactory_train.plan.constants import Constants
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.search import ALIKE_FRAC
from aifactory_train.rundir import write_atomic
from benchmarks.plan_accuracy.fit import names_of, publication, value_of
from benchmarks.plan_accuracy.plot import draw_scatter
from benchmarks.plan_accuracy.prior import PRIORS
from benchmarks.plan_accuracy.rows import Loaded
from benchmarks.plan_accuracy.scores import Group, Scored, Summary, quantile, rank_groups, tabulate
from benchmarks.plan_accuracy.tables import COLUMN_WORDS, TABLES, percent, render_markdown, table_of

N_WORST = 20
NAME = "planner-accuracy"


def write_page(
    docs: Path,
    loaded: Loaded,
    scored: Sequence[Scored],
    summary: Summary,
    fitted: Constants,
    folds: dict[str, Constants],
) -> None:
    """`scored`: predicted with the constants of `folds`; `fitted`: on all rows, for the table of constants."""
    draw_scatter(scored, docs / f"{NAME}.svg")
    ran = [s for s in scored if s.row.outcome == "ok"]
    ranking = _ranking(rank_groups(scored), rank_groups(ran))
    parts = [_head(summary, scored, folds), _tables(scored), ranking, _worst(scored)]
    parts += [_constants(fitted, folds), _left_out(loaded)]
    write_atomic(docs / f"{NAME}.md", "\n\n".join(parts) + "\n")


def _head(summary: Summary, scored: Sequence[Scored], folds: dict[str, Constants]) -> str:
    n_speed = sum(s.speed_error is not None for s in scored)
    by_source = Counter(s.row.source for s in scored if s.speed_error is not None)
    large = sum(n for _, n in by_source.most_common(4)) / max(1, n_speed)
    n_memory = sum(s.memory_error is not None for s in scored)
    n_oom = sum(s.row.outcome == "OOM" for s in scored)
    bars = [
        ["what", "bar", "here", "on"],
        ["tokens/s, median absolute error", "12 %", f"{100 * summary.speed_median:.1f} %", f"{n_speed} rows"],
        ["the same, median over publications", "", _by_publication(scored), f"{len(folds)} publications"],
        ["tokens/s, 90th percentile", "30 %", f"{100 * summary.speed_p90:.1f} %", f"{n_speed} rows"],
        ["memory, median absolute error", "", f"{100 * summary.memory_median:.1f} %", f"{n_memory} rows"],
        ["ran, but called too large", "2 %", f"{100 * summary.false_unfit:.1f} %", f"{len(scored) - n_oom} rows"],
        ["out of memory, and called so", "85 %", f"{100 * summary.oom_recall:.1f} %", f"{n_oom} rows"],
        ["first choice within 5 % of the best", "80 %", f"{100 * summary.ranking:.1f} %", "groups of layouts below"],
    ]
    return f"""# How well the planner predicts

Written by `make plan-accuracy`; do not edit. It predicts runs that others measured and published
(`benchmarks/references/published_results.csv`: {summary.n_rows} complete rows of dense models from
{len({s.row.source for s in scored})} sources) from their configuration alone, and compares speed, memory and whether
they fit.

{render_markdown(bars, 1)}

**No row is predicted by constants that were fitted on it.** The time model has a few constants (below). For each of
the {len(folds)} publications they are fitted anew on all the others, and only then its rows are predicted. All rounds
of MLPerf count as one publication. That is no blind test: the form of the model, and what the table of frameworks says,
were worked out with these rows in sight. The memory model is arithmetic over shapes and this command fits nothing in
it, but the share of a device's memory that may be planned was chosen on these outcomes: those figures are not held
out. The 4 largest sources have {large:.0%} of these speeds; for hardware and software that no other source shares,
expect the error of a publication rather than that of a row.

![Predicted over measured tokens/s]({NAME}.svg)

To judge other rows with the shipped constants: `make plan-accuracy ROWS=other.csv` (the same columns)."""


def _by_publication(scored: Sequence[Scored]) -> str:
    """Median over publications of their median absolute error: each counts alike."""
    lines = [line for line in tabulate(scored, lambda row: (publication(row.source),)) if line.n_speed]
    return f"{100 * quantile([line.speed_absolute for line in lines], 0.5):.1f} %"


def _tables(scored: Sequence[Scored]) -> str:
    parts = [f"## Errors\n\n{COLUMN_WORDS}"]
    for title, names, key_of in TABLES:
        parts.append(f"### {title}\n\n{render_markdown(table_of(scored, names, key_of), len(names))}")
    return "\n\n".join(parts)


def _ranking(groups: Sequence[Group], groups_that_ran: Sequence[Group]) -> str:
    n_oom = sum(g.n_out_of_memory > 0 for g in groups)
    n_good = sum(g.near_best for g in groups)
    n_good_ran = sum(g.near_best for g in groups_that_ran)
    cells = [["group", "ran", "OOM", "chosen", "best", "loss"]]
    for group in sorted(groups, key=lambda g: -g.loss):
        cells.append(
            [
                group.name,
                str(group.n_layouts),
                str(group.n_out_of_memory),
                layout_words(group.chosen.layout),
                layout_words(group.best.layout),
                f"{100 * group.loss:.1f} %",
            ]
        )
    return f"""## Choice of a layout

Where one source measured at least 3 layouts of one model on one machine with the same software, batch and precision,
the planner makes its choice among them as in `aifactory_train/plan/search.py`: of those that it says fit, the fastest
that leaves some memory free, or the largest micro-batch of those within {ALIKE_FRAC:.0%} of that. In {n_good_ran} of
{len(groups_that_ran)} groups it is within 5 % of the best that ran; this is the bar. Out of all that the source
tried, also what ran out of memory ({n_oom} of {len(groups)} groups have such layouts), it is in {n_good}: the table
shows this harder choice. The margins of that rule were chosen on these groups. loss: what the choice
was measured to lose to the best; 100 % where it ran out of memory.

{render_markdown(cells, 1)}"""


def layout_words(layout: Layout) -> str:
    """Degrees above 1, micro-batch, remat, and the group over which FSDP or ZeRO splits where it is not all of dp."""
    degrees = (("pp", layout.pp), ("v", layout.stages_per_rank), ("cp", layout.cp), ("tp", layout.tp))
    words = [f"{name}{n}" for name, n in degrees if n > 1]
    words.append(f"mb{layout.micro_batch_rows}")
    if layout.remat != "none":
        words.append(layout.remat)
    if layout.zero_stage == 3 or layout.dp_replicate > 1:
        words.append(f"zero{layout.zero_stage}/{layout.dp_shard}")
    return " ".join(words)


def _worst(scored: Sequence[Scored]) -> str:
    timed = sorted((s for s in scored if s.speed_error is not None), key=lambda s: -abs(s.speed_error or 0.0))
    cells = [["row", "source", "hardware", "model", "devices", "layout", "speed"]]
    for s in timed[:N_WORST]:
        row = s.row
        cells.append(
            [
                row.id,
                row.source,
                row.machine.device.name,
                row.model_name,
                str(row.layout.world_size),
                layout_words(row.layout),
                percent(s.speed_error or 0.0),
            ]
        )
    unfit = [s for s in scored if s.row.outcome == "ok" and not s.fits]
    names = ", ".join(f"{s.row.id} ({s.row.model_name})" for s in unfit) or "none"
    return f"""## The worst rows

{render_markdown(cells, 4)}

Ran, but the planner says they do not fit: {names}."""


def _constants(fitted: Constants, folds: dict[str, Constants]) -> str:
    cells = [["constant", "start", "fitted on all", "least and most without one publication", "why this start"]]
    for name in names_of(fitted):
        values = [value_of(c, name) for c in folds.values()]
        moved = f"{min(values):.3g} to {max(values):.3g}" if values else ""
        cells.append([f"`{name}`", f"{PRIORS[name][0]:.3g}", f"{value_of(fitted, name):.3g}", moved, PRIORS[name][1]])
    return f"""## The constants

Meanings and units are in `aifactory_train/plan/constants.py`. A rate that was measured on a machine takes the place
of its share of the peak. The fit pulls each constant a little to its start; one on which no row speaks stays there.

{render_markdown(cells, 1)}"""


def _left_out(loaded: Loaded) -> str:
    skipped = Counter(reason for _, reason in loaded.skipped)
    assumed = Counter(words for row in loaded.rows for words in row.assumed)
    n = len(loaded.rows) + len(loaded.skipped)
    reasons = "\n".join(f"- {count}: {reason}" for reason, count in skipped.most_common())
    assumptions = "\n".join(f"- {count}: {words}" for words, count in assumed.most_common())
    return f"""## Limits

Of {n} rows {len(loaded.skipped)} are not predicted:

{reasons}

What had to be assumed for rows that are:

{assumptions}

Rows come from winners of sweeps, single readings and different ways to measure memory; the sources' own noise is 2 to
10 %. fp16 counts as bf16, and MXFP8 as fp8. What each framework does is one table in
`benchmarks/plan_accuracy/software.py`, the hardware is `benchmarks/plan_accuracy/hardware.yaml`."""
