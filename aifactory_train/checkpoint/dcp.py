"""Tensors of a checkpoint: staging, writing and reading through torch.distributed.checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from aifactory_train.errors import storage_fault
from aifactory_train.models.flat import FlatSlice

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
    """With the storage of each FlatSlice in its place: torch's stager would make whole tensors of them."""
    of = {k: _tensors(v) if isinstance(v, dict) else v for k, v in state.items()}
    return {k: v.local_X if isinstance(v, FlatSlice) else v for k, v in of.items()}


def _like(state: State, staged: State) -> State:
    """`staged` with a FlatSlice wherever `state` has one."""
    return {
        k: _like(v, staged[k])
        if isinstance(v, dict)
        else v.with_local(staged[k])
        if isinstance(v, FlatSlice)
        else staged[k]
        for k, v in state.items()
    }


@contextmanager
def _ordinary_errors() -> Iterator[None]:
    """CheckpointException is a BaseException and wraps one error per rank: give the disk's error, or a RuntimeError."""
    try:
        yield
    except dcp.CheckpointException as error:
        fault = storage_fault(error)
        if fault is not None:
            raise OSError(fault.errno, fault.strerror) from error
        raise RuntimeError(str(error)) from error


class _Writer(dcp.FileSystemWriter):
    """torch.save turns a full disk into "unexpected pos", whose cause does not travel to the other ranks."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            fault = storage_fault(error)
            if fault is None:
                raise
            raise OSError(fault.errno, fault.strerror) from error


def write_tensors(state: State, folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write each rank's part, fsynced. Collective over `group` (gloo); returns when all ranks are done.

    Without a group this process writes alone.
    """
    with _ordinary_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        writer = _Writer(folder, sync_files=True)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(state: State, folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Fill `state` in place, whatever number of ranks wrote it. Without a group this process reads alone."""
    reader = dcp.FileSystemReader(folder)
    with _ordinary_errors(), warnings.catch_warnings():
        # To read alone is what the caller asked for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)


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
