"""The verbs. A verb is parse, call, print; everything heavy is imported inside it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aifactory_train import __version__
from aifactory_train.errors import AifactoryError, storage_errors

if TYPE_CHECKING:
    from aifactory_train.plan.plan import Plan


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. See errors.py for what each code means."""
    args = _parser().parse_args(argv)
    try:
        return int(args.verb(args) or 0)
    except AifactoryError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away, as in `| head`
        sys.stderr.close()  # nothing is left to tell, and Python would report the pipe once more at exit
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aifactory-train", description="LLM training on Europe's AI Factory supercomputers."
    )
    parser.add_argument("--version", action="version", version=f"aifactory-train {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, help_text: str, run: object) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(verb=run)
        return sub

    probe = verb("probe", "describe this machine, with measured rates, as a machine file", _probe)
    probe.add_argument("--out", type=Path, default=Path("local-machine.yaml"), help="file to write")
    for name, help_text, run in (
        ("prepare", "text to tokenizer and token shards", _prepare),
        ("plan", "layout, memory and time of a recipe on a machine", _plan),
        ("launch", "plan, check, and start the ranks on this machine", _launch),
    ):
        sub = verb(name, help_text, run)
        sub.add_argument("recipe", type=Path, help="configs/recipes/NAME.yaml")
        sub.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as optim.lr=3e-4"
        )
        if name != "prepare":
            sub.add_argument("--machine", default="local", help="name in configs/machines/, a file, or local (default)")
            sub.add_argument("--cpu-ranks", type=int, default=1, help="ranks where the machine has no GPU (default 1)")
            sub.add_argument("--run", type=Path, help="run folder (default runs/NAME)")
    train = verb("train", "what each rank runs: train the plan of a run folder", _train)
    train.add_argument("run", type=Path, help="run folder that holds plan.json")
    train.add_argument(
        "--bar", type=int, default=0, metavar="COLUMNS", help="progress bar of that width instead of log lines"
    )
    train.add_argument("--timeout-s", type=float, default=300.0, help="how long ranks wait for each other at start")
    export = verb("export", "newest commit to a Hugging Face folder", _export)
    export.add_argument("run", type=Path, help="run folder")
    report = verb("report", "result.json, report.html and a summary of a run", _report)
    report.add_argument("run", type=Path, help="run folder")
    sample = verb("sample", "text by the exported model, through plain transformers", _sample)
    sample.add_argument("run", type=Path, help="run folder that has been exported")
    sample.add_argument("--prompt", default="def __init__(self", help="text to continue (default: %(default)s)")
    sample.add_argument("--tokens", type=int, default=60, help="tokens to generate (default %(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="of the random choice (default %(default)s)")
    return parser


def _probe(args: argparse.Namespace) -> None:
    import torch

    from aifactory_train.machine.load import write_machine
    from aifactory_train.machine.machine import ByDtype, Measured
    from aifactory_train.machine.probe import probe_local, with_measured
    from aifactory_train.metrics.rates import measure_matmul_flops_per_s, measure_memory_bytes_per_s
    from aifactory_train.units import format_bytes_per_s, format_flops_per_s

    machine = probe_local()
    device = torch.device("cpu" if machine.device.kind == "cpu" else "cuda")
    rates = {n: measure_matmul_flops_per_s(device, t) for n, t in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    measured = Measured(matmul_flops_per_s=ByDtype(**rates), memory_bytes_per_s=measure_memory_bytes_per_s(device))
    with storage_errors("writing the machine file", args.out, "give another file: --out FILE"):
        write_machine(with_measured(machine, measured), args.out)
    shown = ", ".join(f"{n} {format_flops_per_s(r)}" for n, r in rates.items())
    print(f"{machine.device.per_node} x {machine.device.name}: matmul {shown}, ", end="")
    print(f"memory {format_bytes_per_s(measured.memory_bytes_per_s)}\nwritten: {args.out}")


def _prepare(args: argparse.Namespace) -> None:
    from aifactory_train.data.prepare import prepare
    from aifactory_train.recipe.load import load_recipe

    prepare(load_recipe(args.recipe, args.set).data)


def _make_plan(args: argparse.Namespace) -> Plan:
    from aifactory_train.machine.load import load_machine
    from aifactory_train.plan.plan import make_plan
    from aifactory_train.recipe.load import load_recipe

    return make_plan(load_recipe(args.recipe, args.set), load_machine(args.machine), cpu_ranks=args.cpu_ranks)


def _plan(args: argparse.Namespace) -> None:
    from aifactory_train.launch.local import check_run_folder, write_run_folder
    from aifactory_train.plan.explain import explain
    from aifactory_train.rundir import RunDir

    plan = _make_plan(args)
    print(explain(plan))
    if args.run is not None:
        run = RunDir(args.run)
        check_run_folder(plan, run)
        write_run_folder(plan, run)
        print(f"written: {run.plan}")
    else:
        print("not written; --run RUN writes it into a run folder")


def _launch(args: argparse.Namespace) -> int:
    from aifactory_train.launch.local import default_run_folder, launch_local
    from aifactory_train.rundir import RunDir

    plan = _make_plan(args)
    return launch_local(plan, RunDir(args.run or default_run_folder(plan.recipe.name)))


def _train(args: argparse.Namespace) -> int:
    from aifactory_train.faults.stopflag import StopFlag

    stop_flag = StopFlag()  # before torch is loaded, which takes seconds
    from aifactory_train.train.start import start

    return start(args.run, stop_flag, args.bar, args.timeout_s)


def _export(args: argparse.Namespace) -> None:
    from aifactory_train.checkpoint.export import export_run
    from aifactory_train.plan.plan import load_plan
    from aifactory_train.rundir import RunDir, existing_run

    run = RunDir(existing_run(args.run))
    print(export_run(run, load_plan(run.plan)))


def _report(args: argparse.Namespace) -> None:
    from aifactory_train.results.report import summary, write_report
    from aifactory_train.rundir import RunDir, existing_run

    run = RunDir(existing_run(args.run))
    with storage_errors("writing the report", run.root, "get the permission or free space there"):
        write_report(run)
    print(summary(run))


def _sample(args: argparse.Namespace) -> None:
    from aifactory_train.checkpoint.export import sample
    from aifactory_train.rundir import RunDir, existing_run

    print(sample(RunDir(existing_run(args.run)).export, args.prompt, args.tokens, args.seed))
