"""How the ranks of a benchmark talk beside what they measure: barriers, gathering of samples, and time-outs.

Over MPI where it started us, over rank 0's TCP store elsewhere. No call waits longer than its time-out: the ranks that
are missing then are named with their hosts, on all ranks that are left.

Values are what JSON can hold: a tuple comes back as a list, and a key as text.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch.distributed as dist

from aifactory_train.errors import Interrupted, RendezvousError
from aifactory_train.train.ranks import Ranks, node_name

# Rank 0 waits for the others first: so much later they learn from it who is missing.
VERDICT_S = 5.0
# From rank 0's verdict to its end: the others must have read it.
GOODBYE_S = 5.0
FINALIZE_S = 10.0
# Sleep between two looks: it starts with the first and doubles up to the second.
PAUSE_S = (0.0002, 0.01)


class Missing(RendezvousError):
    """Raised on every rank that is left. `ranks`: those that did not answer."""

    def __init__(self, ranks: list[int], what: str, where: str) -> None:
        super().__init__(what, where=where, do="look at the log and at the hosts of the missing ranks")
        self.ranks = ranks

    def __reduce__(self) -> tuple[object, ...]:
        return Missing, (self.ranks, self.what, self.where)


class Control:
    """All ranks make the same calls in the same order. This class is that of one rank alone.

    hosts: node of each rank, as Slurm names it.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.hosts = [node_name()]
        self._turn = 0

    def barrier(self, timeout_s: float) -> None:
        """Return when all ranks have called it."""
        self.gather(None, timeout_s)
        self.broadcast(None, timeout_s)

    def gather(self, value: Any, timeout_s: float) -> list[Any] | None:
        """Values of all ranks in their order on rank 0, None elsewhere, which wait for nobody.

        Raises Missing when ranks have not sent theirs after `timeout_s`.
        """
        key = self._next("gather")
        if self.rank != 0:
            self._send(0, key, value, timeout_s)
            return None
        got, missing = self._collect(key, timeout_s)
        if missing:
            self.announce(missing)
            raise self._missing(missing, timeout_s)
        return [_plain(value), *(got[rank] for rank in range(1, self.size))]

    def broadcast(self, value: Any, timeout_s: float) -> Any:
        """Rank 0's value, on all ranks. Raises Missing when rank 0 has sent none, or says that others are missing."""
        key = self._next("broadcast")
        if self.rank != 0:
            return self._from_rank_0(key, timeout_s + VERDICT_S)
        for rank in range(1, self.size):
            self._post(rank, key, json.dumps(value))
        return _plain(value)

    def roll_call(self, timeout_s: float, linger: bool = True) -> list[int]:
        """After a fault, where ranks may stand at different calls: those that do not answer within `timeout_s`.

        linger: all learn who is missing. Without, only rank 0 does, and nobody waits for it.
        """
        if self.rank == 0:
            _, missing = self._collect("here", timeout_s)
            if linger:
                self.announce(missing)
            return missing
        try:
            self._send(0, "here", None, timeout_s)
            if linger:
                self._from_rank_0("verdict", timeout_s + VERDICT_S)
        except Missing as error:
            return error.ranks
        return []

    def announce(self, missing: list[int]) -> None:
        """Rank 0 tells the others who is missing, and waits a little until they know."""
        left = [rank for rank in range(1, self.size) if rank not in missing]
        for rank in left:
            self._post(rank, "verdict", json.dumps(missing))
        self._collect("bye", GOODBYE_S, left)

    def close(self, timeout_s: float) -> None:
        """Leave together, so that rank 0 does not take its store away from the others."""
        self.barrier(timeout_s)
        if self.rank != 0:
            self._send(0, "bye", None, timeout_s)
        else:
            self._collect("bye", GOODBYE_S)

    def _next(self, call: str) -> str:
        self._turn += 1
        return f"{call} {self._turn}"

    def _send(self, to: int, key: str, value: Any, timeout_s: float) -> None:
        try:
            self._post(to, key, json.dumps(value))
            end_s = time.monotonic() + timeout_s
            while not self._delivered():
                if time.monotonic() > end_s:
                    raise self._missing([to], timeout_s)
                time.sleep(PAUSE_S[0])
        except Missing:
            raise
        except RuntimeError:  # of torch's store and of MPI: the connection is gone
            raise self._missing([to], timeout_s) from None

    def _collect(self, key: str, timeout_s: float, of: list[int] | None = None) -> tuple[dict[int, Any], list[int]]:
        """What the ranks `of` (all others) sent to this one, and those that sent nothing."""
        got: dict[int, Any] = {}
        waiting = set(range(1, self.size) if of is None else of)
        end_s, pause_s = time.monotonic() + timeout_s, PAUSE_S[0]
        while waiting:
            for rank in sorted(waiting):
                text = self._take(rank, key)
                if text is not None:
                    got[rank] = json.loads(text)
            waiting -= got.keys()
            if waiting and time.monotonic() > end_s:
                break
            if waiting:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S[1])
        return got, sorted(waiting)

    def _from_rank_0(self, key: str, timeout_s: float) -> Any:
        end_s, pause_s = time.monotonic() + timeout_s, PAUSE_S[0]
        try:
            while time.monotonic() < end_s:
                text = self._take(0, key) if key != "verdict" else None
                if text is not None:
                    return json.loads(text)
                verdict = self._take(0, "verdict")
                if verdict is not None:
                    self._post(0, "bye", "null")
                    raise self._missing(json.loads(verdict), timeout_s)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, PAUSE_S[1])
        except Missing:
            raise
        except RuntimeError:  # of torch's store and of MPI: the connection is gone
            raise self._missing([0], timeout_s) from None
        raise self._missing([0], timeout_s)

    def _missing(self, ranks: list[int], timeout_s: float) -> Missing:
        what = f"{len(ranks)} of {self.size} ranks did not answer within {timeout_s:.0f} s: {self.names(ranks)}"
        return Missing(ranks, what, f"rank {self.rank} on {self.hosts[self.rank] if self.hosts else node_name()}")

    def names(self, ranks: list[int]) -> str:
        """With their hosts, where they have said them: "1 on n2, 3 on n3"; at most 16."""
        known = [f"{r} on {self.hosts[r]}" if self.hosts else str(r) for r in ranks[:16]]
        return ", ".join(known) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")

    def _post(self, to: int, key: str, text: str) -> None:
        raise AssertionError("one rank alone has nobody to write to")

    def _take(self, sender: int, key: str) -> str | None:
        raise AssertionError("one rank alone has nobody to read from")

    def _delivered(self) -> bool:
        return True


