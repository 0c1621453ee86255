"""No rank ever holds a whole model while a checkpoint is saved or loaded: memory grows by a share and a constant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from aifactory_train.checkpoint.blocks import BLOCK_BYTES
from aifactory_train.checkpoint.dcp import Stager, read_tensors, write_tensors
from aifactory_train.checkpoint.manager import CheckpointManager
from aifactory_train.models.flat import FlatSlice
from gloo_forks import on_forks

RANKS = 4
SHAPE = (2048, 2048)  # 16 MiB, as large as a block
N_WEIGHTS = 16
STATE_BYTES = N_WEIGHTS * 4 * SHAPE[0] * SHAPE[1]
SHARE_BYTES = STATE_BYTES // RANKS
# Of each of the four threads that write or read: a block. The rest is what torch.distributed.checkpoint needs to plan.
CONSTANT_BYTES = 4 * BLOCK_BYTES + (12 << 20)

State = dict[str, Any]


def rows(rank: int) -> State:
    """As FSDP splits."""
    mesh = init_device_mesh("cpu", (RANKS,))
    local = (SHAPE[0] // RANKS, SHAPE[1])
    return {f"w{i}": DTensor.from_local(torch.full(local, float(rank)), mesh, [Shard(0)]) for i in range(N_WEIGHTS)}


def columns(rank: int) -> State:
    """As tensor parallelism splits some: every rank needs a part of every block."""
    mesh = init_device_mesh("cpu", (RANKS,))
    local = (SHAPE[0], SHAPE[1] // RANKS)
    return {f"w{i}": DTensor.from_local(torch.full(local, float(rank)), mesh, [Shard(1)]) for i in range(N_WEIGHTS)}


def stretches(rank: int) -> State:
    """As ZeRO 1 and 2 split: one flat tensor of all weights, cut in the middle of rows."""
    size = SHAPE[0] * SHAPE[1]
    cuts = [k * N_WEIGHTS * size // RANKS + 1001 * (0 < k < RANKS) for k in range(RANKS + 1)]
    flat = torch.full((cuts[rank + 1] - cuts[rank],), float(rank))
    state = {}
    for i in range(N_WEIGHTS):
        a, b = max(cuts[rank], i * size), min(cuts[rank + 1], (i + 1) * size)
        if a < b:
            state[f"w{i}"] = FlatSlice(flat[a - cuts[rank] : b - cuts[rank]], a - i * size, SHAPE)
    return state


def wholly(rank: int) -> State:
    """What must not be: the whole model on each rank."""
    return {name: weight.full_tensor() for name, weight in rows(rank).items()}


SPLITS: dict[str, Callable[[int], State]] = {"rows": rows, "columns": columns, "stretches": stretches}


def resident_bytes(key: str) -> int:
    """VmRSS, or VmHWM: the largest that it has been since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return int(line.split()[1]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def growth_bytes(work: Callable[[], object]) -> int:
    """By how much the memory of this process is larger at most during `work`."""
    forget_peak()
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def on_ranks(folder: Path, work: Callable[[int, CheckpointManager], int]) -> list[int]:
    """What `work` returns on each of some forks with a process group."""

    def measured(rank: int) -> None:
        manager = CheckpointManager(folder / "checkpoints", 2, True, torch.device("cpu"))
        _warm_up(manager)
        (folder / f"grew-{rank}").write_text(str(work(rank, manager)))

    on_forks(folder, RANKS, measured)
    return [int((folder / f"grew-{rank}").read_text()) for rank in range(RANKS)]


def _warm_up(manager: CheckpointManager) -> None:
    """What the first save and load import, and the memory of gloo, are no part of a model."""
    state = {"w": DTensor.from_local(torch.ones(1, 1), init_device_mesh("cpu", (RANKS,)), [Shard(0)])}
    folder = manager.folder.with_name("warm")
    write_tensors(Stager().stage(state), folder, manager._group)
    read_tensors(state, folder, manager._group)
    dist.barrier()  # axis: all; none is still at it when another measures


def save(split: Callable[[int], State]) -> Callable[[int, CheckpointManager], int]:
    """Asynchronous: the staged copy of a rank's share is the largest thing."""

    def work(rank: int, manager: CheckpointManager) -> int:
        state = split(rank)

        def save_and_wait() -> None:
            manager.save(1, 0, state, {})
            manager.wait()

        return growth_bytes(save_and_wait)

    return work


def load(split: Callable[[int], State]) -> Callable[[int, CheckpointManager], int]:
    def work(rank: int, manager: CheckpointManager) -> int:
        state = split(rank)

        def check_and_load() -> None:
            commit = manager.latest()
            assert commit is not None
            manager.check(commit, {})
            manager.load(commit, state)

        return growth_bytes(check_and_load)

    return work


@pytest.mark.parametrize("split", SPLITS)
def test_a_save_takes_a_copy_of_the_ranks_own_share_and_a_constant(split: str, tmp_path: Path) -> None:
    assert max(on_ranks(tmp_path, save(SPLITS[split]))) < SHARE_BYTES + CONSTANT_BYTES


@pytest.mark.parametrize("source", ["rows", "stretches"])
def test_a_load_takes_a_constant_beside_the_state_it_fills(source: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, save(SPLITS[source]))
    for split in SPLITS.values():
        assert max(on_ranks(tmp_path, load(split))) < CONSTANT_BYTES


def test_a_whole_model_on_each_rank_is_seen(tmp_path: Path) -> None:
    grew = on_ranks(tmp_path, lambda rank, manager: growth_bytes(lambda: wholly(rank)))
    assert min(grew) >= STATE_BYTES
