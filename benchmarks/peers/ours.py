"""aifactory-train on the yardstick: the engine and loader of `aifactory-train train`, one process, no launcher."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist

from aifactory_train.machine.probe import probe_local
from aifactory_train.plan.plan import make_plan
from aifactory_train.train.ranks import find_ranks, join
from aifactory_train.train.setup import build_engine
from worker import THREADS, parse_arguments, serve, yardstick


def main(args: argparse.Namespace) -> None:
    recipe, loader = yardstick()
    plan = make_plan(recipe, probe_local())
    torch.set_num_threads(THREADS)
    device = torch.device("cpu")
    join(find_ranks(), device)
    engine = build_engine(plan, device, fresh=True)
    steps = enumerate(loader.batches(0), start=1)

    def step() -> float:
        number, batch = next(steps)
        return engine.train_step(batch, number).loss_sum.item()

    serve(step, recipe.train.global_batch_tokens, args)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(parse_arguments(__doc__))
