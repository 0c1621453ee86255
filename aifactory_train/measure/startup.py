"""The start of a run, from the command to the end of its first step, in phases by the marks that the run leaves."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from aifactory_train.errors import TrainingFault
from aifactory_train.rundir import RunDir, read_jsonl

# Each ends where the next one begins. launch: plan, checks and mpirun, until rank 0's process is there; imports: until
# it reads its plan; rendezvous: until the process group stands; build: text checked, engine and weights; rehearse: one
# forward and backward, which compiles; first_step: until its numbers are on the host.
PHASES = ("launch", "imports", "rendezvous", "build", "rehearse", "first_step")
_MARKS = ("process", "imported", "met", "built", "rehearsed")
SENTENCE = "the ranks of a run read rows of tokens and write the loss that the model has made of them"
N_DOCUMENTS = 200
TAIL_LINES = 5


def write_corpus(path: Path) -> Path:
    """Made-up text: enough for a tokenizer and for a few rows, so that preparing it takes seconds."""
    said = SENTENCE.split()
    with open(path, "w") as file:
        for i in range(N_DOCUMENTS):
            words = [said[(i * 7 + k * k + k // 3) % len(said)] for k in range(20 + (i * 37) % 120)]
            file.write(json.dumps({"text": " ".join(words) + f" {i}."}) + "\n")
    return path


def measure_start_s(command: Sequence[str], run: RunDir, env: Mapping[str, str], timeout_s: float) -> dict[str, float]:
    """Seconds of each phase of one start, and of all of them as "total".

    Args:
        command: launches a new run into the folder `run`, on this node: its clock is compared with ours.

    Raises:
        TrainingFault: it failed, or did not end in time; with the end of what it printed.
    """
    began_s = time.time()
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TrainingFault(
            f"the run did not end within {timeout_s:.0f} s", where=str(run.root), do="--timeout-s with more seconds"
        ) from None
    if done.returncode != 0:
        last = " / ".join(done.stdout.strip().splitlines()[-TAIL_LINES:])
        raise TrainingFault(
            f"the run ended with {done.returncode}: {last}", where=" ".join(command), do="run it by hand"
        )
    marks_s = next(event["marks_s"] for event in read_jsonl(run.events) if event["event"] == "start")
    first_row = read_jsonl(run.metrics)[0]
    times_s = [began_s, *(marks_s[name] for name in _MARKS), first_row["time_s"]]
    phases_s = {phase: b - a for phase, (a, b) in zip(PHASES, pairwise(times_s), strict=True)}
    return phases_s | {"total": times_s[-1] - began_s}
