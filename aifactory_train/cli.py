"""The verbs. A verb is parse, call, print; everything heavy is imported inside it."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from aifactory_train import __version__
from aifactory_train.bench_cli import add_bench_job_options, add_bench_options, bench, bench_job
from aifactory_train.cli_options import (
    a_path,
    add_attempt_verb,
    add_machines_options,
    add_recipe_options,
    add_sample_options,
)
from aifactory_train.errors import AifactoryError, MachineError, storage_errors


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. See errors.py for what each code means."""
    try:
        args = _parser().parse_args(argv)
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
    probe.add_argument("--against", metavar="NAME", help="print what differs from this machine file; write nothing")
    add_machines_options(verb("machines", "the machines that are known: list, show NAME, check", _machines))
    stage = verb("stage", "gather what a compute node without internet will need", _stage)
    stage.add_argument("recipe", type=Path, help="configs/recipes/NAME.yaml")
    stage.add_argument("--to", type=a_path, required=True, metavar="DIR", help="folder that compute nodes can read")
    for name, help_text, run in (
        ("prepare", "text to tokenizer and token shards", _prepare),
        ("plan", "layout, memory and time of a recipe on a machine", _plan),
        ("launch", "plan, check, and start the run: by Slurm, or here where the machine has none", _launch),
    ):
        add_recipe_options(verb(name, help_text, run), name)
    status = verb("status", "how far a run is, and what its jobs do", _status)
    status.add_argument("run", type=a_path, help="run folder")
    cancel = verb("cancel", "save and end a run, and submit no further job", _cancel)
    cancel.add_argument("run", type=a_path, help="run folder")
    cancel.add_argument("--now", action="store_true", help="do not wait for a save")
    train = verb("train", "what each rank runs: train the plan of a run folder", _train)
    train.add_argument("run", type=a_path, help="run folder that holds plan.json")
    train.add_argument(
        "--bar", type=int, default=0, metavar="COLUMNS", help="progress bar of that width instead of log lines"
    )
    train.add_argument("--timeout-s", type=float, default=300.0, help="how long ranks wait for each other at start")
    preflight = verb("preflight", "what each rank runs before training: is this node fit?", _preflight)
    preflight.add_argument("attempt", type=Path, help="folder of the attempt")
    add_attempt_verb(verb("attempt", "what a batch script runs before and after the ranks: begin, end", _attempt))
    export = verb("export", "newest commit to a Hugging Face folder", _export)
    export.add_argument("run", type=a_path, help="run folder")
    report = verb("report", "result.json, report.html and a summary of a run", _report)
    report.add_argument("run", type=a_path, help="run folder")
    calibrate = verb(
        "calibrate", "what was measured on a machine into its file, so that plans are corrected", _calibrate
    )
    calibrate.add_argument("machine", help="name in configs/machines/, or a file")
    calibrate.add_argument(
        "measured", nargs="+", type=a_path, metavar="RUN", help="folders of runs and benchmarks, files of probe"
    )
    calibrate.add_argument("--out", type=a_path, metavar="FILE", help="file to write (default NAME-measured.yaml)")
    add_bench_options(verb("bench", "a suite of benchmarks: here, or by Slurm on nodes of a machine", bench))
    add_bench_job_options(verb("bench-job", "what the batch script of a bench runs: begin, next, end", bench_job))
    add_sample_options(verb("sample", "text by the exported model, through plain transformers", _sample))
    return parser


