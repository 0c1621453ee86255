"""Machines for a terminal: all in one table, or one with its node, its rules and where each fact is from."""

from __future__ import annotations

from aifactory_train import units
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.node import (
    devices_of_nics,
    job_limits,
    link_rates,
    linked_alike,
    network_bytes_per_s,
    network_bytes_per_s_of_device,
    unknown_facts,
)
from aifactory_train.machine.page import (
    NOT_KNOWN,
    WIDTH,
    Page,
    columns,
    known,
    shown_bytes,
    shown_count,
    shown_gb_per_s,
    shown_hours,
    yes_no,
)
from aifactory_train.machine.show_site import write_site

# What `by` of a source is called in print.
TAGS = {"third_party": "third party"}
LIST_HEAD = (
    *("name", "title", "nodes", "devices\nper node", "bf16 peak\nper device", "host\nmemory", "network\nper device"),
    *("partition", "most\nnodes", "longest\njob", "internet\ninside"),
)
LEFT_OUT_FIRST = ("title", "partition", "host\nmemory", "network\nper device", "bf16 peak\nper device")


def render_list(machines: list[Machine], width: int | None = None) -> str:
    """One row for each machine; "?" is what the file does not know. Limits are those of a job by default.

    width: of the terminal; columns that it has no room for are left out, and named below. None: all of them.
    """
    heads = list(LIST_HEAD)
    lines = _table(machines, heads)
    left_out: list[str] = []
    for head in LEFT_OUT_FIRST:
        if width is None or max(map(len, lines)) <= width:
            break
        heads.remove(head)
        left_out.append(head.split("\n")[0])
        lines = _table(machines, heads)
    lines.append("network: one direction; internet inside: from compute nodes; ?: not known")
    if left_out:
        lines.append(f"no room here for {', '.join(left_out)}; in a pipe there is: | less -S")
    return "\n".join(lines)


def _table(machines: list[Machine], heads: list[str]) -> list[str]:
    shown = [LIST_HEAD.index(head) for head in heads]
    rows = [[LIST_HEAD[i].partition("\n")[::2][line] for i in shown] for line in range(2)]
    return columns(rows + [[_list_row(machine)[i] for i in shown] for machine in machines])


def render_machine(machine: Machine, width: int = WIDTH) -> str:
    """The node, how nodes are joined, the site's rules, the sources (numbered, as in the brackets) and what is unknown.

    At most `width` columns, but for paths and values that are longer themselves.
    """
    page = Page(machine, width)
    _devices(page)
    _places(page)
    _links(page)
    _network(page)
    _host(page)
    write_site(page)
    _measured(page)
    _sources(page)
    _unknown(page)
    return "\n".join(page.lines)


def _list_row(machine: Machine) -> list[str]:
    nodes, hours = job_limits(machine)
    device, share = machine.device, network_bytes_per_s_of_device(machine)
    row = [
        machine.name,
        machine.title or "?",
        shown_count(machine.nodes),
        f"{device.per_node} x {shown_bytes(device.memory_bytes)}",
        known(units.format_flops_per_s(device.peak_flops_per_s.bf16)),
        shown_bytes(machine.host.memory_bytes),
        shown_gb_per_s(share),
        "none" if machine.slurm is None else machine.slurm.partition.name,
        shown_count(nodes),
        shown_hours(hours),
        yes_no(machine.internet.compute),
    ]
    return [cell.replace(NOT_KNOWN, "?") for cell in row]


def _devices(page: Page) -> None:
    device = page.machine.device
    page.section("devices, each")
    page.row("name", f"{device.per_node} x {device.name} ({device.kind})", "device.name", "device.per_node")
    page.row("memory", shown_bytes(device.memory_bytes), "device.memory_bytes")
    page.row("memory rate", known(units.format_bytes_per_s(device.memory_bytes_per_s)), "device.memory_bytes_per_s")
    peak = device.peak_flops_per_s
    for dtype, rate in (("bf16", peak.bf16), ("fp32", peak.fp32)):
        if rate is not None or dtype == "bf16":
            text = known(units.format_flops_per_s(rate))
            page.row(f"{dtype} peak", text, f"device.peak_flops_per_s.{dtype}")
    page.row("bf16 in hardware", yes_no(device.native_bf16), "device.native_bf16")
    page.row("power at most", known(units.format_watts(device.power_w)), "device.power_w")


def _places(page: Page) -> None:
    places = sorted(page.machine.topology.places, key=lambda p: p.device)
    if not places:
        return
    page.section("near each device", "topology.places")
    rows = [["device", "cores", "NUMA node", "NIC"]]
    rows += [
        [str(p.device), p.cores or "?", "?" if p.numa_node is None else str(p.numa_node), p.nic or "?"] for p in places
    ]
    page.table(rows)
    reserved = page.machine.host.reserved_cores
    if reserved:
        cores = ", ".join(map(str, reserved))
        page.row("reserved cores", f"{cores}: not for jobs", "host.reserved_cores")


