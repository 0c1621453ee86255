"""Every environment variable that a rank gets: value, and why. The only file that writes the environment."""

from __future__ import annotations

import os

from aifactory_train.machine.facts import Variable
from aifactory_train.machine.machine import Machine

# What sbatch and srun were given for the job we may be in; a job that we submit must not inherit it.
_OF_A_JOB = ("SLURM_", "SBATCH_", "SRUN_", "OMPI_", "PMIX_", "PMI_")
# Which Slurm to talk to: set by sites that have several or keep slurm.conf in an unusual place.
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")
# What torchrun, Open MPI, MPICH and Slurm call the number of a rank on its node.
_LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


def rank_variables(machine: Machine, threads: int) -> list[Variable]:
    """For the ranks of any run on this machine, before what its site adds.

    Args:
        threads: CPU threads of one rank.
    """
    variables = [
        Variable(
            name="OMP_NUM_THREADS", value=str(threads), why="ranks share the cores; without it each takes them all"
        ),
        Variable(name="PYTHONUNBUFFERED", value="1", why="log lines appear when they are written"),
    ]
    if machine.device.kind == "cuda":
        why = "blocks of changing size fragment the device's memory"
        variables.append(Variable(name="PYTORCH_CUDA_ALLOC_CONF", value="expandable_segments:True", why=why))
    return variables


def local_variables(machine: Machine, threads: int) -> list[Variable]:
    """For ranks that are started on this node by mpirun.

    Args:
        threads: CPU threads of one rank.
    """
    here = [
        Variable(name="GLOO_SOCKET_IFNAME", value="lo", why="all ranks are on this node; needs no name that resolves"),
        Variable(name="OMPI_MCA_btl", value="self,sm", why="all ranks are here; keeps MPI from probing its networks"),
    ]
    if machine.device.kind != "cpu":
        why = "all ranks are on this node; NCCL passes over loopback unless told"
        here.append(Variable(name="NCCL_SOCKET_IFNAME", value="lo", why=why))
    return rank_variables(machine, threads) + here


def local_environment(machine: Machine, threads: int, mpi_folder: str) -> dict[str, str]:
    """The launcher's environment with the variables of the ranks; what the user has set wins.

    Args:
        threads: CPU threads of one rank.
        mpi_folder: where mpirun keeps its files. Its own choice, /tmp/ompi.PID, stays behind when it is killed, and
            a later mpirun that gets the same process id does not start (Open MPI 5.0).
    """
    ours = {v.name: v.value for v in local_variables(machine, threads)} | {"PRTE_MCA_prte_tmpdir_base": mpi_folder}
    return {**ours, **os.environ}


def set_local_rank() -> None:
    """LOCAL_RANK of this process, without which DeepSpeed 0.19 does not start (runtime/engine.py)."""
    env = {**os.environ}
    os.environ["LOCAL_RANK"] = next((env[name] for name in _LOCAL_RANK if env.get(name)), "0")


def set_deterministic() -> None:
    """What cuBLAS needs for sums in one order; torch's deterministic mode refuses its kernels without it."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def job_variables(machine: Machine, threads: int) -> list[Variable]:
    """For the ranks of a batch job: ours, then those of the machine file."""
    return rank_variables(machine, threads) + machine.environment


def user_defaults() -> dict[str, str]:
    """What the user has set for sbatch or our script: name of the option of `launch` -> value."""
    names = {
        "account": "SBATCH_ACCOUNT",
        "partition": "SBATCH_PARTITION",
        "qos": "SBATCH_QOS",
        "time": "SBATCH_TIMELIMIT",
        "container": "AIFACTORY_CONTAINER",
        "python": "AIFACTORY_PYTHON",
    }
    env = {**os.environ}
    return {option: env[name] for option, name in names.items() if env.get(name)}


def submit_environment(python: str | None, container: str | None) -> dict[str, str]:
    """For sbatch, whose job inherits it: the launcher's, without that of a job we are in.

    Args:
        python: interpreter on the compute nodes; None leaves the choice to the script.
        container: image; None leaves the choice to the script.
    """
    inherited = {**os.environ}.items()
    env = {name: value for name, value in inherited if name in _OF_THE_SITE or not name.startswith(_OF_A_JOB)}
    for name, value in (("AIFACTORY_PYTHON", python), ("AIFACTORY_CONTAINER", container)):
        env.pop(name, None)
        if value is not None:
            env[name] = value
    return env
