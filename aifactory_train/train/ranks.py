"""Who am I, who is rank 0, and how all ranks find each other. The only file that reads os.environ.

Started by mpirun (mpi4py), srun (SLURM_PROCID), torchrun (RANK) or alone. Under MPI rank 0 picks a free port
and tells everybody, so nothing has to be configured; otherwise address and port come from the launcher.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.errors import PlanError, RendezvousError
from aifactory_train.hostlist import expand

# Start-up of thousands of ranks from a parallel file system takes minutes; a lost rank should not cost more.
RENDEZVOUS_TIMEOUT_S = 300.0
COLLECTIVE_TIMEOUT_S = 1800.0
SLURM_PORTS = range(20000, 30000)
# What a result may quote of the environment: never all of it, which holds secrets.
QUOTED_PREFIXES = ("NCCL_", "RCCL_", "FI_", "CXI_", "UCX_", "MPICH_", "TORCH_", "OMP_", "PYTORCH_")
QUOTED_NAMES = (
    *("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_STEP_ID", "SLURMD_NODENAME"),
    *("SLURM_TOPOLOGY_ADDR", "SLURM_TOPOLOGY_ADDR_PATTERN", "LOADEDMODULES"),
    *("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the run. `address` and `port` are those of rank 0's store.

    `end_time_s`: when the job is cut off, seconds since the epoch; None where nobody said so.
    """

    rank: int
    world_size: int
    local_rank: int
    source: str
    address: str
    port: int
    store: Any = None
    end_time_s: float | None = None


def find_ranks(
    timeout_s: float = RENDEZVOUS_TIMEOUT_S,
    env: Mapping[str, str] | None = None,
    *,
    keep_mpi: bool = False,
    of_node: bool = False,
) -> Ranks:
    """Read off the environment who started us. Under MPI this is collective: all ranks arrive.

    keep_mpi: MPI stays alive for the caller, who finalizes it. of_node: the ranks of this node are a run of their own.
    """
    env = os.environ if env is None else env
    ranks = _find_ranks(timeout_s, env, keep_mpi, of_node)
    if of_node and ranks.source in ("torchrun", "slurm"):
        ranks = _of_node(ranks, env)
    return replace(ranks, end_time_s=_end_time_s(env))


def quoted_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that decide how fast communication is, and which job this is."""
    env = os.environ if env is None else env
    return {k: v for k, v in sorted(env.items()) if k.startswith(QUOTED_PREFIXES) or k in QUOTED_NAMES}


def node_name(env: Mapping[str, str] | None = None) -> str:
    """As Slurm calls this node in its lists, else its own short name."""
    env = os.environ if env is None else env
    return env.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def node_switches(env: Mapping[str, str] | None = None) -> str | None:
    """Switches above this node, the top one first: "s0.leaf3" of Slurm's "s0.leaf3.n17" by "switch.switch.node".

    None where Slurm knows no topology.
    """
    env = os.environ if env is None else env
    parts, kinds = (env.get(f"SLURM_TOPOLOGY_ADDR{end}", "").split(".") for end in ("", "_PATTERN"))
    return ".".join(part for part, kind in zip(parts, kinds, strict=False) if kind != "node") or None


def _find_ranks(timeout_s: float, env: Mapping[str, str], keep_mpi: bool, of_node: bool) -> Ranks:
    if "OMPI_COMM_WORLD_RANK" in env or ("PMI_RANK" in env and "SLURM_STEP_ID" not in env):
        return _from_mpi(timeout_s, keep_mpi, of_node)
    # Container runtimes under srun set RANK too; torchrun inside a step names its own run.
    if "RANK" in env and "WORLD_SIZE" in env and ("TORCHELASTIC_RUN_ID" in env or not env.get("SLURM_STEP_ID")):
        return _from_torchrun(env)
    # A batch script or salloc shell has SLURM_PROCID too, but only a step started by srun has this one.
    if env.get("SLURM_STEP_ID") and env.get("SLURM_PROCID") is not None:
        return _from_slurm(env)
    return Ranks(0, 1, 0, "alone", "127.0.0.1", 0)


def _from_mpi(timeout_s: float, keep_mpi: bool, of_node: bool) -> Ranks:
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    MPI.Init()
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, one_node = node.Get_rank(), node.Get_size() == size
    if of_node:
        world, rank, size, one_node = node, local_rank, node.Get_size(), True
    store, place = None, None
    if rank == 0:
        address = "127.0.0.1" if one_node else os.environ.get("MASTER_ADDR") or socket.gethostname()
        store = _host_store(address, 0, size, timeout_s)
        place = (address, store.port)
    address, port = world.bcast(place, root=0)
    if not keep_mpi:
        # MPI has done its work. Finalized now, no rank can hang in MPI_Finalize when another one has failed.
        MPI.Finalize()
    return Ranks(rank, size, local_rank, "mpi", address, port, store)


def _from_torchrun(env: Mapping[str, str]) -> Ranks:
    rank, size = _integer(env, "RANK"), _integer(env, "WORLD_SIZE")
    port = _integer(env, "MASTER_PORT")
    return Ranks(rank, size, _integer(env, "LOCAL_RANK"), "torchrun", env.get("MASTER_ADDR", "127.0.0.1"), port)


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", ""))
    port = int(env.get("MASTER_PORT") or SLURM_PORTS[_integer(env, "SLURM_JOB_ID") % len(SLURM_PORTS)])
    rank, size = _integer(env, "SLURM_PROCID"), _integer(env, "SLURM_STEP_NUM_TASKS")
    return Ranks(rank, size, _integer(env, "SLURM_LOCALID"), "slurm", address, port)


def _of_node(ranks: Ranks, env: Mapping[str, str]) -> Ranks:
    if ranks.source == "torchrun":
        size = _integer(env, "LOCAL_WORLD_SIZE")
    else:
        size = tasks_by_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))[_integer(env, "SLURM_NODEID")]
    # Not the port of the whole run, which rank 0 or torchrun may have taken.
    port = SLURM_PORTS[(ranks.port + 1) % len(SLURM_PORTS)]
    return replace(ranks, rank=ranks.local_rank, world_size=size, address="127.0.0.1", port=port)


def tasks_by_node(text: str) -> list[int]:
    """Slurm's short form, in the order of the step's nodes: "2(x3),1" -> [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]


