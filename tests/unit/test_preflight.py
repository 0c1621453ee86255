"""The rules by which a preflight judges what it saw, and the table of traps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aifactory_train.errors import MachineError
from aifactory_train.faults import host, preflight, traps
from aifactory_train.faults.preflight import device_faults, memory_faults, occupied_faults, product_faults, rate_faults
from aifactory_train.machine.machine import Device, Network, Nic
from aifactory_train.strictyaml import validate
from aifactory_train.train.meet import judge_words
from aifactory_train.units import format_flops_per_s

A100 = Device(kind="cuda", name="NVIDIA A100-SXM-64GB", per_node=4, memory_bytes=64 * 2**30)
NETWORK = Network(nic_gbit_per_s=200, nics=[Nic(name="mlx5_0", interface="ib0")])


def words(faults: list) -> str:
    return " | ".join(f.sentence() for f in faults)


def test_the_devices_of_the_plan_pass_whether_a_rank_sees_all_or_its_own() -> None:
    name = "NVIDIA A100-SXM4-64GB"
    assert device_faults(A100, [name] * 4, "cuda") == device_faults(A100, [name], "cuda") == []


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (["NVIDIA A100-SXM-64GB"] * 3, "cuda", "torch sees 3 devices, expected 4"),
        (["NVIDIA H100"] * 4, "cuda", "the devices are NVIDIA H100, expected NVIDIA A100-SXM-64GB"),
        (["AMD Instinct MI250X"] * 4, "rocm", "torch is built for rocm, the machine has cuda devices"),
    ],
)
def test_other_devices_are_a_fault_with_both_values(names: list[str], kind: str, said: str) -> None:
    assert said in words(device_faults(A100, names, kind))


def test_a_gh200_is_not_taken_for_an_h200() -> None:
    wanted = Device(kind="cuda", name="NVIDIA GH200 120GB", per_node=4)
    assert device_faults(wanted, ["NVIDIA H200"] * 4, "cuda")
    assert device_faults(wanted, ["NVIDIA GH200 480GB"] * 4, "cuda") == []


def test_memory_may_differ_by_what_vendors_round_and_no_more() -> None:
    assert memory_faults(A100, 64 * 10**9) == memory_faults(A100, int(63.4 * 2**30)) == []
    assert "40.0 GiB, expected 64.0 GiB" in words(memory_faults(A100, 40 * 2**30))
    assert memory_faults(A100, 80 * 2**30) and memory_faults(A100, 80 * 2**30, at_most=False) == []
    assert memory_faults(A100.model_copy(update={"memory_bytes": None}), 1) == []


def test_what_sits_on_the_device_is_a_fault_above_a_tenth() -> None:
    assert occupied_faults(91, 100, "") == []
    assert "taken by something else: 77, python" in words(occupied_faults(80, 100, "77, python"))


def test_a_rate_below_the_reference_is_a_fault_and_without_reference_is_none() -> None:
    assert rate_faults("x", 1.0, None, format_flops_per_s) == rate_faults("x", 71e12, 100e12, format_flops_per_s) == []
    said = words(rate_faults("matrix products (bf16)", 69e12, 100e12, format_flops_per_s))
    assert "69.0 TFLOP/s, 69.0 % of the 100 TFLOP/s" in said


def test_wrong_products_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(preflight.MATMUL_SIZE, "cpu", 64)
    device = torch.device("cpu")
    assert preflight.repeat_product(device, torch.float32, 0.0) == (True, 0, 1)
    assert preflight.repeat_product(device, torch.bfloat16, 0.0) == (True, 0, 1)
    good, n_calls = torch.Tensor.__matmul__, 0

    def flips_a_bit_once(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        out = good(a, b)
        out[3, 5] += float(n_calls == 2)
        return out

    monkeypatch.setattr(torch.Tensor, "__matmul__", flips_a_bit_once)
    finite, n_wrong, n = preflight.repeat_product(device, torch.float32, 0.0)
    assert "1 of 1 repeats" in words(product_faults(finite, n_wrong, n))
    assert "not finite" in words(product_faults(False, 0, 1)) and product_faults(True, 0, 9) == []


def test_a_binding_must_lie_inside_the_map_hardware_threads_included() -> None:
    def alone(cpu: int) -> list[int]:
        return [cpu]

    place = [1, 2, 3]
    assert host.mapped_binding_faults([1, 2], place, alone) == []
    assert "bound to cores 0-3; the map wants 1-3" in words(host.mapped_binding_faults([0, 1, 2, 3], place, alone))
    assert host.mapped_binding_faults([2, 66], place, lambda cpu: [cpu % 64, cpu % 64 + 64]) == []


def test_too_few_cores_are_named() -> None:
    assert host.core_count_faults([0, 1, 2, 3], 4) == []
    assert "is 2 (4,9), the plan counts on 4; give each rank" in words(host.core_count_faults([4, 9], 4))


def write_port(sys_class: Path, state: str, rate: str, operstate: str = "up") -> None:
    port, interface = sys_class / "infiniband" / "mlx5_0" / "ports" / "1", sys_class / "net" / "ib0"
    for folder in (port, interface):
        folder.mkdir(parents=True, exist_ok=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")
    (interface / "operstate").write_text(f"{operstate}\n")
    (interface / "speed").write_text("-1\n")


@pytest.mark.parametrize(
    ("state", "rate", "operstate", "said"),
    [
        ("4: ACTIVE", "200 Gb/sec (4X HDR)", "up", ""),
        ("4: ACTIVE", "400 Gb/sec (4X NDR)", "unknown", ""),
        ("2: INIT", "200 Gb/sec (4X HDR)", "up", "mlx5_0 port 1 is '2: INIT', expected ACTIVE"),
        ("4: ACTIVE", "50 Gb/sec (1X HDR)", "up", "mlx5_0 port 1 runs at 50 Gbit/s, expected 200 Gbit/s"),
        ("4: ACTIVE", "200 Gb/sec (4X HDR)", "down", "interface ib0 is down, expected up"),
    ],
)
def test_an_infiniband_card_must_be_active_up_and_at_its_rate(
    tmp_path: Path, state: str, rate: str, operstate: str, said: str
) -> None:
    write_port(tmp_path, state, rate, operstate)
    assert words(host.network_faults(NETWORK, tmp_path)).startswith(said)
    assert bool(host.network_faults(NETWORK, tmp_path)) == bool(said)


def test_a_card_that_is_only_an_interface_tells_its_speed_there(tmp_path: Path) -> None:
    network = Network(nic_gbit_per_s=200, nics=[Nic(name="hsn0", interface="hsn0")])
    assert words(host.network_faults(network, tmp_path)).startswith("network card hsn0 is not there")
    interface = tmp_path / "net" / "hsn0"
    interface.mkdir(parents=True)
    (interface / "operstate").write_text("up\n")
    (interface / "speed").write_text("200000\n")
    assert host.network_faults(network, tmp_path) == []
    (interface / "speed").write_text("100000\n")
    assert "hsn0 runs at 100 Gbit/s, expected 200 Gbit/s" in words(host.network_faults(network, tmp_path))


def test_a_full_run_folder_is_not_the_nodes_doing(tmp_path: Path) -> None:
    (fault,) = host.disk_faults(tmp_path, 31 * 10**9, 10**9, n_checkpoints=0)
    assert fault.elsewhere and "28.9 GiB free" in fault.what and "29.8 GiB" in fault.what
    assert host.disk_faults(tmp_path, 31 * 10**9, 10**9, n_checkpoints=1) == []


def test_the_table_of_traps_can_be_read_and_each_has_its_source() -> None:
    found = traps.load_traps()
    assert len(found) >= 5 and len({t.name for t in found}) == len(found)


@pytest.mark.parametrize(
    ("version", "bounds", "inside"),
    [
        ("2.28.9", "==2.28.9", True),
        ("2.28.9+cuda13.0", ">=2.28.3,<=2.28.9", True),
        ("2.28.10", "<2.28.9", False),
        ("2.28", "==2.28.0", True),
        ("2.28.3", ">2.28.3", False),
        ("7.14.60850", ">=7.14,<7.15", True),
        ("2.5", "!=2.5", False),
        ("unknown", ">=0", False),
    ],
)
def test_version_ranges(version: str, bounds: str, inside: bool) -> None:
    assert traps.in_range(version, bounds) is inside


def test_a_trap_needs_all_of_its_conditions() -> None:
    trap = next(t for t in traps.load_traps() if t.name == "nccl-proxy-slots-on-arm")
    assert traps.applies(trap.when, "2.28.9", "aarch64", "cuda", 1)
    assert not traps.applies(trap.when, "2.28.9", "x86_64", "cuda", 1)
    assert not traps.applies(trap.when, "2.29.3", "aarch64", "cuda", 1)
    assert not traps.applies(trap.when, "2.28.9", "aarch64", "rocm", 1)
    assert not traps.applies(trap.when, None, "aarch64", "cuda", 1)
    two_nodes = next(t for t in traps.load_traps() if t.name == "libfabric-aws-ofi-rccl").when
    assert traps.applies(two_nodes, "1.22", "x86_64", "rocm", 2)
    assert not traps.applies(two_nodes, "1.22", "x86_64", "rocm", 1)


def test_a_trap_without_source_or_with_a_broken_range_is_refused() -> None:
    row = {
        "name": "x",
        "when": {"package": "nccl", "versions": "~2.28"},
        "what": "hangs",
        "do": "take another",
        "severity": "fault",
        "date": "2026-01-01",
    }
    with pytest.raises(MachineError, match="cannot read '~2.28'(.|\n)*source: missing"):
        validate(traps.Traps, {"traps": [row]}, {}, "traps.yaml", MachineError)


def test_a_version_is_read_or_none() -> None:
    assert traps.probe_version("torch") == torch.__version__.split("+")[0] or "+" in str(traps.probe_version("torch"))
    assert traps.probe_version("no-such-package") is None


def word(rate: float = 1e12, fit: bool = True, gpu: str | None = None) -> dict:
    return {"fit": fit, "rates": {"matmul_flops_per_s": rate}, "id": gpu}


def test_rank_0_calls_slow_ranks_and_shared_gpus_unfit() -> None:
    found = judge_words({r: word(rate=5e11 if r == 2 else 1e12) for r in range(4)}, 4)
    assert found["unfit"] == [2]
    assert found["slow"][2] == "matmul_flops_per_s is 500 GFLOP/s; the median of all ranks is 1.00 TFLOP/s"
    assert judge_words({0: word(), 1: word(fit=False)}, 2) == {"unfit": [1], "slow": {}}
    shared = {r: word(gpu="a" if r < 2 else f"b{r}") for r in range(4)}
    assert judge_words(shared, 2)["slow"] == {1: "has the same GPU as rank 0; each rank must get one of its own"}
    assert judge_words(shared, 1)["slow"] == {}, "the same number on two nodes is two GPUs"
