"""Each machine's launcher before a controller with that site's partition, nodes and limits: taken, or refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aifactory_train.launch.slurm import render_job
from aifactory_train.machine.load import load_machine, machine_names
from slurm.cluster import Munge
from slurm.site_cluster import (
    Site,
    device_option,
    max_minutes,
    max_nodes,
    min_nodes,
    running_site,
    slurm_cpus,
    slurm_of,
)

SITES = [name for name in machine_names() if load_machine(name).slurm is not None]


@pytest.fixture(scope="module", params=SITES)
def site(request: pytest.FixtureRequest, munge: Munge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    machine = load_machine(request.param)
    with running_site(machine, tmp_path_factory.mktemp("site"), munge) as controller:
        (controller.folder / "job.sbatch").write_text(render_job(machine))
        yield controller


def submit(site: Site, *options: str):
    slurm = slurm_of(site.machine)
    nodes = max(min_nodes(slurm), min(2, max_nodes(slurm) or 2))
    arguments = ["--account=test", f"--nodes={nodes}", *options, site.folder / "job.sbatch", "recipe.yaml"]
    return site.run("sbatch", "--parsable", *arguments)


def assert_refused(site: Site, option: str, *words: str) -> None:
    done = submit(site, option)
    assert done.returncode != 0, f"{option} was taken as job {done.stdout}"
    assert "Batch job submission failed" in done.stderr and any(w in done.stderr for w in words), done.stderr


def unknown(site: Site, what: str) -> None:
    pytest.skip(f"{site.machine.name}: the machine file does not tell {what}, so this limit is not checked")


def test_the_launcher_is_taken_with_one_rank_per_device(site):
    done = submit(site)
    assert done.returncode == 0, done.stderr
    job = dict(
        word.split("=", 1)
        for word in site.ask("scontrol", "-o", "show", "job", done.stdout.strip()).split()
        if "=" in word
    )
    n_nodes, per_node = int(job["NumNodes"].split("-")[0]), site.machine.device.per_node
    assert job["JobState"] == "PENDING" and job["Partition"] == slurm_of(site.machine).partition.name
    assert int(job["NumTasks"]) == n_nodes * per_node
    assert int(job["CPUs/Task"]) * per_node <= slurm_cpus(site.machine)
    if slurm_of(site.machine).devices is not None:
        assert job["TresPerNode"].endswith(f":{per_node}") and "gpu" in job["TresPerNode"]
    site.ask("scancel", done.stdout.strip())


def test_a_node_too_many_is_refused(site):
    most = max_nodes(slurm_of(site.machine))
    if most is None:
        unknown(site, "how many nodes a job may have")
    assert_refused(site, f"--nodes={most + 1}", "Node count specification invalid", "More processors requested")


def test_a_device_too_many_per_node_is_refused(site):
    option = device_option(slurm_of(site.machine), site.machine.device.per_node + 1)
    if option is None:
        unknown(site, "how devices are asked for")
    assert_refused(site, option, "Requested node configuration is not available")


def test_a_core_too_many_per_task_is_refused(site):
    cpus = slurm_cpus(site.machine) // site.machine.device.per_node + 1
    assert_refused(site, f"--cpus-per-task={cpus}", "Requested node configuration is not available", "processors")


def test_a_minute_too_many_is_refused(site):
    minutes = max_minutes(slurm_of(site.machine))
    if minutes is None:
        unknown(site, "how long a job may run")
    assert_refused(site, f"--time={minutes + 1}", "Requested time limit is invalid")


def test_the_longest_time_is_taken(site):
    minutes = max_minutes(slurm_of(site.machine))
    if minutes is None:
        unknown(site, "how long a job may run")
    done = submit(site, f"--time={minutes}")
    assert done.returncode == 0, done.stderr
    site.ask("scancel", done.stdout.strip())


def test_the_controller_is_as_the_machine_file_says(site):
    """Without this a mistake in the configuration could refuse for another reason."""
    shown = site.ask("scontrol", "-o", "show", "nodes").splitlines()[0]
    assert f"CPUTot={slurm_cpus(site.machine)} " in shown
    if slurm_of(site.machine).devices is not None:
        assert f":{site.machine.device.per_node} " in shown.partition("Gres=")[2].split("NodeAddr")[0]
