"""A machine's node as one SVG that stands alone: no script, no style sheet, no font or file from elsewhere."""

from __future__ import annotations

import re
import textwrap
from xml.etree import ElementTree as ET

from aifactory_train import units
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.node import link_rates, linked_alike, network_bytes_per_s, network_bytes_per_s_of_device
from aifactory_train.machine.nodelayout import (
    GROUP_PADDING,
    INSET,
    MARGIN,
    Arc,
    Box,
    NicBox,
    NodeLayout,
    lay_out,
)

INK, SOFT, PAPER, NODE_FILL = "#1f2328", "#5b636d", "#ffffff", "#fbfaf7"
DEVICE_LINE, DEVICE_FILL = "#1c5d99", "#e6f0fa"
NUMA_LINE, NUMA_FILL = "#b9b3a5", "#f1eee6"
NIC_LINE, NIC_FILL = "#b4562a", "#fdeee4"
CORE, RESERVED = "#3b7d4f", "#b3b3b3"
# From the fastest kind of link to the slowest.
LINK_COLOURS = ("#4b2a86", "#7d5bbd", "#a98fd8", "#c9b9e8")
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"
# Mean width of a character in parts of the font size; bold capitals are wider, so boxes keep a margin.
CHARACTER = 0.56
UNKNOWN = "unknown"
SEPARATOR = " · "
LEGEND_STEP = 24
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_svg(machine: Machine) -> str:
    """The node: devices, links with their rates, NICs, cores by NUMA node, host, and the fabric at its side."""
    layout = lay_out(machine)
    legend = _legend_rows(_legend_items(machine), layout.width - 2 * MARGIN)
    height = layout.legend_y + LEGEND_STEP * len(legend) + 24
    svg = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {layout.width:g} {height:g}",
            "width": f"{layout.width:g}",
            "height": f"{height:g}",
            "font-family": FONT,
            "role": "img",
        },
    )
    ET.SubElement(svg, "title").text = _clean(machine.title or machine.name)
    _rect(svg, Box(0, 0, layout.width, height), fill=PAPER, stroke="none", rx=0)
    _head(svg, machine, layout)
    _node(svg, layout)
    _links(svg, machine, layout)
    _devices(svg, machine, layout)
    _cores(svg, machine, layout)
    _network(svg, machine, layout)
    _host(svg, machine, layout)
    _legend(svg, machine, legend, layout)
    ET.indent(svg, " ")
    return ET.tostring(svg, encoding="unicode") + "\n"


def _head(svg: ET.Element, machine: Machine, layout: NodeLayout) -> None:
    _text(svg, MARGIN, 50, machine.title or machine.name, 27, bold=True, room=layout.width - 2 * MARGIN)
    device = machine.device
    peak = device.peak_flops_per_s.bf16
    measured = machine.measured.matmul_flops_per_s.bf16
    facts = [
        "" if machine.nodes is None else f"{machine.nodes:,} nodes",
        f"{device.per_node} × {device.name} per node" if device.per_node > 1 else device.name,
        "" if peak is None else f"bf16 peak {units.format_flops_per_s(peak)} per device",
        "" if measured is None else f"bf16 matmul measured {units.format_flops_per_s(measured)}",
        "" if device.memory_bytes_per_s is None else f"memory {units.format_bytes_per_s(device.memory_bytes_per_s)}",
        "" if device.power_w is None else f"at most {units.format_watts(device.power_w)} per device",
    ]
    _text(svg, MARGIN, 80, SEPARATOR.join(f for f in facts if f), 15, fill=SOFT, room=layout.width - 2 * MARGIN)


def _node(svg: ET.Element, layout: NodeLayout) -> None:
    _rect(svg, layout.node, fill=NODE_FILL, stroke="#8b8f95", rx=14, name="node")
    _text(svg, layout.node.x + INSET, layout.node.y + 27, "One node", 14, bold=True, fill=SOFT)
    for numa in layout.numa:
        _rect(svg, numa.box, fill=NUMA_FILL, stroke=NUMA_LINE, rx=10, name="numa")
        _text(
            svg, numa.box.middle_x, numa.box.bottom - 11, f"NUMA node {numa.numa_node}", 13, fill=SOFT, anchor="middle"
        )