class StoreControl(Control):
    """Over a store that rank 0 serves. Each message is a key that its reader removes."""

    def __init__(self, rank: int, size: int, store: dist.Store, timeout_s: float) -> None:
        self.rank, self.size, self._turn = rank, size, 0
        self._store = dist.PrefixStore("control", store)
        self.hosts = _meet(self, timeout_s)

    def _post(self, to: int, key: str, text: str) -> None:
        self._store.set(f"{self.rank}>{to} {key}", text)

    def _take(self, sender: int, key: str) -> str | None:
        name = f"{sender}>{self.rank} {key}"
        if not self._store.check([name]):
            return None
        text = self._store.get(name).decode()
        self._store.delete_key(name)
        return text


class MpiControl(Control):
    """Over point-to-point messages of `comm`, none of which blocks. MPI is finalized by `close`."""

    def __init__(self, comm: Any, timeout_s: float) -> None:
        self.rank, self.size, self._turn = comm.Get_rank(), comm.Get_size(), 0
        self._comm = comm
        self._sent: list[Any] = []
        self._coming: list[tuple[int, Any]] = []
        self._inbox: dict[tuple[int, str], str] = {}
        self.hosts = _meet(self, timeout_s)

    def _post(self, to: int, key: str, text: str) -> None:
        self._sent.append(self._comm.isend((key, text), dest=to))

    def _take(self, sender: int, key: str) -> str | None:
        self._progress()
        return self._inbox.pop((sender, key), None)

    def _delivered(self) -> bool:
        self._progress()
        return not self._sent

    def _progress(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self._comm.improbe(status=status)) is not None:
            self._coming.append((status.Get_source(), message.irecv()))
        still = []
        for sender, request in self._coming:
            done, value = request.test()
            if done:
                self._inbox[sender, value[0]] = value[1]
            else:
                still.append((sender, request))
        self._coming = still
        self._sent = [request for request in self._sent if not request.test()[0]]

    def close(self, timeout_s: float) -> None:
        super().close(timeout_s)
        from mpi4py import MPI

        guard = threading.Timer(FINALIZE_S, _give_up_finalizing)
        guard.daemon = True
        guard.start()
        MPI.Finalize()
        guard.cancel()


def build_control(ranks: Ranks, timeout_s: float, of_node: bool = False) -> Control:
    """The control plane of these ranks, who all arrive. Under MPI it must be alive: find_ranks(keep_mpi=True).

    Raises Missing, with the ranks that did not arrive within `timeout_s`.
    """
    if ranks.source == "mpi":
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        return MpiControl(world.Split_type(MPI.COMM_TYPE_SHARED) if of_node else world, timeout_s)
    if ranks.world_size == 1:
        return Control()
    return StoreControl(ranks.rank, ranks.world_size, ranks.store, timeout_s)


@contextmanager
def limited_start(limit_s: float) -> Iterator[None]:
    """End this process, with the exit code of RendezvousError, where MPI_Init waits for a rank that is gone.

    It knows no limit, and no thread of Python runs meanwhile; so another process looks at the clock. What that sends is
    handled by C, not by Python, and not left to kill: `mpirun --continuous` ends with 0 when signals have killed all.
    """
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGQUIT, libc._exit)  # which then gets the number of the signal
    assert int(signal.SIGQUIT) == RendezvousError.exit_code
    read, write = os.pipe()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(write)  # so that the pipe ends with the parent
        if not select.select([read], [], [], limit_s)[0]:
            what = f"MPI did not start all ranks within {limit_s:.0f} s"
            error = RendezvousError(what, where=f"a rank on {node_name()}", do="look at the hosts and at the fabric")
            print(error.render(), file=sys.stderr, flush=True)
            os.kill(parent, signal.SIGQUIT)
        os._exit(0)
    os.close(read)
    try:
        yield
    finally:
        os.close(write)
        os.waitpid(child, 0)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def raise_interrupted(number: int, frame: FrameType | None) -> None:
    """A signal handler."""
    raise Interrupted(
        f"asked to stop by {signal.Signals(number).name}",
        do="mpirun, srun and torchrun do so when a rank has died: look for their message",
    )


def _meet(control: Control, timeout_s: float) -> list[str]:
    """Hosts of all ranks."""
    control.hosts = []
    return control.broadcast(control.gather(node_name(), timeout_s), timeout_s)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _give_up_finalizing() -> None:
    print(f"MPI_Finalize did not end within {FINALIZE_S:.0f} s; the results are written", file=sys.stderr, flush=True)
    os._exit(RendezvousError.exit_code)