def _links(page: Page) -> None:
    machine = page.machine
    n, topology, rates = machine.device.per_node, machine.topology, link_rates(machine)
    if n == 1 and topology.host_bytes_per_s is None:
        return
    page.section("links in the node")
    keys = ("topology.links", "topology.all_to_all_bytes_per_s", "topology.link_kind")
    kind = topology.link_kind or "kind not known"
    if n > 1 and not rates:
        page.row("devices", NOT_KNOWN)
    elif linked_alike(machine):
        text = f"{kind}, each pair {units.format_bytes_per_s(rates[0, 1])} in one direction"
        page.row("devices", text, *keys)
    elif n > 1:
        page.row("devices", f"{kind}, GB/s in one direction; - where there is no direct link", *keys)
        rows = [["", *map(str, range(n))]]
        for a in range(n):
            row = [rates.get((min(a, b), max(a, b))) for b in range(n)]
            rows.append([str(a), *("-" if rate is None else units.format_gb_per_s(rate) for rate in row)])
        page.lines += [f"      {line}" for line in columns(rows, right=True)]
    if topology.host_bytes_per_s is not None:
        rate = units.format_bytes_per_s(topology.host_bytes_per_s)
        page.row("host and device", f"{rate} in one direction, each device", "topology.host_bytes_per_s")


def _network(page: Page) -> None:
    machine, network = page.machine, page.machine.network
    if network.fabric is None and network.nics_per_node is None and not network.nics and machine.slurm is None:
        return
    page.section("network between nodes")
    group = [] if network.shape is None else [network.shape]
    if network.groups is not None:
        group.append(f"{network.groups} groups")
    if network.nodes_per_group is not None:
        group.append(f"{network.nodes_per_group} nodes in a group")
    page.row("fabric", network.fabric or NOT_KNOWN, "network.fabric")
    if group:
        page.row("shape", ", ".join(group), "network.shape", "network.groups", "network.nodes_per_group")
    count = "?" if network.nics_per_node is None else str(network.nics_per_node)
    if network.nic_gbit_per_s is not None:
        count += f" x {units.format_gbit_per_s(network.nic_gbit_per_s)}"
    elif network.nics_per_node is not None:
        count += ", their rate is not known"
    page.row("NICs per node", count, "network.nics_per_node", "network.nic_gbit_per_s")
    total, share = network_bytes_per_s(machine), network_bytes_per_s_of_device(machine)
    if total is not None:
        page.row("rate", f"{shown_gb_per_s(total)} per node, {shown_gb_per_s(share)} per device, in one direction")
    if network.nics:
        names = [n.name if n.interface in (None, n.name) else f"{n.name} ({n.interface})" for n in network.nics]
        page.row("usable NICs", ", ".join(names), "network.nics")
    for nic, devices in devices_of_nics(machine).items():
        if len(devices) > 1:
            listed = ", ".join(map(str, devices))
            page.row(f"shared {nic}", f"by devices {listed}", "topology.places")


def _host(page: Page) -> None:
    host = page.machine.host
    page.section("host")
    page.row("CPU", f"{f'{host.sockets} x ' if host.sockets else ''}{host.cpu or 'not known'}", "host.cpu")
    cores = f"{host.cores} for jobs"
    if host.threads_per_core is not None:
        cores += f", {host.threads_per_core} hardware thread{'s' if host.threads_per_core > 1 else ''} each"
    page.row("cores", cores, "host.cores", "host.threads_per_core")
    page.row("memory", shown_bytes(host.memory_bytes), "host.memory_bytes")
    if host.numa_nodes is not None:
        page.row("NUMA nodes", str(host.numa_nodes), "host.numa_nodes")
    architecture: str = host.architecture or NOT_KNOWN
    if host.login_architecture is not None and host.login_architecture != host.architecture:
        architecture += f"; login nodes are {host.login_architecture}: what is built there does not run here"
    page.row("architecture", architecture, "host.architecture", "host.login_architecture")
    if host.local_disk_bytes is not None:
        page.row("local disk", shown_bytes(host.local_disk_bytes), "host.local_disk_bytes")


def _measured(page: Page) -> None:
    measured = page.machine.measured
    rates = {
        "bf16 matmul": units.format_flops_per_s(measured.matmul_flops_per_s.bf16),
        "fp32 matmul": units.format_flops_per_s(measured.matmul_flops_per_s.fp32),
        "memory rate": units.format_bytes_per_s(measured.memory_bytes_per_s),
        "saves of a job": units.format_bytes_per_s(measured.checkpoint_bytes_per_s),
    }
    known = {name: text for name, text in rates.items() if text != "unknown"}
    for precision in ("fp32", "bf16", "fp8"):
        ratio = getattr(measured.step_time_ratio, precision)
        if ratio is not None:
            known[f"{precision} step"] = f"{units.format_difference(ratio.median - 1)} against the plan"
    if known:
        page.section("measured, per device", "measured")
    for name, text in known.items():
        page.row(name, text)


def _sources(page: Page) -> None:
    if page.machine.sources:
        page.section("sources")
    for i, source in enumerate(page.machine.sources, 1):
        tag = TAGS.get(source.by, source.by)
        first = f"  {f'[{i}]':<5}{tag:<12}{source.date:<12}"
        page.wrapped(first, " ".join(source.source.split()))
        page.wrapped(" " * len(first), f"for {', '.join(source.facts)}")


def _unknown(page: Page) -> None:
    machine = page.machine
    if machine.unseen:
        page.section("not seen")
        for key, why in machine.unseen.items():
            page.wrapped("  ", f"{key}: {why}")
    names = [key for key in unknown_facts(machine) if key not in machine.unseen]
    if names:
        stated = any(source.by in ("site", "vendor", "third_party") for source in machine.sources)
        page.section("not published" if stated else NOT_KNOWN)
        page.wrapped("  ", ", ".join(names))
