"""Recorded outputs of the vendors' tools, and what the probe makes of them. Their first line says what they follow."""

import json
import os
import time
from pathlib import Path

import pytest

from aifactory_train.machine.compare import render_differences
from aifactory_train.machine.load import load_machine
from aifactory_train.machine.probe import probe
from aifactory_train.machine.probe_gpus import (
    parse_amd_addresses,
    parse_amd_smi,
    parse_amd_topology,
    parse_nvidia_addresses,
    parse_nvidia_smi,
    parse_nvlink_rates,
    parse_rocm_smi,
    parse_rocm_topology,
    parse_topo_matrix,
    parse_xgmi_links,
    probe_gpus,
)
from aifactory_train.machine.probe_look import Answer, Look, run_tool

DGX_BUSES = ["07", "0F", "47", "4E", "87", "90", "B7", "BD"]
MI250X_ADDRESSES = [f"0000:{bus}:00.0" for bus in ("c1", "c6", "c9", "ce", "d1", "d6", "d9", "de")]
A100 = "".join(f"NVIDIA A100-SXM4-80GB, 81920, 8.0, 00000000:{b}:00.0, 400.00\n" for b in DGX_BUSES)
GH200 = "".join(f"NVIDIA GH200 120GB, 97871, 9.0, 0000000{g}:01:00.0, 900.00\n" for g in range(4))
MI250X = json.dumps(
    {
        f"card{i}": {
            "VRAM Total Memory (B)": "68702699520",
            "Card Series": "AMD Instinct MI250X",
            "PCI Bus": bus.upper(),
        }
        for i, bus in enumerate(MI250X_ADDRESSES)
    }
)


def recorded(name: str) -> str:
    lines = (Path(__file__).parent / "recorded" / name).read_text().splitlines(keepends=True)
    assert lines[0].startswith("# ")
    return "".join(lines[1:])


def a_look(root: Path, answers: dict[str, str], cpus: int = 2) -> Look:
    def run(command: list[str]) -> Answer:
        text = next((answers[key] for key in answers if " ".join(command).startswith(key)), None)
        return Answer(text) if text is not None else Answer("", f"{command[0]} is not there")

    uname = os.uname_result(("Linux", "nid005000.site", "5.14", "#1", "x86_64"))
    return Look(root, run, list(range(cpus)), uname)


def test_an_a100_dgx_tells_its_nvlinks_cores_numa_nodes_and_nics():
    matrix = parse_topo_matrix(recorded("nvidia_smi_topo_dgx_a100.txt"))
    assert len(matrix.links) == 28 and set(matrix.links.values()) == {12}
    assert matrix.numa_nodes == {0: 3, 1: 3, 2: 1, 3: 1, 4: 7, 5: 7, 6: 5, 7: 5}
    assert matrix.cpus[0] == [*range(48, 64), *range(176, 192)]
    assert [nic for nic, way in matrix.paths[6].items() if way == "PXB"] == ["mlx5_6", "mlx5_7"]


@pytest.mark.parametrize("tabs", [True, False])
def test_a_gh200_node_has_six_links_to_each_and_its_first_numa_node(tabs):
    text = recorded("nvidia_smi_topo_gh200.txt")
    matrix = parse_topo_matrix(text if tabs else text.expandtabs(8))
    assert matrix.links == {(0, 1): 6, (0, 2): 6, (0, 3): 6, (1, 2): 6, (1, 3): 6, (2, 3): 6}
    assert matrix.numa_nodes == {0: 0, 1: 1, 2: 2, 3: 3} and matrix.cpus[3] == list(range(216, 288))


def test_a_row_copied_with_blanks_and_lacking_a_cell_is_not_read_one_column_off():
    text = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    text += "GPU0\t X \tNV4\t\t1\t\tN/A\nGPU1\tNV4\t X \t\t1\t\tN/A\n"
    assert parse_topo_matrix(text).numa_nodes == {0: 1, 1: 1} and not parse_topo_matrix(text).cpus
    blanks = parse_topo_matrix(text.expandtabs(8))
    assert blanks.links == {(0, 1): 4} and not blanks.numa_nodes and not blanks.cpus


def test_inactive_nvlinks_are_not_counted_as_rates():
    assert parse_nvlink_rates(recorded("nvidia_smi_nvlink_h100.txt")) == {0: 26.562e9, 1: 26.562e9}
    assert parse_nvlink_rates("GPU 0: X\n\t Link 0: 0 GB/s\n\t Link 1: 25 GB/s\n") == {0: 25e9}


def test_gpus_tell_their_address_and_power_and_share_of_memory():
    device = parse_nvidia_smi(GH200)
    assert (device.per_node, device.memory_bytes, device.power_w) == (4, 97871 * 1024**2, 900.0)
    assert parse_nvidia_addresses(GH200)[1] == "0001:01:00.0" and parse_nvidia_addresses(A100)[1] == "0000:0f:00.0"
    shared = parse_nvidia_smi("NVIDIA GB10, [N/A], 12.1, 0000000F:01:00.0, [N/A]\n")
    assert shared.name == "NVIDIA GB10" and shared.memory_bytes is None and shared.power_w is None


