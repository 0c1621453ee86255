"""The verbs of benchmarks: `bench SUITE` runs one, other words after `bench` work on folders that are there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aifactory_train.cli_options import a_path, add_job_options, add_tune_options, host_list
from aifactory_train.errors import UserError

if TYPE_CHECKING:
    from aifactory_train.bench.rounds import Wish

# 2 of errors.py would say that a bench is incomplete.
USAGE = 3
ABOUT = """A suite of benchmarks: here, or by Slurm on nodes of a machine.

bench SUITE             run smoke, node, pair, train, scale, or a file of your own
bench train --tune --recipe FILE
                        try the planner's best layouts of a recipe, and write the fastest as a recipe
bench report FOLDER     judge the records again, and write all pages anew
bench compare A B       folders or records: differences with their intervals, and what changed beside the numbers
bench learn FOLDER...   references of a machine from its results
bench archive FOLDER    one .tar.zst of records, samples and logs
"""
# The suite whose step program is tuned.
TUNED_SUITE = "train"
# What stands in the place of a suite, and how many folders follow it: at least, at most.
FOLDERS: dict[str, tuple[int, int | None]] = {
    "report": (1, 1),
    "compare": (2, 2),
    "learn": (1, None),
    "archive": (1, 1),
}


def add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.formatter_class = argparse.RawDescriptionHelpFormatter
    bench.description = ABOUT
    bench.add_argument("suite", metavar="SUITE", help="its name, a file, or one of the words above")
    bench.add_argument("folders", nargs="*", type=a_path, metavar="FOLDER", help="bench folders, after such a word")
    bench.add_argument("--machine", default="local", help="name in configs/machines/, a file, or local (default)")
    bench.add_argument("--nodes", type=int, help="nodes of the machine (default: the fewest that the suite takes)")
    bench.add_argument(
        "--cpu-ranks", type=int, default=2, help="ranks on this node where it has no GPU (default %(default)s)"
    )
    bench.add_argument("--out", type=a_path, metavar="DIR", help="bench folder, or where to write")
    add_tune_options(bench)
    # The login name of who measured is nobody's business in a file that is published.
    bench.add_argument("--author", default="bench learn", help="of learned references (default %(default)s)")
    add_job_options(bench)


def add_bench_job_options(job: argparse.ArgumentParser) -> None:
    what = job.add_subparsers(dest="what", required=True, metavar="WHAT")
    begin = what.add_parser("begin", help="note the hosts, and print the cells that are to be run")
    begin.add_argument("--node-list", type=host_list, required=True, help="hosts of the job, in Slurm's syntax")
    after = what.add_parser("next", help="print the cells of a tuning's next round; nothing when it is over")
    end = what.add_parser("end", help="judge; 0 green, 1 regression, 2 incomplete")
    for sub in (begin, after, end):
        sub.add_argument("folder", type=a_path, help="bench folder")


def bench(args: argparse.Namespace) -> int:
    """0 green, 1 a regression or a failing node, 2 incomplete, 3 a mistake on the command line or in a file."""
    try:
        _check_folders(args.suite, len(args.folders))
        _check_tuning(args)
        verbs = {"report": _report, "compare": _compare, "learn": _learn, "archive": _archive}
        return verbs.get(args.suite, _run)(args)
    except UserError as error:
        print(error.render(), file=sys.stderr)
        return USAGE


def bench_job(args: argparse.Namespace) -> int:
    from aifactory_train.bench.finish import finish
    from aifactory_train.launch.bench import begin_job, go_on_job

    if args.what == "end":
        return finish(args.folder)
    for line in begin_job(args.folder, args.node_list) if args.what == "begin" else go_on_job(args.folder):
        print(line)
    return 0


def _check_folders(word: str, n: int) -> None:
    least, most = FOLDERS.get(word, (0, 0))
    if n < least or (most is not None and n > most):
        wanted = f"{least} or more" if most is None else str(least)
        do = "aifactory-train bench --help"
        raise UserError(f"bench {word} takes {wanted} folder(s), given: {n}", where="command line", do=do)


def _check_tuning(args: argparse.Namespace) -> None:
    of_tuning = {"--recipe": args.recipe, "--set": args.set, "--layouts": args.layouts}
    given = [name for name, value in of_tuning.items() if value not in (None, [])]
    if given and not args.tune:
        what, do = f"{', '.join(given)} without --tune", "aifactory-train bench train --tune --recipe FILE"
    elif args.tune and args.suite != TUNED_SUITE:
        what = f"--tune with {args.suite}; what is tuned is a training step"
        do = "aifactory-train bench train --tune --recipe FILE"
    elif args.tune and args.recipe is None:
        what, do = "--tune without a recipe", "--recipe FILE, such as configs/recipes/cpu-yardstick.yaml"
    else:
        return
    raise UserError(what, where="command line", do=do)


def _report(args: argparse.Namespace) -> int:
    from aifactory_train.bench.finish import conclude

    return conclude(existing(args.folders[0]))


def _compare(args: argparse.Namespace) -> int:
    from aifactory_train.bench.compare import compare

    print(compare(*args.folders))
    return 0


def _learn(args: argparse.Namespace) -> int:
    from aifactory_train.bench.learn import learn
    from aifactory_train.bench.references import lint, references_dir, render_references
    from aifactory_train.bench.store import load_records
    from aifactory_train.errors import storage_errors
    from aifactory_train.rundir import write_atomic

    folders = dict.fromkeys(existing(folder).resolve() for folder in args.folders)
    references = learn([load_records(folder) for folder in folders], args.author)
    path = args.out or references_dir() / f"{references.machine}.yaml"
    with storage_errors("writing the references", path, "give another file: --out FILE"):
        write_atomic(path, render_references(references))
    for fault in lint(references):
        print(fault)
    limits = sum(reference.kind != "info" for reference in references.references)
    told = f"{limits} limits, {len(references.references) - limits} that are only told"
    print(f"{told}, {len(references.fingerprints)} fingerprints\nwritten: {path}")
    return 0


def _archive(args: argparse.Namespace) -> int:
    from aifactory_train.bench.store import archive

    folder = existing(args.folders[0])
    print(archive(folder, args.out or folder.absolute().parent))
    return 0


def existing(folder: Path) -> Path:
    """`folder`, if it holds records of benchmarks; otherwise UserError."""
    if (folder / "records").is_dir():
        return folder
    what = "no bench folder" if not folder.exists() else "not a bench folder: it holds no records/"
    raise UserError(what, where=str(folder.absolute()), do="give one of bench-results/, or what --out named")


def _run(args: argparse.Namespace) -> int:
    from aifactory_train.bench.suites import load_suite
    from aifactory_train.launch.bench import launch_bench
    from aifactory_train.launch.checks import JobOptions
    from aifactory_train.machine.load import load_machine

    suite = load_suite(args.suite)
    options = JobOptions(**{name: getattr(args, name) for name in JobOptions.__annotations__})
    wish = _wish(args) if args.tune else None
    return launch_bench(suite, load_machine(args.machine), args.nodes, args.cpu_ranks, args.out, options, wish)


def _wish(args: argparse.Namespace) -> Wish:
    from aifactory_train.bench.rounds import LAYOUTS, Wish

    return Wish(args.recipe, args.set, LAYOUTS if args.layouts is None else args.layouts)
