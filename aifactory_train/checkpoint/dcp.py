"""Tensors of a checkpoint: staging, writing and reading through torch.distributed.checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from aifactory_train.checkpoint.blocks import (
    ALIGN_BYTES,
    BLOCK_BYTES,
    OtherBytes,
    blocks_of,
    read_blocks,
    write_blocks,
)
from aifactory_train.errors import storage_fault
from aifactory_train.models.flat import FlatSlice
from aifactory_train.models.parts import local_tensor

State = dict[str, Any]


class Stager:
    """Copies a state to host memory so that training can go on while the copy is written."""

    def __init__(self) -> None:
        # The cache is pinned memory, which only exists beside a GPU.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())

    def stage(self, state: State) -> State:
        """A copy in host memory that is this object's own; the next call overwrites it."""
        staged = self._stager.stage(_tensors(state))
        return _like(state, staged if isinstance(staged, dict) else staged.result())


def _tensors(state: State) -> State:
    """With the storage of this rank in the place of each split tensor.

    torch's stager would make whole tensors of FlatSlices, and copies DTensors twice: in holes of the heap that stay.
    """
    of = {k: _tensors(v) if isinstance(v, dict) else v for k, v in state.items()}
    return {k: v.local_X if isinstance(v, FlatSlice) else local_tensor(v) for k, v in of.items()}


def _like(state: State, staged: State) -> State:
    """`staged` with a FlatSlice or DTensor wherever `state` has one."""
    return {k: _like(v, staged[k]) if isinstance(v, dict) else _split_like(v, staged[k]) for k, v in state.items()}


def _split_like(tensor: Any, local: Tensor) -> Tensor:
    if isinstance(tensor, FlatSlice):
        return tensor.with_local(local)
    if isinstance(tensor, DTensor):
        # Not from_local: it would move the copy to the device of the mesh.
        return DTensor(local, tensor._spec, requires_grad=False)
    return local


@contextmanager
def _ordinary_errors() -> Iterator[None]:
    """CheckpointException is a BaseException and wraps one error per rank: give the one that tells the cause."""
    try:
        yield
    except dcp.CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OtherBytes):
                raise cause from error
        fault = storage_fault(error)
        if fault is not None:
            raise OSError(fault.errno, fault.strerror) from error
        raise RuntimeError(str(error)) from error


