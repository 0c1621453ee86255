"""Ranks that hold the state of a model and save and load it when they are told to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.checkpoint.manager import CheckpointManager
from aifactory_train.measure.state import build_state, locals_of


def _serve(rank: int, n_ranks: int, n_parameters: float, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks)
    state = build_state(n_parameters, n_ranks)
    sums = [t.double().sum().item() for t in locals_of(state)]
    manager = CheckpointManager(folder / "checkpoints", 1, False, torch.device("cpu"))
    pipe.send(sum(t.nbytes for t in locals_of(state)))
    while (order := pipe.recv()) != "end":
        if order == "load":
            for t in locals_of(state):
                t.zero_()
        dist.barrier()  # axis: all; they begin together
        start_s = time.perf_counter()
        if order == "save":
            manager.save(1, 0, state, {})
        else:
            commit = manager.latest()
            assert commit is not None
            manager.check(commit, {})
            manager.load(commit, state)
        seconds = time.perf_counter() - start_s
        assert order == "save" or sums == [t.double().sum().item() for t in locals_of(state)], "another state"
        pipe.send(seconds)
    dist.destroy_process_group()
    os._exit(0)


class Ranks:
    """Forks of this process; each method is done by all at once."""

    def __init__(self, n_ranks: int, n_parameters: float, folder: Path) -> None:
        context = get_context("fork")
        self._pipes, self._processes = [], []
        for rank in range(n_ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, n_ranks, n_parameters, folder, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.n_bytes = sum(self._answers())

    def save_s(self) -> float:
        """Save and commit, on disk; seconds of the slowest rank."""
        return self._all("save")

    def load_s(self) -> float:
        """Verify and load; seconds of the slowest rank."""
        return self._all("load")

    def _all(self, order: str) -> float:
        for pipe in self._pipes:
            pipe.send(order)
        return max(self._answers())

    def _answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise SystemExit("a rank ended; its own words stand above") from None

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send("end")
        for process in self._processes:
            process.join()


@contextmanager
def started(n_ranks: int, n_parameters: float, folder: Path) -> Iterator[Ranks]:
    ranks = Ranks(n_ranks, n_parameters, folder)
    yield ranks
    ranks.close()
