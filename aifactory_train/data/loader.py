"""Batches for one rank, read ahead in a thread. The only state is the step.

Shapes: B rows of this rank in one step, T tokens of a row.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from aifactory_train.data.order import Order
from aifactory_train.data.packing import IGNORE, Rows, pack_rows, rows_per_epoch
from aifactory_train.data.shards import Prepared
from aifactory_train.errors import DataError
from aifactory_train.recipe.schema import Data

if TYPE_CHECKING:
    import torch

PREFETCH_STEPS = 3  # one slow read of the file system does not stop training, and few batches lie in memory
STOP_CHECK_S = 0.1


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one step.

    input_BT, target_BT int64 (target -100: does not count), document_BT int32 and position_BT int64 or both None.
    """

    input_BT: torch.Tensor
    target_BT: torch.Tensor
    document_BT: torch.Tensor | None
    position_BT: torch.Tensor | None
    n_valid_tokens: int


class Loader:
    """Rows of a prepared folder in their global order, cut evenly over the ranks that read data.

    Step k takes the global positions [k*R, k*R + R), R = global_batch_rows, and rank r of W the r-th of W equal
    contiguous parts: all ranks together read the same rows at any W. `wait_s` is the time that the consumer
    has waited for data so far.

    Raises DataError if R is not divisible by world_size, or a source's weight is too small to be read at all.
    """

    def __init__(
        self,
        prepared: Prepared,
        data: Data,
        seed: int,
        global_batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        if global_batch_rows % world_size:
            nearest_rows = -(-global_batch_rows // world_size) * world_size
            raise DataError(
                f"{global_batch_rows} rows of a step cannot be cut evenly over {world_size} data-parallel ranks",
                where="train.global_batch_tokens",
                do=f"--set train.global_batch_tokens={nearest_rows * data.seq_len_tokens}",
            )
        self._streams, self._eos_id = prepared.streams, prepared.manifest.eos_id
        self._seq_len_tokens, self._document_mask = data.seq_len_tokens, data.document_mask
        self._rows, self._pin_memory = global_batch_rows, pin_memory
        self._part = global_batch_rows // world_size
        self._offset = rank * self._part
        rows = [rows_per_epoch(s.n_tokens, data.seq_len_tokens) for s in prepared.streams]
        self.order = Order(seed, [s.entry.name for s in prepared.streams], prepared.weights, rows)
        self.wait_s = 0.0

    def rows(self, step: int) -> Rows:
        """This rank's rows of a step, numpy, read now."""
        first = step * self._rows + self._offset
        source_R, _, row_R = self.order.locate(np.arange(first, first + self._part))
        S, R = self._seq_len_tokens, self._part
        out = Rows(
            np.zeros((R, S), np.int64),
            np.zeros((R, S), np.int64),
            np.zeros((R, S), np.int32) if self._document_mask else None,
            np.zeros((R, S), np.int64) if self._document_mask else None,
        )
        for source in np.unique(source_R).tolist():
            mine = source_R == source
            some = pack_rows(self._streams[source], row_R[mine], S, self._document_mask, self._eos_id)
            out.input_RT[mine], out.target_RT[mine] = some.input_RT, some.target_RT
            if out.document_RT is not None and out.position_RT is not None:
                out.document_RT[mine], out.position_RT[mine] = some.document_RT, some.position_RT
        return out

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step as tensors, read now."""
        rows = self.rows(step)
        n_valid_tokens = int((rows.target_RT != IGNORE).sum())
        return Batch(
            self._tensor(rows.input_RT),
            self._tensor(rows.target_RT),
            None if rows.document_RT is None else self._tensor(rows.document_RT),
            None if rows.position_RT is None else self._tensor(rows.position_RT),
            n_valid_tokens,
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        import torch

        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin_memory else tensor

    def batches(self, first_step: int) -> Generator[Batch]:
        """Batches of first_step, first_step + 1, ... without end, read ahead; what fails in the thread raises here."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCH_STEPS)
        stop = threading.Event()
        thread = threading.Thread(target=self._read_ahead, args=(first_step, ready, stop), name="loader", daemon=True)
        thread.start()
        try:
            while True:
                start_s = time.perf_counter()
                batch = ready.get()
                self.wait_s += time.perf_counter() - start_s
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stop.set()
            thread.join()

    def _read_ahead(self, step: int, ready: queue.Queue[Batch | BaseException], stop: threading.Event) -> None:
        item: Batch | BaseException
        while True:
            try:
                item = self.batch(step)
            except BaseException as error:
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=STOP_CHECK_S)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or isinstance(item, BaseException):
                return
            step += 1
