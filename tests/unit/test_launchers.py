"""The batch scripts: rendered from machine files, committed, and right for the site."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from aifactory_train.errors import MachineError
from aifactory_train.launch.slurm import core_mask, cpus_per_rank, launchers_dir, render_job
from aifactory_train.machine.facts import Option, Variable
from aifactory_train.machine.load import load_machine, machine_names
from aifactory_train.machine.machine import Device, Host, Machine, Mpi, Place, Topology
from aifactory_train.machine.site import Container, Partition, Rendezvous, Slurm

MACHINES = [m for m in map(load_machine, machine_names()) if m.slurm is not None]


def a_machine(slurm: dict | None = None, **changes) -> Machine:
    base = {
        "name": "lab",
        "device": Device(kind="cuda", name="H100", per_node=4),
        "host": Host(cores=32),
        "slurm": Slurm(partitions=[Partition(name="gpu", max_time_h=2)], **(slurm or {})),
    }
    return Machine(**{**base, **changes})


def exported(script: str, names: list[str], **env: str) -> list[str]:
    """Values of variables after bash has run the `export` lines of a script."""
    lines = [line for line in script.splitlines() if line.startswith("export ") and "MASTER" not in line]
    ask = "; ".join(f'printf "%s\\0" "${{{name}}}"' for name in names)
    done = subprocess.run(["bash", "-c", "\n".join([*lines, ask])], capture_output=True, text=True, check=True, env=env)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_the_committed_launcher_is_what_its_machine_file_renders(machine):
    path = launchers_dir() / f"{machine.name}.sbatch"
    assert path.exists() and path.read_text() == render_job(machine), f"{path} is old; do: make launchers"


def test_every_launcher_belongs_to_a_machine():
    assert {p.stem for p in launchers_dir().glob("*.sbatch")} == {m.name for m in MACHINES}


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
def test_a_launcher_is_bash_and_gives_every_variable_its_value_and_reason(machine):
    script = render_job(machine)
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    plain = [v for v in machine.environment if not v.expand]
    assert exported(script, [v.name for v in plain]) == [v.value for v in plain]
    text = " ".join(line.lstrip("# ") for line in script.splitlines())
    assert all(v.why in text for v in machine.environment)
    assert max(map(len, script.splitlines())) < 250


def test_an_expanded_variable_is_made_when_the_job_starts_and_any_other_is_not():
    cache = Variable(name="CACHE", value="/tmp/$USER-$SLURM_JOB_ID", why="locks fail on Lustre", expand=True)
    odd = Variable(name="ODD", value="$(touch pwned) 'x' $USER", why="kept as it is")
    script = render_job(a_machine(environment=[cache, odd]))
    assert exported(script, ["CACHE", "ODD"], USER="ada", SLURM_JOB_ID="7", PATH="/usr/bin:/bin") == [
        "/tmp/ada-7",
        "$(touch pwned) 'x' $USER",
    ]


def test_ranks_are_bound_by_the_map_of_the_machine_file():
    assert core_mask([1, 2, 3]) == "0xe"
    places = [Place(device=d, cores=c) for d, c in enumerate(("9-15", "1-7"))]
    machine = a_machine(
        {"cpu_bind": "map", "cpus_per_task": 7},
        device=Device(kind="rocm", name="X", per_node=2),
        topology=Topology(places=places),
    )
    assert "--cpu-bind=mask_cpu:0xfe00,0xfe" in render_job(machine)
    assert cpus_per_rank(machine) == 7


def test_the_masks_of_lumi_are_those_of_its_own_guide():
    guide = (
        "0x00fe000000000000,0xfe00000000000000,0x0000000000fe0000,0x00000000fe000000,"
        "0x00000000000000fe,0x000000000000fe00,0x000000fe00000000,0x0000fe0000000000"
    )
    found = re.search(r"mask_cpu:(\S+)", render_job(load_machine("lumi-g")))
    assert found and [int(m, 16) for m in found[1].split(",")] == [int(m, 16) for m in guide.split(",")]
    assert "gpus-per-task" not in re.sub(r"#.*", "", render_job(load_machine("lumi-g")))


@pytest.mark.parametrize(
    ("rendezvous", "line"),
    [
        (Rendezvous(), "MASTER_ADDR=$first\n"),
        (Rendezvous(rule="suffix", suffix="i"), "MASTER_ADDR=${first}i "),
        (Rendezvous(rule="ip"), 'getent ahostsv4 "$first"'),
        (Rendezvous(rule="interface", interface="ib0"), "ip -4 -o address show ib0"),
        (Rendezvous(rule="ip", loopback_on_one_node=True), "MASTER_ADDR=127.0.0.1"),
    ],
)
def test_the_address_of_rank_0_follows_the_rule_of_the_site(rendezvous, line):
    assert line in render_job(a_machine(rendezvous=rendezvous))


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (
            "singularity",
            ["singularity", "exec", "--bind", "$PWD,/scratch", "--nv", "$container", "${AIFACTORY_PYTHON:-python3}"],
        ),
        (
            "apptainer",
            ["apptainer", "exec", "--bind", "$PWD,/scratch", "--nv", "$container", "${AIFACTORY_PYTHON:-python3}"],
        ),
        ("uenv", ["uenv", "run", "$container", "--nv", "--", "${AIFACTORY_PYTHON:-python3}"]),
    ],
)
def test_a_container_runs_the_same_command(runtime, words):
    script = render_job(a_machine(container=Container(runtime=runtime, binds=["/scratch"], options=["--nv"])))
    found = re.search(r'if \[ -n "\$container" \]; then\n  python=\((.*)\)\n', script)
    assert found and shlex.split(found[1]) == words
    assert script.count('"${aifactory_train[@]}" train "$run"') == 1


def test_pyxis_is_told_by_options_of_srun():
    script = render_job(a_machine(container=Container(runtime="pyxis", binds=["/scratch"])))
    assert '--container-image="$container" --container-mounts="$PWD:$PWD,/scratch:/scratch"' in script
    assert '"${ranks[@]}" --kill-on-bad-exit=1 "${in_ranks[@]}" train "$run"' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_mpirun_starts_the_ranks_where_the_machine_file_says_so():
    script = render_job(a_machine({"starter": "mpirun"}, mpi=Mpi(kind="site", mpirun="/opt/mpi/bin/mpirun")))
    assert "/opt/mpi/bin/mpirun" in script and "--map-by ppr:4:node:PE=8" in script
    assert "kill-on-bad-exit" not in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_default_wall_time_is_within_the_limit():
    assert "#SBATCH --time=02:00:00" in render_job(a_machine())
    slurm = {"devices": Option(option="--gres=gpu:4", why="all four"), "memory": "480G", "exclusive": True}
    script = render_job(a_machine(slurm))
    for option in ("--gres=gpu:4", "--mem=480G", "--exclusive", "--ntasks-per-node=4", "--cpus-per-task=8"):
        assert f"#SBATCH {option}" in script


def test_a_machine_without_slurm_has_no_launcher():
    with pytest.raises(MachineError, match="has no Slurm"):
        render_job(load_machine("h200-node"))
