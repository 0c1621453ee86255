"""Where each part of a node's picture stands, in pixels. No text is measured and nothing is drawn here.

From top to bottom: links as arcs over the devices, the devices, the NICs near them, the cores near them, NICs whose
place nobody published, the host. A NUMA node is a box around all that is near it. The fabric stands at the right;
each NIC has a lane to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from aifactory_train.machine.machine import Machine
from aifactory_train.machine.node import devices_of_nics, link_rates, reserved_cores_of

MARGIN, INSET, GROUP_PADDING, GROUP_GAP = 32, 24, 10, 14
HEAD_HEIGHT, DEVICE_HEIGHT, NIC_HEIGHT, HOST_HEIGHT = 108, 92, 44, 64
ARC_FIRST, ARC_STEP, LANE_STEP = 52, 38, 7
FABRIC_WIDTH, FABRIC_GAP = 236, 44
MIN_INNER_WIDTH = 640
# More cells than this per device are no longer seen as cores; the label alone says their number.
MAX_CORE_CELLS = 160


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def bottom(self) -> float:
        return self.y + self.height

    @property
    def middle_x(self) -> float:
        return self.x + self.width / 2


@dataclass(frozen=True)
class NumaBox:
    numa_node: int
    box: Box


@dataclass(frozen=True)
class Arc:
    """A link between two devices: from (x1, y) up by `height` and down to (x2, y)."""

    devices: tuple[int, int]
    bytes_per_s: float
    x1: float
    x2: float
    y: float
    height: float


@dataclass(frozen=True)
class NicBox:
    """`lane_y`: where its line to the fabric runs. `devices`: those near it, none where nobody says."""

    name: str | None
    devices: list[int]
    box: Box
    lane_y: float


@dataclass(frozen=True)
class CoreCell:
    core: int
    reserved: bool
    box: Box


@dataclass(frozen=True)
class NodeLayout:
    """`cores_y`: top of the rows of cores. `fabric` None: nothing is known of it. `legend_y`: below all boxes."""

    width: float
    node: Box
    numa: list[NumaBox]
    devices: dict[int, Box]
    arcs: list[Arc]
    nics: list[NicBox]
    cores: dict[int, list[CoreCell]]
    cores_y: float
    host: Box
    fabric: Box | None
    legend_y: float


def lay_out(machine: Machine) -> NodeLayout:
    """Places every part; each box is as wide as the number of devices allows."""
    groups = _numa_groups(machine)
    column = _column_width(machine.device.per_node)
    rates = link_rates(machine)
    inner = max(MIN_INNER_WIDTH, _width(groups, column), 104 * _n_nics(machine))
    left = MARGIN + INSET
    devices_y = HEAD_HEIGHT + 48 + _arcs_height(rates, [d for _, g in groups for d in g]) + GROUP_PADDING
    devices = _device_boxes(groups, column, left + (inner - _width(groups, column)) / 2, devices_y)

    y = devices_y + DEVICE_HEIGHT
    near = _near_nics(machine, devices, left, inner, y + 38)
    y = max([nic.lane_y for nic in near], default=y)
    cores_y = y + 16
    cores = {d: _core_cells(machine, d, devices[d], cores_y + 24) for d in devices}
    if any(place.cores is not None for place in machine.topology.places):
        y = max([cell.box.bottom for cells in cores.values() for cell in cells], default=cores_y + 20)
    y += 34 if any(numa is not None for numa, _ in groups) else 8
    numa = _numa_boxes(groups, devices, devices_y - GROUP_PADDING, y)

    elsewhere = _other_nics(machine, left, inner, y + 34)
    y = max([nic.lane_y for nic in elsewhere], default=y)
    host = Box(left, y + 16, inner, HOST_HEIGHT)
    node = Box(MARGIN, HEAD_HEIGHT, inner + 2 * INSET, host.bottom + 16 - HEAD_HEIGHT)
    fabric, nics = None, [*near, *elsewhere]
    if nics or machine.network.fabric is not None or machine.slurm is not None:
        top = devices_y - GROUP_PADDING
        fabric = Box(node.right + FABRIC_GAP, top, FABRIC_WIDTH, host.bottom - top)
    right = node.right if fabric is None else fabric.right
    return NodeLayout(
        width=right + MARGIN,
        node=node,
        numa=numa,
        devices=devices,
        arcs=_arcs(rates, devices),
        nics=nics,
        cores=cores,
        cores_y=cores_y,
        host=host,
        fabric=fabric,
        legend_y=node.bottom + 30,
    )


def _numa_groups(machine: Machine) -> list[tuple[int | None, list[int]]]:
    """Devices by NUMA node, in the order in which the nodes first appear; None where nobody says."""
    numa_of = {p.device: p.numa_node for p in machine.topology.places}
    groups: dict[int | None, list[int]] = {}
    for device in range(machine.device.per_node):
        groups.setdefault(numa_of.get(device), []).append(device)
    return list(groups.items())


def _column_width(n_devices: int) -> float:
    return {1: 360.0, 2: 290.0, 3: 230.0, 4: 210.0, 5: 168.0, 6: 150.0}.get(n_devices, 132.0)


def _width(groups: list[tuple[int | None, list[int]]], column: float) -> float:
    return sum(len(g) * column + 2 * GROUP_PADDING for _, g in groups) + GROUP_GAP * (len(groups) - 1)


def _device_boxes(groups: list[tuple[int | None, list[int]]], column: float, x: float, y: float) -> dict[int, Box]:
    boxes = {}
    for _, devices in groups:
        x += GROUP_PADDING
        for device in devices:
            boxes[device] = Box(x + 6, y, column - 12, DEVICE_HEIGHT)
            x += column
        x += GROUP_PADDING + GROUP_GAP
    return boxes


def _numa_boxes(
    groups: list[tuple[int | None, list[int]]], devices: dict[int, Box], top: float, bottom: float
) -> list[NumaBox]:
    boxes = []
    for numa_node, members in groups:
        if numa_node is not None:
            x, right = devices[members[0]].x - 6 - GROUP_PADDING, devices[members[-1]].right + 6 + GROUP_PADDING
            boxes.append(NumaBox(numa_node, Box(x, top, right - x, bottom - top)))
    return boxes


def _levels(rates: dict[tuple[int, int], float], order: list[int]) -> dict[int, int]:
    """Distance in columns -> how high its arcs rise, in steps: only distances that occur take a step."""
    column = {device: i for i, device in enumerate(order)}
    spans = sorted({abs(column[a] - column[b]) for a, b in rates})
    return {span: level for level, span in enumerate(spans)}


def _arcs_height(rates: dict[tuple[int, int], float], order: list[int]) -> float:
    if rates:
        return ARC_FIRST + ARC_STEP * (len(_levels(rates, order)) - 1) + 18
    return 40 if len(order) > 1 else 0


def _arcs(rates: dict[tuple[int, int], float], devices: dict[int, Box]) -> list[Arc]:
    """Arcs of one distance rise alike, so no two have their tops, where the labels are, in one place."""
    order = list(devices)
    column = {device: i for i, device in enumerate(order)}
    levels = _levels(rates, order)
    ports: dict[tuple[int, int], float] = {}
    for device, box in devices.items():
        others = [b if a == device else a for a, b in rates if device in (a, b)]
        here = column[device]
        # Short links outside, long ones inside: links of one side then do not cross at the device.
        left = sorted((o for o in others if column[o] < here), key=lambda o: -column[o])
        right = sorted((o for o in others if column[o] > here), key=lambda o: -column[o])
        for i, other in enumerate([*left, *right]):
            ports[device, other] = box.x + box.width * (i + 1) / (len(others) + 1)
    arcs = []
    for (a, b), rate in rates.items():
        first, last = sorted((a, b), key=lambda d: column[d])
        height = ARC_FIRST + ARC_STEP * levels[column[last] - column[first]]
        arcs.append(Arc((a, b), rate, ports[first, last], ports[last, first], devices[a].y, height))
    return sorted(arcs, key=lambda arc: (arc.bytes_per_s, -arc.height))


def _n_nics(machine: Machine) -> int:
    return max(len(devices_of_nics(machine)), machine.network.nics_per_node or 0)


def _near_nics(machine: Machine, devices: dict[int, Box], x: float, inner: float, y: float) -> list[NicBox]:
    """Each NIC under the middle of its devices; pushed apart where two would meet."""
    near = [(name, of) for name, of in devices_of_nics(machine).items() if of]
    middles = {name: sum(devices[d].middle_x for d in of) / len(of) for name, of in near}
    near.sort(key=lambda nic: middles[nic[0]])
    width = _nic_width(machine, inner)
    lefts = _pushed_apart([middles[name] - width / 2 for name, _ in near], width + 8, x, x + inner - width)
    return [
        NicBox(name, of, Box(left, y, width, NIC_HEIGHT), _lane_y(y, i, len(near)))
        for i, ((name, of), left) in enumerate(zip(near, lefts, strict=True))
    ]


def _other_nics(machine: Machine, x: float, inner: float, y: float) -> list[NicBox]:
    """NICs that nobody says are near a device, spread evenly."""
    known = devices_of_nics(machine)
    n_other = _n_nics(machine) - sum(bool(of) for of in known.values())
    names = [name for name, of in known.items() if not of]
    width = _nic_width(machine, inner)
    return [
        NicBox(name, [], Box(x + inner * (i + 0.5) / n_other - width / 2, y, width, NIC_HEIGHT), _lane_y(y, i, n_other))
        for i, name in enumerate([*names, *[None] * (n_other - len(names))])
    ]


def _nic_width(machine: Machine, inner: float) -> float:
    return min(118.0, inner / max(1, _n_nics(machine)) - 10)


def _lane_y(nics_y: float, index: int, n_nics: int) -> float:
    """The leftmost NIC takes the lowest lane: then no line to the fabric crosses another."""
    return nics_y + NIC_HEIGHT + 14 + LANE_STEP * (n_nics - 1 - index)


def _pushed_apart(lefts: list[float], pitch: float, low: float, high: float) -> list[float]:
    """Sorted positions, at least `pitch` apart and between low and high."""
    placed: list[float] = []
    for left in lefts:
        placed.append(max(left, low, placed[-1] + pitch if placed else low))
    limit = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - pitch
    return placed


def _core_cells(machine: Machine, device: int, over: Box, y: float) -> list[CoreCell]:
    """The device's cores and the reserved ones beside them, in rows under the device."""
    own = [c for p in machine.topology.places if p.device == device for c in p.core_list()]
    reserved = reserved_cores_of(machine).get(device, [])
    cores = sorted([*own, *reserved])
    if not cores or len(cores) > MAX_CORE_CELLS:
        return []
    pitch = 14.0 if len(cores) <= 16 else 10.0
    per_row = max(1, int(over.width // pitch))
    per_row = next((n for n in range(per_row, per_row // 2, -1) if len(cores) % n == 0), per_row)
    x = over.middle_x - (min(per_row, len(cores)) * pitch - 3) / 2
    return [
        CoreCell(c, c in reserved, Box(x + pitch * (i % per_row), y + pitch * (i // per_row), pitch - 3, pitch - 3))
        for i, c in enumerate(cores)
    ]
