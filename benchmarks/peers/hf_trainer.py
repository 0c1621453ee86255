"""transformers.Trainer on the yardstick: the shape, the rows and the arithmetic of configs/recipes/cpu-yardstick.yaml.

What the recipe does not say stays at Trainer's defaults (fused AdamW, sdpa attention). The rows are read into memory
before the first step, which is in Trainer's favour.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from aifactory_train.recipe.schema import Recipe
from worker import THREADS, Blocks, parse_arguments, yardstick

ROWS_OF_STEPS = 64  # more distinct rows than fit into a cache; Trainer begins anew after them


class Rows(Dataset):
    """The rows of the first steps, in their order; Trainer shifts the labels itself."""

    def __init__(self, input_RT: torch.Tensor) -> None:
        self._input_RT = input_RT

    def __len__(self) -> int:
        return len(self._input_RT)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._input_RT[index], "labels": self._input_RT[index]}


class Clock(TrainerCallback):
    """Times from the end of one step to the end of the next, and waits between blocks."""

    def __init__(self, blocks: Blocks, first_block: int) -> None:
        self._blocks = blocks
        self._left = first_block
        self._step_s: list[float] = []
        self._start_s = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now_s = time.perf_counter()
        self._step_s.append(now_s - self._start_s)
        self._start_s = now_s
        self._left -= 1
        if self._left == 0:
            self._blocks.answer(self._step_s)
            self._step_s = []
            self._left = self._blocks.next()
            control.should_training_stop = self._left == 0
            self._start_s = time.perf_counter()


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    m = recipe.model
    config = LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_size,
        num_hidden_layers=m.n_layers,
        num_attention_heads=m.n_heads,
        num_key_value_heads=m.n_kv_heads,
        head_dim=m.head_size,
        max_position_embeddings=m.max_seq_len_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        rms_norm_eps=m.norm_eps,
        tie_word_embeddings=m.tied_embeddings,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def training_arguments(recipe: Recipe, folder: str, compiled: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=recipe.global_batch_rows,
        max_steps=10**6,
        learning_rate=recipe.optim.lr,
        weight_decay=recipe.optim.weight_decay,
        adam_beta1=recipe.optim.beta1,
        adam_beta2=recipe.optim.beta2,
        adam_epsilon=recipe.optim.eps,
        max_grad_norm=recipe.optim.grad_clip_norm,
        bf16=recipe.train.precision == "bf16",
        use_cpu=True,
        torch_compile=compiled,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=recipe.train.seed,
    )


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(THREADS)
    recipe, loader = yardstick()
    input_RT = torch.cat([loader.batch(step).input_BT for step in range(ROWS_OF_STEPS)])
    blocks = Blocks(args, recipe.train.global_batch_tokens)
    first_block = blocks.next()
    if not first_block:
        return
    torch.manual_seed(recipe.train.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=build_model(recipe),
            args=training_arguments(recipe, folder, args.compile),
            train_dataset=Rows(input_RT),
            callbacks=[Clock(blocks, first_block)],
        )
        trainer.train()


if __name__ == "__main__":
    main(parse_arguments(__doc__))
