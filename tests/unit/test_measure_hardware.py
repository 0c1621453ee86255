"""Node and GPU of each rank, from trees as Linux shows them and from what NVML and amdsmi answer; and the drift."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aifactory_train.bench.compare import changed_provenance
from aifactory_train.bench.tables import build_provenance
from aifactory_train.machine.probe_look import Look
from aifactory_train.measure.hardware import Place, find_libraries, join_places, probe_gpu, probe_node
from aifactory_train.measure.surroundings import describe_system
from aifactory_train.results import provenance
from bench_records import a_record

GPU = torch.device("cuda", 0)
CARD = "sys/class/infiniband/mlx5_0"
FILES = {
    "etc/os-release": 'NAME="SLES"\nPRETTY_NAME="SUSE Linux Enterprise 15 SP6"\n',
    "proc/cmdline": "quiet mitigations=off wwinit.uri=http://10.0.0.1/?assetkey=hush isolcpus=4-7\n",
    "proc/cpuinfo": "model name : EPYC 7763\nmicrocode : 0xa0011d1\n",
    "proc/meminfo": "MemTotal: 1024 kB\nHugePages_Total:     512\n",
    "proc/self/cgroup": "0::/job_1/step_0\n",
    "proc/sys/kernel/numa_balancing": "1\n",
    "sys/fs/cgroup/job_1/memory.max": "4096\n",
    "sys/fs/cgroup/job_1/cpu.max": "800000 100000\n",
    "sys/fs/cgroup/job_1/step_0/cpu.max": "max 100000\n",
    "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/node/node0/cpulist": "0-3\n",
    "sys/devices/system/node/node1/cpulist": "4-7\n",
    f"{CARD}/fw_ver": "20.35.1012\n",
    f"{CARD}/board_id": "MT_0000000223\n",
    f"{CARD}/ports/1/state": "4: ACTIVE\n",
    f"{CARD}/ports/1/rate": "200 Gb/sec (4X HDR)\n",
    f"{CARD}/ports/1/link_layer": "InfiniBand\n",
}


def a_node(root: Path, **changes: str) -> Look:
    for name, text in (FILES | changes).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Look(root, uname=os.uname())


def test_a_node_tells_its_system_limits_and_cards(tmp_path: Path) -> None:
    facts, missed = probe_node(a_node(tmp_path))
    told = {
        "os": "SUSE Linux Enterprise 15 SP6",
        "kernel_options": "mitigations=off isolcpus=4-7",
        "microcode": "0xa0011d1",
        "cpu_governor": "performance",
        "numa_nodes": "0: 0-3; 1: 4-7",
        "numa_balancing": "1",
        "memory_bytes": 1024 * 1024,
        "hugepages": 512,
        "transparent_hugepages": "madvise",
        "cgroup_memory_bytes": 4096,
        "cgroup_cpus": 8.0,
        "nics": "mlx5_0 200 Gbit/s MT_0000000223 firmware 20.35.1012",
    }
    assert {key: facts[key] for key in told} == told and facts["kernel"] == os.uname().release
    assert [one.probe for one in missed] == ["node.sockets", "node.threads_per_core"]


def test_what_a_node_does_not_tell_is_listed_with_where_it_was_looked_for(tmp_path: Path) -> None:
    facts, missed = probe_node(Look(tmp_path))
    reasons = {one.probe: one.reason for one in missed}
    assert "kernel_options" not in facts and reasons["node.kernel_options"] == "not told by /proc/cmdline"
    assert facts["cgroup_memory_bytes"] == facts["cgroup_cpus"] == "no limit"


class Nvml:
    """NVML of one H100 on a driver that does not tell the GSP firmware."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_NVLINK_MAX_LINKS = 1, 2, 18
    driver, power_limit_mw = b"550.54.15", 500_000

    class NVMLError(Exception):
        pass

    def __getattr__(self, name: str):
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
            "nvmlSystemGetDriverVersion": self.driver,
            "nvmlSystemGetCudaDriverVersion_v2": 12040,
            "nvmlDeviceGetVbiosVersion": "96.00.89.00.01",
            "nvmlDeviceGetInforomImageVersion": "G520.0200.00.05",
            "nvmlDeviceGetPciInfo": SimpleNamespace(pciDeviceId=0x233010DE, pciSubSystemId=0x16C110DE),
            "nvmlDeviceGetCurrPcieLinkWidth": 16,
            "nvmlDeviceGetEnforcedPowerLimit": self.power_limit_mw,
            "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetEccMode": [1, 1],
            "nvmlDeviceGetMigMode": [0, 0],
            "nvmlDeviceGetPersistenceMode": 1,
        }
        if name not in answers:
            raise AttributeError(f"no {name} in this version")
        return lambda *_: answers[name]

    def nvmlDeviceGetNvLinkState(self, _: object, link: int) -> int:
        if link >= 6:
            raise self.NVMLError("Invalid Argument")
        return int(link != 3)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2", pci_bus_id=0xC1)
    )
    monkeypatch.setattr(torch.version, "hip", None)
    return fake


def test_a_gpu_tells_driver_firmware_identity_and_cap(nvml: Nvml) -> None:
    facts, missed = probe_gpu(GPU)
    told = {
        "driver": "550.54.15",
        "cuda_of_driver": "12.4",
        "vbios": "96.00.89.00.01",
        "pci_id": "10de:2330",
        "pci_subsystem_id": "10de:16c1",
        "nvlinks": 5,
        "power_cap_w": 500.0,
        "power_cap_default_w": 700.0,
        "most_sm_clock_hertz": 1.98e9,
        "ecc": True,
        "mig": False,
    }
    assert {key: facts[key] for key in told} == told
    [gsp] = missed
    assert gsp.probe == "gpu.firmware" and "no nvmlDeviceGetGspFirmwareVersion in this version" in gsp.reason