def _links(svg: ET.Element, machine: Machine, layout: NodeLayout) -> None:
    devices = list(layout.devices.values())
    if len(devices) < 2:
        return
    left, right = devices[0].middle_x, devices[-1].middle_x
    if not layout.arcs:
        text = f"links between devices {UNKNOWN}"
        _text(
            svg,
            (left + right) / 2,
            devices[0].y - GROUP_PADDING - 12,
            text,
            13,
            fill=SOFT,
            anchor="middle",
            italic=True,
        )
        return
    tiers = _tiers(machine)
    for arc in layout.arcs:
        _arc(svg, arc, tiers)
    if linked_alike(machine):
        # No sum over the pairs: behind a switch a device has no more than the rate of one pair.
        top = max(layout.arcs, key=lambda arc: arc.height)
        kind = f"{machine.topology.link_kind}: " if machine.topology.link_kind else ""
        every = "every pair " if len(devices) > 2 else ""
        text = _cut(f"{kind}{every}{_gb_per_s(top.bytes_per_s)} in each direction", right - left, 13)
        _pill(svg, (top.x1 + top.x2) / 2, top.y - top.height, text, LINK_COLOURS[0])
        return
    for arc in layout.arcs:
        _pill(svg, (arc.x1 + arc.x2) / 2, arc.y - arc.height, _gb_per_s(arc.bytes_per_s), tiers[arc.bytes_per_s][0])


def _arc(svg: ET.Element, arc: Arc, tiers: dict[float, tuple[str, float]]) -> None:
    colour, width = tiers[arc.bytes_per_s]
    control = arc.y - arc.height * 4 / 3  # so that the top of the curve lies at `height`
    ends = f"{arc.x1:.1f},{control:.1f} {arc.x2:.1f},{control:.1f} {arc.x2:.1f},{arc.y:.1f}"
    line = _line(svg, f"M{arc.x1:.1f},{arc.y:.1f} C{ends}", colour, width, name="link", devices=arc.devices)
    a, b = arc.devices
    ET.SubElement(line, "title").text = f"device {a} to device {b}: {_gb_per_s(arc.bytes_per_s)} in one direction"


def _devices(svg: ET.Element, machine: Machine, layout: NodeLayout) -> None:
    device = machine.device
    memory = UNKNOWN if device.memory_bytes is None else units.format_bytes(device.memory_bytes)
    for index, box in layout.devices.items():
        _rect(svg, box, fill=DEVICE_FILL, stroke=DEVICE_LINE, rx=8, name="device", stroke_width=1.8)
        _text(svg, box.middle_x, box.y + 24, f"device {index}", 16, bold=True, anchor="middle")
        lines = _wrapped(device.name, box.width - 12, 13, 2)
        for i, line in enumerate(lines):
            _text(svg, box.middle_x, box.y + 43 + 15 * i, line, 13, anchor="middle")
        y = box.y + (68 if len(lines) == 1 else 78)
        _text(svg, box.middle_x, y, memory, 14, bold=True, fill=DEVICE_LINE, anchor="middle")


def _cores(svg: ET.Element, machine: Machine, layout: NodeLayout) -> None:
    for place in machine.topology.places:
        if place.cores is None:
            continue
        box = layout.devices[place.device]
        label = f"cores {place.cores.replace('-', '–').replace(',', ', ')}"
        _text(svg, box.middle_x, layout.cores_y + 14, label, 13, anchor="middle", room=box.width)
        for cell in layout.cores[place.device]:
            fill = RESERVED if cell.reserved else CORE
            shape = _rect(svg, cell.box, fill=fill, stroke="none", rx=2, name="core")
            ET.SubElement(shape, "title").text = f"core {cell.core}{' (reserved)' if cell.reserved else ''}"


