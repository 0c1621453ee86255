"""What a benchmark ran on: the part of a record by which somebody else can say why their number is another one."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from aifactory_train.bench.record import Unavailable
from aifactory_train.faults.host import _spans
from aifactory_train.machine.probe_look import Look
from aifactory_train.machine.probe_network import probe_network
from aifactory_train.measure.control import Control
from aifactory_train.measure.hardware import join_places, probe_gpu
from aifactory_train.measure.job import probe_gpu_links, probe_job
from aifactory_train.results.provenance import packages, provenance
from aifactory_train.train.ranks import Ranks, quoted_environment
from aifactory_train.units import format_bytes


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
    """What may differ from rank to rank, and from cell to cell."""
    facts = {"cores": _spans(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "device": str(device)}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "gpu_uuid": str(gpu.uuid)}
        facts["power_cap_w"] = probe_gpu(device)[0].get("power_cap_w")
    return facts


def probe_surroundings(ranks: Ranks, places: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[Unavailable]]:
    """Code, versions, job and system; and what could not be read, with the reason.

    Args:
        places: of each rank, as `Place.as_json`; what is not of a place is of the node of this process.
    """
    joined = join_places(places)
    build = {
        "version": torch.__version__,
        "git": torch.version.git_version,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "nccl": list(torch.cuda.nccl.version()) if torch.cuda.is_available() else None,
        "config": torch.__config__.show().strip(),
    }
    code, look = provenance(), Look()
    environment = quoted_environment()
    job, no_job = probe_job(environment, look)
    links, no_links = probe_gpu_links(look) if torch.cuda.is_available() else (None, [])
    seen: dict[str, Any] = {
        **code,
        "torch_build": build,
        **packages(),
        **joined.common,
        "drift": joined.drift,
        "system": describe_system(code["cpu"], joined.common, look),
        "gpu_links": links,
        "job": job,
        "started_by": ranks.source,
        "command": sys.argv,
        "environment": environment,
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "n_cpus": os.cpu_count(),
        "load_1min": os.getloadavg()[0],
    }
    return seen, [*joined.unavailable, *no_job, *no_links]


def describe_system(cpu: str, places: Mapping[str, Mapping[str, Any]], look: Look) -> dict[str, Any]:
    """This node in the field names of MLPerf's system descriptions; what is not known is left out."""
    node, gpu, (network, _) = places.get("node", {}), places.get("gpu", {}), probe_network(look)
    n_gpus = torch.cuda.device_count()
    stack = {"cuda": torch.version.cuda, "rocm": torch.version.hip, "driver": gpu.get("driver")}
    links = f"{gpu['nvlinks']} NVLinks per device" if gpu.get("nvlinks") else None
    nics = f"{network.nics_per_node}x {network.nic_gbit_per_s:g} Gbit/s {network.fabric}" if network.nics else None
    fields = {
        "host_processor_model_name": cpu,
        "host_processors_per_node": node.get("sockets"),
        "host_memory_capacity": format_bytes(node["memory_bytes"]) if "memory_bytes" in node else None,
        "host_networking": nics,
        "accelerators_per_node": n_gpus,
        "accelerator_model_name": torch.cuda.get_device_name() if n_gpus else None,
        "accelerator_memory_capacity": (
            format_bytes(torch.cuda.get_device_properties(0).total_memory) if n_gpus else None
        ),
        "accelerator_interconnect": links,
        "framework": f"PyTorch {torch.__version__}",
        "other_software_stack": {name: version for name, version in stack.items() if version} or None,
        "operating_system": f"{node['os']}, Linux {node['kernel']}" if "os" in node else None,
    }
    return {name: value for name, value in fields.items() if value is not None}
