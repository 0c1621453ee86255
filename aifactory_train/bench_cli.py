"""The verbs of benchmarks."""

from __future__ import annotations

import argparse

from aifactory_train.cli_options import a_path, add_job_options, host_list


def add_bench_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("suite", metavar="SUITE", help="smoke, node, pair, train, scale, or a file")
    bench.add_argument("--machine", default="local", help="name in configs/machines/, a file, or local (default)")
    bench.add_argument("--nodes", type=int, help="nodes of the machine (default: the fewest that the suite takes)")
    bench.add_argument(
        "--cpu-ranks", type=int, default=2, help="ranks on this node where it has no GPU (default %(default)s)"
    )
    bench.add_argument("--out", type=a_path, metavar="DIR", help="bench folder, or where to write")
    add_job_options(bench)


def add_bench_job_options(job: argparse.ArgumentParser) -> None:
    what = job.add_subparsers(dest="what", required=True, metavar="WHAT")
    begin = what.add_parser("begin", help="note the hosts, and print the cells that are to be run")
    begin.add_argument("--node-list", type=host_list, required=True, help="hosts of the job, in Slurm's syntax")
    end = what.add_parser("end", help="judge; 0 green, 1 regression, 2 incomplete")
    for sub in (begin, end):
        sub.add_argument("folder", type=a_path, help="bench folder")


def bench(args: argparse.Namespace) -> int:
    return _run(args)


def bench_job(args: argparse.Namespace) -> int:
    from aifactory_train.bench.finish import finish
    from aifactory_train.launch.bench import begin_job

    if args.what == "end":
        return finish(args.folder)
    for line in begin_job(args.folder, args.node_list):
        print(line)
    return 0


def _run(args: argparse.Namespace) -> int:
    from aifactory_train.bench.suites import load_suite
    from aifactory_train.launch.bench import launch_bench
    from aifactory_train.launch.checks import JobOptions
    from aifactory_train.machine.load import load_machine

    suite = load_suite(args.suite)
    options = JobOptions(**{name: getattr(args, name) for name in JobOptions.__annotations__})
    return launch_bench(suite, load_machine(args.machine), args.nodes, args.cpu_ranks, args.out, options)
