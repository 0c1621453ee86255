"""Trains run folders one after another as forked_ranks.py does, sees which weights move, and exports each.

    python lora_ranks.py RUN...

RUN-again is made here: a copy of RUN without its last checkpoint.

RUN/weights-<rank>.json: names of the weights that train, and of the others sha256 before and after.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from typing import Any

import deepspeed  # noqa: F401  # once, before the ranks are forked
import peft  # noqa: F401

import aifactory_train.models.hf
import aifactory_train.train.start
import forked_ranks
from aifactory_train.checkpoint.export import export_run
from aifactory_train.models.parts import boxes
from aifactory_train.plan.plan import load_plan
from aifactory_train.rundir import RunDir, committed_steps, step_folder
from aifactory_train.train.loop import train
from aifactory_train.train.setup import Run


def digests(engine: Any) -> dict[str, str]:
    """sha256 by name of this rank's part of each frozen weight."""
    if hasattr(engine, "frozen"):
        frozen = engine.frozen()
    else:
        named = engine.stages[0].root.named_parameters()
        frozen = {name: p.detach() for name, p in named if not p.requires_grad}
    return {
        name: hashlib.sha256(b"".join(view.float().numpy().tobytes() for _, view in boxes(w))).hexdigest()
        for name, w in frozen.items()
    }


def watched(run: Run) -> None:
    before = digests(run.engine)
    train(run)
    seen = {"trained": sorted(run.engine.state_dict()["model"]), "before": before, "after": digests(run.engine)}
    (run.folder.root / f"weights-{run.ranks.rank}.json").write_text(json.dumps(seen))


def export(run: RunDir) -> None:
    """In a fork: what it loads has threads, and later forks would copy those half-way."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            export_run(run, load_plan(run.plan))
            code = 0
        finally:
            os._exit(code)
    os.waitpid(pid, 0)


def train_and_export(run: RunDir) -> list[int]:
    first = run.root.with_name(run.root.name.removesuffix("-again"))
    if first != run.root:
        shutil.copytree(first, run.root)
        shutil.rmtree(step_folder(run.checkpoints, committed_steps(run.checkpoints)[-1]))
    codes = forked_ranks.train(run.root)
    if not any(codes):
        export(run)
    return codes


if __name__ == "__main__":
    aifactory_train.train.start.train = watched
    print(json.dumps({run: train_and_export(RunDir(run)) for run in sys.argv[1:]}))
