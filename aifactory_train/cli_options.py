"""Options of the verbs, and the types of their values."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_sample_options(sample: argparse.ArgumentParser) -> None:
    sample.add_argument("run", type=a_path, help="run folder that has been exported")
    sample.add_argument("--prompt", default="def __init__(self", help="text to continue (default: %(default)s)")
    sample.add_argument("--tokens", type=int, default=60, help="tokens to generate (default %(default)s)")
    sample.add_argument("--seed", type=int, default=0, help="of the random choice (default %(default)s)")


def add_machines_options(machines: argparse.ArgumentParser) -> None:
    machines.set_defaults(names=[])
    what = machines.add_subparsers(dest="what", metavar="WHAT")
    for name, help_text in (
        ("list", "one line for each: nodes, devices, network, limits"),
        ("show", "all that is known of a machine, and who says so"),
        ("check", "whether a machine file is sound: facts, sources, site"),
    ):
        sub = what.add_parser(name, help=help_text, description=help_text)
        sub.add_argument("names", nargs="*", metavar="NAME", help="names in configs/machines/, or files")
        if name == "show":
            sub.add_argument("--svg", type=Path, metavar="FILE", help="draw the node into FILE as well")


def add_recipe_options(sub: argparse.ArgumentParser, name: str) -> None:
    sub.add_argument("recipe", type=Path, help="configs/recipes/NAME.yaml")
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as optim.lr=3e-4")
    if name == "prepare":
        return
    sub.add_argument("--machine", default="local", help="name in configs/machines/, a file, or local (default)")
    size = sub.add_mutually_exclusive_group()
    recommended = "recommended where the machine has Slurm" if name == "plan" else "default 1"
    size.add_argument("--nodes", type=int, help=f"nodes of the machine ({recommended})")
    if name == "plan":
        _add_plan_options(sub, size)
    sub.add_argument("--cpu-ranks", type=int, default=1, help="ranks where the machine has no GPU (default 1)")
    sub.add_argument("--run", type=a_path, help="run folder (default runs/NAME)")
    if name == "launch":
        add_job_options(sub)


def _add_plan_options(plan: argparse.ArgumentParser, size: argparse._MutuallyExclusiveGroup) -> None:
    size.add_argument(
        "--gpu-hours", type=float, metavar="H", help="what so many hours of one device buy, and with how many nodes"
    )
    size.add_argument("--deadline", metavar="TIME", help="the fewest nodes that train in time: 10d, 36h or D-HH:MM:SS")
    plan.add_argument("--partition", help="instead of the machine's default, for the limits of a job")
    plan.add_argument("--qos", help="instead of the machine's default, for the limits of a job")
    form = plan.add_mutually_exclusive_group()
    for name, help_text in (
        ("explain", "every term, what was compared, and what is assumed"),
        ("json", "print plan and ranking as one JSON document"),
    ):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, default="short", help=help_text)


def add_job_options(launch: argparse.ArgumentParser) -> None:
    launch.add_argument("--time", metavar="TIME", help="wall time of one job, as sbatch takes it: 12:00:00")
    launch.add_argument("--account", help="project that pays")
    launch.add_argument("--partition", help="instead of the machine's default")
    launch.add_argument("--qos", help="instead of the machine's default")
    launch.add_argument("--container", metavar="IMAGE", help="run Python inside this image; none: not in the site's")
    launch.add_argument("--python", metavar="FILE", help="Python on the compute nodes, or inside the image")
    launch.add_argument("--dry-run", action="store_true", help="print the command and the script; submit nothing")


def add_tune_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--tune", action="store_true", help="search the fastest layout of a recipe; with train alone")
    bench.add_argument("--recipe", type=a_path, metavar="FILE", help="what is tuned: that which it leaves on auto")
    bench.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override of that recipe")
    bench.add_argument("--layouts", type=int, metavar="K", help="so many, with up to 3 micro-batches each (default 4)")


def add_attempt_verb(attempt: argparse.ArgumentParser) -> None:
    what = attempt.add_subparsers(dest="what", required=True, metavar="WHAT")
    begin = what.add_parser("begin", help="make plan and attempt folder; prints the folder, or nothing if all is done")
    begin.add_argument("recipe", type=Path)
    begin.add_argument("--machine", required=True)
    begin.add_argument("--nodes", type=int, required=True)
    begin.add_argument("--run", type=a_path, help="run folder (default runs/NAME)")
    begin.add_argument("--job-id", type=_job_id, required=True)
    begin.add_argument("--node-list", type=host_list, required=True, help="hosts of the job, in Slurm's syntax")
    begin.add_argument(
        "--end-time-s", type=_seconds, help="when the job is cut off, seconds since the epoch; empty: never"
    )
    end = what.add_parser(
        "end", help="0 the run is finished, 75 submit the next job (unfit hosts on stdout), else stop"
    )
    end.add_argument("attempt", type=Path, help="folder that begin has printed")
    end.add_argument("--exit-code", type=int, required=True, help="of the ranks")
    end.add_argument("--down-nodes", type=host_list, default="", help="hosts that Slurm has lost, in its syntax")
    end.add_argument("--terminated", action="store_true", help="the batch script itself was told to end")
    submitted = what.add_parser("submitted", help="note the job that goes on with a run")
    submitted.add_argument("run", type=a_path)
    submitted.add_argument("job_id", type=_job_id)


def _seconds(text: str) -> float | None:
    if text and not text.replace(".", "", 1).isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return float(text) if text else None


def a_path(text: str) -> Path:
    if not text:  # an unset variable, and not the folder that we stand in
        raise argparse.ArgumentTypeError("it is empty; is the variable set?")
    return Path(text)


def _job_id(text: str) -> str:
    if not text[:1].isdecimal() or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no id of a job, such as 4711")
    return text


def host_list(text: str) -> str:
    from aifactory_train.hostlist import expand

    try:
        expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
