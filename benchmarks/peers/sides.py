"""One side of the comparison as compare.py sees it: a small group of processes, one per rank."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import IO, Any, NamedTuple

from worker import Task

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OURS = "ours"
ANSWER_LIMIT_S = 1800.0  # of one block; compilation and a slow file system are in the first
WORDS = 300  # of a failed side's last line
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Program(NamedTuple):
    """What a side runs, and whose environment it runs in; ours runs in that of compare.py."""

    file: str
    venv: str
    words: tuple[str, ...] = ()


PROGRAMS = {
    OURS: Program("ours.py", OURS),
    "trainer": Program("hf_trainer.py", "trainer"),
    "trainer_compile": Program("hf_trainer.py", "trainer", ("compile",)),
    "accelerate": Program("accelerate_fsdp2.py", "accelerate"),
    "deepspeed": Program("deepspeed_alone.py", "deepspeed"),
    "litgpt": Program("litgpt_pretrain.py", "litgpt"),
    "torchtitan": Program("torchtitan_llama.py", "torchtitan"),
}


class SideFailed(Exception):
    """A side did not start, ended or hung; the text says why."""


class Answer(NamedTuple):
    """Of one block: how long each step took on its slowest rank, and the mean loss of all ranks."""

    step_s: list[float]
    loss: list[float]


class Side:
    """The ranks of one side, alive. Each reads its commands from a pipe of its own, so that a waiting side waits in a
    read, takes no processor time and needs no collective."""

    def __init__(self, name: str, python: str, task: Task) -> None:
        self.name, self._log = name, task.folder / f"{name}.log"
        self._ranks: list[subprocess.Popen[str]] = []
        self._answers: list[IO[str]] = []
        port = str(_free_port())
        with self._log.open("w") as log:
            for rank in range(task.processes):
                reads, writes = os.pipe()
                program = PROGRAMS[name]
                command = [python, str(HERE / program.file), str(task.folder), str(writes), *program.words]
                self._ranks.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        text=True,
                        pass_fds=[writes],
                        env=_environment(python, task, rank, port),
                        cwd=ROOT,  # which the paths of a recipe are relative to
                    )
                )
                os.close(writes)
                self._answers.append(os.fdopen(reads))

    @property
    def process_ids(self) -> list[int]:
        return [rank.pid for rank in self._ranks]

    def run(self, steps: int) -> Answer:
        """Make that many steps. Raises SideFailed."""
        for rank in self._ranks:
            assert rank.stdin is not None
            try:
                rank.stdin.write(f"run {steps}\n")
                rank.stdin.flush()
            except BrokenPipeError:
                raise self._failed("ended") from None
        rows = self._wait_for_answers()
        step_s = [max(of_step) for of_step in zip(*(row["step_s"] for row in rows), strict=True)]
        return Answer(step_s, [fmean(of_step) for of_step in zip(*(row["loss"] for row in rows), strict=True)])

    def _wait_for_answers(self) -> list[dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        end_s = time.monotonic() + ANSWER_LIMIT_S
        with selectors.DefaultSelector() as waiting:
            for number, pipe in enumerate(self._answers):
                waiting.register(pipe, selectors.EVENT_READ, number)
            while len(rows) < len(self._answers):
                ready = waiting.select(max(0.0, end_s - time.monotonic()))
                if not ready:
                    raise self._failed(f"gave no answer for {ANSWER_LIMIT_S:.0f} s")
                for key, _ in ready:
                    line = self._answers[key.data].readline()
                    if not line:
                        raise self._failed("ended")
                    rows[key.data] = json.loads(line)
                    waiting.unregister(key.fileobj)
        return [rows[number] for number in sorted(rows)]

    def _failed(self, what: str) -> SideFailed:
        for rank in self._ranks:  # the others may wait for the one that has ended
            try:
                rank.wait(timeout=5 if what == "ended" else 0)
            except subprocess.TimeoutExpired:
                rank.kill()
        codes = ", ".join(str(rank.wait()) for rank in self._ranks)
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines or ["it said nothing"]
        return SideFailed(f"{what} (exit codes {codes}): {errors[-1][:WORDS]}; all of it: {os.path.relpath(self._log)}")

    def close(self) -> None:
        """Ask the ranks to end; end those that do not."""
        for rank in self._ranks:
            assert rank.stdin is not None
            try:
                rank.stdin.close()
            except BrokenPipeError:
                pass  # it has ended already, which is what we want
        for rank, pipe in zip(self._ranks, self._answers, strict=True):
            try:
                rank.wait(timeout=30)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
            pipe.close()


@contextmanager
def started(name: str, python: str, task: Task) -> Iterator[Side]:
    side = Side(name, python, task)
    try:
        yield side
    finally:
        side.close()


def _environment(python: str, task: Task, rank: int, port: str) -> dict[str, str]:
    """Ours, with what torchrun would set where there are several ranks; alone, none of it."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    paths = [str(HERE), *([str(ROOT)] if python == sys.executable else [])]
    env |= {"OMP_NUM_THREADS": str(task.threads), "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    env["PATH"] = os.pathsep.join([str(Path(python).parent), env.get("PATH", "")])
    # Not the home's: there the lock of a compiler that was killed makes every later run wait for ever.
    env["TORCH_EXTENSIONS_DIR"] = str(task.folder / "extensions")
    if task.processes > 1:
        world = str(task.processes)
        values = (str(rank), str(rank), "0", world, world, "127.0.0.1", port)
        env |= dict(zip(RANK_VARIABLES, values, strict=True)) | {"TORCHELASTIC_RUN_ID": "peers"}
    return env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
