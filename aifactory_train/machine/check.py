"""Is a machine file sound? Every fact has a source, every source speaks of a fact, and the facts fit together."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from aifactory_train.errors import AifactoryError
from aifactory_train.hostlist import expand
from aifactory_train.machine.facts import Facts, FactSource, Option, Variable
from aifactory_train.machine.load import load_machine
from aifactory_train.machine.machine import Machine, Nic, Place
from aifactory_train.machine.site import FileSystem, Partition, Qos

# Says which machine the file is about, and how it is known: no facts about the machine, so they need no source.
_NOT_FACTS = {"name", "title", "sources", "unseen"}
# What tells the elements of a list apart; others go by their number.
_IDENTITY: dict[type[Facts], str] = {
    Partition: "name",
    Qos: "name",
    Variable: "name",
    Nic: "name",
    Place: "device",
    FileSystem: "path",
    Option: "option",
}
SET_BY_LAUNCHER = {
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *("OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONUNBUFFERED"),
}


def check_machines(names: list[str]) -> tuple[str, int]:
    """One line for each sound machine, else its faults; and the number of faults. Looks at all, whatever it finds.

    A bare name must be the name that the file holds; a path may hold any.
    """
    lines, n_faults = [], 0
    width = max(map(len, names), default=0)
    for name in names:
        try:
            machine = load_machine(name)
        except AifactoryError as error:
            faults = [error.render().replace("\n", "\n    ")]
        else:
            is_path = "/" in name or name.endswith((".yaml", ".yml"))
            faults = check_machine(machine, machine.name if is_path else name)
        if faults:
            lines += [f"bad {name}", *(f"    {fault}" for fault in faults)]
        else:
            lines.append(f"ok  {name:{width}}  {len(list(facts(machine)))} facts, {len(machine.sources)} sources")
        n_faults += len(faults)
    return "\n".join(lines), n_faults


def check_machine(machine: Machine, name: str, today: datetime.date | None = None) -> list[str]:
    """Every fault as "key: what is wrong; what to do". `name`: of the file, without .yaml."""
    faults = []
    if machine.name != name:
        faults.append(f"name: {machine.name} in a file called {name}; write name: {name} or rename the file")
    faults += _source_faults(machine, today or datetime.date.today())
    faults += _topology_faults(machine)
    faults += _core_faults(machine)
    faults += _site_faults(machine)
    faults += _environment_faults(machine)
    return faults


def facts(machine: Machine) -> Iterator[str]:
    """Dotted key of each value that is not its default: "slurm.partitions.gpu.max_nodes", "topology.places.0.cores".

    An element of a list goes by its name, path, device or option, else by its number, and is a fact itself. A reason
    (`why`) belongs to the value beside it.
    """
    return (key for key, is_default in _values(machine) if not is_default)


def _values(machine: Machine) -> Iterator[tuple[str, bool]]:
    """(dotted key, whether the value is its default) of all that is neither None nor empty."""
    for field in type(machine).model_fields:
        if field not in _NOT_FACTS:
            yield from _below(machine, field, field)


def _below(owner: Facts, field: str, key: str) -> Iterator[tuple[str, bool]]:
    value: Any = getattr(owner, field)
    if value is None or value == []:
        return
    if isinstance(value, Facts):
        yield from _inside(value, key)
    elif isinstance(value, list) and not isinstance(value[0], int):
        for i, element in enumerate(value):
            identity = _IDENTITY.get(type(element))
            element_key = f"{key}.{getattr(element, identity) if identity else i}"
            if identity or not isinstance(element, Facts):
                yield element_key, False
            if isinstance(element, Facts):
                yield from _inside(element, element_key, identity)
    else:
        yield key, value == type(owner).model_fields[field].default


def _inside(value: Facts, key: str, identity: str | None = None) -> Iterator[tuple[str, bool]]:
    for field in type(value).model_fields:
        if field not in (identity, "why"):
            yield from _below(value, field, f"{key}.{field}")


def _source_faults(machine: Machine, today: datetime.date) -> Iterator[str]:
    named = [fact for source in machine.sources for fact in source.facts]
    present = [key for key, _ in _values(machine)]
    there = [*present, *_NOT_FACTS]
    for key in facts(machine):
        # A source of what stands below an element speaks for the element too.
        if machine.source_of(key) is None and not any(fact.startswith(f"{key}.") for fact in named):
            yield f"{key}: no source speaks for it; add it to the facts of the source that states it, or drop it"
    for key in present:
        source = machine.source_of(key)
        if key.startswith("measured.") and source is not None and source.by != "measured":
            yield f"{key}: from a source by {source.by}; only a measurement on the machine may stand here: drop it"
    for fact, times in Counter(named).items():
        if not any(key == fact or key.startswith(f"{fact}.") for key in there):
            yield f"sources: {fact} is named, and the machine has no such value; correct the key or drop it"
        if times > 1:
            yield f"sources: {fact} is named {times} times; let one source speak for it, with all that was read"
    for number, source in enumerate(machine.sources):
        yield from _date_faults(source, number, today)


def _date_faults(source: FactSource, number: int, today: datetime.date) -> Iterator[str]:
    where = f"sources.{number}.date: {source.date}"
    try:
        first_day = datetime.date.fromisoformat(source.date if source.date.count("-") == 2 else f"{source.date}-01")
    except ValueError:
        yield f"{where} is no day of the calendar; write YYYY-MM-DD or YYYY-MM"
        return
    if first_day > today:
        yield f"{where} is in the future (today is {today}); write the day when the source was read or published"


def _topology_faults(machine: Machine) -> Iterator[str]:
    topology, nics = machine.topology, machine.network.nics
    for pair, times in Counter(tuple(sorted(link.devices)) for link in topology.links).items():
        if pair[0] == pair[1]:
            yield f"topology.links: device {pair[0]} is linked to itself; name two devices"
        if times > 1:
            yield f"topology.links: {pair[0]} to {pair[1]} stands {times} times; keep one, with the sum of its lanes"
    if topology.links and topology.all_to_all_bytes_per_s is not None:
        yield "topology: has links and all_to_all_bytes_per_s; give links where pairs differ, else the one rate"
    usable = {name for nic in nics for name in (nic.name, nic.interface)}
    for place in topology.places:
        if place.nic is not None and place.nic not in usable:
            yield f"topology.places.{place.device}.nic: {place.nic} is not in network.nics; add it there"
    lists = {"topology.places": [str(p.device) for p in topology.places], "network.nics": [n.name for n in nics]}
    lists["file_systems"] = [f.path for f in machine.file_systems]
    for key, names in lists.items():
        yield from _doubles(key, names)


def _core_faults(machine: Machine) -> Iterator[str]:
    host, places = machine.host, machine.topology.places
    threads = host.threads_per_core or 1
    n_cores = (host.cores + len(host.reserved_cores)) * threads
    users: dict[int, list[int]] = {}
    for place in places:
        for core in place.core_list():
            users.setdefault(core, []).append(place.device)
    for core, devices in users.items():
        where = f"topology.places.{devices[0]}.cores"
        if core in host.reserved_cores:
            yield f"{where}: core {core} is in host.reserved_cores, so no job gets it; leave it out"
        if core >= n_cores:
            yield f"{where}: core {core}, and the host has 0 to {n_cores - 1}; correct it or host.cores"
        if len(devices) > 1:
            yield f"{where}: core {core} is given to devices {_listed(devices)}; each core has one device"
    slurm = machine.slurm
    if slurm is None or slurm.cpus_per_task is None:
        return
    for place in places:
        n = len(place.core_list())
        what = f"topology.places.{place.device}.cores: {n} cores, slurm.cpus_per_task {slurm.cpus_per_task}"
        if n > slurm.cpus_per_task * threads:
            yield f"{what}: the job does not ask for them all; shorten the list or raise cpus_per_task"
        if slurm.cpu_bind == "map" and n * threads < slurm.cpus_per_task:
            yield f"{what}: the mask is too small for the rank's threads; lengthen it or lower cpus_per_task"
    one_thread = {"--hint=nomultithread", "--threads-per-core=1"}
    if one_thread & {option.option for option in (*slurm.directives, *slurm.srun_options)}:
        threads = 1
    asked, there = machine.device.per_node * slurm.cpus_per_task, host.cores * threads
    if asked > there:
        yield (
            f"slurm.cpus_per_task: {machine.device.per_node} ranks of {slurm.cpus_per_task} need {asked} cores, a job "
            f"may use {there} of a node; lower it to {there // machine.device.per_node}"
        )


def _site_faults(machine: Machine) -> Iterator[str]:
    slurm, accounting = machine.slurm, machine.accounting
    if slurm is not None:
        yield from _doubles("slurm.partitions", [p.name for p in slurm.partitions])
        yield from _doubles("slurm.qos", [q.name for q in slurm.qos])
        for key, options in {"slurm.directives": slurm.directives, "slurm.srun_options": slurm.srun_options}.items():
            yield from _doubles(key, [o.option for o in options])
        for partition in slurm.partitions:
            if (partition.max_nodes or 0) > (partition.nodes or machine.nodes or partition.max_nodes or 0):
                yield (
                    f"slurm.partitions.{partition.name}.max_nodes: {partition.max_nodes}, more than the nodes that "
                    f"there are, {partition.nodes or machine.nodes}; correct one of them"
                )
            n_named = len(expand(slurm.node_names or ""))
            if slurm.node_names is not None and n_named < (partition.nodes or partition.max_nodes or 1):
                yield (
                    f"slurm.node_names: {slurm.node_names} names {n_named} hosts, partition {partition.name} has "
                    f"{partition.nodes or partition.max_nodes}; name them all or drop the list"
                )
        for qos in slurm.qos:
            if qos.min_nodes and qos.max_nodes and qos.min_nodes > qos.max_nodes:
                yield f"slurm.qos.{qos.name}: min_nodes {qos.min_nodes} is above max_nodes {qos.max_nodes}; swap them"
    if accounting is None:
        return
    where = f"accounting.unit: {accounting.unit!r}"
    what = f"accounting.units_per_node_hour: {accounting.units_per_node_hour:g} {accounting.unit}"
    host = machine.host
    n_cores = (host.cores + len(host.reserved_cores)) * (host.threads_per_core or 1)
    most = {"node": 1, "GPU": machine.device.per_node, "core": n_cores}
    kind = accounting.unit.partition(" (")[0].removesuffix("-hour")  # "GPU-hour (one MI250X)"
    if kind not in most:
        yield f"{where} is not known; one of {', '.join(f'{k}-hour' for k in most)}, with a remark in brackets"
    elif accounting.units_per_node_hour > most[kind]:
        yield f"{what}, and a node has {most[kind]}; correct it"
    elif kind == "node" and accounting.units_per_node_hour < 1:
        yield f"{what}; a node hour is one node for one hour: write 1 or name the unit that is counted"


def _environment_faults(machine: Machine) -> Iterator[str]:
    yield from _doubles("environment", [v.name for v in machine.environment])
    for variable in machine.environment:
        where = f"environment.{variable.name}"
        if variable.name in SET_BY_LAUNCHER:
            yield f"{where}: the launcher sets it for each job; drop it here"
        if variable.expand and "$" not in variable.value:
            yield f"{where}: expand is true and nothing in {variable.value!r} expands; drop expand"
        if not variable.expand and "$" in variable.value:
            yield f"{where}: {variable.value!r} would be taken as it stands; add expand: true"


def _doubles(key: str, names: Iterable[str]) -> Iterator[str]:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"{key}: {name} stands {times} times; keep one"


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))