def _network(svg: ET.Element, machine: Machine, layout: NodeLayout) -> None:
    fabric = layout.fabric
    for nic in layout.nics:
        _nic_lines(svg, nic, layout)
    for nic in layout.nics:
        _nic(svg, machine, nic)
    elsewhere = [nic.box for nic in layout.nics if not nic.devices]
    if elsewhere and machine.device.per_node > 1:
        text = f"{'NIC' if len(elsewhere) == 1 else 'NICs'} whose place in the node is {UNKNOWN}"
        _text(svg, layout.host.x, elsewhere[0].y - 10, text, 13, fill=SOFT, italic=True)
    if fabric is None:
        return
    _rect(svg, fabric, fill=NIC_FILL, stroke=NIC_LINE, rx=14, name="fabric", dashed=machine.network.fabric is None)
    if not layout.nics:
        middle = fabric.y + fabric.height / 2
        _line(svg, f"M{layout.node.right:.1f},{middle:.1f} H{fabric.x:.1f}", name="lane", dashed=True)
    y = fabric.y + 30
    for text, size, bold, colour in _fabric_lines(machine):
        for line in _wrapped(text, fabric.width - 32, size, 3):
            if y < fabric.bottom - 6:
                _text(svg, fabric.x + 18, y, line, size, bold=bold, fill=colour)
            y += size + 7
        y += 2


def _fabric_lines(machine: Machine) -> list[tuple[str, int, bool, str]]:
    network = machine.network
    lines = [("Network between nodes", 13, True, SOFT), (network.fabric or f"fabric {UNKNOWN}", 17, True, INK)]
    if network.shape:
        lines.append((network.shape, 14, False, INK))
    if network.nodes_per_group is not None or network.groups is not None:
        groups = f"{network.groups} groups" if network.groups is not None else "groups"
        of = f" of {network.nodes_per_group} nodes" if network.nodes_per_group is not None else ""
        lines.append((groups + of, 14, False, INK))
    if network.nics_per_node is None:
        lines.append((f"NICs per node {UNKNOWN}", 14, False, INK))
        if network.nic_gbit_per_s is not None:
            lines.append((f"{units.format_gbit_per_s(network.nic_gbit_per_s)} each", 14, False, INK))
    total, share = network_bytes_per_s(machine), network_bytes_per_s_of_device(machine)
    if total is not None and network.nic_gbit_per_s is not None:
        lines.append((f"{network.nics_per_node} × {units.format_gbit_per_s(network.nic_gbit_per_s)}", 14, False, INK))
        lines.append((f"{_gb_per_s(total)} per node", 14, False, INK))
        if machine.device.per_node > 1:
            lines.append((f"{_gb_per_s(share)} per device", 14, True, NIC_LINE))
        lines.append(("in one direction", 12, False, SOFT))
    elif network.nics_per_node is not None:
        lines.append((f"{network.nics_per_node} NICs, rate {UNKNOWN}", 14, False, INK))
    return lines


def _nic_lines(svg: ET.Element, nic: NicBox, layout: NodeLayout) -> None:
    for i, device in enumerate(nic.devices):
        start, y = layout.devices[device].middle_x, layout.devices[device].bottom
        end = nic.box.x + nic.box.width * (i + 1) / (len(nic.devices) + 1)
        bend = (y + nic.box.y) / 2
        d = f"M{start:.1f},{y:.1f} C{start:.1f},{bend:.1f} {end:.1f},{bend:.1f} {end:.1f},{nic.box.y:.1f}"
        _line(svg, d, name="nic-line", devices=(device,))
    if layout.fabric is not None:
        x = nic.box.middle_x
        _line(svg, f"M{x:.1f},{nic.box.bottom:.1f} V{nic.lane_y:.1f} H{layout.fabric.x:.1f}", name="lane")


