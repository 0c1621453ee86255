"""The tensors of a Hugging Face folder by name: safetensors or pickles, in one file or several, read box by box."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aifactory_train.errors import CheckpointError
from aifactory_train.models.flat import Box
from aifactory_train.recipe.weights import read_json

INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_DO = "download the folder again, or take the recipe of that model"


class WeightFiles:
    """Nothing is read before it is asked for. Safetensors are taken where there are both.

    Raises:
        CheckpointError: no weights, or a file is missing, truncated, or pickled with more than tensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self.file_of = self._list()

    def _list(self) -> dict[str, str]:
        for index, single in ((INDEX, "model.safetensors"), (f"{_PICKLED}.index.json", _PICKLED)):
            if (self.folder / index).exists():
                names = read_json(self.folder / index).get("weight_map")
                if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                    raise CheckpointError(f"{index} has no weight_map", where=str(self.folder / index), do=_DO)
                return names
            if (self.folder / single).exists():
                return dict.fromkeys(self._names(single), single)
        raise CheckpointError(
            "no weights: neither model.safetensors nor its index, nor pytorch_model.bin",
            where=str(self.folder),
            do="set model.init_from to a Hugging Face folder with weights",
        )

    def _names(self, file: str) -> list[str]:
        with self._errors(file):
            return list(self._opened(file).keys())

    def check(self) -> None:
        """Open every file, which finds one that is missing or truncated; no tensor is read."""
        for file in sorted(set(self.file_of.values())):
            with self._errors(file):
                self._opened(file)

    def shape(self, name: str) -> tuple[int, ...]:
        file = self.file_of[name]
        with self._errors(file):
            opened = self._opened(file)
            return tuple(opened[name].shape if isinstance(opened, dict) else opened.get_slice(name).get_shape())

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or a box of it."""
        file = self.file_of[name]
        with self._errors(file):
            opened = self._opened(file)
            whole = opened[name] if isinstance(opened, dict) else opened.get_slice(name)
            return whole[box] if box else whole[...]

    def _opened(self, file: str) -> Any:
        """A safetensors file, whose tensors stay on disk, or a dict of tensors that are mapped and not read."""
        if file not in self._open:
            path = self.folder / file
            if file.endswith(".safetensors"):
                from safetensors import safe_open

                self._open[file] = safe_open(path, framework="pt")
            else:
                self._open[file] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return self._open[file]

    @contextmanager
    def _errors(self, file: str) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{file} is pickled and holds more than tensors, which could run any code: {reason}",
                where=str(self.folder),
                do="take a folder with safetensors, or convert it by transformers where you trust it",
            ) from None
        except (SafetensorError, OSError, RuntimeError, EOFError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{file} cannot be read: {reason}", where=str(self.folder), do=_DO) from None
