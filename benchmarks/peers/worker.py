"""What all sides of the comparison share: the task that they train, and the little protocol with compare.py.

A side is one process per rank that lives through its part of the comparison: it reads "run K" from stdin, makes K
steps, and answers with one JSON line, {"step_s": [K numbers], "loss": [K numbers]}. Between blocks it waits in a read
and takes no processor time. The end of stdin ends it. By hand: `echo run 3 | python hf_trainer.py FOLDER`.

Peers run it in their own virtual environments: it needs torch and numpy alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROWS_FILE, TASK_FILE, WEIGHTS_FOLDER = "rows.npy", "task.json", "weights"


@dataclass(frozen=True)
class Task:
    """One training step, as every side makes it, from the same first weights with the same rows.

    folder: holds the rows [n, T + 1] int32, the same for each side at step k, and the first weights as Hugging Face
    writes them (config.json, model.safetensors, bf16), from which each side makes its own float32 ones.
    threads: of one rank. recompute: blocks are computed again in backward, where our plan for this task does so.
    The learning rate stays what it is. AdamW decays no vector.
    """

    folder: Path
    device: str
    seq_len_tokens: int
    global_batch_rows: int
    micro_batch_rows: int
    processes: int
    threads: int
    recompute: bool
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    grad_clip_norm: float

    @property
    def weights(self) -> str:
        return str(self.folder / WEIGHTS_FOLDER)

    @property
    def rows_of_rank(self) -> int:
        return self.global_batch_rows // self.processes

    @property
    def accumulation(self) -> int:
        return self.rows_of_rank // self.micro_batch_rows

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_rows * self.seq_len_tokens

    def save(self) -> None:
        facts = asdict(self)
        del facts["folder"]
        (self.folder / TASK_FILE).write_text(json.dumps(facts, indent=1) + "\n")

    def rows(self) -> Tensor:
        """All rows in their order, int64 [n, T + 1]: step k trains rows k*R to k*R + R, R = global_batch_rows."""
        return torch.from_numpy(np.load(self.folder / ROWS_FILE).astype(np.int64))

    def micro_batches(self) -> Iterator[Tensor]:
        """This rank's rows of one micro-batch after the other, [B, T + 1] on its device; without end."""
        by_rank = self.rows().unflatten(0, (-1, self.processes, self.rows_of_rank))
        parts, device = by_rank[:, rank()].flatten(0, 1).split(self.micro_batch_rows), self.torch_device()
        while True:
            for part in parts:
                yield part.to(device)

    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.device == "cpu" else torch.device(self.device, local_rank())

    def decayed(self, named: Iterator[tuple[str, Tensor]]) -> list[dict[str, object]]:
        """The parameters in two groups for AdamW: matrices, and vectors, which are not decayed."""
        parameters = [p for _, p in named]
        matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        return [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    def adamw(self) -> dict[str, object]:
        """The other arguments of torch.optim.AdamW."""
        return {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps, "fused": True}


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def load_task() -> Task:
    """The task of the folder on the command line, with this process's threads and device set."""
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: echo run 3 | python {sys.argv[0]} FOLDER, a folder that compare.py has made")
    folder = Path(sys.argv[1]).resolve()
    task = Task(folder=folder, **json.loads((folder / TASK_FILE).read_text()))
    torch.set_num_threads(task.threads)
    if task.device != "cpu":
        torch.get_device_module(task.device).set_device(local_rank())
    return task


class Blocks:
    """The blocks of steps that this process is asked for, one after the other. Answers go to the file number that the
    command line names, as libraries print what they like; by hand to stderr."""

    def __init__(self) -> None:
        self._answers = os.fdopen(int(sys.argv[2]) if len(sys.argv) > 2 else os.dup(2), "w")

    def next(self) -> int:
        """Number of steps of the next block; 0 at the end. Waits for it."""
        verb, _, count = sys.stdin.readline().strip().partition(" ")
        return int(count) if verb == "run" else 0

    def answer(self, step_s: list[float], losses: list[float]) -> None:
        """Say how long each step of the block took, and this rank's mean loss at each, nats per token."""
        row = {"step_s": [round(s, 6) for s in step_s], "loss": [round(loss, 6) for loss in losses]}
        print(json.dumps(row), file=self._answers, flush=True)


def wait_for_device() -> None:
    """Until the accelerator has done what it was given; nothing to wait for on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(step_fn: Callable[[], Tensor]) -> None:
    """Run and time `step_fn`, one optimizer step per call, until no block is left. It returns this rank's loss."""
    blocks = Blocks()
    while n := blocks.next():
        step_s, losses = [], []
        for _ in range(n):
            start_s = time.perf_counter()
            losses.append(step_fn())
            wait_for_device()
            step_s.append(time.perf_counter() - start_s)
        blocks.answer(step_s, [loss.item() for loss in losses])
