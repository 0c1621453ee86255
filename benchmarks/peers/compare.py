"""Our tokens/s beside those of others that train the same step, measured in turns on one machine.

On a CPU: configs/recipes/cpu-yardstick.yaml with 1 and with 2 processes. On GPUs: the shapes of Llama 3 1B and 8B at
4096 tokens (recipes/), with 1 process and with one per GPU. Each peer runs in its own virtual environment (venvs.py) as
a group of processes (sides.py). Blocks of steps go forwards and backwards through the sides (ABBA), one side at a time.

Writes benchmarks/results/peers-DATE.json and prints for each peer a line `ratio_to PEER@PROCESSES R low LOW high HIGH`:
our tokens/s over theirs, with a 95 % interval. Exit code 1 where a peer could not be measured, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aifactory_train.bench.paired import MIN_BLOCKS, ratio_line, ratio_of_medians
from aifactory_train.errors import AifactoryError, PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.probe import probe_local
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import fingerprint
from aifactory_train.results.provenance import provenance
from aifactory_train.rundir import write_atomic
from measure import Comparison
from sides import OURS, PROGRAMS
from tasks import build_task
from venvs import NotInstalled, build_venv, installed_versions

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORK = ROOT / "bench-results" / "peers"
CPU_RECIPES = [ROOT / "configs" / "recipes" / "cpu-yardstick.yaml"]
GPU_RECIPES = [HERE / "recipes" / "llama3-1b.yaml", HERE / "recipes" / "llama3-8b.yaml"]
PEERS = ["trainer", "accelerate", "deepspeed", "litgpt", "torchtitan"]
ON_GPU_ALONE = {"torchtitan": "torchtitan 0.3.0 imports triton, which a torch for CPUs does not bring"}


def choose_peers(asked: list[str], on_cpu: bool) -> tuple[list[str], dict[str, str]]:
    """Those to be measured, each once, and why the others are left out."""
    left_out = {peer: f"on a GPU alone: {ON_GPU_ALONE[peer]}" for peer in asked if on_cpu and peer in ON_GPU_ALONE}
    return [peer for peer in dict.fromkeys(asked) if peer not in left_out], left_out


def find_pythons(peers: list[str], failed: dict[str, str]) -> dict[str, str]:
    """The interpreter of each side, ours first; why a peer has none goes into `failed`."""
    pythons = {OURS: sys.executable}
    for peer in peers:
        try:
            pythons[peer] = str(build_venv(PROGRAMS[peer].venv))
        except NotInstalled as error:
            failed[peer] = f"cannot be installed: {error}"
            print(f"{peer}: {failed[peer]}", flush=True)
    return pythons


def compare(recipe: Path, machine: Machine, processes: int, pythons: dict[str, str], args: argparse.Namespace) -> Any:
    """One comparison, as the result file has it."""
    print(f"\n== {recipe.stem}, {processes} process{'es' if processes > 1 else ''}", flush=True)
    task, plan = build_task(recipe, machine, processes, WORK / recipe.stem / str(processes))
    comparison = Comparison(task, pythons)
    comparison.measure(args.blocks, args.steps, args.warmup)
    rates = {name: comparison.rates(name) for name, blocks in comparison.blocks.items() if blocks}
    peers = [name for name in rates if name != OURS] if OURS in rates else []
    return {
        "recipe": recipe.relative_to(ROOT).as_posix(),
        "recipe_hash": fingerprint(load_recipe(recipe)),
        "processes": processes,
        "threads": task.threads,
        "layout": plan.layout.model_dump(mode="json"),
        "warm_up_loss": comparison.loss,
        "failed": comparison.failed,
        "median_tokens_per_s": {n: statistics.median(r for block in rates[n] for r in block) for n in rates},
        "ratio_to": {name: ratio_of_medians(rates[OURS], rates[name])._asdict() for name in peers},
        "tokens_per_s": rates,
    }


def circumstances(args: argparse.Namespace, peers: list[str]) -> dict[str, Any]:
    """Everything one needs to judge or repeat the numbers. Ends the program where there is no commit to name."""
    facts = provenance()
    if facts["git_sha"] is None:
        raise SystemExit("no result without a commit to name\n  do:    run it in a git checkout, with git installed")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "versions_of_peers": {peer: installed_versions(PROGRAMS[peer].venv) for peer in peers},
        "cores": os.cpu_count(),
        "load_1min_before": round(os.getloadavg()[0], 2),
        "arguments": vars(args),
    }


def result_path(day: str) -> Path:
    """peers-DATE.json, or peers-DATE-2.json and on where that day has one already."""
    for number in range(1, 1000):
        path = RESULTS / (f"peers-{day}.json" if number == 1 else f"peers-{day}-{number}.json")
        if not path.exists():
            return path
    raise SystemExit(f"{RESULTS} has 999 results of {day}; remove some")


def print_ratios(comparisons: list[dict[str, Any]]) -> None:
    """The table and the lines of each comparison, the same for all."""
    for row in comparisons:
        print(f"\n{Path(row['recipe']).stem}, processes: {row['processes']}")
        for name, rate in row["median_tokens_per_s"].items():
            print(f"{name:16s} {rate:8.0f} tokens/s")
        for name, ratio in row["ratio_to"].items():
            print(ratio_line(f"{name}@{row['processes']}", **ratio))


def parse_arguments(argv: list[str] | None, machine: Machine) -> argparse.Namespace:
    on_cpu = machine.device.kind == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in PROGRAMS if name != OURS]
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=names, metavar="NAME", help=", ".join(names))
    processes = [1, 2] if on_cpu else sorted({1, machine.device.per_node})
    parser.add_argument("--processes", type=int, nargs="+", default=processes, metavar="N", help="of each side")
    parser.add_argument("--blocks", type=int, default=6, help=f"blocks of each side, at least {MIN_BLOCKS}")
    parser.add_argument("--steps", type=int, default=2, help="steps of a block that count")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side before its first block")
    args = parser.parse_args(argv)
    if args.blocks < MIN_BLOCKS or args.steps < 1 or args.warmup < 1:
        parser.error(f"--blocks {args.blocks} --steps {args.steps} --warmup {args.warmup}: at least {MIN_BLOCKS}, 1, 1")
    return args


def main(argv: list[str] | None = None) -> int:
    machine = probe_local()
    args = parse_arguments(argv, machine)
    on_cpu = machine.device.kind == "cpu"
    peers, left_out = choose_peers(args.peers, on_cpu)
    for peer, reason in left_out.items():
        print(f"{peer}: left out: {reason}")
    failed: dict[str, str] = {}
    pythons = find_pythons(peers, failed)
    result: dict[str, Any] = {"schema": "aifactory-peers/2", **circumstances(args, list(pythons)[1:])}
    comparisons = []
    for recipe in CPU_RECIPES if on_cpu else GPU_RECIPES:
        for processes in args.processes:
            try:
                comparisons.append(compare(recipe, machine, processes, pythons, args))
            except PlanError as error:  # a model that does not fit is no fault of a peer
                left_out[f"{recipe.stem}@{processes}"] = str(error)
                print(f"left out: {error}", flush=True)
    for row in comparisons:
        failed |= {f"{name}@{row['processes']}": reason for name, reason in row["failed"].items()}
    result |= {"load_1min_after": round(os.getloadavg()[0], 2), "failed": failed, "left_out": left_out}
    result["comparisons"] = comparisons
    print_ratios(comparisons)
    if any(row["ratio_to"] for row in comparisons):
        path = result_path(result["date"][:10])
        write_atomic(path, json.dumps(result, indent=1) + "\n")
        print(os.path.relpath(path, ROOT))
    for name, reason in failed.items():
        print(f"not measured: {name}: {reason}")
    return 1 if failed or not comparisons else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except AifactoryError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