def test_links_of_an_a100_dgx_are_one_rate_for_every_pair(tmp_path):
    answers = {"nvidia-smi --query": A100, "nvidia-smi topo": recorded("nvidia_smi_topo_dgx_a100.txt")}
    machine = probe(a_look(tmp_path, answers, cpus=256), with_slurm=False)
    assert machine.topology.link_kind == "NVLink 3" and machine.topology.all_to_all_bytes_per_s == 300e9
    assert [p.numa_node for p in machine.topology.places] == [3, 3, 1, 1, 7, 7, 5, 5]
    assert "nvidia-smi topo -m" in machine.source_of("topology.all_to_all_bytes_per_s").source
    assert machine.unseen["topology.places.*.nic"] == "no NIC is seen"


def test_a_link_is_no_faster_than_the_vendor_says_and_no_faster_than_it_shows(tmp_path):
    topo = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV12\t0-1\t0\nGPU1\tNV12\t X \t0-1\t0\n"
    h100 = "NVIDIA H100 PCIe, 81559, 9.0\n" * 2
    answers = {"nvidia-smi --query": h100, "nvidia-smi topo": topo}
    shown = recorded("nvidia_smi_nvlink_h100.txt")
    for status, rate in ((shown, 300e9), (shown.replace("26.562", "13.281"), 12 * 13.281e9)):
        gpus = probe_gpus(a_look(tmp_path, {**answers, "nvidia-smi nvlink": status}))
        assert gpus.topology.all_to_all_bytes_per_s == pytest.approx(rate)


def test_a_generation_without_a_known_rate_takes_what_nvlink_shows_or_stays_unseen(tmp_path):
    topo = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV4\t0-1\t0\nGPU1\tNV4\t X \t0-1\t0\n"
    answers = {"nvidia-smi --query": "NVIDIA RTX A6000, 49140, 8.6\n" * 2, "nvidia-smi topo": topo}
    look = a_look(tmp_path, answers)
    assert probe_gpus(look).topology.all_to_all_bytes_per_s is None
    assert "topology.links" in look.unseen
    status = "GPU 0: NVIDIA RTX A6000 (UUID: GPU-1)\n\t Link 0: 14.062 GB/s\n"
    gpus = probe_gpus(a_look(tmp_path, {**answers, "nvidia-smi nvlink": status}))
    assert gpus.topology.all_to_all_bytes_per_s == 4 * 14.062e9 and gpus.topology.link_kind == "NVLink"


def test_gpus_on_pcie_have_no_links_and_say_so(tmp_path):
    topo = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tSYS\t0-1\t0\nGPU1\tSYS\t X \t0-1\t0\n"
    look = a_look(tmp_path, {"nvidia-smi --query": "NVIDIA L40S, 46068, 8.9\n" * 2, "nvidia-smi topo": topo})
    assert probe_gpus(look).topology.links == []
    assert look.unseen["topology.links"] == "nvidia-smi topo -m shows no NVLink between the devices"


def test_only_neighbours_among_mi250x_dies_have_a_link_and_its_rate():
    links = parse_amd_topology(recorded("amd_smi_topology_mi250x.json"))
    assert len(links) == 12 and (0, 3) not in links
    assert (links[0, 1], links[0, 6], links[0, 2]) == (200e9, 100e9, 50e9)


def test_rocm_smi_tells_weights_and_numa_nodes_of_eight_dies():
    weights, nodes = parse_rocm_topology(recorded("rocm_smi_topo_mi250x.txt"))
    assert nodes == {0: 3, 1: 3, 2: 1, 3: 1, 4: 0, 5: 0, 6: 2, 7: 2}
    assert len(weights) == 28 and (weights[0, 1], weights[0, 3]) == (15, 30)
    direct = {pair for pair, weight in weights.items() if weight == 15}
    assert direct == set(parse_amd_topology(recorded("amd_smi_topology_mi250x.json")))


def test_pcie_pairs_of_rocm_smi_are_no_xgmi_links():
    text = recorded("rocm_smi_topo_mi250x.txt").replace("XGMI", "PCIE")
    assert parse_rocm_topology(text)[0] == {}


def test_the_driver_counts_the_links_of_each_pair_and_a_matrix_in_another_order_is_not_believed():
    rows = recorded("xgmi_num_links_mi250x.txt").splitlines()
    links = parse_xgmi_links(rows)
    by_tool = parse_amd_topology(recorded("amd_smi_topology_mi250x.json"))
    assert {pair: n * 50e9 for pair, n in links.items()} == by_tool
    assert parse_xgmi_links(["00 04", "04 00"]) == {(0, 1): 4} and parse_xgmi_links(["04 02", "02 04"]) == {}
    assert parse_xgmi_links(rows[::-1]) == {} and parse_xgmi_links(rows[:7]) == {} and parse_xgmi_links([""] * 8) == {}


