"""Known traps: a version of a package on an architecture or device, from configs/traps.yaml."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from aifactory_train.errors import MachineError
from aifactory_train.machine.facts import Count, Facts, Line, Name
from aifactory_train.strictyaml import Key, configs_dir, read_yaml, validate

_BOUND = re.compile(r"(==|!=|>=|<=|>|<)(\d+(?:\.\d+)*)")
_HOLDS: dict[str, Callable[[int], bool]] = {
    "==": lambda order: order == 0,
    "!=": lambda order: order != 0,
    ">=": lambda order: order >= 0,
    "<=": lambda order: order <= 0,
    ">": lambda order: order > 0,
    "<": lambda order: order < 0,
}


class When(Facts):
    """All of it must hold. `package`: nccl, rccl, hip, libfabric, torch, or the name of a Python distribution."""

    package: Name
    versions: Annotated[str, Field(min_length=1)]
    architecture: Literal["x86_64", "aarch64"] | None = None
    device: Literal["cpu", "cuda", "rocm"] | None = None
    min_nodes: Count = 1

    @model_validator(mode="after")
    def _versions_can_be_read(self) -> When:
        bad = [part for part in self.versions.split(",") if not _BOUND.fullmatch(part.strip())]
        if bad:
            raise ValueError(f"cannot read {bad[0]!r} of versions {self.versions!r}; write them as >=2.28.3,<2.28.9")
        return self


class Trap(Facts):
    """`what` and `do` are sentences for the user; `date` is that of the source."""

    name: Name
    when: When
    what: Line
    do: Line
    severity: Literal["fault", "warning"]
    source: Annotated[str, Field(pattern=r"^https://\S+$")]
    date: Annotated[str, Field(pattern=r"^20\d\d-[01]\d(-[0-3]\d)?$")]

    def sentence(self, version: str) -> str:
        return f"{self.when.package} {version}: {self.what} ({self.source}, {self.date})"


class Traps(Facts):
    traps: list[Trap]


def load_traps() -> list[Trap]:
    """configs/traps.yaml. Raises MachineError with every fault of the file and its line."""
    path = configs_dir() / "traps.yaml"
    origins: dict[Key, str] = {}
    data = read_yaml(path, origins, MachineError)
    return validate(Traps, data, origins, str(path), MachineError, do="mend the lines named above").traps


def applies(
    when: When, version: str | None, architecture: str, device: Literal["cpu", "cuda", "rocm"], n_nodes: int
) -> bool:
    """Whether a run on such nodes steps into the trap. An unknown version does not."""
    if when.architecture not in (None, architecture) or when.device not in (None, device) or n_nodes < when.min_nodes:
        return False
    return version is not None and in_range(version, when.versions)


def in_range(version: str, bounds: str) -> bool:
    """Compare the leading numbers only: "2.28.9+cuda13" is in ">=2.28.3,<2.29". A text without number is in none."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    if found is None:
        return False
    for part in bounds.split(","):
        bound = _BOUND.fullmatch(part.strip())
        assert bound is not None, bounds
        if not _HOLDS[bound.group(1)](_compare(found.group(), bound.group(2))):
            return False
    return True


def _compare(a: str, b: str) -> int:
    """-1, 0 or 1; missing places count as 0, so that 2.28 equals 2.28.0."""
    left, right = ([int(n) for n in text.split(".")] for text in (a, b))
    width = max(len(left), len(right))
    left, right = left + [0] * (width - len(left)), right + [0] * (width - len(right))
    return (left > right) - (left < right)


def probe_version(package: str) -> str | None:
    """Version of a package as this process would use it; None where it is absent or does not tell."""
    if package in ("nccl", "rccl"):
        return _collectives_version(package)
    if package == "hip":
        return torch.version.hip
    if package == "libfabric":
        return _libfabric_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _collectives_version(package: str) -> str | None:
    """torch calls RCCL `nccl` too; which of the two it is depends on the build."""
    if package != ("rccl" if torch.version.hip else "nccl") or not torch.cuda.is_available():
        return None
    return ".".join(str(n) for n in torch.cuda.nccl.version()[:3])


def _libfabric_version() -> str | None:
    """By fi_version(): major in the upper 16 bits, minor in the lower."""
    try:
        library = ctypes.CDLL("libfabric.so.1")
    except OSError:
        return None
    library.fi_version.restype = ctypes.c_uint32
    number = library.fi_version()
    return f"{number >> 16}.{number & 0xFFFF}"
