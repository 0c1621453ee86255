"""Every environment variable that a rank gets: value, and why. The only file that writes the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from aifactory_train.plan.plan import Plan


@dataclass(frozen=True)
class Variable:
    name: str
    value: str
    why: str


def rank_variables(plan: Plan) -> list[Variable]:
    """Variables for the ranks of a run on one node."""
    threads = str(plan.layout.threads_per_rank)
    variables = [
        Variable("OMP_NUM_THREADS", threads, "ranks share the cores; without it each takes all of them"),
        Variable("PYTHONUNBUFFERED", "1", "log lines appear when they are written"),
        Variable("GLOO_SOCKET_IFNAME", "lo", "all ranks are on this node; needs no host name that resolves"),
        Variable("OMPI_MCA_btl", "self,sm", "all ranks are on this node; keeps MPI from probing its networks"),
    ]
    if plan.machine.device.kind != "cpu":
        variables += [
            Variable("NCCL_SOCKET_IFNAME", "lo", "all ranks are on this node; NCCL passes over loopback unless told"),
            Variable("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "blocks of changing size fragment memory"),
        ]
    return variables


def rank_environment(plan: Plan) -> dict[str, str]:
    """The launcher's environment with the variables of the ranks; what the user has set wins."""
    return {**{v.name: v.value for v in rank_variables(plan)}, **os.environ}