def a_mi250x_node(root: Path, rows: list[str]) -> None:
    for i, address in enumerate(MI250X_ADDRESSES):
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        node = [3, 3, 1, 1, 0, 0, 2, 2][i]
        (folder / "numa_node").write_text(f"{node}\n")
        (folder / "local_cpulist").write_text(f"{16 * node}-{16 * node + 15},{16 * node + 64}-{16 * node + 79}\n")
        if rows:
            (folder / "xgmi_num_links").write_text(rows[i] + "\n")


@pytest.mark.parametrize("by", ["amd-smi", "sys"])
def test_a_node_with_mi250x_is_described_by_whichever_source_is_there(tmp_path, by):
    a_mi250x_node(tmp_path, recorded("xgmi_num_links_mi250x.txt").splitlines() if by == "sys" else [])
    answers = {"rocm-smi --showproduct": MI250X, "rocm-smi --showtopo": recorded("rocm_smi_topo_mi250x.txt")}
    if by == "amd-smi":
        answers["amd-smi topology"] = recorded("amd_smi_topology_mi250x.json")
    machine = probe(a_look(tmp_path, answers, cpus=64), with_slurm=False)
    assert machine.device.per_node == 8 and machine.topology.link_kind == "xGMI"
    assert [(link.devices, link.bytes_per_s) for link in machine.topology.links][:3] == [
        ([0, 1], 200e9),
        ([0, 2], 50e9),
        ([0, 6], 100e9),
    ]
    assert [p.numa_node for p in machine.topology.places] == [3, 3, 1, 1, 0, 0, 2, 2]
    assert machine.topology.places[0].cores == "48-63"
    assert ("amd-smi" if by == "amd-smi" else "xgmi_num_links") in machine.source_of("topology.links").source


def test_a_recorded_node_agrees_with_the_machine_file_of_its_kind_in_links_and_numa_nodes(tmp_path):
    a_mi250x_node(tmp_path, [])
    answers = {"rocm-smi --showp": MI250X, "amd-smi topology": recorded("amd_smi_topology_mi250x.json")}
    machine = probe(a_look(tmp_path, answers, cpus=64), with_slurm=False)
    differing = [line for line in render_differences(machine, load_machine("lumi-g")).splitlines() if ": here " in line]
    assert not [line for line in differing if line.startswith(("device.", "topology."))]


def test_without_rates_the_links_are_unseen_and_the_reason_names_the_missing_tool(tmp_path):
    look = a_look(tmp_path, {"rocm-smi --showp": MI250X, "rocm-smi --showtopo": recorded("rocm_smi_topo_mi250x.txt")})
    assert probe_gpus(look).topology.links == []
    assert look.unseen["topology.links"] == (
        "rocm-smi --showtopo shows 12 pairs joined by xGMI directly, not how fast; amd-smi is not there"
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_amd_smi_describes_devices_where_rocm_smi_is_gone(wrapped):
    text = recorded("amd_smi_static_mi300x.json")
    text = json.dumps({"gpu_data": json.loads(text)}) if wrapped else text
    device = parse_amd_smi(text)
    assert (device.kind, device.name, device.per_node) == ("rocm", "AMD Instinct MI300X", 2)
    assert device.memory_bytes == 196592 * 1024**2 and device.native_bf16
    assert parse_amd_addresses(text) == ["0000:05:00.0", "0000:26:00.0"]


GARBAGE = [
    "",
    "\0\x1b[4m",
    "null",
    "[]",
    "[1, null]",
    '[{"gpu": "x", "asic": "N/A", "links": "N/A"}]',
    "GPU0 CPU\nGPU0 X",
]


@pytest.mark.parametrize("text", [*GARBAGE, '{"card0": 3}', "GPU 0:\n\t Link 0: GB/s", "a,b\n,,\n"])
def test_garbage_is_no_device_and_no_link(text):
    assert parse_nvidia_smi(text) is None and parse_rocm_smi(text) is None
    assert parse_topo_matrix(text).links == {} and parse_nvlink_rates(text) == {}
    assert parse_rocm_topology(text) == ({}, {}) and parse_amd_topology(text) == {}
    parse_amd_smi(text)


def test_a_tool_that_is_missing_fails_or_hangs_is_told_as_such(tmp_path, monkeypatch):
    assert run_tool(["no-such-tool-here"]).fault == "no-such-tool-here is not there"
    assert run_tool(["sh", "-c", "echo first >&2; echo broken >&2; exit 3"]).fault.endswith("exit 3 failed: broken")
    assert run_tool(["sh", "-c", "printf '\\377ok'"]).text.endswith("ok")
    monkeypatch.setattr("aifactory_train.machine.probe_look._ANSWER_WITHIN_S", 0.2)
    begin_s = time.monotonic()
    # The child of the tool leaves its group and keeps its output open: it must not be waited for.
    assert run_tool(["sh", "-c", "setsid sleep 5 & sleep 5"]).fault.endswith("no answer in 0.2 s")
    assert time.monotonic() - begin_s < 3
