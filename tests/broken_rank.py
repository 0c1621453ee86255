"""A rank of the preflight that is broken at one point. In a file of its own, as a forkserver must import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aifactory_train.faults.checks import Check
from aifactory_train.train import meet, preflight


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(*_: object) -> None:
    time.sleep(100)


def fail(*_: object) -> None:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


def noted(arrived: Path, work: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """`work`, which tells the other rank that this one has come to it."""

    def noted_work(*args: Any) -> list[str]:
        arrived.touch()
        return work(*args)

    return noted_work


def after(arrived: Path, work: Callable[..., None]) -> Callable[..., None]:
    """`work`, when the other rank is there, too: what is broken earlier shows in the roll call."""

    def late_work(*args: Any) -> None:
        while not arrived.exists():
            time.sleep(0.01)
        work(*args)

    return late_work


BROKEN = {"dies": die, "hangs": hang, "fails": fail}


def run_rank(env: dict[str, str], attempt: Path, victim: int, where: str, how: str, said: Path) -> None:
    """The preflight of one rank; what it says stands in `said`.

    Times are shortened and the good checks left out, to make the tests quick.

    Args:
        env: what a launcher sets; RANK tells which rank this is.
        victim: the rank that is broken.
        where: "check" or "collectives".
        how: a key of `BROKEN`.
    """
    os.environ.update(env)
    with open(said, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    meet.RENDEZVOUS_S = meet.COLLECTIVE_S = 5.0
    meet.GOODBYE_S = 2.0
    preflight.CHECKS = ()
    broken, arrived = env["RANK"] == str(victim), said.with_name("in-collectives")
    if where == "collectives":
        meet.measure_collectives = after(arrived, BROKEN[how]) if broken else noted(arrived, meet.measure_collectives)
    elif broken:
        preflight.CHECKS = (Check("a broken device", BROKEN[how]),)
        preflight.LIMIT_S = 3.0
    preflight.preflight(attempt)
