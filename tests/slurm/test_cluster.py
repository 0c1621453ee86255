"""The cluster that the other tests stand on does what they expect of it."""

from pathlib import Path

import pytest

from slurm.cluster import Cluster, poll


def script(folder, *lines):
    path = folder / "job.sh"
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    return path


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


def test_stop_leaves_no_process_behind(munge, tmp_path, tmp_path_factory):
    # A short name: slurmstepd's socket lies below the folder, and the path of a socket has 107 characters at most.
    slurm = Cluster(tmp_path_factory.mktemp("stop"), munge, 2)
    job = slurm.sbatch("-N2", "--output=/dev/null", script(tmp_path, "trap '' TERM", "srun sleep 300"))
    poll(lambda: len(slurm.processes()) > 5, "the start of the job", 30, slurm.story)
    with pytest.raises(AssertionError, match="did not happen"):
        slurm.wait(job, timeout_s=1)
    seen = slurm.processes()
    assert seen
    slurm.stop()
    assert slurm.processes() == {}
    assert not [pid for pid in seen if is_alive(pid)]
