"""Recorded answers of scontrol, and what the probe makes of them. Their first line says which version they follow."""

import os
from pathlib import Path

import pytest

from aifactory_train.machine.check import check_machine
from aifactory_train.machine.probe import probe
from aifactory_train.machine.probe_look import Answer, Look
from aifactory_train.machine.probe_slurm import parse_gres, parse_partition, parse_record, probe_slurm

FOLDER = Path(__file__).parent / "recorded"


def recorded(name: str) -> str:
    lines = (FOLDER / name).read_text().splitlines(keepends=True)
    assert lines[0].startswith("# ")
    return "".join(lines[1:])


def a_look(version: str, host: str, root: Path = Path("/nowhere")) -> Look:
    def run(command: list[str]) -> Answer:
        if command[0] != "scontrol":
            return Answer("", f"{command[0]} is not there")
        file = FOLDER / f"scontrol_{command[2]}_{version}.txt"
        if not file.exists() or (command[2] == "node" and f"NodeName={command[3]} " not in file.read_text()):
            return Answer("", f"{' '.join(command)} failed: not found")
        return Answer(recorded(file.name))

    return Look(root, run, [0, 1], os.uname_result(("Linux", host, "5.14", "#1", "x86_64")))


def test_slurm_22_05_tells_partitions_limits_nodes_gpus_and_requeue():
    look = a_look("22.05", "nid005000.cluster")
    slurm = probe_slurm(look)
    assert [(p.name, p.nodes, p.max_nodes, p.max_time_h) for p in slurm.partitions] == [
        ("standard-g", 4, 4, 48.0),  # its MaxNodes is 1024
        ("dev-g", 2, 2, 3.0),
        ("open", 2, None, None),
    ]
    assert slurm.node_names == "nid[005000-005003]" and slurm.requeues_after_node_failure is True
    assert slurm.devices.option == "--gres=gpu:mi250:8" and "AMD_EPYC_7A53,x1101" in slurm.quirks[0]
    assert look.unseen["slurm.account_required"] == "scontrol does not tell"


def test_slurm_24_05_lists_the_partitions_of_this_node_first():
    look = a_look("24.05", "a02")
    slurm = probe_slurm(look)
    assert [(p.name, p.nodes, p.max_nodes, p.max_time_h) for p in slurm.partitions] == [
        ("gpu", 2, 2, 12.5),
        ("compute", 48, None, 48.0),
    ]
    assert slurm.node_names == "a[02-03]" and slurm.devices.option == "--gres=gpu:nvidia_a100-sxm4-40gb:4"
    assert slurm.quirks == [] and slurm.requeues_after_node_failure is None
    assert look.unseen["slurm.requeues_after_node_failure"] == "scontrol show config failed: not found"


def test_on_a_login_node_the_default_partition_comes_first_and_its_gpus_are_unseen():
    look = a_look("24.05", "login1")
    run = look.run
    look.run = lambda command: Answer("\n".join(run(command).text.splitlines()[::-1]), run(command).fault)
    assert [p.name for p in probe_slurm(look).partitions] == ["compute", "gpu"]
    assert look.unseen["slurm.devices"] == "scontrol show node login1 -o failed: not found"


def test_values_with_blanks_and_equal_signs_are_read_whole():
    node = parse_record(recorded("scontrol_node_24.05.txt").strip())
    assert node["OS"] == "Linux 4.18.0-553.8.1.el8_10.x86_64 #1 SMP Tue Jul 2 07:26:33 EDT 2024"
    assert node["CfgTRES"].endswith("gres/gpu:nvidia_a100-sxm4-40gb=4") and node["CPUSpecList"] == "63"
    assert node["Partitions"] == "gpu,batch" and node["ThreadsPerCore"] == "1" and node["State"] == "MIXED+DRAIN"


def test_limits_that_are_none_stay_unknown():
    partition = parse_partition({"PartitionName": "p", "TotalNodes": "0", "MaxNodes": "UNLIMITED", "MaxTime": "NONE"})
    assert (partition.nodes, partition.max_nodes, partition.max_time_h) == (None, None, None)


@pytest.mark.parametrize(
    ("gres", "option"),
    [
        ("gpu:8", "gpu:8"),
        ("gpu:a100:4(S:0-1)", "gpu:a100:4"),
        ("cpu:amd:1,gpu:gh200:4(S:0,1)", "gpu:gh200:4"),
        ("nvme:1", None),
        ("(null)", None),
        ("", None),
    ],
)
def test_gpus_are_found_among_the_generic_resources(gres, option):
    assert parse_gres(gres) == option


@pytest.mark.parametrize("text", ["", "No partitions in the system\n", "PartitionName=-x/y Nodes=\n", "\0\n=\n"])
def test_garbage_is_no_slurm_and_the_reason_is_kept(text):
    look = Look(Path("/nowhere"), lambda command: Answer(text), [0])
    assert probe_slurm(look) is None
    assert look.unseen == {"slurm": "scontrol show partition -o lists none"}


def test_a_slurm_that_does_not_answer_is_unseen_with_its_complaint():
    complaint = "scontrol show partition -o failed: Unable to contact slurm controller (connect failure)"
    look = Look(Path("/nowhere"), lambda command: Answer("", complaint), [0])
    machine = probe(look, with_slurm=True)
    assert machine.slurm is None and machine.unseen["slurm"] == complaint


def test_every_fact_of_a_probed_machine_has_a_source_and_every_source_a_fact(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1048576 kB\n")
    (tmp_path / "proc/cpuinfo").write_text("model name\t: AMD EPYC 7A53\nflags\t: fpu\n")
    machine = probe(a_look("22.05", "nid005000", tmp_path), with_slurm=True)
    assert machine.slurm is not None and check_machine(machine, "local") == []
