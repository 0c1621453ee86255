"""Low-rank adapters (Hu et al., arxiv.org/abs/2106.09685) by `peft`: beside a frozen linear W a product B A trains.

A target linear becomes a module of `peft`: its weight is then called NAME.base_layer.weight, and its adapters
NAME.lora_A.default.weight and NAME.lora_B.default.weight. It computes W x + alpha / rank * B A x.
Shapes: R rank, I inputs and O outputs of a linear.
"""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aifactory_train.errors import PlanError
from aifactory_train.models.parts import ModelParts, boxes, copy_into
from aifactory_train.recipe.schema import Lora

_ADAPTERS = (".lora_A.default.", ".lora_B.default.")


def apply_lora(parts: ModelParts, lora: Lora) -> None:
    """Put adapters beside linears of the blocks, in place; from here on they alone train. Before all parallel axes.

    Args:
        parts: on the meta device; the adapters stand there too.

    Raises:
        PlanError: a name in `lora.targets` is of no linear of the blocks.
    """
    with warnings.catch_warnings():
        # GPT-2 stores its linears as (I, O). peft does what is right there and says so for each.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        config = _config(lora, _targets(parts, lora))
        _peft().inject_adapter_in_model(config, parts.root, low_cpu_mem_usage=True)
    for name, parameter in parts.root.named_parameters():
        parameter.requires_grad_(is_adapter(name))


@cache
def _peft() -> Any:
    # Its import tries libraries of other devices and logs which of them it lacks.
    logging.disable(logging.WARNING)
    import peft

    logging.disable(logging.NOTSET)
    return peft


def _config(lora: Lora, targets: list[str], base: str | None = None) -> Any:
    return _peft().LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha)
        if lora.alpha.is_integer()
        else lora.alpha,  # whole where it can be, as others read it
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )


def _targets(parts: ModelParts, lora: Lora) -> list[str]:
    """Full names of the linears that get adapters."""
    inside = {id(module) for block in parts.blocks for module in block.modules()}
    linears = [name for name, m in parts.root.named_modules() if id(m) in inside and _is_linear(m)]
    if lora.targets == "all-linear":
        return linears
    found = {wanted: [n for n in linears if f".{n}".endswith(f".{wanted}")] for wanted in lora.targets}
    for wanted, names in found.items():
        if not names:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            error = PlanError(
                f"lora.targets names {wanted}, and no linear of the blocks is called so; there are: {known}",
                where="recipe: lora.targets",
                do="--set lora.targets=all-linear, or some of these names",
            )
            error.on_every_rank = True  # all ranks build the same blocks
            raise error
    return sorted({name for names in found.values() for name in names})


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # what GPT-2 has for a linear


def is_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTERS)


def split_weights(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of the model itself, by the names they have without adapters, and the adapters."""
    base = {name.replace(".base_layer.", "."): w for name, w in weights.items() if not is_adapter(name)}
    return base, {name: w for name, w in weights.items() if is_adapter(name)}


@torch.no_grad()
def init_adapters(adapters: Mapping[str, Tensor], seed: int) -> None:
    """Fill this rank's part of each adapter: A uniform in +-1/sqrt(I) as peft has it, B zero, so that B A is nothing.

    Each from its own generator, so that the numbers depend on seed and name alone.

    Args:
        adapters: whole, sharded (DTensor) or stretches (FlatSlice).
    """
    for name, weight in adapters.items():
        views = [view for _, view in boxes(weight)]
        if ".lora_B." in name:
            for view in views:
                view.zero_()
        elif views:
            device = views[0].device
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            full_RI = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            bound = 1 / math.sqrt(weight.shape[1])
            copy_into(weight, full_RI.uniform_(-bound, bound, generator=generator))


@torch.no_grad()
def merge_adapters(root: nn.Module, weights: dict[str, Tensor], adapters: Mapping[str, Tensor]) -> None:
    """Add alpha / rank * B A to each of `weights` that has adapters, in place, by peft's own arithmetic.

    Args:
        root: of `apply_lora`, on the meta device.
        weights: some of the model's own, whole, by the names they have without adapters.
        adapters: of all of those, whole, float32.
    """
    for name, weight in weights.items():
        linear = name.removesuffix(".weight")
        names = [f"{linear}{part}weight" for part in _ADAPTERS]
        if name == linear or names[0] not in adapters:
            continue
        layer: Any = root.get_submodule(linear)
        for holder, adapter in zip((layer.lora_A, layer.lora_B), names, strict=True):
            holder["default"].weight = nn.Parameter(adapters[adapter], requires_grad=False)
        weight += layer.get_delta_weight("default").to(weight.dtype)
        layer.lora_A["default"].to("meta"), layer.lora_B["default"].to("meta")


def save_adapter_config(lora: Lora, adapters: Mapping[str, Any], base: str, folder: Path) -> None:
    """adapter_config.json as peft reads it. Full names, because peft takes each linear whose name ends in one given.

    Args:
        adapters: by name.
        base: folder or hub id of the model that they change.
    """
    linears = sorted({name.partition(".lora_")[0] for name in adapters})
    _config(lora, linears, base).save_pretrained(folder)


def peft_name(name: str) -> str:
    """What an adapter of this name is called in peft's adapter_model.safetensors."""
    return "base_model.model." + name.replace(".default.", ".")
