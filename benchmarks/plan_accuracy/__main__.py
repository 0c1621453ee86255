"""Predicts every complete row of a file of published results and says how far off.

Without --rows the constants that predict a row are fitted without its publication; with --rows they are the shipped
ones. Run by `make plan-accuracy`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from aifactory_train.errors import AifactoryError
from aifactory_train.plan.constants import CONSTANTS, Constants
from benchmarks.plan_accuracy.fit import fit, leave_one_out, names_of, publication, value_of
from benchmarks.plan_accuracy.page import NAME, write_page
from benchmarks.plan_accuracy.prior import load_prior
from benchmarks.plan_accuracy.rows import REFERENCE, Loaded, load_rows
from benchmarks.plan_accuracy.scores import Scored, predict_tokens_per_s, rank_groups, score, summarize
from benchmarks.plan_accuracy.tables import COLUMN_WORDS, TABLES, render_table, table_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
DRIFT = 0.02  # of a constant, beyond which the shipped ones are called out of date


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy", description=__doc__)
    parser.add_argument("--rows", type=Path, help="other published rows, judged with the shipped constants")
    parser.add_argument("--refit", action="store_true", help="print the constants fitted on all rows, and stop")
    options = parser.parse_args(arguments)
    try:
        return _run(options.rows, options.refit)
    except AifactoryError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _run(path: Path | None, refit: bool) -> int:
    loaded = load_rows(path or REFERENCE)
    _print_rows(loaded)
    if refit:
        _print_constants(fit(loaded.rows, load_prior(CONSTANTS), predict_tokens_per_s))
        return 0
    if path is not None:
        scored = score(loaded.rows, lambda row: CONSTANTS)
        _print_tables(scored, "the shipped constants")
        print(summarize(scored).line())
        return 0
    start_s = time.perf_counter()
    prior = load_prior(CONSTANTS)
    fitted = fit(loaded.rows, prior, predict_tokens_per_s)
    folds = leave_one_out(loaded.rows, prior, predict_tokens_per_s, fitted)
    print(f"\n{len(folds) + 1} fits in {time.perf_counter() - start_s:.0f} s")
    scored = score(loaded.rows, lambda row: folds.get(publication(row.source), fitted))
    summary = summarize(scored)
    _print_tables(scored, "constants fitted without the row's publication")
    _print_drift(fitted)
    write_page(DOCS, loaded, scored, summary, fitted, folds)
    print(f"written: {DOCS.name}/{NAME}.md, {DOCS.name}/{NAME}.svg\n")
    print(summary.line())
    return 0


def _print_rows(loaded: Loaded) -> None:
    """Nothing is dropped silently."""
    n = len(loaded.rows) + len(loaded.skipped)
    print(f"{n} rows, {len(loaded.rows)} predicted; of the others:")
    for reason, count in Counter(reason for _, reason in loaded.skipped).most_common():
        print(f"  {count:5d}  {reason}")
    print("assumed for rows that are predicted:")
    for words, count in Counter(words for row in loaded.rows for words in row.assumed).most_common():
        print(f"  {count:5d}  {words}")


def _print_tables(scored: list[Scored], by: str) -> None:
    print(f"\npredicted by {by}\n{COLUMN_WORDS}")
    for title, names, key_of in TABLES:
        print(f"\n{title}\n{render_table(table_of(scored, names, key_of), len(names))}")
    for words, some in (
        ("tried", scored),
        ("that ran", [s for s in scored if s.row.outcome == "ok"]),
    ):
        groups = rank_groups(some)
        good = sum(group.near_best for group in groups)
        print(f"\nfirst choice out of all layouts {words}, within 5 % of the best: {good} of {len(groups)} groups")


def _print_drift(fitted: Constants) -> None:
    """How far the shipped constants are from the fit on all rows."""
    moved = {name: abs(value_of(fitted, name) / value_of(CONSTANTS, name) - 1) for name in names_of(fitted)}
    name = max(moved, key=lambda key: moved[key])
    if moved[name] > DRIFT:
        print(f"\nshipped constants differ from the fit on all rows, most in {name}: {value_of(CONSTANTS, name):.3g}, ")
        print(f"fitted {value_of(fitted, name):.3g}\n  do:    make plan-accuracy REFIT=1, copy to plan/constants.py")


def _print_constants(fitted: Constants) -> None:
    print("\nfitted on all rows:")
    for name in names_of(fitted):
        print(f"  {name:28s} {value_of(fitted, name):.4g}   (shipped {value_of(CONSTANTS, name):.4g})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
