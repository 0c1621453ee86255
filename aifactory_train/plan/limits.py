"""What one job may have on a machine, by partition and QoS."""

from __future__ import annotations

from dataclasses import dataclass

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.site import limits_of


@dataclass(frozen=True)
class JobLimits:
    """Of one job. None where nobody says. `named`: "partition gpu with QoS normal"."""

    named: str
    min_nodes: int | None
    max_nodes: int | None
    max_time_h: float | None


def job_limits(machine: Machine, partition: str | None = None, qos: str | None = None) -> JobLimits:
    """Limits by partition and QoS, by default the machine's; no job has more nodes than there are."""
    slurm = machine.slurm
    if slurm is None:
        return JobLimits(f"machine {machine.name}", None, 1, None)
    part = next((p for p in slurm.partitions if p.name == (partition or slurm.partition.name)), None)
    if part is None:
        known = ", ".join(p.name for p in slurm.partitions)
        raise PlanError(
            f"partition {partition!r} is not in the machine file",
            where="command line",
            do=f"--partition NAME, one of {known}",
        )
    wanted = qos or slurm.default_qos
    level = next((q for q in slurm.qos if q.name == wanted), None)
    if qos is not None and level is None:
        known = ", ".join(q.name for q in slurm.qos)
        raise PlanError(
            f"QoS {qos!r} is not in the machine file",
            where="command line",
            do=f"--qos NAME, one of {known}" if known else "leave out --qos",
        )
    limits = limits_of(part, level)
    return JobLimits(
        f"partition {part.name}" + (f" with QoS {level.name}" if level else ""),
        limits.min_nodes,
        limits.max_nodes or part.nodes or machine.nodes,
        limits.max_time_h,
    )
