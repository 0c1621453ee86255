"""Collectives with known results: what each rank gives, the call, and how many elements came out wrong.

Values are small whole numbers, which bf16 holds exactly, and so are all sums: no order of summation may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from aifactory_train.bench.wire import Op

# bf16 holds whole numbers exactly up to this.
EXACT = 256
# Steps of the value from rank to rank and, in an all-to-all, from one receiver to the next; prime to EXACT - 1.
RANK_STEP, TO_STEP = 31, 17
CHECKED_ELEMENTS = 1 << 24  # checked at once, which bounds the memory


@dataclass
class Exchange:
    """One op of one size on this rank: `refresh` fills in what it gives, `run` is the call, `count_wrong` looks.

    n_bytes: of the op, as bench/wire.py counts them; the size asked for, less what n ranks cannot share evenly.
    """

    op: Op
    n_bytes: int
    given: torch.Tensor
    got: torch.Tensor
    pristine: torch.Tensor | None
    group: dist.ProcessGroup | None = None

    @property
    def n(self) -> int:
        return dist.get_world_size(self.group)

    def refresh(self) -> None:
        """An all-reduce overwrites what it was given; the others need no new values."""
        if self.pristine is not None:
            self.given.copy_(self.pristine)

    def run(self) -> None:
        """Axis: the group's; all its ranks arrive. On a device it is queued, and waited for by its stream."""
        match self.op:
            case "all_reduce":
                dist.all_reduce(self.given, group=self.group)
            case "all_gather":
                dist.all_gather_into_tensor(self.got, self.given, group=self.group)
            case "reduce_scatter":
                dist.reduce_scatter_tensor(self.got, self.given, group=self.group)
            case "all_to_all":
                dist.all_to_all_single(self.got, self.given, group=self.group)
            case "sendrecv":
                self._pass_on()

    def _pass_on(self) -> None:
        me = dist.get_rank(self.group)
        ops = [
            dist.P2POp(dist.isend, self.given, group=self.group, group_peer=(me + 1) % self.n),
            dist.P2POp(dist.irecv, self.got, group=self.group, group_peer=(me - 1) % self.n),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    def count_wrong(self) -> int:
        """Run once more into a buffer that holds another value, and count the elements that are not as they must be."""
        if self.pristine is None:
            self.got.fill_(-1)
        self.refresh()
        self.run()
        n_wrong = 0
        for start in range(0, self.got.numel(), CHECKED_ELEMENTS):
            end = min(start + CHECKED_ELEMENTS, self.got.numel())
            at = torch.arange(start, end, device=self.got.device)
            wanted = _wanted(self.op, dist.get_rank(self.group), self.n, self.got.numel(), at)
            n_wrong += int((self.got[start:end].double() != wanted).sum())
        return n_wrong


def build_exchange(
    op: Op, n_bytes: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
) -> Exchange:
    """With its buffers on the device: twice the bytes of an all-reduce, and those of the op and of a rank's part."""
    n, rank = dist.get_world_size(group), dist.get_rank(group)
    part = max(1, n_bytes // dtype.itemsize // n)
    whole = part * n
    n_given = part if op == "all_gather" else whole
    given = torch.empty(n_given, dtype=dtype, device=device)
    for start in range(0, n_given, CHECKED_ELEMENTS):
        at = torch.arange(start, min(start + CHECKED_ELEMENTS, n_given), device=device)
        given[start : start + len(at)] = _given(op, rank, n, whole, at)
    pristine = given.clone() if op == "all_reduce" else None
    got = (
        given if op == "all_reduce" else torch.empty(part if op == "reduce_scatter" else whole, dtype=dtype).to(device)
    )
    return Exchange(op, whole * dtype.itemsize, given, got, pristine, group)


def _given(op: Op, rank: int, n: int, whole: int, at: torch.Tensor) -> torch.Tensor:
    """Elements `at` of what a rank gives."""
    if op in ("all_reduce", "reduce_scatter"):
        return ((at + rank) % _period(n) == 0).double()
    receiver = at // (whole // n) if op == "all_to_all" else torch.zeros_like(at)
    return _labelled(rank, receiver, at % (whole // n) if op == "all_to_all" else at)


def _wanted(op: Op, rank: int, n: int, n_got: int, at: torch.Tensor) -> torch.Tensor:
    """Elements `at` of what a rank must get."""
    if op in ("all_reduce", "reduce_scatter"):
        first = rank * n_got if op == "reduce_scatter" else 0
        period = _period(n)
        counts = torch.zeros(period, dtype=torch.float64, device=at.device)
        for giver in range(n):
            counts[-giver % period] += 1
        return counts[(at + first) % period]
    if op == "sendrecv":
        return _labelled((rank - 1) % n, torch.zeros_like(at), at)
    part = n_got // n
    receiver = torch.full_like(at, rank) if op == "all_to_all" else torch.zeros_like(at)
    return _labelled(at // part, receiver, at % part)


def _period(n: int) -> int:
    """Of n ranks one in `period` gives a 1 for an element, the others a 0: their sum stays exact."""
    return max(5, -(-n // (EXACT // 2)))


def _labelled(giver: int | torch.Tensor, receiver: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Values that tell who gave an element, to whom, and at which place."""
    return ((giver * RANK_STEP + receiver * TO_STEP + at) % (EXACT - 1)).double()
