"""`bench node` on a real Slurm: each node alone, and the one that is slow or silent is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurm.chains import MACHINE
from slurm.cluster import Cluster, poll
from training_runs import aifactory

pytestmark = pytest.mark.usefixtures("settled")

# A product takes longer than the kernel lets a process run in one go: what crowds a core is in each sample. Other tests
# run beside this one, so no window of samples is like the next.
SUITE = """\
about: a product on each node
programs:
  - program: gemm
    ranks: one
    scope: node
    budget_s: 60
    cpu: --dtypes fp32 --sizes 1024 --budget-s 2 --change-frac 0.95
"""
BURN = "while True: pass"


def bench(cluster: Cluster, folder: Path) -> int:
    """Run the suite on two nodes; the exit code of the batch script."""
    suite = folder / "own.yaml"
    suite.write_text(SUITE)
    given = ("--machine", MACHINE, "--nodes", 2, "--out", folder / "out")
    done = aifactory("bench", suite, *given, **cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    job = int(done.stdout.split()[1])
    poll(lambda: not cluster.jobs(), "end of the bench", 100, lambda: story(cluster, folder))
    return int(cluster.job(job)["ExitCode"].split(":")[0])


def story(cluster: Cluster, folder: Path) -> str:
    texts = [path.read_text() for pattern in ("out/*.out", "out/logs/*") for path in folder.glob(pattern)]
    return "\n".join([*texts, cluster.story()])


@contextmanager
def crowded(core: int) -> Iterator[None]:
    """Five processes that leave a sixth of a core to whoever else is on it."""
    command = ["taskset", "--cpu-list", str(core), sys.executable, "-c", BURN]
    burning = [subprocess.Popen(command) for _ in range(5)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a slow node needs a core of its own")
def test_a_node_that_is_slow_is_named_and_the_other_passes(cluster, tmp_path):
    with cluster.confined("node1"), crowded(min(os.sched_getaffinity(0))):
        bench(cluster, tmp_path)
    records = [json.loads(path.read_text()) for path in (tmp_path / "out/records").glob("*.json")]
    assert sorted(record["hosts"] for record in records) == [["node1"], ["node2"]], story(cluster, tmp_path)
    said = next((tmp_path / "out").glob("slurm-*.out")).read_text()
    assert (tmp_path / "out/failing_nodes.txt").read_text().strip() == "node1", said
    assert "node1: " in said
