"""What a job was given around its processes: the image of its container, options of Slurm, links of its GPUs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any

import torch

from aifactory_train.bench.record import Unavailable
from aifactory_train.hostlist import expand
from aifactory_train.machine.probe_look import Answer, Look
from aifactory_train.machine.probe_slurm import parse_record

# Of `scontrol show job`: key there -> key here. OverSubscribe=NO is a job that has its nodes for itself.
OF_SLURM = {
    "Features": "constraint",
    "OverSubscribe": "oversubscribe",
    "Switches": "switches",
    "Network": "network",
    "Reservation": "reservation",
    "QOS": "qos",
}
_OTHERS = "only the first node of a job asks Slurm"
_IMAGES = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
# Global header of the Singularity Image Format (github.com/apptainer/sif, pkg/sif/sif.go): launch script, magic,
# version, architecture, and then the id that each build of an image gets anew.
_SIF_MAGIC_AT, _SIF_MAGIC = 32, b"SIF_MAGIC\0"
_SIF_ID_AT = _SIF_MAGIC_AT + len(_SIF_MAGIC) + 3 + 3
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def probe_job(env: Mapping[str, str], look: Look) -> tuple[dict[str, Any], list[Unavailable]]:
    """Of a process with this environment; that it is not in a container or not of Slurm is no fault.

    container_id: of the build of the image, whose path may hold another one tomorrow. asked: by names of OF_SLURM.
    """
    facts: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    image = next((env[name] for name in _IMAGES if env.get(name)), None)
    if image is not None:
        facts["container_id"] = read_sif_id(look, image)
        reasons["container_id"] = f"{image} is no SIF image that can be read from here"
    if "SLURM_JOB_ID" in env:
        # Thousands of nodes that ask at once hold up the controller for everybody.
        others = not _is_first_node(env)
        answer = Answer("", _OTHERS) if others else look.run(["scontrol", "show", "job", env["SLURM_JOB_ID"], "-o"])
        told = parse_record(answer.text)
        asked = {ours: told[key] for key, ours in OF_SLURM.items() if told.get(key) not in (None, "", "(null)")}
        facts["asked"] = asked or None
        reasons["asked"] = answer.fault or "scontrol show job tells nothing of it"
    known = {key: value for key, value in facts.items() if value is not None}
    return known, [Unavailable(probe=f"job.{key}", reason=reasons[key]) for key in facts if key not in known]


def _is_first_node(env: Mapping[str, str]) -> bool:
    nodes = expand(env.get("SLURM_JOB_NODELIST", ""))
    return not nodes or env.get("SLURMD_NODENAME") == nodes[0]


def read_sif_id(look: Look, image: str) -> str | None:
    try:
        with open(look.path(image), "rb") as file:
            head = file.read(_SIF_ID_AT + 16)
    except OSError:
        return None
    if head[_SIF_MAGIC_AT:].startswith(_SIF_MAGIC) and len(head) == _SIF_ID_AT + 16:
        return str(uuid.UUID(bytes=head[_SIF_ID_AT:]))
    return None


def probe_gpu_links(look: Look) -> tuple[list[str], list[Unavailable]]:
    """Lines of the vendor's matrix of links between the GPUs and NICs that this process sees."""
    command = ["rocm-smi", "--showtopo"] if torch.version.hip else ["nvidia-smi", "topo", "-m"]
    answer = look.run(command)
    lines = [line.rstrip() for line in _COLOURS.sub("", answer.text).splitlines() if line.strip()]
    return lines, [] if lines else [Unavailable(probe="gpu_links", reason=answer.fault or f"{command[0]} prints none")]
