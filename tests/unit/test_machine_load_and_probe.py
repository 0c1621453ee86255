import pytest

from aifactory_train.errors import MachineError
from aifactory_train.machine import probe, probe_gpus, probe_host
from aifactory_train.machine.load import load_machine, write_machine
from aifactory_train.machine.machine import ByDtype, Device, Host, Machine, Measured
from aifactory_train.machine.probe_look import Answer, Look
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import load_recipe
from aifactory_train.strictyaml import configs_dir

EPYC = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 9354\nflags\t\t: fpu avx512f avx512_bf16 amx\n"
)
XEON_6130 = "model name\t: Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz\nflags\t\t: fpu avx512f avx512vl\n"
GRACE = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
A100 = "NVIDIA A100-SXM-64GB, 65536, 8.0\n" * 4
V100 = "Tesla V100-SXM2-16GB, 16384, 7.0\n"
MI250X = (
    '{"card0": {"VRAM Total Memory (B)": "68702699520", "VRAM Total Used Memory (B)": "1", '
    '"Card Series": "AMD Instinct MI250X"}, '
    '"card1": {"VRAM Total Memory (B)": "68702699520", "Card Series": "AMD Instinct MI250X"}, "system": {}}'
)


def a_machine():
    return Machine(
        name="lab",
        device=Device(kind="cuda", name="H100", per_node=4, memory_bytes=85_899_345_920, native_bf16=True),
        host=Host(cores=64),
        measured=Measured(matmul_flops_per_s=ByDtype(bf16=7.1e14)),
    )


def test_the_local_machine_probes_and_reads_back_equal_from_its_file(tmp_path):
    machine = load_machine("local")
    assert machine.host.cores >= 1 and machine.host.memory_bytes > 2**28
    assert machine.source_of("device.name").by == "probed"
    write_machine(machine, tmp_path / "here.yaml")
    assert load_machine(tmp_path / "here.yaml") == machine


def test_a_machine_with_measured_rates_reads_back_equal(tmp_path):
    machine = probe.with_measured(a_machine(), Measured(matmul_flops_per_s=ByDtype(fp32=1.25e13, bf16=6.9e14)))
    write_machine(machine, tmp_path / "lab.yaml")
    again = load_machine(tmp_path / "lab.yaml")
    assert again == machine and again.measured.matmul_flops_per_s.bf16 == 6.9e14
    assert again.source_of("measured").by == "measured" and a_machine().source_of("measured") is None


def test_an_unknown_machine_is_refused_with_the_names_that_exist():
    with pytest.raises(MachineError, match="unknown machine 'nowhere'") as caught:
        load_machine("nowhere")
    assert "local" in caught.value.do


def test_a_missing_machine_file_is_refused(tmp_path):
    with pytest.raises(MachineError, match="No such file"):
        load_machine(tmp_path / "gone.yaml")


