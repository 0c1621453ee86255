"""Trains run folders one after another, the ranks of each as forks of this process.

    python forked_ranks.py RUN...

Each rank finds the others as under torchrun and runs what `aifactory-train train` runs; what it says stands in
RUN.txt. Prints {RUN: [exit code of each rank]} as JSON. To fork after the imports takes milliseconds, where a launcher
starts a new Python for each rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from aifactory_train.faults.stopflag import StopFlag
from aifactory_train.launch.local import write_run_folder
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.plan import Plan, load_plan
from aifactory_train.rundir import RunDir
from aifactory_train.train.start import start
from training_runs import free_port

TIMEOUT_S = 60.0


def run_rank(run: Path, rank: int, world_size: int, port: int) -> None:
    """What a fork does, to its end."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(n) for name, n in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    said = os.open(f"{run}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    code = 1
    try:
        code = start(run, StopFlag(), 0, TIMEOUT_S)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(run: Path) -> list[int]:
    world_size, port = load_plan(RunDir(run).plan).layout.world_size, free_port()
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            run_rank(run, rank, world_size, port)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def in_forks(plans: Mapping[str, Plan], folder: Path) -> dict[str, list[int]]:
    """Train each plan in a run folder of its name below `folder`. The exit codes of its ranks."""
    for name, plan in plans.items():
        write_run_folder(plan, RunDir(folder / name))
    program = [sys.executable, __file__, *(str(folder / name) for name in plans)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return {Path(run).name: codes for run, codes in json.loads(done.stdout).items()}


def import_once(layouts: list[Layout]) -> None:
    """What takes seconds, so that no fork has to."""
    if any(layout.model_code == "transformers" for layout in layouts):
        import aifactory_train.models.hf
    if any(layout.engine == "deepspeed" for layout in layouts):
        import aifactory_train.train.engine_deepspeed  # noqa: F401  # isort: skip  # keeps deepspeed's words off stdout
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # slow because of torch's compiler


if __name__ == "__main__":
    import_once([load_plan(RunDir(Path(run)).plan).layout for run in sys.argv[1:]])
    print(json.dumps({run: train(Path(run)) for run in sys.argv[1:]}))
