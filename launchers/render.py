"""Write launchers/<machine>.sbatch for every machine that has Slurm: `make launchers`."""

from __future__ import annotations

import argparse

from aifactory_train.launch.slurm import launchers_dir, render_job
from aifactory_train.machine.load import load_machine, machine_names


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for machine in map(load_machine, machine_names()):
        if machine.slurm is not None:
            path = launchers_dir() / f"{machine.name}.sbatch"
            path.write_text(render_job(machine))
            print(path)


if __name__ == "__main__":
    main()
