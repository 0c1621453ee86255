"""Container, options of Slurm, switches and links of a job, from what sites set and tools print."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

from aifactory_train.machine.probe_look import Answer, Look
from aifactory_train.measure.job import probe_gpu_links, probe_job
from aifactory_train.measure.scratch import describe_storage
from aifactory_train.train.ranks import node_switches

ID = uuid.UUID("8f3b9c1e-2d4a-4c6b-9e7f-0a1b2c3d4e5f")
HEAD = b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + ID.bytes
JOB = (
    "JobId=7 JobName=bench UserId=u(1) QOS=normal Partition=gpu NodeList=n[1-4] Features=a100&ib OverSubscribe=NO "
    "Contiguous=0 Licenses=(null) Network=(null) Switches=1@00:10:00 Command=(null)\n"
)


def a_look(root: Path, text: str = "", fault: str = "") -> Look:
    return Look(root, run=lambda command: Answer(text, fault))


def test_a_job_tells_the_build_of_its_container_and_what_it_asked_slurm_for(tmp_path: Path) -> None:
    (tmp_path / "site.sif").write_bytes(HEAD + b"more")
    env = {"APPTAINER_CONTAINER": "/site.sif", "SLURM_JOB_ID": "7"}
    asked = {"constraint": "a100&ib", "oversubscribe": "NO", "switches": "1@00:10:00", "qos": "normal"}
    assert probe_job(env, a_look(tmp_path, JOB)) == ({"container_id": str(ID), "asked": asked}, [])
    assert probe_job({}, a_look(tmp_path, JOB)) == ({}, [])


@pytest.mark.parametrize(("node", "asks"), [("n1", True), ("n2", False), ("n4", False)])
def test_only_the_first_node_of_a_job_asks_slurm(tmp_path: Path, node: str, asks: bool) -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURMD_NODENAME": node}
    facts, missed = probe_job(env, a_look(tmp_path, JOB))
    assert ("asked" in facts) == asks and [m.reason for m in missed] == (
        [] if asks else ["only the first node of a job asks Slurm"]
    )


def test_what_a_job_does_not_tell_is_listed_with_the_reason(tmp_path: Path) -> None:
    facts, (missed,) = probe_job({"SLURM_JOB_ID": "7"}, a_look(tmp_path, fault="scontrol is not there"))
    assert (facts, missed.probe, missed.reason) == ({}, "job.asked", "scontrol is not there")


@pytest.mark.parametrize("content", [None, b"", HEAD[:50], HEAD.replace(b"SIF_MAGIC", b"SIF_MAGIX")])
def test_an_image_without_an_id_is_named_and_its_id_is_missing(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "box").write_bytes(content)
    facts, missed = probe_job({"SINGULARITY_CONTAINER": "/box"}, a_look(tmp_path))
    assert facts == {}
    assert [one.probe for one in missed] == ["job.container_id"] and "/box" in missed[0].reason


@pytest.mark.parametrize(
    ("address", "pattern", "switches"),
    [
        ("s0.leaf3.n17", "switch.switch.node", "s0.leaf3"),
        ("n17", "node", None),
        ("", "", None),
        ("block1.n17", "block.node", "block1"),
    ],
)
def test_the_switches_above_a_node_are_known_without_its_own_name(address: str, pattern: str, switches: str) -> None:
    env = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert node_switches(env) == switches


def test_links_are_the_lines_of_the_vendors_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    asked = []
    matrix = "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\x1b[0m\nGPU0\t X \tNV18\t0-7\n\n"
    look = Look(tmp_path, run=lambda command: asked.append(command) or Answer(matrix))
    assert probe_gpu_links(look) == (["\tGPU0\tGPU1\tCPU Affinity", "GPU0\t X \tNV18\t0-7"], [])
    assert asked == [["nvidia-smi", "topo", "-m"]]
    lines, (missed,) = probe_gpu_links(a_look(tmp_path, fault="nvidia-smi is not there"))
    assert (lines, missed.probe, missed.reason) == ([], "gpu_links", "nvidia-smi is not there")


def test_the_stripes_of_lustre_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"stat": Answer("lustre\n"), "lfs": Answer("stripe_count:  4 stripe_size:   1048576\n")}
    monkeypatch.setattr("aifactory_train.measure.scratch.run_tool", lambda command: told[command[0]])
    stripe = "stripe_count: 4 stripe_size: 1048576"
    assert describe_storage(tmp_path) == {"file_system": "lustre", "stripe": stripe}
    told["lfs"] = Answer("", "lfs is not there")
    assert describe_storage(tmp_path)["stripe"] == "lfs is not there"
    monkeypatch.undo()
    here = describe_storage(tmp_path)
    assert set(here) == {"file_system"} and here["file_system"].isprintable() and here["file_system"]
