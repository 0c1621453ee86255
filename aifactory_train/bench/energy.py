"""Energy of a timed window as numbers: of each scope and method one for the whole window, so without an interval."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from aifactory_train.bench.record import EnergyWindow, Record

JOULES = "aifactory_train_energy_joules_total"
PER_TOKEN = "aifactory_train_energy_per_token_joules"
NO_INTERVAL = "none, one window"


class EnergyNumber(NamedTuple):
    """One of metric_names.NAMES, in its unit; n is 1."""

    name: str
    scope: str
    method: str
    value: float

    @property
    def labelled(self) -> str:
        return f"{self.name}{{scope={self.scope},method={self.method}}}"


def energy_numbers(record: Record) -> Iterator[EnergyNumber]:
    """Joules and joules per token of each source, of a record that counts tokens; scopes are never added."""
    for window in record.energy:
        per_token = joules_per_token(record, window)
        if per_token is not None:
            yield EnergyNumber(JOULES, window.scope, window.method, window.joules)
            yield EnergyNumber(PER_TOKEN, window.scope, window.method, per_token)


def joules_per_token(record: Record, window: EnergyWindow) -> float | None:
    """Over all tokens of the steps that the window holds; None where the record counts none."""
    tokens = record.facts.get("window", {}).get("tokens")
    return window.joules / tokens if tokens else None
