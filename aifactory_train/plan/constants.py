"""Constants of the time model: few, physical, each with its meaning and unit.

Fitted on published results by `make plan-accuracy`, which says in docs/planner-accuracy.md how well they carry over
to results that they were not fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Shares of a peak are between 0 and 1; a measured rate of the machine takes the place of its share."""

    node_link_frac: float = 0.75  # of the vendor's rate of the links inside a node, by a large collective
    nic_frac: float = 0.75  # of a NIC's rate, by a large collective
    node_latency_s: float = 10e-6  # start of a collective inside a node, and per hop of its ring
    nic_latency_s: float = 25e-6  # the same between nodes


CONSTANTS = Constants()
