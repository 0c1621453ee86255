"""The cluster that the other tests stand on does what they expect of it."""

from pathlib import Path

import pytest

from slurm.cluster import Cluster, poll


def script(folder, *lines):
    path = folder / "job.sh"
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return path


def sleeps(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"sleep", b"/usr/bin/sleep", b"/bin/sleep"))
    except OSError:
        return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_runs_on_two_nodes(cluster, tmp_path):
    out = tmp_path / "out"
    job = cluster.sbatch("-N2", f"--output={out}", script(tmp_path, "srun printenv SLURMD_NODENAME"))
    assert cluster.wait(job) == "COMPLETED"
    assert sorted(out.read_text().split()) == ["node1", "node2"]


def test_a_job_whose_node_dies_is_requeued_under_its_id_and_runs_when_the_node_is_back(cluster, tmp_path):
    out = tmp_path / "out"
    lines = ('echo "begin $SLURM_JOB_ID $SLURM_RESTART_COUNT"', '[ -n "$SLURM_RESTART_COUNT" ] || srun sleep 300')
    job = cluster.sbatch("-N3", "--open-mode=append", f"--output={out}", script(tmp_path, *lines))
    poll(lambda: "node3" in (node for pid, node in cluster.processes().items() if sleeps(pid)), "a rank there", 20)
    assert cluster.kill_node("node3") >= 3, "slurmd, slurmstepd and the rank"
    assert "node3" not in cluster.processes().values()
    poll(lambda: cluster.state(job) == "PENDING", "requeue", 60, cluster.story)
    cluster.start_node("node3")
    assert cluster.wait(job) == "COMPLETED"
    assert out.read_text().splitlines()[0] == f"begin {job} " and f"begin {job} 1" in out.read_text()


def test_stop_leaves_no_process_behind(munge, tmp_path):
    slurm = Cluster(tmp_path, munge, 2)
    with pytest.raises(AssertionError, match="did not happen"):
        job = slurm.sbatch("-N2", "--output=/dev/null", script(tmp_path, "trap '' TERM", "srun sleep 300"))
        slurm.wait(job, timeout_s=2)
    seen = slurm.processes()
    assert len(seen) > 5
    slurm.stop()
    assert slurm.processes() == {}
    assert not [pid for pid in seen if is_alive(pid)]
