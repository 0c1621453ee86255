"""aifactory-train on the task: the engine, loader and plan of `aifactory-train train`, without its launcher.

The recipe is beside the task as recipe.yaml: it reads the rows through the loader, from the prepared folder.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from aifactory_train.data.shards import load_prepared
from aifactory_train.plan.plan import load_plan
from aifactory_train.train.ranks import find_ranks, join
from aifactory_train.train.setup import build_engine, build_loader
from worker import load_task, serve


def main() -> None:
    task = load_task()
    plan = load_plan(task.folder / "plan.json")
    ranks, device = find_ranks(), task.torch_device()
    join(ranks, device)
    engine = build_engine(plan, device, fresh=True)
    loader = build_loader(plan, ranks, load_prepared(plan.recipe.data), pin_memory=device.type == "cuda")
    steps = enumerate(loader.batches(0), start=1)

    def step() -> Tensor:
        number, batch = next(steps)
        stats = engine.train_step(batch, number)
        return stats.loss_sum * ranks.world_size / stats.n_valid_tokens

    serve(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
