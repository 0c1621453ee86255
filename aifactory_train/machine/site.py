"""What a site adds to the nodes: batch system, rendezvous, containers, file systems, accounting."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from aifactory_train.machine.facts import Count, Expanded, Facts, HostList, Line, Name, Option, Positive, fits


class Partition(Facts):
    """Limits of one job. `nodes` is how many the partition has."""

    name: Name
    nodes: Count | None = None
    max_nodes: Count | None = None
    max_time_h: Positive | None = None


class Qos(Facts):
    """Limits that come with `--qos`; they win over the partition's."""

    name: Name
    max_nodes: Count | None = None
    min_nodes: Count | None = None
    max_time_h: Positive | None = None


class Slurm(Facts):
    """How a job is asked for. The launcher takes `partition` (the first of `partitions`) unless told otherwise.

    node_names: in Slurm's host-list syntax, such as "node[001-128]".
    account_required, qos_required: whether sbatch needs --account and --qos; None where nobody says.
    default_qos: rendered into the launcher.
    devices: option that asks for all devices of a node, None on machines without GPUs.
    cpus_per_task: of one rank per device; None: host.cores shared out evenly.
    memory: value of --mem, None where it must not be given.
    exclusive: whether to render --exclusive.
    starter: who starts the ranks inside the allocation.
    mpi: value of srun --mpi, None to leave the site's default.
    cpus_per_task_again: srun does not inherit it from sbatch and must be told.
    cpu_bind: `map` binds rank i to topology.places[i].cores by masks, `cores` leaves it to srun, `none` unbound.
    requeues_after_node_failure: under the same job id, which would overwrite a log that is not appended to.
    """

    partitions: Annotated[list[Partition], Field(min_length=1)]
    qos: list[Qos] = []
    default_qos: Name | None = None
    node_names: HostList | None = None
    account_required: bool | None = None
    account_hint: Line | None = None
    qos_required: bool | None = None
    devices: Option | None = None
    cpus_per_task: Count | None = None
    memory: Annotated[str, fits(r"\d+[KMGT]?", "a number with K, M, G or T, such as 480G")] | None = None
    exclusive: bool = False
    directives: list[Option] = []
    starter: Literal["srun", "mpirun"] = "srun"
    mpi: Literal["pmix", "pmi2", "none"] | None = None
    cpus_per_task_again: bool = True
    cpu_bind: Literal["map", "cores", "none"] = "cores"
    srun_options: list[Option] = []
    requeues_after_node_failure: bool | None = None
    quirks: list[Line] = []

    @property
    def partition(self) -> Partition:
        return self.partitions[0]

    @model_validator(mode="after")
    def _default_qos_is_listed(self) -> Slurm:
        if self.default_qos is not None and self.default_qos not in [q.name for q in self.qos]:
            raise ValueError(f"default_qos {self.default_qos} is not in qos: {[q.name for q in self.qos]}")
        return self


class Limits(NamedTuple):
    """Of one job. None where nobody says."""

    min_nodes: int | None
    max_nodes: int | None
    max_time_h: float | None


def limits_of(partition: Partition | None, qos: Qos | None) -> Limits:
    """A QoS that has a limit wins over the partition."""
    return Limits(
        qos.min_nodes if qos else None,
        (qos.max_nodes if qos else None) or (partition.max_nodes if partition else None),
        (qos.max_time_h if qos else None) or (partition.max_time_h if partition else None),
    )


class Rendezvous(Facts):
    """How the ranks find rank 0, which runs on the first node of the job.

    rule:
        hostname: the node's name as Slurm gives it;
        suffix: that name with `suffix` after it ("i" gives "node01i");
        ip: the address that the name resolves to;
        interface: the address of `interface` on the first node.
    loopback_on_one_node: 127.0.0.1 where the job has a single node.
    """

    rule: Literal["hostname", "suffix", "ip", "interface"] = "hostname"
    suffix: Annotated[str, fits(r"[A-Za-z0-9.-]+", "the end of a host name")] | None = None
    interface: Name | None = None
    loopback_on_one_node: bool = False

    @model_validator(mode="after")
    def _has_what_the_rule_needs(self) -> Rendezvous:
        for rule in ("suffix", "interface"):
            if (self.rule == rule) != (getattr(self, rule) is not None):
                raise ValueError(
                    f"rule {self.rule!r} with {rule} {getattr(self, rule)!r}: give {rule} with rule {rule}"
                )
        return self


class Container(Facts):
    """How a Python inside an image is run. `image` is what the site provides, None where the user brings one.

    binds: paths that the site mounts by name; `options` go to the runtime as they are.
    """

    runtime: Literal["apptainer", "singularity", "pyxis", "uenv"]
    image: Line | None = None
    binds: list[Expanded] = []
    options: list[Line] = []


class FileSystem(Facts):
    """`path` as users write it, with $VARIABLES where the site has them."""

    path: str
    kind: str | None = None
    use: str | None = None
    quota: str | None = None
    purge_after_days: Count | None = None
    max_files: Count | None = None


class Internet(Facts):
    """Whether a connection to the outside works from there. None where nobody says."""

    login: bool | None = None
    compute: bool | None = None


class Accounting(Facts):
    """What the grant pays: `units_per_node_hour` of `unit` for one hour of one node."""

    unit: str
    units_per_node_hour: Positive
