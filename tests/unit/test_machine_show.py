import itertools
import re
from xml.etree import ElementTree as ET

import pytest

from aifactory_train.machine.draw import render_svg
from aifactory_train.machine.facts import FactSource, Variable
from aifactory_train.machine.load import load_machine, machine_names
from aifactory_train.machine.machine import ByDtype, Device, Host, Link, Machine, Network, Nic, Place, Topology
from aifactory_train.machine.show import render_list, render_machine
from aifactory_train.machine.site import Container, FileSystem, Internet, Partition, Qos, Rendezvous, Slurm

XGMI_GB_PER_S = {
    **dict.fromkeys([(0, 1), (2, 3), (4, 5), (6, 7)], 200),
    **dict.fromkeys([(0, 6), (2, 4)], 100),
    **dict.fromkeys([(0, 2), (1, 3), (1, 5), (3, 7), (4, 6), (5, 7)], 50),
}
FIRST_CORES, NUMA_NODES = (49, 57, 17, 25, 1, 9, 33, 41), (3, 3, 1, 1, 0, 0, 2, 2)
SVG = "{http://www.w3.org/2000/svg}"


def gcd_node(**changes):
    """Eight devices with links of three rates, four NICs that two devices share, and reserved cores."""
    places = [
        Place(device=i, cores=f"{core}-{core + 6}", numa_node=numa, nic=f"hsn{i // 2}")
        for i, (core, numa) in enumerate(zip(FIRST_CORES, NUMA_NODES, strict=True))
    ]
    facts = dict(
        name="gcds",
        title="Eight GCDs",
        nodes=2978,
        device=Device(kind="rocm", name="AMD MI250X", per_node=8, memory_bytes=64 * 2**30, power_w=280.0),
        host=Host(cores=56, memory_bytes=512 * 2**30, reserved_cores=list(range(0, 64, 8)), threads_per_core=2),
        topology=Topology(
            link_kind="xGMI",
            links=[Link(devices=list(pair), bytes_per_s=rate * 1e9) for pair, rate in XGMI_GB_PER_S.items()],
            places=places,
            host_bytes_per_s=36e9,
        ),
        network=Network(
            fabric="Slingshot-11", nics_per_node=4, nic_gbit_per_s=200.0, nics=[Nic(name=f"hsn{i}") for i in range(4)]
        ),
        slurm=Slurm(
            partitions=[Partition(name="standard", max_nodes=1024, max_time_h=48.0)], cpu_bind="map", memory="480G"
        ),
    )
    return Machine(**(facts | changes))


