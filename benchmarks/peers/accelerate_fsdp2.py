"""Accelerate with FSDP2 on the task: a plain loop over transformers' Llama, blocks sharded over all ranks.

What differs: on one rank Accelerate has nothing to shard and casts by autocast; a row of T tokens has T - 1 targets.
Accelerate 1.15 gives FSDP to accelerators alone (AcceleratorState of its state.py), though what it calls of torch
runs on CPUs too: there its state is told. The rows are in memory before the first step, which is in its favour.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import LlamaForCausalLM

from worker import Task, load_task, serve


def build_accelerator(task: Task) -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        activation_checkpointing=task.recompute,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(
        mixed_precision="bf16",
        gradient_accumulation_steps=task.accumulation,
        fsdp_plugin=plugin if task.processes > 1 else None,
        cpu=task.device == "cpu",
    )
    if task.processes > 1 and accelerator.distributed_type != DistributedType.FSDP:
        plugin.set_mixed_precision("bf16")
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    return accelerator


def main() -> None:
    task = load_task()
    accelerator = build_accelerator(task)
    model = LlamaForCausalLM.from_pretrained(task.weights, dtype=torch.float32, use_cache=False)
    if task.recompute and task.processes == 1:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(task.decayed(model.named_parameters()), **task.adamw())
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    batches = task.micro_batches()

    def step() -> Tensor:
        losses = []
        for _ in range(task.accumulation):
            input_BT = next(batches)[:, :-1]
            with accelerator.accumulate(model):
                loss = model(input_ids=input_BT, labels=input_BT).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), task.grad_clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    serve(step)
    accelerator.end_training()


if __name__ == "__main__":
    main()