def _end_time_s(env: Mapping[str, str]) -> float | None:
    """SLURM_JOB_END_TIME, which old versions do not set and scripts set to what squeue prints ("N/A", "")."""
    try:
        end_time_s = float(env.get("SLURM_JOB_END_TIME", ""))
    except ValueError:
        return None
    return end_time_s if math.isfinite(end_time_s) and end_time_s > 0 else None


def _integer(env: Mapping[str, str], name: str) -> int:
    value = env.get(name)
    if value is None or not value.isdigit():
        raise RendezvousError(
            f"{name} is {value!r}, expected a whole number",
            where="environment of this rank",
            do="start the ranks with `aifactory-train launch`, mpirun, srun or torchrun",
        )
    return int(value)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm list: "nid[0012-0014,0020],x1" -> "nid0012"."""
    hosts = expand(nodelist)
    if not hosts:
        raise RendezvousError(
            f"SLURM_STEP_NODELIST is {nodelist!r}: no host in it",
            where="environment of this rank",
            do="export MASTER_ADDR=<host of rank 0> before srun",
        )
    return hosts[0]


def check_world_size(ranks: Ranks, planned: int) -> None:
    """Refuse a start with another number of ranks than the plan was made for."""
    if ranks.world_size != planned:
        error = PlanError(
            f"the plan is for {planned} ranks, {ranks.source} started {ranks.world_size}",
            where="plan.json: layout.world_size",
            do="aifactory-train launch RECIPE  makes a plan for the ranks it starts",
        )
        error.on_every_rank = True
        raise error


def join(ranks: Ranks, device: torch.device, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> None:
    """Initialise torch.distributed. Raises RendezvousError within `timeout_s`, never hangs.

    Gloo serves CPU tensors on every machine (checkpoint and control), NCCL the tensors of GPUs.
    """
    store = ranks.store or _open_store(ranks, timeout_s)
    _wait_for_all(ranks, store, timeout_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("aifactory-train", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        device_id=device if device.type == "cuda" else None,
    )


def _open_store(ranks: Ranks, timeout_s: float) -> dist.TCPStore:
    if ranks.rank == 0:
        return _host_store(ranks.address, ranks.port, ranks.world_size, timeout_s)
    try:
        return dist.TCPStore(ranks.address, ranks.port, ranks.world_size, False, timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError) as error:
        raise RendezvousError(
            f"rank 0 did not answer at {ranks.address}:{ranks.port} within {timeout_s:.0f} s",
            where=f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()}: {_first_line(error)}",
            do="check that rank 0 runs, and that MASTER_ADDR names a network that the nodes share",
        ) from None


def _host_store(address: str, port: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    try:
        return dist.TCPStore(address, port, world_size, True, timedelta(seconds=timeout_s), wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        raise RendezvousError(
            f"rank 0 cannot listen on {address}:{port}: {_first_line(error)}",
            where=f"rank 0 on {socket.gethostname()}",
            do=f"another process has port {port}: export MASTER_PORT=<a free port>, or stop that process",
        ) from None


def _wait_for_all(ranks: Ranks, store: dist.TCPStore, timeout_s: float) -> None:
    """Every rank says that it is there and how many it believes there are; everybody waits for everybody."""
    store.set(f"here/{ranks.rank}", f"{ranks.world_size} {socket.gethostname()}")
    keys = [f"here/{r}" for r in range(ranks.world_size)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError):
        missing = [r for r, key in enumerate(keys) if not store.check([key])]
        shown = ", ".join(str(r) for r in missing[:16]) + (" …" if len(missing) > 16 else "")
        raise RendezvousError(
            f"{ranks.world_size - len(missing)} of {ranks.world_size} ranks arrived within {timeout_s:.0f} s; "
            f"missing: {shown}",
            where=f"rendezvous at {ranks.address}:{ranks.port}",
            do="look at the log of the missing ranks' nodes; start with the number of ranks that the plan names",
        ) from None
    said = {int(store.get(key).split()[0]) for key in keys}
    if said != {ranks.world_size}:
        raise RendezvousError(
            f"ranks disagree about how many they are: {sorted(said)}",
            where=f"rendezvous at {ranks.address}:{ranks.port}",
            do="two runs share this address and port: export another MASTER_PORT for one of them",
        )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
