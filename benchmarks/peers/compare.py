"""Our tokens/s beside those of transformers.Trainer, on the yardstick, measured in turns on one machine.

Each side is one process that lives through the whole comparison (worker.py); blocks of steps alternate ABBA, one
process at a time. The first steps of each side, and the first step of each block, do not count. Writes
benchmarks/results/peers-DATE.json and prints as its last line `ratio_to_trainer R low LOW high HIGH`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aifactory_train.bench.paired import MIN_BLOCKS, Block, order_of_turns, ratio_of_medians
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import fingerprint
from aifactory_train.results.provenance import provenance
from aifactory_train.rundir import write_atomic
from worker import RECIPE, THREADS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIDES = {"ours": ["ours.py"], "trainer": ["hf_trainer.py"], "trainer_compile": ["hf_trainer.py", "--compile"]}


class Side:
    """One long-lived process of the comparison."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = [sys.executable, str(HERE / SIDES[name][0]), *SIDES[name][1:], "--serve"]
        env = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )

    def run(self, steps: int) -> dict[str, Any]:
        """Make that many steps; the answer of worker.py."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(f"run {steps}\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}; its own words stand above")
        return json.loads(line)

    def close(self) -> None:
        """Ask it to end; end it where it does not."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already, which is what we want
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def started(name: str) -> Iterator[Side]:
    side = Side(name)
    try:
        yield side
    finally:
        side.close()


def measure(names: list[str], args: argparse.Namespace) -> dict[str, list[Block]]:
    """Tokens/s of each step that counts, by side and block."""
    rates: dict[str, list[Block]] = {name: [] for name in names}
    with ExitStack() as stack:
        sides = []
        for name in names:
            start_s = time.perf_counter()
            sides.append(stack.enter_context(started(name)))
            sides[-1].run(args.warmup)
            print(f"{name}: {args.warmup} warm-up steps in {time.perf_counter() - start_s:.0f} s", flush=True)
        turns = order_of_turns(len(names), args.blocks)
        for number, turn in enumerate(turns, 1):
            side = sides[turn]
            answer = side.run(1 + args.steps)
            block = [answer["tokens_per_step"] / s for s in answer["step_s"][1:]]
            rates[side.name].append(block)
            print(
                f"block {number:2d} of {len(turns)}  {side.name:16s} {statistics.median(block):6.0f} tokens/s",
                flush=True,
            )
    return rates


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Everything one needs to judge or repeat the numbers. Ends the program where there is no commit to name."""
    facts = provenance()
    if facts["git_sha"] is None:
        raise SystemExit("no result without a commit to name\n  do:    run it in a git checkout, with git installed")
    facts["versions"]["accelerate"] = importlib.metadata.version("accelerate")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "recipe": RECIPE.relative_to(ROOT).as_posix(),
        "recipe_hash": fingerprint(load_recipe(RECIPE)),
        "cores": os.cpu_count(),
        "threads": THREADS,
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8, help=f"blocks of each side, at least {MIN_BLOCKS}")
    parser.add_argument("--steps", type=int, default=6, help="steps of a block that count")
    parser.add_argument("--warmup", type=int, default=4, help="steps of each side before the first block")
    parser.add_argument("--with-compile", action="store_true", help="measure Trainer with torch.compile as well")
    args = parser.parse_args(argv)
    if args.blocks < MIN_BLOCKS or args.steps < 1 or args.warmup < 1:
        parser.error(f"--blocks {args.blocks} --steps {args.steps} --warmup {args.warmup}: at least {MIN_BLOCKS}, 1, 1")

    result: dict[str, Any] = {"schema": "aifactory-peers/1", **circumstances(args)}
    names = ["ours", "trainer", *(["trainer_compile"] if args.with_compile else [])]
    rates = measure(names, args)
    result["load_1min_after"] = round(os.getloadavg()[0], 2)
    result["median_tokens_per_s"] = {n: statistics.median(r for b in rates[n] for r in b) for n in names}
    result["ratio_to"] = {n: ratio_of_medians(rates["ours"], rates[n])._asdict() for n in names[1:]}
    result["tokens_per_s"] = rates
    path = result_path(result["date"][:10])
    write_atomic(path, json.dumps(result, indent=1) + "\n")

    for name in names:
        print(f"{name:16s} {result['median_tokens_per_s'][name]:6.0f} tokens/s")
    print(os.path.relpath(path, ROOT))
    for name in reversed(names[1:]):
        print("ratio_to_{} {ratio:.3f} low {low:.3f} high {high:.3f}".format(name, **result["ratio_to"][name]))


if __name__ == "__main__":
    main()
