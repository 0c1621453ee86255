"""DeepSpeed on the task: transformers' Llama under ZeRO stage 2, as its tutorial has it, without Trainer.

What differs: DeepSpeed computes with bf16 weights and keeps the float32 ones in the optimizer; a row of T tokens has
T - 1 targets. torch's own fused AdamW steps, as DeepSpeed's has to be compiled where it runs. The rows are in memory
before the first step, which is in its favour.
"""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM

from worker import Task, load_task, serve


def config(task: Task) -> dict[str, Any]:
    return {
        "train_batch_size": task.global_batch_rows,
        "train_micro_batch_size_per_gpu": task.micro_batch_rows,
        "gradient_clipping": task.grad_clip_norm,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
    }


def main() -> None:
    task = load_task()
    if task.processes == 1:  # DeepSpeed would look for MPI, and asks which GPU is this rank's
        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group(
            "gloo" if task.device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1
        )
    model = LlamaForCausalLM.from_pretrained(task.weights, dtype=torch.float32, use_cache=False)
    if task.recompute:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(task.decayed(model.named_parameters()), **task.adamw())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(task))
    engine.train()
    batches = task.micro_batches()

    def step() -> Tensor:
        losses = []
        for _ in range(task.accumulation):
            input_BT = next(batches)[:, :-1]
            loss = engine(input_ids=input_BT, labels=input_BT).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    serve(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
