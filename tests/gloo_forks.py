"""Some forks of this process as the ranks of a gloo group. To fork costs milliseconds, a new Python seconds."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=120)


def on_forks(folder: Path, n_ranks: int, work: Callable[[int], object]) -> None:
    """Run `work(rank)` on each rank, with one thread; fails where one of them did, whose traceback is printed."""
    (folder / "store").unlink(missing_ok=True)
    pids = []
    for rank in range(n_ranks):
        pid = os.fork()
        if pid == 0:
            _run(folder, rank, n_ranks, work)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [0] * n_ranks


def _run(folder: Path, rank: int, n_ranks: int, work: Callable[[int], object]) -> None:
    """What a fork does, to its end."""
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), n_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks, timeout=TIMEOUT)
        work(rank)
        dist.barrier()  # all ranks arrive: nobody leaves while others still talk to it
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