def test_faults_in_a_machine_file_are_told_with_their_lines(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: bad\ndevice:\n  kind: gpu\n  name: X\n  per_nod: 4\nhost: {cores: 0}\n")
    with pytest.raises(MachineError) as caught:
        load_machine(path)
    text = caught.value.render()
    assert f"{path}:3: device.kind: Input should be 'cpu', 'cuda' or 'rocm', given: 'gpu'" in text
    assert f"{path}:5: device.per_nod: unknown key; did you mean per_node?" in text
    assert f"{path}:6: host.cores" in text and "--set" not in text


@pytest.mark.parametrize(
    ("cpuinfo", "name", "bf16"),
    [
        (EPYC, "AMD EPYC 9354", True),
        (XEON_6130, "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz", False),
        (GRACE, "0xd4f", True),
        ("", "unknown", None),
    ],
)
def test_the_cpu_says_its_name_and_whether_it_computes_bf16(cpuinfo, name, bf16):
    assert probe_host.parse_cpu_name(cpuinfo) == name
    assert probe_host.parse_native_bf16(cpuinfo) is bf16


def test_nvidia_smi_gives_the_number_of_gpus_their_memory_and_bf16():
    device = probe_gpus.parse_nvidia_smi(A100)
    assert (device.kind, device.per_node, device.native_bf16) == ("cuda", 4, True)
    assert device.name == "NVIDIA A100-SXM-64GB" and device.memory_bytes == 64 * 1024**3
    assert probe_gpus.parse_nvidia_smi(V100).native_bf16 is False


@pytest.mark.parametrize("text", ["", "No devices were found\n", "NVIDIA-SMI has failed, driver, mismatch\n"])
def test_nvidia_smi_without_a_gpu_gives_none(text):
    assert probe_gpus.parse_nvidia_smi(text) is None


def test_rocm_smi_counts_each_gcd_as_a_device():
    device = probe_gpus.parse_rocm_smi(MI250X)
    assert (device.kind, device.per_node, device.memory_bytes) == ("rocm", 2, 68702699520)
    assert device.name == "AMD Instinct MI250X" and device.native_bf16
    assert probe_gpus.parse_rocm_smi("WARNING: no driver") is None and probe_gpus.parse_rocm_smi("{}") is None


def test_the_memory_limit_of_the_control_group_counts_where_it_is_lower():
    assert probe_host.parse_mem_total_bytes("MemTotal:       24684084 kB\nMemFree: 1 kB\n") == 24684084 * 1024
    assert probe_host.parse_cgroup_limit_bytes("8589934592\n") == 8 * 1024**3
    assert probe_host.parse_cgroup_limit_bytes("max\n") is None
    assert probe_host.parse_cgroup_limit_bytes("9223372036854771712\n") is None


def test_limits_are_read_from_our_control_group_and_those_above_it():
    v2 = probe_host.parse_cgroup_files("0::/system.slice/slurm.scope\n")
    assert v2 == [
        "/sys/fs/cgroup/system.slice/slurm.scope/memory.max",
        "/sys/fs/cgroup/system.slice/memory.max",
        "/sys/fs/cgroup/memory.max",
    ]
    v1 = probe_host.parse_cgroup_files("9:cpu,cpuacct:/x\n4:memory:/slurm\n")
    assert v1 == [
        "/sys/fs/cgroup/memory/slurm/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ]


def a_look(root, files, query=""):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return Look(root, lambda command: Answer(query) if "--query" in command[1] else Answer("", "is not there"))


def test_a_lower_limit_of_the_control_group_wins_over_the_memory_of_the_host(tmp_path):
    files = {"proc/meminfo": "MemTotal: 1048576 kB", "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "1000"}
    machine = probe.probe(a_look(tmp_path, files), with_slurm=False)
    assert machine.host.memory_bytes == machine.device.memory_bytes == 1000
    assert "control group" in machine.source_of("host.memory_bytes").source


def test_a_machine_with_gpus_has_their_memory_and_not_the_hosts(tmp_path):
    machine = probe.probe(a_look(tmp_path, {"proc/meminfo": "MemTotal: 1048576 kB"}, A100), with_slurm=False)
    assert machine.device.kind == "cuda" and machine.device.per_node == 4
    assert machine.device.memory_bytes == 64 * 1024**3 and machine.host.memory_bytes == 1024**3
    assert machine.source_of("device").source == "nvidia-smi"


def test_the_local_machine_is_read_at_once_and_never_has_slurm(monkeypatch):
    asked = []
    monkeypatch.setattr("aifactory_train.machine.probe_look.shutil.which", lambda name, path=None: asked.append(name))
    assert probe.probe_local().slurm is None and "scontrol" not in asked and "nvidia-smi" in asked
    assert "slurm" not in probe.probe_local().unseen
    assert probe.probe_machine().unseen["slurm"] == "scontrol is not there" and "scontrol" in asked


def test_why_something_could_not_be_seen_does_not_make_another_machine():
    recipe = load_recipe(configs_dir() / "recipes" / "demo.yaml")
    machines = [a_machine().model_copy(update={"unseen": u}) for u in ({}, {"network.nics": "no answer in 20 s"})]
    assert len({make_plan(recipe, machine).machine_hash for machine in machines}) == 1
