"""Runs on the test cluster: launch them, follow them, disturb them, and compare what they logged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aifactory_train.hostlist import expand
from aifactory_train.results.record import read_metrics
from aifactory_train.rundir import RunDir, committed_steps, read_jsonl
from slurm.cluster import Cluster, poll
from training_runs import aifactory

MACHINE = Path(__file__).parent / "two-nodes.yaml"
EXACT = ("step", "tokens", "loss", "grad_norm", "lr")


class Chain:
    """One run folder, and the jobs that train it."""

    def __init__(self, cluster: Cluster, recipe: Path, run: Path, machine: Path = MACHINE) -> None:
        self.cluster, self.recipe, self.machine = cluster, recipe, machine
        self.run = RunDir(run)

    def launch(self, *options: object) -> int:
        """By `aifactory-train launch`; the job's id."""
        given = ("--machine", self.machine, "--nodes", 2, "--run", self.run.root, *options)
        done = self.verb("launch", self.recipe, *given)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.job_ids()[-1]

    def verb(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return aifactory(*arguments, **self.cluster.env)

    def job_ids(self) -> list[int]:
        return [int(row["job_id"]) for row in read_jsonl(self.run.jobs)]

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        """Until that attempt has logged the step or a later one."""

        def reached() -> bool:
            rows = read_jsonl(self.run.metrics)
            return any(row["step"] >= step and row["attempt"] >= attempt for row in rows)

        poll(reached, f"step {step} in attempt {attempt}", 120, self.story)

    def wait_for_end(self, timeout_s: float = 240) -> None:
        poll(lambda: not self.cluster.jobs(), "end of all jobs", timeout_s, self.story)

    def last_step(self) -> int:
        return max((row["step"] for row in read_jsonl(self.run.metrics)), default=0)

    def committed(self) -> int:
        return max(committed_steps(self.run.checkpoints), default=0)

    def curve(self) -> list[tuple[Any, ...]]:
        return [tuple(row[name] for name in EXACT) for row in read_metrics(self.run)]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(self.run.events) if event["event"] == kind]

    def attempt(self, number: int, name: str) -> dict[str, Any]:
        """job.json or end.json of an attempt."""
        return json.loads((self.run.attempt(number) / name).read_text())

    def ends(self) -> list[tuple[int, str]]:
        """Exit code and verdict of every attempt, (0, "") where it has none."""
        found = []
        for number in range(1, self.run.last_attempt() + 1):
            path = self.run.attempt(number) / "end.json"
            end = json.loads(path.read_text()) if path.exists() else {"exit_code": 0, "verdict": ""}
            found.append((end["exit_code"], end["verdict"]))
        return found

    def said(self) -> str:
        """What the batch scripts printed."""
        return "\n".join(path.read_text() for path in sorted(self.run.root.glob("slurm-*.out")))

    def signal_ranks(self, number: int, node: str | None = None) -> None:
        """Send a signal to the Pythons that train, or to those of one node."""
        pids = self.cluster.ranks("train", self.run.root)
        assert sorted(pids.values()) == self.attempt_nodes(), pids
        for pid, there in pids.items():
            if node in (None, there):
                os.kill(pid, number)

    def slow_down(self, seconds: float, until: Callable[[], object]) -> None:
        """Hold the ranks still for so long after each step or so."""
        while not until():
            before = self.last_step()
            self._send(signal.SIGSTOP)
            time.sleep(seconds)
            self._send(signal.SIGCONT)
            poll(lambda before=before: until() or self.last_step() > before, "a step", 60, self.story)

    def _send(self, number: int) -> None:
        for pid in self.cluster.ranks("train", self.run.root):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def log(self, attempt: int) -> str:
        return (self.run.attempt(attempt) / "log.txt").read_text()

    def wasted(self) -> str:
        """The last line in which a batch script has told it."""
        return [line for line in self.said().splitlines() if line.startswith("wasted so far")][-1]

    def attempt_nodes(self) -> list[str]:
        """Nodes of the newest attempt; the batch script runs on the first."""
        return expand(self.attempt(self.run.last_attempt(), "job.json")["node_list"])

    def story(self) -> str:
        """For a failing test: everything that was printed."""
        logs = [f"--- {path}\n{path.read_text()}" for path in sorted(self.run.attempts.glob("*/*.txt"))]
        ends = [f"--- {path}\n{path.read_text()}" for path in sorted(self.run.attempts.glob("*/*.json"))]
        return "\n".join([self.said(), *logs, *ends, self.cluster.story()])
