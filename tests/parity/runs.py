"""Jobs for ranks.py, and what it leaves of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from parity.cases import STEPS, Case

# Relative, of the loss and gradient norm of each step, and of the norm of the difference of each weight tensor.
TOLERANCE = 1e-5
WAIT_S = 900
RANKS = Path(__file__).with_name("ranks.py")


class Difference(NamedTuple):
    """The largest relative difference to one process."""

    loss: float
    norm: float
    weights: float


class Runs:
    """What ranks.py leaves, as it comes: one process trains all its jobs, one after the other."""

    def __init__(self, folder: Path, jobs: list[dict[str, Any]]) -> None:
        self.folder = folder
        (folder / "jobs.json").write_text(json.dumps(jobs))
        self.log = open(folder / "log.txt", "w")  # noqa: SIM115
        command = [sys.executable, str(RANKS), str(folder / "jobs.json"), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def result(self, name: str) -> dict[str, Any]:
        path, end_s = self.folder / f"{name}.json", time.monotonic() + WAIT_S
        while not path.exists():
            ended = self.process.poll() is not None and not path.exists()
            assert not ended, (self.folder / "log.txt").read_text()[-3000:]
            assert time.monotonic() < end_s, f"no result of {name} within {WAIT_S} s"
            time.sleep(0.05)
        result: dict[str, Any] = json.loads(path.read_text())
        assert "error" not in result, result["error"]
        return result

    def difference(self, case: Case) -> Difference:
        """Between a case and one process."""
        ours, theirs = (self.result(c.name)["curve"] for c in (case, case.reference))
        assert len(ours) == len(theirs) == STEPS
        losses, norms = (largest(relative(a[k], b[k]) for a, b in zip(ours, theirs, strict=True)) for k in (0, 1))
        whole = torch.load(self.folder / case.reference.name / "weights-0.pt")
        parts = [torch.load(path) for path in sorted((self.folder / case.name).glob("weights-*.pt"))]
        assert len(parts) == case.pp
        assert set().union(*parts) == set(whole), "some weights are in no stage"
        weights = largest(((w - whole[n]).norm() / whole[n].norm()).item() for part in parts for n, w in part.items())
        return Difference(losses, norms, weights)


def largest(values: Iterable[float]) -> float:
    """NaN where one is NaN, which Python's max would pass over."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def job(case: Case, saves: bool = False) -> dict[str, Any]:
    """Trains all steps."""
    return {"name": case.name, "case": asdict(case), "saves": saves, "loads": []}


def job_of_loads(case: Case, sources: list[Case], saves_again: bool = False) -> dict[str, Any]:
    """Goes on from each of the checkpoints that other jobs saved. Its result is called <case>-loads."""
    loads = {"loads": [source.name for source in sources], "saves_again": saves_again}
    return {"name": f"{case.name}-loads", "case": asdict(case), "saves": False, **loads}


@contextmanager
def started(folder: Path, jobs: list[dict[str, Any]]) -> Iterator[Runs]:
    runs = Runs(folder, jobs)
    try:
        yield runs
    finally:
        runs.process.kill()
        runs.process.wait()
        runs.log.close()
