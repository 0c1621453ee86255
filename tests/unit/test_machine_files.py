import datetime

import pytest

from aifactory_train.machine.check import check_machine, check_machines, facts
from aifactory_train.machine.load import load_machine, machine_names, write_machine
from aifactory_train.machine.machine import Machine

TODAY = datetime.date(2026, 11, 23)
ASKED_FOR = {
    *("lumi-g", "leonardo-booster", "marenostrum5-acc", "jupiter-booster", "meluxina-gpu", "karolina-gpu", "vega-gpu"),
    *("deucalion-a100-40", "deucalion-a100-80", "discoverer-plus", "arrhenius"),
    *("juwels-booster", "alps", "jean-zay-h100", "h200-node"),
}


def edited(name, edit):
    """The machine of a file after `edit` has changed its fields in place."""
    data = load_machine(name).model_dump()
    edit(data)
    return Machine.model_validate(data)


def faults_after(name, edit):
    return check_machine(edited(name, edit), name, TODAY)


def test_every_machine_that_was_asked_for_has_a_file():
    assert len(machine_names()) >= 14
    assert set(machine_names()) >= ASKED_FOR


@pytest.mark.parametrize("name", machine_names())
def test_each_machine_file_is_sound(name):
    assert check_machine(load_machine(name), name) == []


@pytest.mark.parametrize("name", machine_names())
def test_each_machine_file_reads_back_equal_after_it_was_written(name, tmp_path):
    machine = load_machine(name)
    write_machine(machine, tmp_path / "again.yaml")
    assert load_machine(tmp_path / "again.yaml") == machine


@pytest.mark.parametrize("name", machine_names())
def test_without_sources_each_fact_is_named_as_a_fault(name):
    machine = edited(name, lambda data: data.update(sources=[]))
    found = check_machine(machine, name, TODAY)
    assert [fault.split(": ")[0] for fault in found] == list(facts(machine))
    assert all("no source speaks for it" in fault for fault in found)


@pytest.mark.parametrize("name", ["meluxina-gpu", "karolina-gpu", "arrhenius", "h200-node"])
def test_no_entry_of_sources_can_be_left_out(name):
    machine = load_machine(name)
    spoken_for = [machine.source_of(key) for key in facts(machine)]
    needed = [i for i, source in enumerate(machine.sources) if any(source is one for one in spoken_for)]
    assert len(needed) >= len(machine.sources) - 1, "the other speaks of a value that is the default"
    for i in needed:
        found = faults_after(name, lambda data, i=i: data["sources"].pop(i))
        assert any("no source speaks for it" in fault for fault in found), machine.sources[i].facts


def test_no_key_of_any_entry_can_be_left_out_where_it_names_a_fact_that_no_other_does():
    sources = load_machine("karolina-gpu").sources
    for i, source in enumerate(sources):
        for j, fact in enumerate(source.facts):
            if len(source.facts) > 1:
                assert faults_after("karolina-gpu", lambda data, i=i, j=j: data["sources"][i]["facts"].pop(j)), fact


def slurm(**fields):
    return lambda data: data["slurm"].update(fields)


def a_source(*keys, by="site", date="2026-11-01"):
    return lambda data: data["sources"].append({"facts": list(keys), "source": "a page", "by": by, "date": date})


def without(start):
    """No source whose first fact begins with `start`."""
    return lambda data: data.update(sources=[s for s in data["sources"] if not s["facts"][0].startswith(start)])


def both(*edits):
    return lambda data: [edit(data) for edit in edits]


def qos_limits(data):
    data["slurm"]["qos"][0].update(min_nodes=60)


def two_places(first, second):
    def edit(data):
        data["topology"]["places"] = [{"device": 0, "cores": first}, {"device": 1, "cores": second}]
        a_source("topology.places")(data)

    return edit


