"""What the site adds to the nodes, for a terminal: Slurm, jobs, rendezvous, environment, software, files."""

from __future__ import annotations

from aifactory_train import units
from aifactory_train.machine.facts import Option
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.page import LABEL, Page, shown_count, shown_hours, yes_no


def write_site(page: Page) -> None:
    """Every section that is about the site; those of which nothing is known stay out."""
    _slurm(page)
    if page.machine.slurm is not None:
        _job(page)
        page.section("rendezvous", "rendezvous")
        page.wrapped("  ", _rendezvous(page.machine))
    _to_know(page)
    _environment(page)
    _software(page)
    _files(page)


def _slurm(page: Page) -> None:
    slurm = page.machine.slurm
    if slurm is None:
        page.section("Slurm")
        page.row("none", "ranks are started here, by mpirun")
        return
    page.section("Slurm: partitions, the first is the default", "slurm.partitions")
    rows = [["partition", "nodes", "most nodes of a job", "longest job"]]
    for p in slurm.partitions:
        rows.append([p.name, shown_count(p.nodes), shown_count(p.max_nodes), shown_hours(p.max_time_h)])
    page.table(rows)
    if slurm.qos:
        page.section("Slurm: QoS, whose limits win", "slurm.qos")
        rows = [["QoS", "fewest nodes", "most nodes", "longest job", ""]]
        for q in slurm.qos:
            default = "default" if q.name == slurm.default_qos else ""
            rows.append(
                [q.name, shown_count(q.min_nodes), shown_count(q.max_nodes), shown_hours(q.max_time_h), default]
            )
        page.table(rows)


def _job(page: Page) -> None:
    machine, slurm = page.machine, page.machine.slurm
    if slurm is not None:
        page.section("a job")
        hint = f": {slurm.account_hint}" if slurm.account_hint else ""
        page.row("--account", _needed(slurm.account_required) + hint, "slurm.account_required", "slurm.account_hint")
        page.row("--qos", _needed(slurm.qos_required), "slurm.qos_required")
        for option, key in _options(machine):
            page.row("asks for", f"{option.option}  {option.why}".rstrip(), key)
        page.row("ranks", _start(machine), "slurm.starter", "slurm.mpi")
        page.row("binding", _binding(machine), "slurm.cpu_bind", "slurm.cpus_per_task_again")
        for option in slurm.srun_options:
            page.row("srun", f"{option.option}  {option.why}", f"slurm.srun_options.{option.option}")
        if slurm.requeues_after_node_failure is not None:
            yes = "Slurm requeues the job under the same id" if slurm.requeues_after_node_failure else "the job ends"
            page.row("node failure", yes, "slurm.requeues_after_node_failure")
        if slurm.node_names is not None:
            page.row("node names", slurm.node_names, "slurm.node_names")


def _to_know(page: Page) -> None:
    machine, slurm = page.machine, page.machine.slurm
    if slurm is not None and slurm.quirks:
        page.section("to know", "slurm.quirks")
        for quirk in slurm.quirks:
            page.wrapped("  - ", quirk)
    if machine.accounting is not None:
        cost = units.format_count(machine.accounting.units_per_node_hour).strip()
        page.section("accounting", "accounting")
        page.wrapped("  ", f"one node for one hour: {cost} x {machine.accounting.unit}")


def _options(machine: Machine) -> list[tuple[Option, str]]:
    """What a job asks sbatch for, with the key of each."""
    slurm = machine.slurm
    assert slurm is not None
    found = [] if slurm.devices is None else [(slurm.devices, "slurm.devices")]
    cores = slurm.cpus_per_task or machine.host.cores // machine.device.per_node
    why = "of a rank" if slurm.cpus_per_task is not None else "of a rank: the node's cores shared out evenly"
    found.append((Option(option=f"--cpus-per-task={cores}", why=why), "slurm.cpus_per_task"))
    if slurm.memory is not None:
        found.append((Option(option=f"--mem={slurm.memory}", why="of a node"), "slurm.memory"))
    if slurm.exclusive:
        found.append((Option(option="--exclusive", why="whole nodes"), "slurm.exclusive"))
    return found + [(option, f"slurm.directives.{option.option}") for option in slurm.directives]


def _start(machine: Machine) -> str:
    slurm = machine.slurm
    assert slurm is not None
    mpi = "" if slurm.mpi is None else f" --mpi={slurm.mpi}"
    return f"one per device, started by {slurm.starter}{mpi}"


def _binding(machine: Machine) -> str:
    slurm = machine.slurm
    assert slurm is not None
    text = {
        "map": "rank i to the cores of device i, by masks",
        "cores": "left to srun: --cpu-bind=cores",
        "none": "none: --cpu-bind=none",
    }[slurm.cpu_bind]
    return text + ("; srun is told --cpus-per-task again" if slurm.cpus_per_task_again else "")


def _rendezvous(machine: Machine) -> str:
    rule = machine.rendezvous
    words = {
        "hostname": "the name of the job's first node, as Slurm gives it",
        "suffix": f"the name of the job's first node with {rule.suffix!r} after it: node01 is node01{rule.suffix}",
        "ip": "the IP address that the name of the job's first node resolves to",
        "interface": f"the address of the interface {rule.interface} on the job's first node",
    }
    loopback = "; 127.0.0.1 where the job has one node" if rule.loopback_on_one_node else ""
    return f"ranks find rank 0 by {words[rule.rule]}{loopback}"


def _environment(page: Page) -> None:
    if page.machine.environment:
        page.section("environment")
    for variable in page.machine.environment:
        page.lines.append(f"  {variable.name}={variable.value}{page.ref(f'environment.{variable.name}')}")
        page.wrapped("      ", variable.why)


def _software(page: Page) -> None:
    machine = page.machine
    if machine.software.setup:
        page.section("modules and setup", "software")
        page.lines += [f"  {line}" for line in machine.software.setup]
    if machine.container is not None:
        page.section("container", "container")
        page.row("runtime", machine.container.runtime)
        page.row("image", machine.container.image or "none by the site: bring one")
        for label, values in (("binds", machine.container.binds), ("options", machine.container.options)):
            if values:
                page.row(label, " ".join(values))


def _files(page: Page) -> None:
    machine = page.machine
    if machine.file_systems:
        page.section("file systems", "file_systems")
        width = max(LABEL, *(len(f.path) + 2 for f in machine.file_systems))
        for f in machine.file_systems:
            parts = [f.use, f.kind, f.quota]
            parts.append(None if f.max_files is None else f"{f.max_files:,} files at most")
            parts.append(None if f.purge_after_days is None else f"purged after {f.purge_after_days} days")
            page.wrapped(f"  {f.path:<{width}}", "; ".join(part for part in parts if part))
    page.section("internet")
    for where in ("login", "compute"):
        page.row(f"{where} nodes", yes_no(getattr(machine.internet, where)), f"internet.{where}")


def _needed(value: bool | None) -> str:
    return "whether it is needed is not known" if value is None else "needed" if value else "not needed"
