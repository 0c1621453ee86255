"""torchtitan on the task: its Trainer with the Llama 3 of its list, compiled blocks, CUDA graphs and FSDP. GPUs only.

What differs: its attention is flex; it reads the loss of each step back, which is how we learn it, and its metrics are
printed nowhere. The rows are in memory before the first step, which is in its favour.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import CompileConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common.config_utils import decoder_vocab_size
from torchtitan.models.llama3 import model_registry
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from worker import Task, load_task, serve

FLAVORS = {2048: "1B", 4096: "8B"}  # by width; weights of any other shape do not load
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


class Rows(BaseDataLoader):
    """This rank's rows; each is one document."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Config, *, seq_len: int, local_batch_size: int, **_: Any) -> None:
        self._positions_BT = torch.arange(seq_len).repeat(local_batch_size, 1)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for rows_BT in replace(load_task(), device="cpu").micro_batches():
            yield {"input": rows_BT[:, :-1], "positions": self._positions_BT}, rows_BT[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class NoTokenizer(BaseTokenizer):
    """Trainer builds one, though rows are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    encode = decode = get_vocab_size = None


def build_model_spec(task: Task) -> ModelSpec:
    hf = json.loads((task.folder / "weights" / "config.json").read_text())
    spec = model_registry(FLAVORS[hf["hidden_size"]])
    for layer in spec.model.layers:
        layer.attention.rope = replace(layer.attention.rope, theta=hf["rope_theta"], scaling="none")
    return spec


def build_trainer(task: Task) -> Trainer:
    spec = build_model_spec(task)
    vectors = ParamGroupConfig(
        pattern="norm", optimizer_name="AdamW", optimizer_kwargs={**task.adamw(), "weight_decay": 0.0}
    )
    matrices = ParamGroupConfig(
        pattern=".*", optimizer_name="AdamW", optimizer_kwargs={**task.adamw(), "weight_decay": task.weight_decay}
    )
    config = Trainer.Config(
        model_spec=spec,
        hf_assets_path=task.weights,
        dump_folder=str(task.folder / "torchtitan"),
        tokenizer=NoTokenizer.Config(),
        dataloader=Rows.Config(),
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))),
        optimizer=OptimizersContainer.Config(param_groups=[vectors, matrices]),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0),
        training=TrainingConfig(
            local_batch_size=task.micro_batch_rows,
            global_batch_size=task.global_batch_rows,
            seq_len=task.seq_len_tokens,
            max_norm=task.grad_clip_norm,
            steps=10**6,
        ),
        checkpoint=CheckpointManager.Config(
            enable=True, load_only=True, initial_load_path=task.weights, initial_load_in_hf=True
        ),
        activation_checkpoint=FullAC.Config() if task.recompute else None,
        compile=CompileConfig(enable=True),
        metrics=MetricsProcessor.Config(log_freq=1),
    )
    trainer = config.build()
    trainer.checkpointer.load()
    return trainer


def main() -> None:
    task = load_task()
    if task.processes == 1:
        os.environ.update(ALONE)
    trainer = build_trainer(task)
    losses: list[float] = []
    trainer.metrics_processor.log = lambda step, loss, *_, **__: losses.append(loss)
    batches = trainer.batch_generator(trainer.dataloader)

    def step() -> Tensor:
        trainer.step += 1
        trainer.gc_handler.run(trainer.step)
        trainer.train_step(batches)
        return torch.tensor(losses[-1])

    serve(step)
    trainer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