def links(*pairs):
    def edit(data):
        data["topology"]["links"] = [{"devices": list(pair), "bytes_per_s": 1e11} for pair in pairs]
        a_source("topology.links")(data)

    return edit


def variable(name, value, expand=False):
    def edit(data):
        data["environment"].append({"name": name, "value": value, "why": "to see", "expand": expand})
        a_source(f"environment.{name}")(data)

    return edit


FAULTS = {
    "a fact without a source": (
        lambda data: data["internet"].update(compute=False),
        "internet.compute: no source speaks for it",
    ),
    "a new partition without a source of its own is covered by that of the list": (
        lambda data: data["slurm"]["partitions"].append({"name": "fpga", "max_nodes": 4}),
        None,
    ),
    "a variable without a source": (
        lambda data: data["environment"].append({"name": "NCCL_DEBUG", "value": "INFO", "why": "to see"}),
        "environment.NCCL_DEBUG: no source speaks for it",
    ),
    "a source for a fact that nobody states": (a_source("device.power_w"), "device.power_w is named"),
    "a source for a key that does not exist": (a_source("device.colour"), "device.colour is named"),
    "a source for a name that is not in the list": (a_source("environment.NCCL_DEBUG"), "NCCL_DEBUG is named"),
    "a source for a value that is the default": (a_source("slurm.cpu_bind"), None),
    "a fact that two sources claim": (a_source("host.cores"), "host.cores is named 2 times"),
    "a source in the future": (
        lambda data: data["sources"][0].update(date="2026-11-24"),
        "sources.0.date: 2026-11-24 is in the future (today is 2026-11-23)",
    ),
    "a source of a future month": (lambda data: data["sources"][1].update(date="2026-12"), "2026-12 is in the future"),
    "a source of this month": (lambda data: data["sources"][1].update(date="2026-11"), None),
    "a day that no calendar has": (
        lambda data: data["sources"][2].update(date="2026-02-30"),
        "sources.2.date: 2026-02-30 is no day of the calendar",
    ),
    "a rate that was not measured": (
        both(lambda data: data["measured"].update(memory_bytes_per_s=1e12), a_source("measured")),
        "measured.memory_bytes_per_s: from a source by site",
    ),
    "a rate that was measured": (
        both(lambda data: data["measured"].update(memory_bytes_per_s=1e12), a_source("measured", by="measured")),
        None,
    ),
    "another name than the file's": (lambda data: data.update(name="meluxina"), "name: meluxina in a file called"),
    "a reserved core given to a device": (
        both(
            two_places("0-15", "16-31"),
            lambda data: data["host"].update(reserved_cores=[16]),
            a_source("host.reserved_cores"),
        ),
        "topology.places.1.cores: core 16 is in host.reserved_cores",
    ),
    "a core given to two devices": (two_places("0-15", "15-20"), "core 15 is given to devices 0 and 1"),
    "a core that the host does not have": (two_places("0-7", "120-128"), "core 128, and the host has 0 to 127"),
    "more cores than the rank asks for": (two_places("0-15", "16-48"), "33 cores, slurm.cpus_per_task 16"),
    "as many threads as the rank's cores have": (two_places("0-15,64-79", "16-31"), None),
    "a NIC that is not listed": (
        both(two_places("0-15", "16-31"), lambda data: data["topology"]["places"][1].update(nic="mlx5_7")),
        "topology.places.1.nic: mlx5_7 is not in network.nics",
    ),
    "a link twice, once in each direction": (links((0, 1), (1, 0)), "0 to 1 stands 2 times"),
    "a link of a device to itself": (links((2, 2)), "device 2 is linked to itself"),
    "links where all pairs are said to be alike": (
        both(links((0, 1)), lambda data: data["topology"].update(all_to_all_bytes_per_s=1e11)),
        "has links and all_to_all_bytes_per_s",
    ),
    "more cores per rank than a node has": (
        slurm(cpus_per_task=17),
        "4 ranks of 17 need 68 cores, a job may use 64 of a node; lower it to 16",
    ),
    "threads counted as cores": (slurm(cpus_per_task=32), "4 ranks of 32 need 128 cores, a job may use 64 of a node"),
    "threads that count as CPUs": (
        both(
            slurm(cpus_per_task=32, directives=[], srun_options=[]),
            without("slurm.directives"),
            without("slurm.srun_options"),
        ),
        None,
    ),
    "a job of more nodes than there are": (
        lambda data: data["slurm"]["partitions"][0].update(max_nodes=201),
        "slurm.partitions.gpu.max_nodes: 201, more than the nodes that there are, 200",
    ),
    "fewer names than nodes": (slurm(node_names="mel[2001-2199]"), "names 199 hosts, partition gpu has 200"),
    "a QoS that no job fits": (qos_limits, "min_nodes 60 is above max_nodes 50"),
    "a unit that nobody can count": (lambda data: data["accounting"].update(unit="credits"), "'credits' is not known"),
    "a unit with a remark": (lambda data: data["accounting"].update(unit="GPU-hour (one A100)"), None),
    "more GPU-hours than GPUs": (
        lambda data: data["accounting"].update(unit="GPU-hour", units_per_node_hour=8.0),
        "8 GPU-hour, and a node has 4",
    ),
    "half a node-hour for a node": (
        lambda data: data["accounting"].update(units_per_node_hour=0.5),
        "a node hour is one node for one hour",
    ),
    "a variable twice": (variable("NCCL_SOCKET_IFNAME", "ib1"), "environment: NCCL_SOCKET_IFNAME stands 2 times"),
    "a variable that the launcher sets": (variable("MASTER_ADDR", "me"), "environment.MASTER_ADDR: the launcher sets"),
    "a value that would not be expanded": (variable("TMPDIR", "/tmp/$USER"), "add expand: true"),
    "a value that has nothing to expand": (variable("TMPDIR", "/tmp", expand=True), "drop expand"),
    "a partition twice": (
        lambda data: data["slurm"]["partitions"].append({"name": "gpu"}),
        "slurm.partitions: gpu stands 2 times",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_slip_in_a_sound_file_is_found_and_nothing_else(case):
    edit, expected = FAULTS[case]
    found = faults_after("meluxina-gpu", edit)
    if expected is None:
        assert found == []
    else:
        assert any(expected in fault for fault in found), found
        assert all("; " in fault for fault in found), "each fault says what to do"


def test_a_mask_too_small_for_its_rank_is_found():
    found = faults_after("lumi-g", lambda data: data["topology"]["places"][3].update(cores="25"))
    assert found == [
        "topology.places.3.cores: 1 cores, slurm.cpus_per_task 7: the mask is too small for the rank's threads; "
        "lengthen it or lower cpus_per_task"
    ]


def test_all_files_are_looked_at_and_each_fault_is_counted(tmp_path):
    unreadable = tmp_path / "unreadable.yaml"
    unreadable.write_text("name: [\n")
    unsourced = tmp_path / "unsourced.yaml"
    write_machine(edited("h200-node", lambda data: data["sources"].pop()), unsourced)
    text, n_faults = check_machines([str(unreadable), "no-such-machine", str(unsourced), "h200-node"])
    lines = text.splitlines()
    assert [line.split()[1] for line in lines if line[0] != " "] == [
        *(str(unreadable), "no-such-machine", str(unsourced), "h200-node"),
    ]
    assert n_faults == 2 + 5
    assert lines[-1].startswith("ok  h200-node") and lines[-1].endswith("13 facts, 3 sources")
    assert "not valid YAML" in text and "unknown machine 'no-such-machine'" in text


def test_a_probed_file_may_have_any_name(tmp_path):
    write_machine(load_machine("local"), tmp_path / "local-machine.yaml")
    assert check_machines([str(tmp_path / "local-machine.yaml")])[1] == 0
