"""A rank of the preflight that is broken at one point. In a file of its own, as a forkserver must import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from aifactory_train.faults.checks import Check
from aifactory_train.train import meet, preflight


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(*_: object) -> None:
    time.sleep(100)


def fail(*_: object) -> None:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered")


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
    if env["RANK"] == str(victim):
        if where == "check":
            preflight.CHECKS = (Check("a broken device", BROKEN[how]),)
            preflight.LIMIT_S = 3.0
        else:
            meet.measure_collectives = BROKEN[how]
    preflight.preflight(attempt)
