"""The little protocol between compare.py and one side of the comparison.

A side is one process that lives through the whole comparison: it reads "run K" from stdin, makes K steps, and answers
with one JSON line on stdout, {"step_s": [K numbers], "tokens_per_step": N, "tokens_per_s": median}. Between blocks it
waits in a read and takes no processor time. The end of stdin, or "quit", ends it.

Without --serve it makes --warmup steps that do not count, then --steps steps, and prints one such line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from aifactory_train.data.loader import Loader
from aifactory_train.data.shards import load_prepared
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Recipe

RECIPE = Path(__file__).resolve().parent.parent.parent / "configs" / "recipes" / "cpu-yardstick.yaml"
THREADS = 2


def parse_arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """`steps`, `warmup`, `serve`, `compile` (for sides that can do without)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them that do not count")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, where that is a choice")
    parser.add_argument("--serve", action="store_true", help="take blocks from stdin instead")
    return parser.parse_args(argv)


def yardstick() -> tuple[Recipe, Loader]:
    """The recipe that all sides train, and its rows in their global order: the same tokens at step k for each side."""
    recipe = load_recipe(RECIPE)
    return recipe, Loader(load_prepared(recipe.data), recipe.data, recipe.train.seed, recipe.global_batch_rows)


class Blocks:
    """The blocks of steps that this process is asked for, one after the other.

    Takes stdout for the answers, and sends to stderr whatever a library prints.
    """

    def __init__(self, args: argparse.Namespace, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._serve = args.serve
        self._left = [] if args.serve else [n for n in (args.warmup, args.steps) if n]
        self._answers: IO[str] = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def next(self) -> int:
        """Number of steps of the next block; 0 at the end. Waits for it."""
        if not self._serve:
            return self._left.pop(0) if self._left else 0
        verb, _, count = sys.stdin.readline().strip().partition(" ")
        return int(count) if verb == "run" else 0

    def answer(self, step_s: list[float]) -> None:
        """Say how long each step of the block took."""
        if self._left:
            return
        rate = self._tokens_per_step / statistics.median(step_s)
        row = {"step_s": [round(s, 6) for s in step_s], "tokens_per_step": self._tokens_per_step, "tokens_per_s": rate}
        print(json.dumps(row), file=self._answers, flush=True)


def serve(step_fn: Callable[[], object], tokens_per_step: int, args: argparse.Namespace) -> None:
    """Run and time `step_fn`, one optimizer step per call, until no block is left.

    `step_fn` returns when the step is done: on an accelerator it has to wait for the device.
    """
    blocks = Blocks(args, tokens_per_step)
    while n := blocks.next():
        step_s = []
        for _ in range(n):
            start_s = time.perf_counter()
            step_fn()
            step_s.append(time.perf_counter() - start_s)
        blocks.answer(step_s)
