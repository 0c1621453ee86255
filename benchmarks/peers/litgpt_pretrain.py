"""litgpt on the task: the model, precision, compilation and loop of its pretrain.py (fit), on Lightning Fabric.

What differs: autocast ("bf16-mixed") keeps float32 weights; AdamW decays vectors too, as litgpt's. On several CPU
ranks DDP, as Lightning's FSDP refuses CPUs; on several GPUs FSDP as in litgpt. torch's fused AdamW also on CPUs, where
litgpt takes the slower one, and rows in memory before the first step: both in litgpt's favour.
"""

from __future__ import annotations

import json
from functools import partial

import lightning as L
import torch
from lightning.fabric.strategies import FSDPStrategy
from litgpt.config import Config
from litgpt.model import GPT, Block
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from torch import Tensor

from worker import Task, load_task, serve


def config(task: Task) -> Config:
    """litgpt's words for the model of the task's config.json."""
    hf = json.loads((task.folder / "weights" / "config.json").read_text())
    rope = hf["rope_parameters"]
    adjustments = {
        "factor": rope.get("factor"),
        "low_freq_factor": rope.get("low_freq_factor"),
        "high_freq_factor": rope.get("high_freq_factor"),
        "original_max_seq_len": rope.get("original_max_position_embeddings"),
    }
    return Config(
        name="task",
        block_size=task.seq_len_tokens,
        n_layer=hf["num_hidden_layers"],
        n_embd=hf["hidden_size"],
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        n_head=hf["num_attention_heads"],
        n_query_groups=hf["num_key_value_heads"],
        head_size=hf["head_dim"],
        rotary_percentage=1.0,
        rope_base=rope["rope_theta"],
        rope_adjustments=adjustments if rope["rope_type"] == "llama3" else None,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=hf["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=hf["intermediate_size"],
    )


def build_model(task: Task) -> GPT:
    weights: dict[str, Tensor] = {}
    found = load_file(task.folder / "weights" / "model.safetensors")
    copy_weights_hf_llama(config(task), {}, weights, found, dtype=torch.float32)
    model = GPT(config(task))
    model.load_state_dict(weights)
    if "lm_head.weight" not in found:
        model.transformer.wte.weight = model.lm_head.weight
    return model


def build_fabric(task: Task) -> L.Fabric:
    strategy: str | FSDPStrategy = "auto"
    if task.processes > 1:
        shard = partial(FSDPStrategy, auto_wrap_policy={Block}, sharding_strategy="HYBRID_SHARD")
        strategy = "ddp" if task.device == "cpu" else shard(activation_checkpointing_policy=recomputed(task))
    return L.Fabric(accelerator=task.device, devices=task.processes, strategy=strategy, precision="bf16-mixed")


def recomputed(task: Task) -> set[type] | None:
    return {Block} if task.recompute else None


def main() -> None:
    task = load_task()
    fabric = build_fabric(task)
    fabric.launch()
    model = fabric.setup(torch.compile(build_model(task)))
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(model.parameters(), weight_decay=task.weight_decay, **task.adamw())
    )
    batches = task.micro_batches()

    def step() -> Tensor:
        losses = []
        for number in range(1, task.accumulation + 1):
            rows_BT = next(batches)
            with fabric.no_backward_sync(model, enabled=number < task.accumulation):
                loss = chunked_cross_entropy(model(rows_BT[:, :-1].contiguous()), rows_BT[:, 1:].contiguous())
                fabric.backward(loss / task.accumulation)
            losses.append(loss.detach())
        fabric.clip_gradients(model, optimizer, max_norm=task.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean()

    serve(step)


if __name__ == "__main__":
    main()
