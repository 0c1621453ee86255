"""What a check of a node has to say, and what it works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aifactory_train.machine.machine import Machine
from aifactory_train.plan.placement import device_of
from aifactory_train.plan.plan import Plan


class Fault(NamedTuple):
    """`elsewhere`: not this node's doing; another one would meet it too."""

    what: str
    do: str
    elsewhere: bool = False

    def sentence(self) -> str:
        return f"{self.what}; {self.do}"


@dataclass
class Here:
    """One rank on its node. The checks write what they saw into `facts`."""

    plan: Plan
    rank: int
    local_rank: int
    root: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        return self.plan.machine

    @property
    def ranks_per_node(self) -> int:
        return self.plan.layout.world_size // self.plan.layout.n_nodes

    @property
    def device(self) -> torch.device:
        """As train/setup.py picks it: where a rank sees one GPU only, that is its own."""
        if self.machine.device.kind == "cpu":
            return torch.device("cpu")
        return torch.device(
            "cuda", device_of(self.plan.layout, self.local_rank) if torch.cuda.device_count() > 1 else 0
        )


class Check(NamedTuple):
    """`on_device`: left out once the device has failed. `gate`: a fault here means that it has."""

    doing: str
    run: Callable[[Here], list[Fault]]
    on_device: bool = False
    gate: bool = False


def read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # some drivers refuse to be read while a link is down
        return ""