def test_without_nvml_the_extra_to_install_is_named(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    facts, [missed] = probe_gpu(GPU)
    assert facts == {} and "pip install 'aifactory-train[gpu]'" in missed.reason


def test_an_amd_gpu_tells_the_same(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = SimpleNamespace(
        AmdSmiException=RuntimeError,
        amdsmi_init=lambda: None,
        amdsmi_get_processor_handles=lambda: ["other", "ours"],
        amdsmi_get_gpu_device_bdf=lambda handle: {"other": "0000:c5:00.0", "ours": "0000:c1:00.0"}[handle],
        amdsmi_get_gpu_asic_info=lambda handle: {
            "market_name": handle,
            "device_id": "0x7408",
            "subsystem_id": "0x0b0c",
        },
        amdsmi_get_gpu_driver_info=lambda handle: {"driver_version": "6.3.6"},
        amdsmi_get_gpu_vbios_info=lambda handle: {"part_number": "113-D65209"},
        amdsmi_get_fw_info=lambda handle: {"fw_list": [{"fw_name": "SMC", "fw_version": "68.58"}]},
        amdsmi_get_power_cap_info=lambda handle: {"power_cap": 500_000_000, "default_power_cap": 560_000_000},
        amdsmi_get_gpu_compute_partition=lambda handle: "SPX",
    )
    monkeypatch.setitem(sys.modules, "amdsmi", smi)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    facts, missed = probe_gpu(GPU)
    assert facts == {
        "name": "ours",
        "driver": "6.3.6",
        "firmware": "SMC 68.58",
        "pci_id": "1002:7408",
        "pci_subsystem_id": "0b0c",
        "power_cap_w": 500.0,
        "power_cap_default_w": 560.0,
        "compute_partition": "SPX",
    }
    assert [one.probe for one in missed] == ["gpu.vbios", "gpu.memory_partition"]


def ranks_on(hosts: str, **of_gpu: list) -> list[dict]:
    """One rank for each letter of `hosts`, with the values of each fact in that order."""
    return [
        Place(f"n{host}", {f"gpu.{key}": values[i] for key, values in of_gpu.items()}, []).as_json()
        for i, host in enumerate(hosts)
    ]


def test_what_most_ranks_have_is_common_and_the_others_are_named() -> None:
    joined = join_places(ranks_on("1122", driver=["550", "550", "550", "535"], mig=[False] * 4))
    assert joined.common == {"gpu": {"driver": "550", "mig": False}}
    assert joined.drift == {"gpu.driver": "550 on n[1-2] (ranks 0-2); 535 on n2 (rank 3)"}


def test_a_rank_that_tells_nothing_is_drift_too() -> None:
    places = ranks_on("12", power_cap_w=[700.0, 700.0])
    del places[1]["facts"]["gpu.power_cap_w"]
    assert join_places(places).drift == {"gpu.power_cap_w": "700.0 on n1 (rank 0); not told on n2 (rank 1)"}


def record_of(places: list[dict]):
    joined = join_places(places)
    return a_record(provenance={"git_sha": "a", "versions": {"python": "3"}, **joined.common, "drift": joined.drift})


def test_a_comparison_and_a_report_name_what_differs() -> None:
    before, after = (record_of(ranks_on("11", driver=[driver] * 2)) for driver in ("550", "570"))
    changes = {change.key: (change.a, change.b) for change in changed_provenance([before], [after])}
    assert changes == {"gpu.driver": ("550", "570")}
    assert [key for key, _ in build_provenance([before, after]).different] == ["gpu.driver"]


def test_ranks_of_one_job_that_differ_are_a_difference_of_its_report() -> None:
    found = build_provenance([record_of(ranks_on("12", driver=["550", "535"]))])
    assert found.different == [("drift.gpu.driver", [("550 on n1 (rank 0); 535 on n2 (rank 1)", "n1")])]
    assert ("gpu.driver", "550") in found.common


def test_one_changed_package_changes_the_sum_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def sum_of(**versions: str) -> str:
        found = [SimpleNamespace(name=name, version=version) for name, version in versions.items()]
        monkeypatch.setattr(provenance.metadata, "distributions", lambda: found)
        return provenance.packages()["packages_sha256"]

    assert sum_of(a_b="1", torch="2") == sum_of(torch="2", a_b="1") != sum_of(a_b="1", torch="2.1")


def test_libraries_that_carry_messages_are_named_with_their_files(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text(
        "7f1 r-xp 0 08:01 1   /opt/lib/libfabric.so.1.21.0\n7f2 r-xp 0 08:01 1   /opt/my lib/libnccl.so.2\n"
        "7f3 r-xp 0 08:01 2   /opt/lib/libnccl-net-ofi.so\n7f4 r-xp 0 08:01 2   /usr/lib/libc.so.6\n7f5 rw-p 0 0 0\n"
    )
    assert find_libraries(maps) == {
        "libfabric": "/opt/lib/libfabric.so.1.21.0",
        "libnccl-net-ofi": "/opt/lib/libnccl-net-ofi.so",
        "libnccl": "/opt/my lib/libnccl.so.2",
    }


def test_a_system_is_described_in_mlperfs_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = a_node(tmp_path)
    facts, _ = probe_node(look)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    system = describe_system("EPYC 7763", {"node": facts}, look)
    assert system["host_processor_model_name"] == "EPYC 7763" and system["accelerators_per_node"] == 0
    assert system["host_networking"] == "1x 200 Gbit/s InfiniBand"
    assert system["operating_system"].startswith("SUSE Linux Enterprise 15 SP6, Linux ")
    assert "accelerator_model_name" not in system