def _nic(svg: ET.Element, machine: Machine, nic: NicBox) -> None:
    _rect(svg, nic.box, fill=NIC_FILL, stroke=NIC_LINE, rx=6, name="nic", dashed=not nic.devices)
    gbit_per_s = machine.network.nic_gbit_per_s
    rate = f"rate {UNKNOWN}" if gbit_per_s is None else units.format_gbit_per_s(gbit_per_s)
    room = nic.box.width - 8
    _text(svg, nic.box.middle_x, nic.box.y + 19, nic.name or "NIC", 14, bold=True, anchor="middle", room=room)
    _text(svg, nic.box.middle_x, nic.box.y + 36, rate, 12, anchor="middle", room=room)


def _host(svg: ET.Element, machine: Machine, layout: NodeLayout) -> None:
    host, box = machine.host, layout.host
    _rect(svg, box, fill="#e9f2ec", stroke=CORE, rx=8, name="host")
    cpu = host.cpu or (machine.device.name if machine.device.kind == "cpu" else f"CPU {UNKNOWN}")
    sockets = f"{host.sockets} × " if host.sockets else ""
    architecture = f", {host.architecture}" if host.architecture else ""
    _text(svg, box.x + 16, box.y + 26, f"Host: {sockets}{cpu}{architecture}", 15, bold=True, room=box.width - 32)
    rate = machine.topology.host_bytes_per_s
    reserved = len(host.reserved_cores)
    near = f"cores near each device {UNKNOWN}"
    facts = [
        f"{host.cores} cores for jobs" + (f" ({reserved} more reserved)" if reserved else ""),
        units.format_bytes(host.memory_bytes) if host.memory_bytes else f"memory {UNKNOWN}",
        "" if rate is None else f"{_gb_per_s(rate)} to each device, each way",
        "" if host.local_disk_bytes is None else f"local disk {units.format_bytes(host.local_disk_bytes)}",
        "" if any(p.cores for p in machine.topology.places) or machine.device.per_node == 1 else near,
    ]
    _text(svg, box.x + 16, box.y + 49, SEPARATOR.join(f for f in facts if f), 14, room=box.width - 32)


def _legend_items(machine: Machine) -> list[tuple[str, str, float, str]]:
    """(kind of mark, colour, width of a line, text), of what the picture holds."""
    items = []
    kind = _cut(machine.topology.link_kind or "link", 240, 13)
    if link_rates(machine):
        for rate, (colour, width) in sorted(_tiers(machine).items(), reverse=True):
            items.append(("line", colour, width, f"{kind}, {_gb_per_s(rate)} in one direction"))
    if any(p.cores for p in machine.topology.places):
        items.append(("cell", CORE, 0.0, "core near the device"))
        if machine.host.reserved_cores:
            items.append(("cell", RESERVED, 0.0, "reserved core, not for jobs"))
    if machine.network.nics or machine.network.nics_per_node:
        items.append(("line", NIC_LINE, 1.8, "to the network"))
    return items


def _legend_rows(items: list[tuple[str, str, float, str]], room: float) -> list[list[tuple[str, str, float, str]]]:
    rows: list[list[tuple[str, str, float, str]]] = []
    used = room
    for item in items:
        width = 56 + CHARACTER * 13 * len(item[3])
        if used + width > room:
            rows.append([])
            used = 0
        rows[-1].append(item)
        used += width
    return rows


def _legend(
    svg: ET.Element, machine: Machine, rows: list[list[tuple[str, str, float, str]]], layout: NodeLayout
) -> None:
    y = layout.legend_y
    for row in rows:
        x = MARGIN + 4.0
        for kind, colour, width, text in row:
            if kind == "line":
                _line(svg, f"M{x:.1f},{y - 4:.1f} h26", colour, width, name="legend")
            else:
                _rect(svg, Box(x + 7, y - 10, 12, 12), fill=colour, stroke="none", rx=2, name="legend")
            _text(svg, x + 34, y, text, 13, fill=SOFT)
            x += 56 + CHARACTER * 13 * len(text)
        y += LEGEND_STEP
    dates = sorted(source.date for source in machine.sources)
    read = f"sources up to {dates[-1]}" if dates else "no sources"
    text = f"{read}; each fact's source: aifactory-train machines show {machine.name}"
    _text(svg, MARGIN, y, text, 12, fill=SOFT, room=layout.width - 2 * MARGIN)


