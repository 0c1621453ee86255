"""transformers.Trainer on the task: its defaults (fused AdamW, sdpa attention), DDP where there are several ranks.

What differs: autocast keeps the weights in float32 and casts them at each use; a row of T tokens has T - 1 targets.
The rows are in memory before the first step, which is in Trainer's favour. With "compile" as the last argument:
Trainer with torch_compile=True.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from worker import Blocks, Task, load_task, wait_for_device


class Rows(Dataset):
    """The rows of all ranks, which Trainer deals out in their order; it shifts the labels itself."""

    def __init__(self, rows_RT: torch.Tensor) -> None:
        self._input_RT = rows_RT[:, :-1]

    def __len__(self) -> int:
        return len(self._input_RT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._input_RT[index], "labels": self._input_RT[index]}


class KeepsLosses(Trainer):
    """Its own losses of micro-batches since they were last taken, left on the device."""

    losses: list[torch.Tensor]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(*args, **kwargs)
        self.losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result


class Clock(TrainerCallback):
    """Times from the end of one step to the end of the next, and waits between blocks."""

    trainer: KeepsLosses

    def __init__(self, blocks: Blocks, first_block: int, accumulation: int) -> None:
        self._blocks, self._left, self._accumulation = blocks, first_block, accumulation
        self._step_s: list[float] = []
        self._start_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait_for_device()
        now_s = time.perf_counter()
        self._step_s.append(now_s - self._start_s)
        self._start_s = now_s
        self._left -= 1
        if self._left == 0:
            # With several micro-batches Trainer divides each loss by the tokens of all of them.
            losses = torch.stack(self.trainer.losses).view(-1, self._accumulation).sum(1)
            self._blocks.answer(self._step_s, losses.tolist())
            self._step_s, self.trainer.losses = [], []
            self._left = self._blocks.next()
            control.should_training_stop = self._left == 0
            self._start_s = time.perf_counter()


def training_arguments(task: Task, compiled: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(task.folder / "trainer"),
        per_device_train_batch_size=task.micro_batch_rows,
        gradient_accumulation_steps=task.accumulation,
        max_steps=10**6,
        learning_rate=task.lr,
        lr_scheduler_type="constant",
        weight_decay=task.weight_decay,
        adam_beta1=task.beta1,
        adam_beta2=task.beta2,
        adam_epsilon=task.eps,
        max_grad_norm=task.grad_clip_norm,
        bf16=True,
        use_cpu=task.device == "cpu",
        gradient_checkpointing=task.recompute,
        torch_compile=compiled,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=task.device != "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    task, blocks = load_task(), Blocks()
    first_block = blocks.next()
    if not first_block:
        return
    model = LlamaForCausalLM.from_pretrained(task.weights, dtype=torch.float32, use_cache=False)
    clock = Clock(blocks, first_block, task.accumulation)
    arguments = training_arguments(task, compiled=sys.argv[-1] == "compile")
    clock.trainer = KeepsLosses(model, arguments, train_dataset=Rows(task.rows()), callbacks=[clock])
    clock.trainer.losses = []
    clock.trainer.train()


if __name__ == "__main__":
    main()
