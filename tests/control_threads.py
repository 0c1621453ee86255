"""Ranks of a control plane as threads of this process, over a real store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from aifactory_train.measure.control import Control, StoreControl


def run_ranks(
    size: int, work: Callable[[Control], Any], present: int | None = None, timeout_s: float = 20.0
) -> list[Any]:
    """What `work` returns, or the error it raised, for each of the first `present` ranks (all)."""
    wait = timedelta(seconds=timeout_s)
    server = dist.TCPStore("127.0.0.1", 0, size, True, wait, wait_for_workers=False)

    def run(rank: int) -> Any:
        store = dist.TCPStore("127.0.0.1", server.port, size, False, wait, wait_for_workers=False)
        try:
            return work(StoreControl(rank, size, store, timeout_s))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size if present is None else present)))
