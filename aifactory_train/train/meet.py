"""How the ranks of a preflight meet: a roll call over rank 0's store, collectives, a goodbye.

Rank 0 reads what the ranks say and writes one verdict, so that the store serves N messages and not N times N. No step
waits longer than its time-out: whoever is missing then is named.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.errors import RendezvousError
from aifactory_train.faults.checks import Fault, Here
from aifactory_train.metrics.outliers import slow_ranks
from aifactory_train.train.ranks import Ranks, _open_store
from aifactory_train.units import format_bytes_per_s, format_flops_per_s

LIMIT_S = 60.0
RENDEZVOUS_S = 30.0
COLLECTIVE_S = 30.0
# From the end of a collective to the goodbye of the last rank, and what is kept free of LIMIT_S for the last words.
GOODBYE_S = 5.0
ALL_REDUCE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
REPEATS = 5
RATES = {"matmul_flops_per_s": format_flops_per_s, "memory_bytes_per_s": format_bytes_per_s}


class Clock:
    """Time since the preflight began."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()

    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin_s

    def left_s(self, at_most_s: float = LIMIT_S) -> float:
        """What is left of LIMIT_S for a step, and a second at least."""
        return max(1.0, min(at_most_s, LIMIT_S - GOODBYE_S - self.elapsed_s()))


@dataclass
class Verdict:
    """What the ranks found together.

    missing: ranks that others waited for in vain. unfit: ranks that have come and said so, or are slow.
    slow: this rank's own fault. faults: what happened in the collectives.
    """

    missing: list[int] = field(default_factory=list)
    how_missing: str = "did not come"
    unfit: list[int] = field(default_factory=list)
    slow: Fault | None = None
    faults: list[Fault] = field(default_factory=list)
    store: dist.Store | None = None
    ranks: Ranks | None = None

    def leave(self) -> None:
        """Say goodbye and wait, GOODBYE_S at most, until all have: mpirun kills what is left when one rank fails."""
        if self.store is None or self.ranks is None:
            return
        n_here = self.ranks.world_size - len(self.missing)
        try:
            n = self.store.add("gone", 1)
            if self.ranks.rank != 0:
                _wait(self.store, ["closed"], GOODBYE_S)
                return
            end_s = time.monotonic() + GOODBYE_S
            while n < n_here and time.monotonic() < end_s:
                time.sleep(0.01)
                n = self.store.add("gone", 0)
            self.store.set("closed", "")
            self.store.add("gone", 0)  # `set` waits for no answer: with this one the others have theirs, too
        except RuntimeError:  # rank 0 has gone, and its store with it
            return


def meet(ranks: Ranks, here: Here, fit: bool, clock: Clock, facts: dict[str, Any]) -> Verdict:
    """Roll call, collectives if everybody is fit, and who is still there afterwards. Writes rates into `facts`.

    All ranks arrive, fit or not; those that do not are in `missing` after RENDEZVOUS_S.
    """
    timeout_s = clock.left_s(RENDEZVOUS_S)
    try:
        base = ranks.store or _open_store(ranks, timeout_s)
    except RendezvousError as error:
        fault = Fault(error.what, error.do, elsewhere=True)
        return Verdict(missing=[] if ranks.rank == 0 else [0], how_missing="did not answer", faults=[fault])
    store = dist.PrefixStore("preflight", base)
    said = {"fit": fit, "rates": {name: facts[name] for name in RATES if name in facts}, "id": facts.get("device_id")}
    verdict = _roll_call(ranks, here, store, said, timeout_s, clock)
    if not verdict.missing and not verdict.unfit:
        facts["rendezvous_s"] = round(clock.elapsed_s() - facts.get("local_s", 0.0), 3)
        _run_collectives(ranks, here, base, store, verdict, clock, facts)
    verdict.store, verdict.ranks = store, ranks
    return verdict


def _roll_call(
    ranks: Ranks, here: Here, store: dist.Store, said: dict[str, Any], timeout_s: float, clock: Clock
) -> Verdict:
    try:
        store.set(f"here/{ranks.rank}", json.dumps(said))
        if ranks.rank == 0:
            missing = _wait(store, [f"here/{r}" for r in range(ranks.world_size)], timeout_s)
            come = [r for r in range(ranks.world_size) if r not in set(missing)]
            words = [json.loads(w) for w in store.multi_get([f"here/{r}" for r in come])]
            found = judge_words(dict(zip(come, words, strict=True)), here.ranks_per_node)
            store.set("verdict", json.dumps({"missing": missing, **found}))
        # Rank 0 may have come later than this one, and waits its own time for the others.
        elif _wait(store, ["verdict"], clock.left_s(RENDEZVOUS_S + GOODBYE_S)):
            return Verdict(missing=[0], how_missing="did not call the roll")
        decided = json.loads(store.get("verdict"))
    except RuntimeError:  # torch's DistError: the connection to rank 0 is gone
        return Verdict(missing=[0], how_missing="went away during the roll call")
    slow = decided["slow"].get(str(ranks.rank))
    fault = None if slow is None else Fault(slow, "leave this node out: sbatch --exclude")
    return Verdict(missing=decided["missing"], unfit=decided["unfit"], slow=fault)


def _wait(store: dist.Store, keys: list[str], timeout_s: float) -> list[int]:
    """Positions of the keys that are not there after `timeout_s`. Raises RuntimeError if the store is gone."""
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
        return []
    except dist.DistStoreError:
        return [i for i, key in enumerate(keys) if not store.check([key])]


