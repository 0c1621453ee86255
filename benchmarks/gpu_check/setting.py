"""What is built and how large: the same on a GPU and, in a test, on a CPU, where only the sizes are others."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from aifactory_train.data.loader import Batch
from aifactory_train.machine.machine import Device, Host, Machine
from aifactory_train.plan.contract import Layout, Prediction
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.shape import build_shape
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Model, Recipe, fingerprint
from aifactory_train.strictyaml import configs_dir
from aifactory_train.train.engine_torch import TorchEngine
from aifactory_train.train.setup import build_engine

TINY = Model(
    family="llama", vocab_size=1024, hidden_size=256, ffn_size=512, n_layers=3, n_heads=8, n_kv_heads=4, head_size=32,
    max_seq_len_tokens=1024, rope_theta=1e4, norm_eps=1e-5, tied_embeddings=False,
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """parity: the model whose numbers are compared, its rows and their tokens. wide: the model that is measured.

    memory_layers, memory_rows: of the model whose memory is measured, tried in this order until one fits.
    speed_layers: tried in this order, too. speed_rows: of a step. cp_chunk_tokens: of a chunk of axis cp.
    """

    parity: Model
    parity_tokens: int
    parity_rows: int
    wide: Model
    tokens: int
    memory_layers: tuple[int, ...]
    memory_rows: tuple[int, ...]
    speed_layers: tuple[int, ...]
    speed_rows: int
    cp_chunk_tokens: int


def gpu_sizes() -> Sizes:
    """Llama 3 8B at 4096 tokens, and a model that a CPU steps in a second."""
    llama = load_recipe(configs_dir() / "recipes" / "llama3-8b.yaml").model
    return Sizes(
        TINY, 256, 4, llama, 4096, memory_layers=(8, 6, 4, 2), memory_rows=(4, 2, 1),
        speed_layers=tuple(range(32, 1, -2)), speed_rows=4, cp_chunk_tokens=256,
    )  # fmt: skip


def a_recipe(model: Model, rows: int, tokens: int, precision: str, documents: bool, **layout: Any) -> Recipe:
    """A recipe whose text does not exist: batches are random numbers.

    AdamW's eps is as large as gradients of a tiny model, so that it does not blow up rounding where they are next to
    nothing.
    """
    return Recipe.model_validate({
        "name": "gpu-check",
        "model": model,
        "data": {
            "sources": [{"name": "none", "path": "none"}], "tokenizer": {"train_vocab_size": 96},
            "prepared_dir": "none", "seq_len_tokens": tokens, "document_mask": documents,
        },
        "train": {
            "budget_tokens": 1000 * rows * tokens, "global_batch_tokens": rows * tokens, "precision": precision,
            "compile": True,
        },
        "optim": {"lr": 3e-3 if model == TINY else 3e-5, "eps": 1e-3},
        "layout": {"engine": "fsdp2", **layout},
        "checkpoint": {"every_steps": 1000, "asynchronous": False},
    })  # fmt: skip


def this_machine(device: torch.device) -> Machine:
    """What torch sees of one device and its host."""
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cpu":
        kind, name, memory_bytes = "cpu", "CPU", host_bytes
    else:
        kind = "cuda" if torch.version.hip is None else "rocm"
        name, memory_bytes = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    return Machine(
        name="here",
        device=Device(kind=kind, name=name, per_node=1, memory_bytes=memory_bytes, native_bf16=True),
        host=Host(cores=os.cpu_count() or 1, memory_bytes=host_bytes),
    )


def one_device(rows: int, micro_batch_rows: int, precision: str, remat: str, compiled: bool) -> Layout:
    return Layout(
        engine="fsdp2", world_size=1, dp_shard=1, micro_batch_rows=micro_batch_rows,
        accumulation=rows // micro_batch_rows, reshard_after_forward=False, remat=remat, compile=compiled,
        precision=precision, threads_per_rank=torch.get_num_threads(),
    )  # fmt: skip


def plan_of(recipe: Recipe, machine: Machine, layout: Layout) -> Plan:
    """A plan of exactly this layout, without predictions."""
    nothing = Prediction(
        memory_bytes={}, peak_memory_bytes=0, step_time_s={}, total_step_time_s=None, tokens_per_s=None, mfu_frac=None,
        run_time_s=None, device_hours=None,
    )  # fmt: skip
    return Plan(
        recipe=recipe, recipe_hash=fingerprint(recipe), machine=machine, machine_hash=fingerprint(machine),
        layout=layout, shape=build_shape(recipe.model, recipe.data.seq_len_tokens), predicted=nothing,
    )  # fmt: skip


def random_batch(step: int, recipe: Recipe, device: torch.device) -> Batch:
    """The rows of a step, made from its number; documents of uneven lengths where the recipe masks them.

    In pinned memory for a GPU, as the loader gives them.
    """
    random = torch.Generator().manual_seed(step)
    rows, n_tokens = recipe.global_batch_rows, recipe.data.seq_len_tokens
    tokens = torch.randint(0, recipe.model.vocab_size, (rows, n_tokens + 1), generator=random)
    target = tokens[:, 1:].clone()
    target[:, :: 7 + step] = -100
    parts: list[torch.Tensor | None] = [tokens[:, :-1].contiguous(), target, None, None]
    if recipe.data.document_mask:
        starts = torch.rand(rows, n_tokens, generator=random) < 8 / n_tokens
        starts[:, 0] = True
        index = torch.arange(n_tokens).expand(rows, -1)
        parts[2] = starts.cumsum(1).int() - 1
        parts[3] = index - torch.where(starts, index, 0).cummax(1).values
    if device.type == "cuda":
        parts = [None if part is None else part.pin_memory() for part in parts]
    return Batch(*parts, int((target != -100).sum()))  # type: ignore[arg-type]


@contextmanager
def built(plan: Plan, device: torch.device) -> Iterator[TorchEngine]:
    """The engine of training with fresh weights, alone on the device and with nothing compiled before.

    The one before is gone when the function that held it has returned.
    """
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    engine = build_engine(plan, device, fresh=True)
    try:
        yield engine
    finally:
        engine.close()


def largest(values: Iterable[float]) -> float:
    """NaN where one of them is: max() drops it, so that a broken number would be within every bound."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