def gpu_node(n=4, *, places=True, nics=True, n_numa=2):
    """Devices that are all linked alike, with or without what is near them."""
    near = [
        Place(device=i, cores=f"{8 * i}-{8 * i + 7}", numa_node=i * n_numa // n, nic=f"mlx5_{i}" if nics else None)
        for i in range(n)
    ]
    return Machine(
        name=f"gpus{n}",
        device=Device(kind="cuda", name="NVIDIA A100-SXM4-40GB", per_node=n, memory_bytes=40 * 2**30),
        host=Host(cores=8 * n),
        topology=Topology(
            link_kind="NVLink 3",
            all_to_all_bytes_per_s=100e9 if n > 1 else None,
            places=near if places else [],
        ),
        network=Network(fabric="InfiniBand", nics_per_node=n, nic_gbit_per_s=200.0) if nics else Network(),
        slurm=Slurm(partitions=[Partition(name="gpu")]),
    )


def drawn(machine):
    return ET.fromstring(render_svg(machine))


def boxes(svg, *names):
    """(name, left, top, right, bottom) of each rectangle."""
    found = []
    for rect in svg.iter(f"{SVG}rect"):
        if rect.get("class") in names:
            x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
            found.append((rect.get("class"), x, y, x + width, y + height))
    return found


def texts(svg):
    return [element.text for element in svg.iter(f"{SVG}text")]


def overlap(a, b):
    return a[1] < b[3] - 0.01 and b[1] < a[3] - 0.01 and a[2] < b[4] - 0.01 and b[2] < a[4] - 0.01


def inside(a, b):
    return b[1] <= a[1] and a[3] <= b[3] and b[2] <= a[2] and a[4] <= b[4]


def assert_nothing_overlaps(svg):
    solid = boxes(svg, "device", "nic", "core", "host", "fabric", "pill")
    for a, b in itertools.combinations(solid, 2):
        assert not overlap(a, b), (a, b)
    for a, b in itertools.combinations(boxes(svg, "numa", "host", "fabric"), 2):
        assert not overlap(a, b), (a, b)
    (node,), (paper,) = boxes(svg, "node"), boxes(svg, "paper")
    for box in solid:
        assert inside(box, paper if box[0] == "fabric" else node), box
    for device in boxes(svg, "device"):
        numa = [box for box in boxes(svg, "numa") if overlap(box, device)]
        assert len(numa) <= 1 and all(inside(device, box) for box in numa)


LAYOUTS = [(n, places, nics) for n in (1, 2, 3, 4, 6, 8, 16) for places in (True, False) for nics in (True, False)]


@pytest.mark.parametrize(("n", "places", "nics"), LAYOUTS)
def test_no_box_of_a_picture_lies_on_another_whatever_is_known(n, places, nics):
    svg = drawn(gpu_node(n, places=places, nics=nics))
    assert len(boxes(svg, "device")) == n
    assert len(boxes(svg, "nic")) == (n if nics else 0)
    assert len(boxes(svg, "core")) == (8 * n if places else 0)
    assert_nothing_overlaps(svg)


def test_an_irregular_node_shows_each_link_once_with_its_rate_and_a_width_that_goes_with_it():
    svg = drawn(gcd_node())
    assert_nothing_overlaps(svg)
    links = {
        tuple(map(int, line.get("data-devices").split())): float(line.get("stroke-width"))
        for line in svg.iter(f"{SVG}path")
        if line.get("class") == "link"
    }
    assert set(links) == set(XGMI_GB_PER_S)
    assert links[0, 1] > links[0, 6] > links[0, 2]
    labels = texts(svg)
    assert (labels.count("200 GB/s"), labels.count("100 GB/s"), labels.count("50 GB/s")) == (4, 2, 6)
    assert "xGMI, 200 GB/s in one direction" in labels


def test_links_end_at_the_devices_that_they_join():
    svg = drawn(gcd_node())
    devices = boxes(svg, "device")
    for line in svg.iter(f"{SVG}path"):
        if line.get("class") == "link":
            numbers = [float(x) for x in re.findall(r"[\d.]+", line.get("d"))]
            ends = sorted([numbers[0], numbers[-2]])
            joined = [devices[int(d)] for d in line.get("data-devices").split()]
            assert all(box[1] < x < box[3] for x, box in zip(ends, sorted(joined, key=lambda b: b[1]), strict=True))


def test_a_full_mesh_has_every_pair_and_one_label():
    svg = drawn(gpu_node(4))
    assert sum(line.get("class") == "link" for line in svg.iter(f"{SVG}path")) == 6
    assert len(boxes(svg, "pill")) == 1
    assert "NVLink 3: every pair 100 GB/s in each direction" in texts(svg)


def test_a_nic_that_two_devices_share_is_drawn_once_with_a_line_to_each():
    svg = drawn(gcd_node())
    assert [t for t in texts(svg) if t.startswith("hsn")] == ["hsn0", "hsn1", "hsn2", "hsn3"]
    lines = [line.get("data-devices") for line in svg.iter(f"{SVG}path") if line.get("class") == "nic-line"]
    assert sorted(lines) == [str(i) for i in range(8)]
    assert "12.5 GB/s per device" in texts(svg)


def test_no_line_to_the_fabric_crosses_another_or_a_box():
    svg = drawn(gcd_node())
    lanes = []
    for line in svg.iter(f"{SVG}path"):
        if line.get("class") == "lane":
            x, top, lane_y, end = (float(v) for v in re.findall(r"[\d.]+", line.get("d")))
            lanes.append((x, top, lane_y, end))
    assert len(lanes) == 4
    for (x1, _, y1, _), (x2, top2, y2, _) in itertools.combinations(sorted(lanes), 2):
        assert x1 < x2 and y1 > y2 > top2
    for x, _, y, end in lanes:
        stroke = ("lane", x, y - 1, end - 2, y + 1)
        assert not [box for box in boxes(svg, "core", "device", "nic", "host") if overlap(stroke, box)]


def test_reserved_cores_stand_beside_the_cores_that_follow_them():
    svg = drawn(gcd_node())
    named = [rect.find(f"{SVG}title").text for rect in svg.iter(f"{SVG}rect") if rect.get("class") == "core"]
    assert named[:8] == ["core 48 (reserved)", *(f"core {c}" for c in range(49, 56))]
    assert sum("reserved" in name for name in named) == 8
    assert {"NUMA node 0", "NUMA node 3", "cores 49–55", "reserved core, not for jobs"} <= set(texts(svg))


def test_nics_of_unknown_place_stand_outside_the_numa_boxes():
    machine = gpu_node(4, nics=False)
    svg = drawn(machine.model_copy(update={"network": gcd_node().network}))
    assert_nothing_overlaps(svg)
    assert len(boxes(svg, "nic")) == 4
    assert not [1 for nic in boxes(svg, "nic") for numa in boxes(svg, "numa") if overlap(nic, numa)]
    assert "NICs whose place in the node is unknown" in texts(svg)


def test_a_picture_says_what_is_not_known():
    machine = Machine(
        name="bare",
        device=Device(kind="cuda", name="x", per_node=4),
        host=Host(cores=8),
        slurm=Slurm(partitions=[Partition(name="p")]),
    )
    svg = drawn(machine)
    assert_nothing_overlaps(svg)
    assert {"links between devices unknown", "fabric unknown", "NICs per node unknown"} <= set(texts(svg))


def test_hostile_text_is_text_in_the_picture():
    hostile = '"><script>alert(1)</script>&amp;\x1b[31m\x00' + "W" * 300
    machine = gcd_node(
        title="".join(filter(str.isprintable, hostile)),
        device=Device(kind="rocm", name=hostile, per_node=8),
        host=Host(cores=56, cpu=hostile),
        topology=Topology(link_kind=hostile, all_to_all_bytes_per_s=1e9, places=gcd_node().topology.places),
        network=Network(fabric=hostile, shape=hostile, nics_per_node=4, nics=[Nic(name="n" * 80)]),
    )
    text = render_svg(machine)
    svg = ET.fromstring(text)
    assert "<script" not in text and "&lt;script&gt;" in text
    assert {element.tag.removeprefix(SVG) for element in svg.iter()} <= {"svg", "title", "rect", "text", "path"}
    assert not [c for c in text if not c.isprintable() and c != "\n" and c != "\u00a0"]
    assert_nothing_overlaps(svg)


def test_a_picture_needs_nothing_from_elsewhere():
    text = render_svg(gcd_node())
    assert not re.search(r"href|url\(|<style|<image|@import|\bon\w+=", text)
    assert text.count("http") == 1 and 'xmlns="http://www.w3.org/2000/svg"' in text


def test_every_machine_file_is_drawn_and_shown_without_a_fault():
    for name in machine_names():
        machine = load_machine(name)
        assert_nothing_overlaps(drawn(machine))
        assert machine.device.name in render_machine(machine)


def test_the_list_has_a_row_for_each_machine_and_a_question_mark_for_what_is_not_known():
    gcds, bare = gcd_node(internet=Internet(compute=True)), gpu_node(4, places=False, nics=False)
    lines = render_list([gcds, bare]).splitlines()
    known, unknown = lines[2], lines[3]
    for cell in ("gcds", "2,978", "8 x 64.0 GiB", "512 GiB", "12.5 GB/s", "standard", "1,024", "48 h", "yes"):
        assert cell in known
    assert re.split(r"\s{2,}", unknown) == ["gpus4", "?", "?", "4 x 40.0 GiB", "?", "?", "?", "gpu", "?", "?", "?"]


def test_limits_of_the_default_qos_win_in_the_list():
    slurm = Slurm(
        partitions=[Partition(name="acc", max_nodes=999, max_time_h=10.0)],
        qos=[Qos(name="other", max_nodes=1), Qos(name="ehpc", max_nodes=100, max_time_h=72.0)],
        default_qos="ehpc",
    )
    row = render_list([gcd_node(slurm=slurm)]).splitlines()[2]
    assert re.search(r"\b100\b.*\b72 h\b", row) and "999" not in row and "10 h" not in row


def test_links_of_an_irregular_node_are_a_symmetric_matrix_with_dashes_where_there_is_none():
    lines = render_machine(gcd_node()).splitlines()
    first = next(i for i, line in enumerate(lines) if line.split() == [str(d) for d in range(8)])
    matrix = [line.split()[1:] for line in lines[first + 1 : first + 9]]
    for a, b in itertools.product(range(8), repeat=2):
        rate = XGMI_GB_PER_S.get((min(a, b), max(a, b)))
        assert matrix[a][b] == ("-" if rate is None else str(rate))


def test_links_of_one_rate_take_one_line():
    text = render_machine(gpu_node(4))
    assert "NVLink 3, each pair 100 GB/s in one direction" in text
    assert "  0  1  2  3" not in text


def test_a_machine_tells_who_shares_a_nic_and_what_is_near_each_device():
    lines = render_machine(gcd_node()).splitlines()
    assert next(line for line in lines if line.startswith("  5 ")).split() == ["5", "9-15", "0", "hsn2"]
    assert any("shared hsn2" in line and "devices 4, 5" in line for line in lines)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rendezvous(), "name of the job's first node, as Slurm gives it"),
        (Rendezvous(rule="suffix", suffix="i"), "node01 is node01i"),
        (Rendezvous(rule="ip"), "IP address that the name of the job's first node resolves to"),
        (Rendezvous(rule="interface", interface="ib0"), "interface ib0 on the job's first node"),
        (Rendezvous(loopback_on_one_node=True), "127.0.0.1 where the job has one node"),
    ],
)
def test_the_rendezvous_rule_stands_in_words(rule, words):
    assert words in " ".join(render_machine(gcd_node(rendezvous=rule)).split())


