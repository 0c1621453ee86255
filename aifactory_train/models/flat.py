"""A stretch of a flattened tensor: what ZeRO leaves of a weight on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Box = tuple[slice, ...]


class FlatSlice(Tensor):
    """Elements [start, start + n) of a tensor of `shape`, flattened by rows, as `local_X` of shape (n,) holds them.

    torch.distributed.checkpoint writes and reads boxes of whole tensors. A stretch is a few of them (one of whole rows,
    and up to two of parts for each dim but the last), each a view of `local_X`, so nothing is copied or gathered. It is
    a tensor because that is what torch looks for; the methods in double underscores are its protocol
    (torch/distributed/_checkpointable.py). It knows no operators: work on `local_X` or on `boxes()`.
    """

    local_X: Tensor
    start: int

    @staticmethod
    def __new__(cls, local_X: Tensor, start: int, shape: Sequence[int]) -> FlatSlice:
        made = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=local_X.dtype, device=local_X.device)
        made.local_X, made.start = local_X, start
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a FlatSlice; take its local_X or its boxes()")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FlatSlice({self.start}..{self.start + self.local_X.numel()} of {tuple(self.shape)})"

    def with_local(self, local_X: Tensor) -> FlatSlice:
        """The same stretch of another tensor of this shape, such as a copy in host memory."""
        return FlatSlice(local_X, self.start, self.shape)

    def boxes(self) -> list[tuple[Box, Tensor]]:
        """Where each box lies in the whole tensor, and the view of `local_X` that holds it."""
        found, at = [], 0
        for box in _boxes(self.start, self.start + self.local_X.numel(), self.shape):
            sizes = [s.stop - s.start for s in box]
            n = math.prod(sizes)
            found.append((box, self.local_X[at : at + n].view(sizes)))
            at += n
        return found

    def __create_write_items__(self, fqn: str, object: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties.create_from_tensor(self.local_X)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [
            ChunkStorageMetadata(offsets=torch.Size(s.start for s in box), sizes=view.shape)
            for box, view in self.boxes()
        ]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        for box, view in self.boxes():
            if torch.Size(s.start for s in box) == index.offset:
                return view
        raise ValueError(f"{self} has no box at {index.offset}")


def _boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Boxes that hold elements start..stop of a tensor, in their order."""
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # all within one row
        yield from _in_row(last, start - last * row, stop - last * row, shape)
        return
    if start < first * row:
        yield from _in_row(first - 1, start - (first - 1) * row, row, shape)
    if first < last:
        yield (slice(first, last), *(slice(0, n) for n in shape[1:]))
    if last * row < stop:
        yield from _in_row(last, 0, stop - last * row, shape)


def _in_row(number: int, start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    for box in _boxes(start, stop, shape[1:]):
        yield (slice(number, number + 1), *box)
