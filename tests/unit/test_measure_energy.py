"""Energy counters and meters, from trees as Linux shows them on nodes that have them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aifactory_train.bench.record import EnergyWindow, Unavailable
from aifactory_train.measure import energy
from aifactory_train.measure.energy import Counter, EnergyMeter, Meter, amdsmi_joules
from aifactory_train.measure.health import HealthMonitor
from aifactory_train.measure.meters import join_windows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which go on only when the test says so."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(energy.time, "monotonic", lambda: now.s)
    return now


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def rapl_zone(root: Path, zone: str, name: str, energy_uj: int) -> None:
    folder = f"class/powercap/{zone}"
    files = {"name": name, "energy_uj": str(energy_uj), "max_energy_range_uj": "262143328850"}
    write(root, **{f"{folder}/{file}": text for file, text in files.items()})


def windows(meter: EnergyMeter) -> dict[tuple[str, str], float]:
    return {(w.scope, w.method): w.joules for w in meter.end()[0]}


def test_packages_of_a_node_are_added_and_what_is_inside_or_around_them_is_not(tmp_path, clock):
    for zone, name in (("0", "package-0"), ("1", "package-1"), ("0:0", "dram"), ("0:1", "core"), ("2", "psys")):
        rapl_zone(tmp_path, f"intel-rapl:{zone}", name, 1_000_000)
    meter = EnergyMeter(CPU, True, tmp_path)
    meter.begin()
    for zone, name in (("0", "package-0"), ("1", "package-1"), ("0:0", "dram"), ("0:1", "core"), ("2", "psys")):
        rapl_zone(tmp_path, f"intel-rapl:{zone}", name, 6_000_000)
    clock.s += 20
    assert windows(meter) == {("package", "rapl"): 10.0, ("dram", "rapl"): 5.0}


def test_a_counter_that_began_anew_has_gone_once_around(tmp_path, clock):
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 262_143_000_000)
    meter = EnergyMeter(CPU, True, tmp_path)
    meter.begin()
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    clock.s += 20
    assert windows(meter)["package", "rapl"] == pytest.approx(1.0 + 0.328850)


def test_crays_counters_have_their_scopes(tmp_path, clock):
    names = {"energy": 100, "cpu_energy": 10, "memory_energy": 5, "accel0_energy": 30, "accel1_energy": 40}
    write(tmp_path, **{f"cray/pm_counters/{name}": f"{joules} J 1700000000 us" for name, joules in names.items()})
    write(tmp_path, **{"cray/pm_counters/power": "900 W 1700000000 us"})
    meter = EnergyMeter(CPU, True, tmp_path)
    meter.begin()
    write(tmp_path, **{f"cray/pm_counters/{name}": f"{2 * joules} J 1800000000 us" for name, joules in names.items()})
    clock.s += 20
    seen = {scope: joules for (scope, method), joules in windows(meter).items()}
    assert seen == {"node": 100.0, "package": 10.0, "memory": 5.0, "accelerators": 70.0}


def test_the_power_of_grace_hopper_modules_is_integrated(tmp_path, clock):
    for number, name in enumerate(("Module Power Socket 0", "Grace Power Socket 0", "CPU Power Socket 0")):
        folder = f"class/hwmon/hwmon{number}/device"
        write(tmp_path, **{f"{folder}/power1_oem_info": name, f"{folder}/power1_average": "500000000"})
    meter = EnergyMeter(CPU, True, tmp_path)
    assert [m.scope for m in meter.meters] == ["module", "package"]
    meter.begin()
    clock.s += 20
    assert windows(meter) == {
        ("module", "grace_hwmon"): pytest.approx(10_000.0),
        ("package", "grace_hwmon"): pytest.approx(10_000.0),
    }


def test_trapezoids_not_rectangles(clock):
    meter = Meter("gpu", "nvml_power", iter([100.0, 300.0]).__next__)
    meter.look()
    clock.s += 2
    meter.look()
    assert meter.used_j() == 400.0


def test_a_short_window_is_no_claim(tmp_path, clock):
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = EnergyMeter(CPU, True, tmp_path)
    meter.begin()
    clock.s += 0.5
    seen, missed = meter.end()
    assert seen == [] and "0.5 s is shorter than 1 s" in next(m.reason for m in missed if "package" in m.probe)


def test_what_is_not_there_or_not_readable_is_listed_with_its_path(tmp_path):
    write(tmp_path, **{"class/powercap/intel-rapl:0/name": "package-0"})
    reasons = {m.probe: m.reason for m in EnergyMeter(CPU, True, tmp_path).unavailable}
    assert "No such file" in reasons["rapl intel-rapl:0"]
    assert str(tmp_path / "cray/pm_counters") in reasons["pm_counters"] and "grace hwmon" in reasons


def test_only_one_rank_of_a_node_reads_what_belongs_to_the_node(tmp_path):
    rapl_zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = EnergyMeter(CPU, False, tmp_path)
    assert meter.counters == [] and meter.unavailable == []


class Nvml:
    """NVML of one GPU that has used 5 kJ, draws 400 W and is too hot."""

    NVMLError = RuntimeError
    nvmlEventTypeXidCriticalError = 8
    NVML_CLOCK_SM = NVML_TEMPERATURE_GPU = NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
    energy_mj = 5_000_000
    reasons = 0x40
    ecc_errors = 2
    rows = (5, 1, 0, 0)
    xids = ()

    def nvmlEventSetWait(self, events: str, timeout_ms: int) -> SimpleNamespace:
        assert (events, timeout_ms) == ("events", 0)
        if not self.xids:
            raise self.NVMLError("Timeout")
        first, *self.xids = self.xids
        return SimpleNamespace(eventData=first)

    def __getattr__(self, name: str):
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetTotalEnergyConsumption": self.energy_mj,
            "nvmlDeviceGetPowerUsage": 400_000,
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetTemperature": 71,
            "nvmlDeviceGetCurrentClocksThrottleReasons": self.reasons,
            "nvmlDeviceGetTotalEccErrors": self.ecc_errors,
            "nvmlDeviceGetRemappedRows": self.rows,
            "nvmlEventSetCreate": "events",
            "nvmlDeviceRegisterEvents": None,
        }
        return lambda *_: answers[name]


@pytest.fixture
def nvml(monkeypatch):
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.version, "hip", None)
    return fake


def test_a_gpu_is_read_by_its_counter_and_by_its_power(nvml, clock):
    meter = EnergyMeter(GPU, False)
    meter.begin()
    nvml.energy_mj += 8_200_000
    clock.s += 20
    assert windows(meter) == {("gpu", "nvml_counter"): 8200.0, ("gpu", "nvml_power"): pytest.approx(8000.0)}


def test_heat_is_seen_and_a_power_cap_of_the_site_is_no_fault(nvml):
    monitor = HealthMonitor(GPU)
    monitor.begin()
    health = monitor.end()
    assert health.slowed_by == ["hardware thermal slowdown"] and health.throttled
    assert (health.sm_clock_hertz[-1], health.ecc_errors) == (1.98e9, 0)
    nvml.reasons = 0x04
    monitor.begin()
    health = monitor.end()
    assert not health.throttled and health.power_capped_looks >= 1


def test_what_a_device_reports_as_broken_is_that_of_the_window(nvml):
    nvml.xids = [31]
    monitor = HealthMonitor(GPU)
    monitor.begin()
    nvml.xids, nvml.rows, nvml.ecc_errors = [79, 94], (6, 2, 1, 0), 5
    health = monitor.end()
    assert (health.xids, health.remapped_rows, health.ecc_errors) == ([79, 94], 2, 3)
    assert health.errors == ["3 uncorrected memory errors", "2 memory rows remapped", "Xid 79", "Xid 94"]
    monitor.begin()
    assert monitor.end().errors == []


def test_a_device_without_such_counters_is_measured_all_the_same(nvml, monkeypatch):
    def unsupported(*_):
        raise nvml.NVMLError("Not Supported")

    for name in ("nvmlDeviceRegisterEvents", "nvmlDeviceGetRemappedRows", "nvmlDeviceGetTotalEccErrors"):
        monkeypatch.setattr(nvml, name, unsupported, raising=False)
    monitor = HealthMonitor(GPU)
    monitor.begin()
    health = monitor.end()
    assert health.errors == [] and health.remapped_rows is None and health.sm_clock_hertz == [1.98e9]
    assert [(m.probe, m.reason) for m in monitor.unavailable] == [("Xid errors", "NVML: Not Supported")]


def test_without_nvml_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.version, "hip", None)
    reasons = {m.probe: m.reason for m in EnergyMeter(GPU, False).unavailable}
    assert "pip install 'aifactory-train[gpu]', or pip install nvidia-ml-py" in reasons["nvml"]
    assert "no GPU" in HealthMonitor(CPU).unavailable[0].reason


def test_amds_counter_is_ticks_of_a_resolution():
    assert amdsmi_joules({"energy_accumulator": 2_000_000, "counter_resolution": 15.3}) == pytest.approx(30.6)
    assert amdsmi_joules({"power": 2_000_000, "counter_resolution": 15.3}) == pytest.approx(30.6)


@pytest.mark.parametrize(("power_j", "found"), [(104.0, 0), (106.0, 1), (94.0, 1)])
def test_two_methods_of_one_scope_that_disagree_are_a_warning(power_j, found):
    one = EnergyWindow(scope="gpu", method="nvml_counter", joules=100.0, seconds=12.0)
    other = one.model_copy(update={"method": "nvml_power", "joules": power_j})
    node = one.model_copy(update={"scope": "node", "joules": 900.0})
    rank = {"energy": [w.model_dump() for w in (one, other, node)], "health": None, "unavailable": []}
    joined = join_windows([rank])
    assert len(joined.warnings) == found and len(joined.facts().get("warnings", [])) == found
    if found:
        assert f"{power_j:.0f} J by nvml_power" in joined.warnings[0] and "100 J by nvml_counter" in joined.warnings[0]


def rank_window(joules: float | None, slowed_by: list[str] | None = None, errors: Sequence[str] = ()) -> dict:
    own = EnergyWindow(scope="gpu", method="nvml_counter", joules=joules or 0.0, seconds=12.0)
    missed = Unavailable(probe="nvml", reason="not there")
    return {
        "energy": [] if joules is None else [own.model_dump()],
        "health": None if slowed_by is None else {"slowed_by": slowed_by, "errors": errors},
        "unavailable": [missed.model_dump()] if joules is None else [],
    }


def test_energy_of_all_ranks_is_added_and_one_hot_gpu_is_enough():
    joined = join_windows([rank_window(10.0, []), rank_window(20.0, ["heat"])])
    assert [(w.joules, w.seconds) for w in joined.energy] == [(30.0, 12.0)]
    assert joined.throttled is True
    assert join_windows([rank_window(10.0)]).validity() == {"throttled": None, "device_errors": None}
    broken = join_windows([rank_window(10.0, []), rank_window(20.0, [], ["Xid 79"])])
    assert broken.validity() == {"throttled": False, "device_errors": ["rank 1: Xid 79"]}


def test_a_sum_that_lacks_a_rank_is_left_out_and_listed():
    joined = join_windows([rank_window(10.0), rank_window(None)])
    assert joined.energy == []
    assert {m.reason for m in joined.unavailable} == {"not there", "only 1 of 2 ranks could read it"}


def test_a_counter_without_a_wrap_is_a_plain_difference():
    counter = Counter("gpu", "nvml_counter", lambda: 7.0, begin_j=2.0)
    assert counter.used_j() == 5.0