def test_the_site_is_told_with_reasons_and_wrapped_at_100_columns():
    machine = gcd_node(
        environment=[Variable(name="NCCL_SOCKET_IFNAME", value="hsn0", why="else the management network is taken")],
        container=Container(runtime="singularity", binds=["/scratch"]),
        file_systems=[FileSystem(path="/scratch", kind="Lustre", quota="50 TB", purge_after_days=90)],
        slurm=gcd_node().slurm.model_copy(update={"quirks": ["a long sentence of a site " * 12]}),
    )
    text = render_machine(machine)
    for words in (
        "NCCL_SOCKET_IFNAME=hsn0",
        "else the management",
        "singularity",
        "purged after 90 days",
        "--mem=480G",
    ):
        assert words in text
    assert text.count("a long sentence of a site") >= 8
    assert max(map(len, text.splitlines())) <= 100


def test_sources_stand_at_the_end_with_tag_and_date_and_each_fact_bears_their_number():
    machine = gcd_node(
        sources=[
            FactSource(facts=["device.name"], source="the data sheet", by="vendor", date="2026-01"),
            FactSource(facts=["device", "topology"], source="a log of a user", by="third_party", date="2026-08-22"),
        ]
    )
    text = render_machine(machine)
    assert re.search(r"\[1\] +vendor +2026-01 +the data sheet", text)
    assert re.search(r"\[2\] +third party +2026-08-22 +a log of a user", text)
    assert re.search(r"power at most +280 W \[2\]", text)
    assert re.search(r"bf16 peak +not known\n", text)


def test_facts_that_nobody_published_are_named_and_known_ones_are_not():
    source = FactSource(facts=["device"], source="the data sheet", by="vendor", date="2026-01")
    text = render_machine(gcd_node(sources=[source]))
    missing = " ".join(text.split("not published\n")[1].split())
    assert "device.peak_flops_per_s.bf16" in missing and "accounting" in missing
    assert "device.power_w" not in missing and "topology.places.nic" not in missing
    known = gcd_node().device.model_copy(update={"peak_flops_per_s": ByDtype(bf16=1.9e14)})
    assert "peak_flops_per_s" not in render_machine(gcd_node(device=known))


def test_what_probe_could_not_see_is_told_with_its_reason():
    text = render_machine(gcd_node(unseen={"device.power_w": "rocm-smi is not there"}))
    assert "not seen" in text and "device.power_w: rocm-smi is not there" in text


def test_every_published_total_of_links_is_left_to_the_reader():
    """Behind a switch a device has the rate of one pair, not the sum: no sum may be shown."""
    machine = gpu_node(8)
    assert "700 GB/s" not in render_machine(machine) + render_svg(machine)