def judge_words(words: dict[int, dict[str, Any]], ranks_per_node: int) -> dict[str, Any]:
    """From what the ranks said: who is not fit, and a sentence for each that is slow or shares its GPU."""
    slow: dict[int, str] = {}
    for name, shown in RATES.items():
        rates = {rank: word["rates"][name] for rank, word in words.items() if name in word["rates"]}
        found, median = slow_ranks(rates)
        for rank in found:
            slow.setdefault(rank, f"{name} is {shown(rates[rank])}; the median of all ranks is {shown(median)}")
    owners: dict[tuple[int, str], int] = {}
    for rank, word in words.items():
        if word["id"] is not None:
            owner = owners.setdefault((rank // ranks_per_node, word["id"]), rank)
            if owner != rank:
                slow[rank] = f"has the same GPU as rank {owner}; each rank must get one of its own"
    unfit = sorted({*slow, *(rank for rank, word in words.items() if not word["fit"])})
    return {"unfit": unfit, "slow": slow}


def _run_collectives(
    ranks: Ranks,
    here: Here,
    base: dist.TCPStore,
    store: dist.Store,
    verdict: Verdict,
    clock: Clock,
    facts: dict[str, Any],
) -> None:
    """In a thread of their own: a collective that hangs is left behind, and this rank can still tell."""
    errors: list[str] = []

    def work() -> None:
        try:
            # A connection of its own: one that waits in this thread would keep the other from its goodbye.
            own = dist.TCPStore(base.host, base.port, None, False, timedelta(seconds=COLLECTIVE_S))
            errors.extend(measure_collectives(ranks, here.device, own, facts))
        except Exception as error:  # told as a fault below
            errors.append((str(error).splitlines() or [type(error).__name__])[0])

    timeout_s = clock.left_s(COLLECTIVE_S)
    end_s = time.monotonic() + timeout_s
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        errors.append(f"it did not end within {timeout_s:.0f} s")
    # A broken device shows here as well as in phase 1, and is this node's own.
    own = any("CUDA error" in e or "HIP error" in e for e in errors)
    do = "export NCCL_DEBUG=INFO and launch again: its log names the connection"
    if here.device.type == "cpu":
        do = "look whether the interface GLOO_SOCKET_IFNAME of all nodes is in one network"
    what = f"all-gather and all-reduce of {ranks.world_size} ranks"
    verdict.faults += [Fault(f"{what}: {error}", do, elsewhere=not own) for error in errors]
    wait_s = max(0.0, end_s - time.monotonic()) if errors else 0.0
    verdict.missing = _silent(ranks, store, min(wait_s + GOODBYE_S, clock.left_s()))
    verdict.how_missing = "went away during the collectives"


def _silent(ranks: Ranks, store: dist.Store, timeout_s: float) -> list[int]:
    """Who does not say that its collectives have ended, well or not. Rank 0 waits for all and tells."""
    try:
        store.set(f"done/{ranks.rank}", "1")
        if ranks.rank == 0:
            silent = _wait(store, [f"done/{r}" for r in range(ranks.world_size)], timeout_s)
            store.set("silent", json.dumps(silent))
        elif _wait(store, ["silent"], timeout_s + GOODBYE_S):
            return [0]
        return list(json.loads(store.get("silent")))
    except RuntimeError:
        return [0]


def measure_collectives(ranks: Ranks, device: torch.device, store: dist.Store, facts: dict[str, Any]) -> list[str]:
    """Run what FSDP runs, all-gather and all-reduce, and time the second. Returns what came out wrong.

    `facts` gets the bus bandwidth, 2 (n - 1) / n of the bytes per second: what each link carries in a ring.
    All ranks arrive.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    n = ranks.world_size
    # The time-out is ours, in the thread that waits; NCCL's own would end the process before it can tell.
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("collectives", store),
        rank=ranks.rank,
        world_size=n,
        timeout=timedelta(seconds=2 * LIMIT_S),
        device_id=device if device.type == "cuda" else None,
    )
    wrong = []
    mine = torch.full((1,), float(ranks.rank), device=device)  # exact in fp32 up to 16 million ranks
    gathered = [torch.empty_like(mine) for _ in range(n)]
    dist.all_gather(gathered, mine)
    got = torch.cat(gathered).tolist()
    bad = [r for r in range(n) if got[r] != r]
    if bad:
        wrong.append(f"the all-gather brought {got[bad[0]]:g} from rank {bad[0]}, expected {bad[0]}")
    # Each brings its number modulo 64, so that the sum is exact in fp32 for 200 thousand ranks.
    buffer = torch.full((ALL_REDUCE_BYTES[device.type] // 4,), float(ranks.rank % 64), device=device)
    dist.all_reduce(buffer)
    total = sum(r % 64 for r in range(n))
    if not bool((buffer == total).all()):
        wrong.append(f"the all-reduce of the rank numbers gave {buffer[buffer != total][0].item():g}, expected {total}")
    times_s = []
    for _ in range(REPEATS):
        t0_s = time.perf_counter()
        dist.all_reduce(buffer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - t0_s)
    n_bytes = buffer.numel() * buffer.element_size()
    facts["all_reduce_bytes_per_s"] = 2 * (n - 1) / n * n_bytes / sorted(times_s)[REPEATS // 2]
    return wrong