def _probe(args: argparse.Namespace) -> None:
    import torch

    from aifactory_train.machine.compare import render_differences
    from aifactory_train.machine.load import load_machine, write_machine
    from aifactory_train.machine.machine import ByDtype, Measured
    from aifactory_train.machine.probe import probe_machine, with_measured
    from aifactory_train.metrics.rates import measure_matmul_flops_per_s, measure_memory_bytes_per_s
    from aifactory_train.units import format_bytes_per_s, format_flops_per_s

    machine = probe_machine()
    if args.against is not None:
        print(render_differences(machine, load_machine(args.against)))
        return
    device = torch.device("cpu" if machine.device.kind == "cpu" else "cuda")
    rates = {n: measure_matmul_flops_per_s(device, t) for n, t in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    measured = Measured(matmul_flops_per_s=ByDtype(**rates), memory_bytes_per_s=measure_memory_bytes_per_s(device))
    with storage_errors("writing the machine file", args.out, "give another file: --out FILE"):
        write_machine(with_measured(machine, measured), args.out)
    shown = ", ".join(f"{n} {format_flops_per_s(r)}" for n, r in rates.items())
    print(f"{machine.device.per_node} x {machine.device.name}: matmul {shown}, ", end="")
    print(f"memory {format_bytes_per_s(measured.memory_bytes_per_s)}\nwritten: {args.out}")


def _machines(args: argparse.Namespace) -> int:
    from aifactory_train.machine.check import check_machines
    from aifactory_train.machine.draw import render_svg
    from aifactory_train.machine.load import load_machine, machine_names
    from aifactory_train.machine.page import WIDTH
    from aifactory_train.machine.show import render_list, render_machine
    from aifactory_train.rundir import write_atomic

    if args.what == "check":
        text, n_faults = check_machines(args.names or machine_names())
        print(text)
        return 2 if n_faults else 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if args.what != "show":
        print(render_list([load_machine(name) for name in args.names or machine_names()], width))
        return 0
    if args.svg is not None and len(args.names) > 1:
        raise MachineError(
            f"--svg {args.svg} holds one drawing, and {len(args.names)} machines are named",
            where="command line",
            do=f"one at a time: aifactory-train machines show {args.names[0]} --svg {args.svg}",
        )
    for machine in [load_machine(name) for name in args.names or ["local"]]:
        print(render_machine(machine, min(WIDTH, max(60, width or WIDTH))))
        if args.svg is not None:
            with storage_errors("writing the drawing", args.svg, "give another file: --svg FILE"):
                write_atomic(args.svg, render_svg(machine))
            print(f"written: {args.svg}")
    return 0


def _stage(args: argparse.Namespace) -> None:
    from aifactory_train.data.stage import stage

    print(stage(args.recipe, args.to))


def _prepare(args: argparse.Namespace) -> None:
    from aifactory_train.data.prepare import prepare
    from aifactory_train.recipe.load import load_recipe

    prepare(load_recipe(args.recipe, args.set).data)


def _plan(args: argparse.Namespace) -> None:
    from aifactory_train.launch.checks import JobOptions, refuse_job_options
    from aifactory_train.launch.local import check_run_folder, write_run_folder
    from aifactory_train.machine.load import load_machine
    from aifactory_train.plan.explain import render_answer
    from aifactory_train.plan.limits import job_limits
    from aifactory_train.plan.nodes import choose_nodes
    from aifactory_train.plan.plan import make_ranked_plan
    from aifactory_train.recipe.load import load_recipe
    from aifactory_train.rundir import RunDir

    recipe, machine = load_recipe(args.recipe, args.set), load_machine(args.machine)
    if machine.slurm is None:
        refuse_job_options(JobOptions(partition=args.partition, qos=args.qos))
    n_nodes, table = choose_nodes(recipe, machine, args.nodes, args.partition, args.qos, args.gpu_hours, args.deadline)
    plan, ranking = make_ranked_plan(recipe, machine, n_nodes, args.cpu_ranks)
    run = None if args.run is None else RunDir(args.run)
    if run is not None:
        check_run_folder(plan, run)
        write_run_folder(plan, run)
    limit_h = job_limits(machine, args.partition, args.qos).max_time_h
    job_time_s = None if limit_h is None else limit_h * 3600
    print(render_answer(plan, ranking, table, args.gpu_hours, args.form, job_time_s))
    if args.form != "json":
        print(f"\nwritten: {run.plan}" if run else "\nnot written; --run RUN writes it into a run folder")


def _launch(args: argparse.Namespace) -> int:
    from aifactory_train.launch.checks import JobOptions
    from aifactory_train.launch.env import user_defaults
    from aifactory_train.launch.local import default_run_folder, launch_local
    from aifactory_train.launch.submit import launch_job
    from aifactory_train.machine.load import load_machine
    from aifactory_train.plan.launchable import make_launch_plan
    from aifactory_train.recipe.load import load_recipe
    from aifactory_train.rundir import RunDir

    n_nodes = 1 if args.nodes is None else args.nodes
    recipe, machine, env = load_recipe(args.recipe, args.set), load_machine(args.machine), user_defaults()
    partition, qos = args.partition or env.get("partition"), args.qos or env.get("qos")
    plan = make_launch_plan(recipe, machine, n_nodes, args.cpu_ranks, partition, qos)
    run = RunDir(args.run or default_run_folder(plan.recipe.name))
    given = {name: getattr(args, name) for name in JobOptions.__annotations__}
    if plan.machine.slurm is None:
        return launch_local(plan, run, JobOptions(**given))
    print(launch_job(plan, run, JobOptions(**given), args.recipe))
    return 0


def _status(args: argparse.Namespace) -> None:
    from aifactory_train.launch.status import render_status
    from aifactory_train.rundir import RunDir, existing_run

    print(render_status(RunDir(existing_run(args.run))))


def _cancel(args: argparse.Namespace) -> None:
    from aifactory_train.launch.status import cancel
    from aifactory_train.rundir import RunDir, existing_run

    print(cancel(RunDir(existing_run(args.run)), args.now))


def _attempt(args: argparse.Namespace) -> int:
    from aifactory_train.launch import chain
    from aifactory_train.rundir import RunDir, existing_attempt, existing_run

    if args.what == "begin":
        folder = chain.begin(
            args.recipe, args.machine, args.nodes, args.run, args.job_id, args.node_list, args.end_time_s
        )
        if folder is not None:
            print(folder)
        return 0
    if args.what == "submitted":
        chain.note_job(RunDir(existing_run(args.run)), args.job_id)
        return 0
    return chain.end(existing_attempt(args.attempt), args.exit_code, args.down_nodes, args.terminated)


def _preflight(args: argparse.Namespace) -> int:
    from aifactory_train.rundir import existing_attempt
    from aifactory_train.train.preflight import preflight

    return preflight(existing_attempt(args.attempt))


def _train(args: argparse.Namespace) -> int:
    from aifactory_train.faults.stopflag import StopFlag

    stop_flag = StopFlag()  # before torch is loaded, which takes seconds
    from aifactory_train.launch.env import set_local_rank
    from aifactory_train.train.start import start

    set_local_rank()
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


def _calibrate(args: argparse.Namespace) -> None:
    from aifactory_train.results.calibration import calibrate_file

    print(calibrate_file(args.machine, args.measured, args.out))


def _sample(args: argparse.Namespace) -> None:
    from aifactory_train.checkpoint.export import sample
    from aifactory_train.rundir import RunDir, existing_run

    print(sample(RunDir(existing_run(args.run)).export, args.prompt, args.tokens, args.seed))