class _Writer(dcp.FileSystemWriter):
    """One file for each rank: the bytes of its tensors, one behind the other.

    torch's own way, a torch.save for each tensor, copies each several times and is slower than a good disk.

    written: name of this rank's file -> [bytes, sha256 of each block].
    """

    written: dict[str, list[Any]]

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        name, end = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}", 0
        tensors, results = [], []
        for item in plan.items:
            tensor = planner.resolve_data(item).detach()
            start = -(-end // ALIGN_BYTES) * ALIGN_BYTES
            end = start + tensor.nbytes
            tensors.append((start, tensor.reshape(-1).view(torch.uint8)))
            results.append(WriteResult(item.index, tensor.nbytes, _StorageInfo(name, start, tensor.nbytes)))
        self.written = {name: [end, write_blocks(self.path / name, tensors)]} if end else {}
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class _Wanted(NamedTuple):
    """A tensor of which a part is in a file. A box of it, from `offsets`, is to be copied into `target`."""

    start: int
    shape: torch.Size
    dtype: torch.dtype
    offsets: torch.Size
    target: Tensor

    def extent(self) -> tuple[int, int]:
        """First byte of the box in the file, and the one behind its last."""
        last = [o + n - 1 for o, n in zip(self.offsets, self.target.shape, strict=True)]
        first_element, last_element = (self._element(at) for at in (self.offsets, last))
        return self.start + first_element * self.dtype.itemsize, self.start + (last_element + 1) * self.dtype.itemsize

    def _element(self, at: Sequence[int]) -> int:
        number = 0
        for i, n in zip(at, self.shape, strict=True):
            number = number * n + i
        return number

    def take(self, first: int, data: Tensor) -> None:
        """Copy what bytes first... of the file have of the box."""
        a, b = max(first, self.start), min(first + data.numel(), self.start + self.shape.numel() * self.dtype.itemsize)
        if a >= b:
            return
        elements = data[a - first : b - first].view(self.dtype)
        for box, view in FlatSlice(elements, (a - self.start) // self.dtype.itemsize, self.shape).boxes():
            low = [max(s.start, o) for s, o in zip(box, self.offsets, strict=True)]
            sizes = zip(box, self.offsets, self.target.shape, strict=True)
            high = [min(s.stop, o + n) for s, o, n in sizes]
            if all(i < j for i, j in zip(low, high, strict=True)):
                here = tuple(slice(i - s.start, j - s.start) for i, j, s in zip(low, high, box, strict=True))
                there = tuple(slice(i - o, j - o) for i, j, o in zip(low, high, self.offsets, strict=True))
                self.target[there].copy_(view[here])


class _Reader(dcp.FileSystemReader):
    """Reads what _Writer wrote: of each file the blocks that this rank needs, once, verified on the way.

    seen: name of a file -> its blocks that were read.
    """

    def __init__(self, folder: Path, files: Mapping[str, Sequence[Any]] | None = None) -> None:
        super().__init__(folder)
        self.files, self.seen = files, dict[str, set[int]]()

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self.tensors = metadata.state_dict_metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        wanted: dict[str, list[_Wanted]] = {}
        for item in plan.items:
            info, tensor = self.storage_data[item.storage_index], self.tensors[item.storage_index.fqn]
            (shape,) = {chunk.sizes for chunk in tensor.chunks if chunk.offsets == item.storage_index.offset}
            target = planner.resolve_tensor(item).detach()
            if target.numel():
                dtype, offsets = tensor.properties.dtype, item.storage_offsets
                wanted.setdefault(info.relative_path, []).append(_Wanted(info.offset, shape, dtype, offsets, target))
        for name, parts in wanted.items():
            self._read_file(name, parts)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _read_file(self, name: str, wanted: list[_Wanted]) -> None:
        by_block: dict[int, list[_Wanted]] = {}
        for part in wanted:
            for block in blocks_of(*part.extent()):
                by_block.setdefault(block, []).append(part)
        self.seen[name] = set(by_block)

        def use(first: int, data: Tensor) -> None:
            for part in by_block[first // BLOCK_BYTES]:
                part.take(first, data)

        sums = self.files[name][1] if self.files else None
        # In another layout several ranks of a node may each need a part of the same blocks.
        alone = 2 * sum(part.target.nbytes for part in wanted) > len(by_block) * BLOCK_BYTES
        read_blocks(self.path / name, sorted(by_block), sums, use, alone)


def write_tensors(state: State, folder: Path, group: dist.ProcessGroup | None = None) -> dict[str, list[Any]]:
    """Write each rank's part, fsynced. Collective over `group` (gloo); returns when all ranks are done.

    Without a group this process writes alone. Returns name -> [bytes, sha256 of each block] of what this rank wrote,
    but for .metadata.
    """
    with _ordinary_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = _Writer(folder, sync_files=True)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
    return writer.written


def read_tensors(
    state: State,
    folder: Path,
    group: dist.ProcessGroup | None = None,
    files: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, set[int]]:
    """Fill `state` in place, whatever number of ranks wrote it. Without a group this process reads alone.

    Args:
        files: name -> (bytes, sha256 of each block) to verify what is read; None where that is done.
    Returns:
        name -> which blocks of that file this rank has read.
    Raises:
        OtherBytes, on all ranks, where a block is not what was written.
    """
    reader = _Reader(folder, files)
    with _ordinary_errors(), warnings.catch_warnings():
        # To read alone is what the caller asked for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    return reader.seen


def stored_tensors(folder: Path) -> dict[str, Any]:
    """Name -> stored metadata (size, dtype) of everything in a checkpoint."""
    return dict(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)


def rng_state(rank: int) -> State:
    """This rank's random states, as tensors under keys of its own."""
    state = {f"rank{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rank{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: State, rank: int) -> None:
    torch.set_rng_state(state[f"rank{rank}.cpu"])
    if f"rank{rank}.cuda" in state:
        torch.cuda.set_rng_state(state[f"rank{rank}.cuda"])
