"""Energy and health over one timed window, of one rank and joined over all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from aifactory_train.bench.record import EnergyWindow, Unavailable
from aifactory_train.measure.energy import EnergyMeter, find_disagreements
from aifactory_train.measure.health import Health, HealthMonitor


@dataclass
class Window:
    """What one rank has read. Empty until the window has ended."""

    energy: list[EnergyWindow] = field(default_factory=list)
    health: Health | None = None
    unavailable: list[Unavailable] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "energy": [window.model_dump() for window in self.energy],
            "health": None if self.health is None else {**asdict(self.health), "errors": self.health.errors},
            "unavailable": [missed.model_dump() for missed in self.unavailable],
        }


@dataclass
class Joined:
    """Of all ranks. health: one entry per rank; throttled: any of them, None where no rank can tell.

    errors: what devices reported as broken, with the rank; None where no rank can tell. warnings: methods
    of one scope that disagree.
    """

    energy: list[EnergyWindow]
    warnings: list[str]
    health: list[dict[str, Any] | None]
    throttled: bool | None
    errors: list[str] | None
    unavailable: list[Unavailable]

    def validity(self) -> dict[str, Any]:
        """The part of a record's validity that the devices tell."""
        return {"throttled": self.throttled, "device_errors": self.errors}

    def facts(self) -> dict[str, Any]:
        """For the facts of a record; warnings only where there are any."""
        return {"health": self.health} | ({"warnings": self.warnings} if self.warnings else {})


class Meters:
    """This rank's sources of energy and health, opened once. of_node: also those of the whole node."""

    def __init__(self, device: torch.device, of_node: bool) -> None:
        self._energy = EnergyMeter(device, of_node)
        self._health = HealthMonitor(device)
        self._device = device

    @contextmanager
    def window(self) -> Iterator[Window]:
        """Read before and after what is inside, with the device at rest at both ends."""
        window = Window()
        self._wait()
        self._health.begin()
        self._energy.begin()
        yield window
        self._wait()
        window.energy, window.unavailable = self._energy.end()
        window.health = self._health.end()
        window.unavailable += self._health.unavailable

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def join_windows(of_ranks: Sequence[dict[str, Any]]) -> Joined:
    """Add the energy of ranks by scope and method: each device and each node is read by one rank only.

    Where some ranks could not read a scope, its sum would be part of the whole: it is left out, and listed.
    """
    sums: dict[tuple[str, str], EnergyWindow] = {}
    missed = {(m["probe"], m["reason"]): Unavailable(**m) for rank in of_ranks for m in rank["unavailable"]}
    for rank in of_ranks:
        for row in rank["energy"]:
            own = EnergyWindow(**row)
            key = (own.scope, own.method)
            before = sums.get(key)
            joules = own.joules + (before.joules if before else 0.0)
            seconds = max(own.seconds, before.seconds if before else 0.0)
            sums[key] = own.model_copy(update={"joules": joules, "seconds": seconds})
    for key in [key for key in sums if key[0] == "gpu"]:
        n = sum(any((row["scope"], row["method"]) == key for row in rank["energy"]) for rank in of_ranks)
        if n < len(of_ranks):
            reason = f"only {n} of {len(of_ranks)} ranks could read it"
            missed[key] = Unavailable(probe=f"energy of {key[0]} by {key[1]}", reason=reason)
            del sums[key]
    health = [rank["health"] for rank in of_ranks]
    known = [bool(one["slowed_by"]) for one in health if one is not None]
    energy = list(sums.values())
    throttled = any(known) if known else None
    errors = [f"rank {rank}: {error}" for rank, one in enumerate(health) if one is not None for error in one["errors"]]
    return Joined(
        energy, find_disagreements(energy), health, throttled, errors if known else None, list(missed.values())
    )
