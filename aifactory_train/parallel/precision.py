"""fp8: the matrix products of the blocks in 8 bits, by torchao; embedding, norms, attention, head and loss stay bf16.

Weights, gradients and the optimizer's state stay as they are in bf16 training: what is multiplied is cast at each
product, scaled by its largest value per tensor ("fp8") or per row and column ("fp8_rowwise"; torchao/float8/README.md).
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch
from torch import nn

from aifactory_train.errors import PlanError
from aifactory_train.models.parts import ModelParts
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.layout import FP8_MULTIPLE

TORCHAO_RECIPES = {"fp8": "tensorwise", "fp8_rowwise": "rowwise"}
# Ada has fp8 with a scale per tensor; scales per row need Hopper's kernels.
LEAST_CAPABILITY = {"fp8": (8, 9), "fp8_rowwise": (9, 0)}
ROCM_ARCHITECTURES = ("gfx942", "gfx950")


def refuse_fp8(layout: Layout, device: torch.device) -> None:
    """Raise PlanError where the layout wants fp8 and this device or installation has none, with the reason."""
    if layout.precision not in TORCHAO_RECIPES:
        return
    reason = _why_no_device(layout.precision, device)
    do = "--set train.precision=bf16"
    if reason is None and (reason := _why_no_torchao()) is not None:
        do = "pip install 'aifactory-train[fp8]', or --set train.precision=bf16"
    if reason is not None:
        error = PlanError(f"precision {layout.precision} {reason}", where="plan.json: layout.precision", do=do)
        error.on_every_rank = True  # the ranks of a run have the same devices and the same installation
        raise error


def _why_no_device(precision: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a GPU, and this run is on {device.type}"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.split(":")[0]
        if architecture not in ROCM_ARCHITECTURES:
            return f"needs one of {', '.join(ROCM_ARCHITECTURES)}, and {properties.name} is {architecture}"
        return None
    least, capability = LEAST_CAPABILITY[precision], (properties.major, properties.minor)
    if capability < least:
        shown = "{}.{}, and {} has {}.{}".format(*least, properties.name, *capability)
        return f"needs compute capability {shown}"
    return None


def _why_no_torchao() -> str | None:
    try:
        importlib.import_module("torchao.float8")
    except (ImportError, OSError, RuntimeError) as error:  # the latter two from one that was built for another torch
        return f"needs torchao, which cannot be imported: {error}"
    return None


def apply_precision(parts: ModelParts, layout: Layout) -> None:
    """Replace the linears of the blocks by torchao's, in place, where the layout says fp8; before tp splits them.

    Raises:
        PlanError: a matrix has a side that is no multiple of 16 on one rank of tp.
    """
    if layout.precision in TORCHAO_RECIPES:
        _convert_linears(parts, layout)


def _convert_linears(parts: ModelParts, layout: Layout, *, emulate: bool = False) -> None:
    """emulate: multiply in the precision of the model what was cast to 8 bits, which any device can."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(TORCHAO_RECIPES[layout.precision])
    for block in parts.blocks:
        _check_sides(block, parts.tp_plan, layout)
        convert_to_float8_training(block, config=replace(config, emulate=emulate))


def _check_sides(block: nn.Module, tp_plan: dict[str, str], layout: Layout) -> None:
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        style = tp_plan.get(name, "")
        n_out = module.out_features / (layout.tp if style == "colwise" else 1)
        n_in = module.in_features / (layout.tp if style == "rowwise" else 1)
        if n_out % FP8_MULTIPLE or n_in % FP8_MULTIPLE:
            error = PlanError(
                f"precision {layout.precision} needs matrices whose sides are multiples of {FP8_MULTIPLE}; {name} is "
                f"{n_out:g} x {n_in:g} on each of {layout.tp} rank(s) of tp",
                where="plan.json: layout.precision",
                do="--set train.precision=bf16" + (", or a smaller layout.tp" if layout.tp > 1 else ""),
            )
            error.on_every_rank = True
            raise error
