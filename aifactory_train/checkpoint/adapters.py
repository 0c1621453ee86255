"""Adapters out of a checkpoint: by themselves as peft reads them, and merged into the weights that they change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from aifactory_train.checkpoint.dcp import read_tensors, stored_tensors
from aifactory_train.checkpoint.huggingface import load_weights
from aifactory_train.models.build import build_model
from aifactory_train.models.lora import apply_lora, merge_adapters, peft_name, save_adapter_config
from aifactory_train.recipe.schema import Lora, Model

ADAPTER = "adapter"  # folder within an export


def read_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """All adapters of a checkpoint by name, whole, float32; a small part of the model."""
    stored = {k: v for k, v in stored_tensors(checkpoint).items() if k.startswith("model.")}
    adapters = {k.removeprefix("model."): torch.empty(v.size, dtype=v.properties.dtype) for k, v in stored.items()}
    read_tensors({"model": adapters}, checkpoint)
    return adapters


def open_merged(
    model: Model, model_code: str, lora: Lora, adapters: dict[str, Tensor]
) -> tuple[dict[str, torch.Size], Callable[[list[str]], dict[str, Tensor]]]:
    """The model with its adapters merged: shape of each weight by name, and what reads some of them, whole, float32.

    The weights below the adapters come from `model.init_from`, as in training.

    Raises:
        CheckpointError: when read: that folder is gone, damaged or of another model.
    """
    with torch.device("meta"):
        parts = build_model(model, model_code)
        shapes = {name: parameter.shape for name, parameter in parts.root.named_parameters()}
        apply_lora(parts, lora)

    def read(names: list[str]) -> dict[str, Tensor]:
        weights = {name: torch.empty(shapes[name]) for name in names}
        load_weights(weights, model, Path(str(model.init_from)))
        merge_adapters(parts.root, weights, adapters)
        return weights

    return shapes, read


def save_adapters(lora: Lora, adapters: dict[str, Tensor], base: str, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which `peft.PeftModel.from_pretrained` loads.

    Args:
        base: folder of the model that they change.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_adapter_config(lora, adapters, base, folder)
    tensors = {peft_name(name): tensor.contiguous() for name, tensor in adapters.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
