"""The measurement of one comparison: sides warm up, are checked to train the same, and run blocks in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from aifactory_train.bench.paired import Block, order_of_turns
from sides import OURS, Answer, Side, SideFailed, started
from worker import Task

# Nats per token between the losses of a peer and ours at one step, from the same weights and rows: bf16 rounds
# elsewhere, and transformers has no target for the first token of a row.
MOST_LOSS_APART = 0.05


class Comparison:
    """Ours and the peers on one task: what was measured, and who failed why.

    On a CPU the sides live through the comparison. On a GPU, whose memory they could not share, a block starts its side
    anew and warms it up.

    Args:
        pythons: the interpreter of each side; ours first.
    """

    def __init__(self, task: Task, pythons: dict[str, str]) -> None:
        self.task, self.pythons = task, pythons
        self.failed: dict[str, str] = {}
        self.loss: dict[str, list[float]] = {}
        self.blocks: dict[str, list[Answer]] = {name: [] for name in pythons}
        self._stack = ExitStack()
        self._alive: dict[str, Side] = {}

    def measure(self, n_blocks: int, steps: int, warm_up_steps: int) -> None:
        """Warm up, compare losses, make the blocks. Where ours fails, nothing is left to compare."""
        with self._stack:
            for name in self.pythons:
                if OURS not in self.failed:
                    with self._failures_of(name):
                        self._warm_up(name, warm_up_steps)
            names = list(self.blocks)
            turns = [names[turn] for turn in order_of_turns(len(names), n_blocks)]
            for number, name in enumerate(turns, 1):
                if name in self.failed or OURS in self.failed:
                    continue
                with self._failures_of(name):
                    self._make_block(name, steps, warm_up_steps)
                    rate = statistics.median(self.rates(name)[-1])
                    print(f"block {number:2d} of {len(turns)}  {name:16s} {rate:8.0f} tokens/s", flush=True)

    def rates(self, name: str) -> list[Block]:
        """Tokens/s of each step that counts, by block: not of the first, which refills caches."""
        return [[self.task.tokens_per_step / s for s in block.step_s[1:]] for block in self.blocks[name]]

    @contextmanager
    def _failures_of(self, name: str) -> Iterator[None]:
        """A side that fails leaves the others going."""
        try:
            yield
        except SideFailed as error:
            self.failed[name] = str(error)
            del self.blocks[name]
            print(f"{name}: {error}", flush=True)

    def _warm_up(self, name: str, steps: int) -> None:
        start_s = time.perf_counter()
        with self._running(name) as side:
            self.loss[name] = side.run(steps).loss
        shown = " ".join(f"{loss:.4f}" for loss in self.loss[name])
        print(f"{name}: {steps} warm-up steps in {time.perf_counter() - start_s:.0f} s, loss {shown}", flush=True)
        apart = loss_apart(self.loss[name], self.loss[OURS])
        if apart > MOST_LOSS_APART:
            raise SideFailed(f"does not train what ours does: losses up to {apart:.4f} apart, not {MOST_LOSS_APART}")

    def _make_block(self, name: str, steps: int, warm_up_steps: int) -> None:
        with self._running(name) as side:
            if side is not self._alive.get(name):
                side.run(warm_up_steps)
            self.blocks[name].append(side.run(1 + steps))

    @contextmanager
    def _running(self, name: str) -> Iterator[Side]:
        if self.task.device != "cpu":
            with started(name, self.pythons[name], self.task) as side:
                yield side
            return
        if name not in self._alive:
            self._alive[name] = self._stack.enter_context(started(name, self.pythons[name], self.task))
        yield self._alive[name]


def loss_apart(theirs: list[float], ours: list[float]) -> float:
    """The most that two losses of the same step differ; infinite where one is no number."""
    apart = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    return max(apart) if all(map(math.isfinite, apart)) else math.inf