def _tiers(machine: Machine) -> dict[float, tuple[str, float]]:
    """Rate of a link -> colour and width of its line: the width goes with the rate."""
    rates = sorted(set(link_rates(machine).values()), reverse=True)
    if linked_alike(machine):
        return {rates[0]: (LINK_COLOURS[0], 4.0 if machine.device.per_node <= 4 else 2.0)}
    return {
        rate: (LINK_COLOURS[min(i, len(LINK_COLOURS) - 1)], 1.6 + 5.4 * rate / rates[0]) for i, rate in enumerate(rates)
    }


def _gb_per_s(value: float | None) -> str:
    return "unknown" if value is None else f"{units.format_gb_per_s(value)} GB/s"


def _pill(svg: ET.Element, x: float, y: float, text: str, colour: str) -> None:
    width = CHARACTER * 13 * len(text) + 14
    _rect(svg, Box(x - width / 2, y - 11, width, 22), fill=PAPER, stroke=colour, rx=11, name="pill")
    _text(svg, x, y + 4.5, text, 13, anchor="middle")


def _rect(
    svg: ET.Element,
    box: Box,
    *,
    fill: str,
    stroke: str,
    rx: float,
    name: str = "paper",
    stroke_width: float = 1.3,
    dashed: bool = False,
) -> ET.Element:
    shape = {"class": name, "x": f"{box.x:.1f}", "y": f"{box.y:.1f}", "width": f"{box.width:.1f}"}
    shape |= {"height": f"{box.height:.1f}", "rx": f"{rx:g}", "fill": fill, "stroke": stroke}
    if stroke != "none":
        shape["stroke-width"] = f"{stroke_width:g}"
    if dashed:
        shape["stroke-dasharray"] = "5 4"
    return ET.SubElement(svg, "rect", shape)


def _line(
    svg: ET.Element,
    d: str,
    colour: str = NIC_LINE,
    width: float = 1.8,
    *,
    name: str,
    devices: tuple[int, ...] = (),
    dashed: bool = False,
) -> ET.Element:
    line = {"class": name, "d": d, "fill": "none", "stroke": colour, "stroke-width": f"{width:g}"}
    if devices:
        line["data-devices"] = " ".join(map(str, devices))
    if dashed:
        line["stroke-dasharray"] = "5 4"
    return ET.SubElement(svg, "path", line)


def _text(
    svg: ET.Element,
    x: float,
    y: float,
    text: str,
    size: float,
    *,
    bold: bool = False,
    italic: bool = False,
    fill: str = INK,
    anchor: str = "start",
    room: float | None = None,
) -> None:
    """One line. Text that is wider than `room` is set smaller, and cut where that is not enough."""
    text = _clean(text)
    if room is not None and text:
        size = max(10.0, min(size, room / (CHARACTER * len(text))))
        text = _cut(text, room, size)
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-size": f"{size:.3g}", "fill": fill, "text-anchor": anchor}
    if bold:
        attributes["font-weight"] = "bold"
    if italic:
        attributes["font-style"] = "italic"
    ET.SubElement(svg, "text", attributes).text = text


def _wrapped(text: str, room: float, size: float, max_lines: int) -> list[str]:
    columns = max(4, int(room / (CHARACTER * size)))
    return textwrap.wrap(_clean(text), columns, max_lines=max_lines, placeholder="…") or [""]


def _cut(text: str, room: float, size: float) -> str:
    most = max(4, int(room / (CHARACTER * size) + 0.5))
    return text if len(text) <= most else text[: most - 1] + "…"


def _clean(text: str) -> str:
    """Without the control characters that XML cannot hold; ElementTree escapes the rest."""
    return _NOT_XML.sub("\ufffd", " ".join(text.split()))
