"""Weights of a Hugging Face folder into the parts that this rank has of a model.

Files hold other names and shapes than the code of transformers where that has changed: an expert by itself, which the
code stacks. Its own table of such changes (conversion_mapping.py of transformers 5.23) is used here, both ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from aifactory_train.checkpoint.weightfiles import WeightFiles
from aifactory_train.errors import CheckpointError
from aifactory_train.models.decoder import Decoder
from aifactory_train.models.parts import boxes
from aifactory_train.recipe.schema import Model
from aifactory_train.recipe.weights import check_config

_DO = "download the folder again, or take the recipe of that model"


@dataclass
class _Source:
    """Where a weight is in the files: under one name, or in several tensors that `converter` makes it of."""

    names: dict[str, list[str]] = field(default_factory=dict)  # by pattern of the converter; "" without one
    converter: Any = None


@torch.no_grad()
def load_weights(weights: Mapping[str, Tensor], model: Model, folder: Path) -> None:
    """Fill weights of a model, or of a stage of it, from safetensors or tensors pickled alone.

    Each rank reads what it has: a box of a tensor, or of stacked experts those that it has a part of. Nothing is
    written but `weights`, and no other rank is waited for.

    Args:
        weights: by name in the model without adapters; whole, sharded (DTensor) or stretches (FlatSlice).

    Raises:
        CheckpointError: no such folder, another architecture, missing or truncated files, missing tensors.
    """
    files, sources = _open(model, folder.expanduser())
    for name, weight in weights.items():
        source = _source_of(name, sources, files)
        if source.converter is None:
            _read_boxes(files, source.names[""][0], name, weight)
        else:
            _read_converted(files, source, name, weight)


def check_weights(model: Model, folder: Path) -> None:
    """Find what `load_weights` would refuse on any rank, without reading weights: for one rank, before all read.

    Raises:
        CheckpointError: as `load_weights`.
    """
    files, sources = _open(model, folder.expanduser())
    files.check()
    for name, weight in _on_meta(model).named_parameters():
        source = _source_of(name, sources, files)
        if source.converter is None:
            _check_shape(name, files.shape(source.names[""][0]), weight, files.folder)


def _open(model: Model, folder: Path) -> tuple[WeightFiles, dict[str, _Source]]:
    check_config(model, folder)
    files = WeightFiles(folder)
    return files, _own_sources(model, files) if model.family != "other" else _foreign_sources(model, files)


def _source_of(name: str, sources: dict[str, _Source], files: WeightFiles) -> _Source:
    if name not in sources:
        raise CheckpointError(f"the weights have no tensor {name}", where=str(files.folder), do=_DO)
    return sources[name]


def _on_meta(model: Model) -> torch.nn.Module:
    if model.family == "other":
        from aifactory_train.models.hf import build_root

        return cast(torch.nn.Module, build_root(model))
    with torch.device("meta"):
        return Decoder(model)


def _read_boxes(files: WeightFiles, stored: str, name: str, weight: Tensor) -> None:
    _check_shape(name, files.shape(stored), weight, files.folder)
    for box, view in boxes(weight):
        view.copy_(files.read(stored, box))


def _check_shape(name: str, found: tuple[int, ...], weight: Tensor, folder: Path) -> None:
    if found != tuple(weight.shape):
        raise CheckpointError(
            f"{name} has shape {found}, the recipe's model {tuple(weight.shape)}", where=str(folder), do=_DO
        )


def _read_converted(files: WeightFiles, source: _Source, name: str, weight: Tensor) -> None:
    from transformers.core_model_loading import MergeModulelist

    n_stacked = {len(names) for names in source.names.values()}
    first = source.converter.operations[0]
    if not (isinstance(first, MergeModulelist) and first.dim == 0):
        whole = _converted(files, source, name, slice(None))
        _check_shape(name, tuple(whole.shape), weight, files.folder)
        for box, view in boxes(weight):
            view.copy_(whole[box])
        return
    if n_stacked != {weight.shape[0]}:
        found = ", ".join(map(str, sorted(n_stacked)))
        raise CheckpointError(
            f"the weights have {found} tensors for {name}, the recipe's model stacks {weight.shape[0]}",
            where=str(files.folder),
            do=_DO,
        )
    for box, view in boxes(weight):
        if view.numel() == 0:
            continue
        part = _converted(files, source, name, box[0])
        _check_shape(name, (weight.shape[0], *part.shape[1:]), weight, files.folder)
        view.copy_(part[(slice(None), *box[1:])])


def _converted(files: WeightFiles, source: _Source, name: str, which: slice) -> Tensor:
    """What the converter makes of some of the stacked tensors, or of all."""
    converter = deepcopy(source.converter)
    for pattern, names in source.names.items():
        for stored in names[which]:
            converter.add_tensor(name, stored, pattern, files.read(stored))
    try:
        made = converter.convert(name)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the tensors for {name} do not fit together: {str(error).splitlines()[0]}",
            where=str(files.folder),
            do=_DO,
        ) from None
    return made[name][0] if isinstance(made[name], list) else made[name]


def _own_sources(model: Model, files: WeightFiles) -> dict[str, _Source]:
    ours = {n for n, _ in _on_meta(model).named_parameters()}
    has_prefix = any(name.startswith("model.") for name in files.file_of)
    found = {name if has_prefix or name in ours else f"model.{name}": name for name in files.file_of}
    # Older folders hold the frequencies of RoPE, and tied ones a second copy of the embedding.
    _refuse_extra([n for n in found if n not in ours and n != "lm_head.weight"], files.folder)
    return {name: _Source({"": [stored]}) for name, stored in found.items()}


def _refuse_extra(extra: list[str], folder: Path) -> None:
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise CheckpointError(
            f"the weights have {len(extra)} tensors that the recipe's model has not, such as {extra[0]}",
            where=str(folder),
            do="take a recipe of that model; biases of a bias-free family are not supported",
        )


def _foreign_sources(model: Model, files: WeightFiles) -> dict[str, _Source]:
    """By the name of each weight in the code of transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    from aifactory_train.models.hf import TiedHead, build_root

    root = build_root(model)
    ours, prefix = root.state_dict(), root.base_model_prefix
    changes = get_model_conversion_mapping(root)
    converters = [c for c in changes if isinstance(c, WeightConverter)]
    renamings = [c for c in changes if not isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, _Source] = {}
    extra = []
    for stored in sorted(files.file_of, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, ours)
        if name not in ours and rename_source_key(stored, [], [], prefix, ours)[0] in ours:
            # Written by this code itself: nothing to change.
            name, pattern = rename_source_key(stored, [], [], prefix, ours)[0], None
        if name not in ours:
            extra.append(stored)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        targets = converter.target_patterns if converter is not None else [""]
        for target in targets:  # of one tensor that is cut into several, the first is named
            source = sources.setdefault(name.replace(targets[0], target), _Source(converter=converter))
            source.names.setdefault(pattern or "", []).append(stored)
    _check_buffers(root, sources, files)
    ignored = [re.compile(text) for text in root._keys_to_ignore_on_load_unexpected or ()]
    tied = {f"{name}.weight" for name, module in root.named_modules() if isinstance(module, TiedHead)}
    _refuse_extra([n for n in extra if n not in tied and not any(r.search(n) for r in ignored)], files.folder)
    return sources


def _check_buffers(root: Any, sources: dict[str, _Source], files: WeightFiles) -> None:
    """Numbers beside the weights are those of the constructors; others would be lost."""
    for name, buffer in root.named_buffers():
        if name in sources and not torch.equal(files.read(sources[name].names[""][0]).to(buffer), buffer):
            raise CheckpointError(
                f"the weights hold numbers that are not trained and not those of a new model: {name}",
                where=str(files.folder),
                do="take another model: training here keeps weights alone",
            )
