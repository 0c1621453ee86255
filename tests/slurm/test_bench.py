"""Benches on a real Slurm: a node that is slow, a link that is silent and a rank that is killed are named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from aifactory_train.bench.suites import programs_dir
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
# Both would run for minutes; each is disturbed in the middle. The first line that collectives prints is of a cell that
# it has measured: before that, a killed rank may be one that was never met.
LINKS = """\
about: the link of two nodes, then both together
programs:
  - program: p2p
    scope: job
    budget_s: 20
    cpu: --bytes 4096 --calls 10000000 --pair-timeout-s 6
  - program: collectives
    scope: job
    budget_s: 20
    cpu: --ops all_gather all_reduce reduce_scatter --dtypes fp32 --budget-s 2 --timeout-s 4
"""
# Quick options for those programs of the suite train that join both nodes; the others would take the test a minute.
SMALL = {
    "collectives": "--ops all_reduce --dtypes fp32 --max-bytes 32768 --budget-s 2 --change-frac 1000",
    "step": "--recipe configs/recipes/smoke.yaml --set train.micro_batch_rows=4 --steps 10 --change-frac 1000",
}


def submit(cluster: Cluster, folder: Path, programs: str) -> int:
    """Submit a suite for two nodes; the job's id."""
    suite = folder / "own.yaml"
    suite.write_text(programs)
    given = ("--machine", MACHINE, "--nodes", 2, "--out", folder / "out")
    done = aifactory("bench", suite, *given, **cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[1])


def wait(cluster: Cluster, folder: Path, job: int) -> int:
    """The exit code of the batch script, at its end."""
    poll(lambda: not cluster.jobs(), "end of the bench", 100, lambda: story(cluster, folder))
    return int(cluster.job(job)["ExitCode"].split(":")[0])


def disturb(cluster: Cluster, folder: Path, program: str, number: int) -> None:
    """Send a signal to the process on node2 that runs a program, while it is connected with its peer."""
    found: list[int] = []

    def connected() -> list[int]:
        found[:] = [pid for pid in pids_of(cluster, "node2", program) if n_sockets(pid) > 2]
        return found

    poll(connected, f"{program} on node2", 60, lambda: story(cluster, folder))
    time.sleep(0.5)
    for pid in found:
        os.kill(pid, number)


def pids_of(cluster: Cluster, node: str, program: str) -> list[int]:
    found = []
    for pid, there in cluster.processes().items():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if there == node and "python" in words[0] and any(word.endswith(program) for word in words):
            found.append(pid)
    return found


def n_sockets(pid: int) -> int:
    try:
        return sum(os.readlink(fd).startswith("socket:") for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return 0


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (folder / "out/records").glob("*.json")]


def story(cluster: Cluster, folder: Path) -> str:
    texts = [path.read_text() for pattern in ("out/*.out", "out/logs/*") for path in folder.glob(pattern)]
    return "\n".join([*texts, cluster.story()])


@contextmanager
def crowded(core: int) -> Iterator[None]:
    """Three processes that leave a quarter of a core to whoever else is on it."""
    command = ["taskset", "--cpu-list", str(core), sys.executable, "-c", BURN]
    # In sessions of their own: the kernel shares a core between sessions first.
    burning = [subprocess.Popen(command, start_new_session=True) for _ in range(3)]
    try:
        yield
    finally:
        for process in burning:
            process.kill()
            process.wait()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a slow node needs a core of its own")
def test_a_node_that_is_slow_is_named_and_the_other_passes(cluster, tmp_path):
    with cluster.confined("node1"), crowded(min(os.sched_getaffinity(0))):
        wait(cluster, tmp_path, submit(cluster, tmp_path, SUITE))
    assert sorted(record["hosts"] for record in records(tmp_path)) == [["node1"], ["node2"]], story(cluster, tmp_path)
    jobs = {record["hosts"][0]: record["provenance"]["job"] for record in records(tmp_path)}
    assert jobs["node1"]["asked"]["oversubscribe"] and jobs["node2"] == {}, jobs
    said = next((tmp_path / "out").glob("slurm-*.out")).read_text()
    assert (tmp_path / "out/failing_nodes.txt").read_text().strip() == "node1", said
    assert "node1: " in said


def test_a_silent_link_and_a_killed_rank_are_named_within_their_time_outs(cluster, tmp_path):
    job = submit(cluster, tmp_path, LINKS)
    disturb(cluster, tmp_path, "measure.pairs", signal.SIGSTOP)
    log = tmp_path / "out/logs/2-collectives.txt"
    poll(lambda: log.exists() and "collectives op=" in log.read_text(), "a cell", 60, lambda: story(cluster, tmp_path))
    disturb(cluster, tmp_path, "collectives.py", signal.SIGKILL)
    assert wait(cluster, tmp_path, job) == 2, story(cluster, tmp_path)
    faults = {record["benchmark"]: record for record in records(tmp_path) if record["fault"]}
    silent, killed = faults["p2p"], faults["collectives"]
    assert silent["cell"]["pair"] == "node1+node2" and silent["hosts"] == ["node1", "node2"]
    assert "node1 and node2 do not reach each other" in silent["fault"]
    assert "rank 1 on node2: no answer within 6 s" in silent["fault"]
    assert killed["facts"]["missing_ranks"] == [1] and "missing: 1 on node2" in killed["fault"]
    said = next((tmp_path / "out").glob("slurm-*.out")).read_text()
    assert silent["fault"] in said and killed["fault"] in said
    assert (tmp_path / "out/failing_nodes.txt").read_text() == "node[1-2]\n", said
    assert (tmp_path / "out/missing_nodes.txt").read_text() == ""


def test_programs_of_the_suite_train_leave_records_of_both_nodes(cluster, tmp_path):
    suite = yaml.safe_load((programs_dir() / "suites/train.yaml").read_text())
    of_both = {entry["program"]: entry for entry in suite["programs"] if entry["program"] in SMALL}
    suite["programs"] = [{**entry, "cpu": SMALL[program]} for program, entry in of_both.items()]
    code = wait(cluster, tmp_path, submit(cluster, tmp_path, yaml.safe_dump(suite)))
    found = {record["benchmark"]: record for record in records(tmp_path)}
    assert code == 0 and set(found) == set(SMALL), story(cluster, tmp_path)
    for record in found.values():
        assert record["hosts"] == ["node1", "node2"] and record["fault"] is None and record["metrics"]
        assert {verdict["verdict"] for verdict in record["verdicts"]} == {"no_reference"}
    assert found["step"]["cell"]["devices"] == 2 and found["step"]["validity"]["loss_finite"]
    assert (tmp_path / "out/passing_nodes.txt").read_text() == "node[1-2]\n"
