"""What Slurm says of its partitions and of this node, by scontrol."""

from __future__ import annotations

import re
from typing import Any

from aifactory_train.machine.facts import Option
from aifactory_train.machine.probe_look import Look
from aifactory_train.machine.site import Partition, Slurm
from aifactory_train.units import parse_slurm_time_s

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def probe_slurm(look: Look) -> Slurm | None:
    """Partitions with their limits, those of this node first; None where there is no Slurm or it does not answer."""
    answer = look.run(["scontrol", "show", "partition", "-o"])
    records = [parse_record(line) for line in answer.text.splitlines()]
    records = [r for r in records if _NAME.fullmatch(r.get("PartitionName", ""))]
    if not records:
        look.missed(answer.fault or "scontrol show partition -o lists none", "slurm")
        return None
    host = look.uname.nodename.split(".")[0]
    told = look.run(["scontrol", "show", "node", host, "-o"])
    node = parse_record(told.text)
    mine = node.get("Partitions", "").split(",")
    records.sort(key=lambda r: (r["PartitionName"] not in mine, r.get("Default") != "YES"))
    facts: dict[str, Any] = {"partitions": [parse_partition(record) for record in records]}
    look.saw("scontrol show partition -o", "slurm.partitions")
    names = records[0].get("Nodes", "")
    if names not in ("", "(null)"):
        facts["node_names"] = names
        look.saw(f"scontrol show partition -o: nodes of {records[0]['PartitionName']}", "slurm.node_names")
    devices = parse_gres(node.get("Gres", ""))
    if devices:
        facts["devices"] = Option(option=f"--gres={devices}", why="the GPUs of this node by scontrol show node")
        look.saw(f"scontrol show node {host} -o: Gres", "slurm.devices")
    else:
        look.missed(told.fault or f"scontrol show node {host} -o names no GPU in Gres", "slurm.devices")
    features = node.get("AvailableFeatures", "(null)")
    if features not in ("", "(null)"):
        facts["quirks"] = [f"this node has the features {features}: --constraint=FEATURE asks for nodes of its kind"]
        look.saw(f"scontrol show node {host} -o: AvailableFeatures", "slurm.quirks")
    _requeue(look, facts)
    look.missed("scontrol does not tell", "slurm.account_required", "slurm.qos_required", "slurm.qos")
    return Slurm(**facts)


def parse_record(line: str) -> dict[str, str]:
    """One record of `scontrol show ... -o`: "NodeName=n1 OS=Linux 5.14 #1 SMP" -> {"NodeName": "n1", "OS": ...}.

    A value runs to the next key: some hold blanks, and those of TRES hold equal signs.
    """
    keys = list(re.finditer(r"(?:^|\s)([A-Z][A-Za-z_]*)=", line))
    ends = [key.start() for key in keys[1:]] + [len(line)]
    record: dict[str, str] = {}
    for key, end in zip(keys, ends, strict=False):
        record.setdefault(key.group(1), line[key.end() : end].strip())
    return record


def parse_partition(record: dict[str, str]) -> Partition:
    """Limits of a partition; UNLIMITED, NONE and what is missing are None, and no job has more nodes than there are."""
    facts: dict[str, Any] = {"name": record["PartitionName"]}
    for fact, key in (("nodes", "TotalNodes"), ("max_nodes", "MaxNodes")):
        if record.get(key, "").isdecimal() and int(record[key]) > 0:
            facts[fact] = min(int(record[key]), facts.get("nodes", int(record[key])))
    time_s = parse_slurm_time_s(record.get("MaxTime", ""))
    if time_s:
        facts["max_time_h"] = time_s / 3600
    return Partition(**facts)


def parse_gres(text: str) -> str | None:
    """ "gpu:a100:4(S:0-1),nvme:1" -> "gpu:a100:4"; None where there is no GPU. Of more kinds the first."""
    found = re.search(r"(?:^|,)(gpu:(?:[A-Za-z0-9._-]+:)?\d+)(?=[(,]|$)", text)
    return found.group(1) if found else None


def _requeue(look: Look, facts: dict[str, Any]) -> None:
    told = look.run(["scontrol", "show", "config"])
    requeue = re.search(r"^JobRequeue\s*=\s*([01])\s*$", told.text, re.MULTILINE)
    if requeue is None:
        reason = told.fault or "scontrol show config names no JobRequeue"
        look.missed(reason, "slurm.requeues_after_node_failure")
        return
    facts["requeues_after_node_failure"] = requeue.group(1) == "1"
    look.saw("scontrol show config: JobRequeue", "slurm.requeues_after_node_failure")
