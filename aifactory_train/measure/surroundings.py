"""What a benchmark ran on: the part of a record by which somebody else can say why their number is another one."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from aifactory_train.bench.record import Unavailable
from aifactory_train.faults.host import _spans
from aifactory_train.measure.control import Control
from aifactory_train.results.provenance import provenance
from aifactory_train.train.ranks import Ranks, quoted_environment

GOVERNOR = "devices/system/cpu/cpu0/cpufreq/scaling_governor"


def pick_device(ranks: Ranks) -> torch.device:
    """The GPU of this local rank, or the CPU where torch sees none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher that shows each rank only its own GPU makes it number 0 everywhere.
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def bind_threads(control: Control, timeout_s: float) -> None:
    """Let torch use this rank's share of the cores that it may run on. All ranks arrive.

    Ranks that their launcher did not bind share the same cores; with all of them each they would measure each other.
    """
    own = _spans(os.sched_getaffinity(0))
    place = [control.hosts[control.rank], own]
    places = control.broadcast(control.gather(place, timeout_s), timeout_s)
    share = max(1, len(os.sched_getaffinity(0)) // places.count(place))
    torch.set_num_threads(min(torch.get_num_threads(), share))


def probe_rank(device: torch.device) -> dict[str, Any]:
    """What may differ from rank to rank."""
    facts = {"cores": _spans(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "gpu_uuid": str(gpu.uuid)}
    return facts


def probe_surroundings(ranks: Ranks, sys_root: Path = Path("/sys")) -> tuple[dict[str, Any], list[Unavailable]]:
    """Code, versions, job and system, of the node of rank 0; and what could not be read, with the reason."""
    build = {
        "version": torch.__version__,
        "git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": list(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "config": torch.__config__.show().strip(),
    }
    seen: dict[str, Any] = {
        **provenance(),
        "torch_build": build,
        "started_by": ranks.source,
        "command": sys.argv,
        "environment": quoted_environment(),
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "n_cpus": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
    }
    missed = []
    for name, path in (("cpu_governor", sys_root / GOVERNOR), ("kernel_cmdline", Path("/proc/cmdline"))):
        try:
            seen[name] = path.read_text().strip()
        except OSError as error:
            missed.append(Unavailable(probe=name, reason=f"{path}: {error.strerror}"))
    return seen, missed
