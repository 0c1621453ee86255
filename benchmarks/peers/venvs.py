"""One virtual environment per peer in .venv-peers/, made once with pip: the versions of constraints.txt and, for what
is not there or does not go together with it, those below. torch is the build that this program runs with.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENVS = ROOT / ".venv-peers"
CONSTRAINTS = ROOT / "constraints.txt"
MARK = ".installed"  # holds what was installed: a venv of other versions is made anew
INSTALL_LIMIT_S = 1800.0

# Asked of pip; a version here takes the place of that in constraints.txt.
NEEDS = {
    "trainer": ("transformers", "accelerate"),
    "accelerate": ("accelerate", "transformers"),
    "deepspeed": ("deepspeed", "transformers"),
    # litgpt 0.5.13 needs huggingface-hub < 1.4
    "litgpt": ("litgpt==0.5.13", "lightning==2.6.6", "huggingface_hub==1.3.7", "jsonargparse==4.41.0"),
    "torchtitan": ("torchtitan==0.3.0", "datasets==4.7.0", "torch_checkpointing==0.1.0", "spmd_types==0.2.3"),
}


class NotInstalled(Exception):
    """A peer's environment could not be made; the text says why."""


def build_venv(name: str, folder: Path = VENVS) -> Path:
    """The Python of a peer's environment, which is made first where it is not there yet.

    Raises NotInstalled with the last words of pip, and leaves no half of an environment.
    """
    venv = folder / name
    python, mark, wanted = venv / "bin" / "python", venv / MARK, "\n".join(requirements(name))
    if python.exists() and mark.exists() and mark.read_text() == wanted:
        return python
    print(f"{name}: make {os.path.relpath(venv)} (once)", flush=True)
    shutil.rmtree(venv, ignore_errors=True)
    # What the site provides (SITE_TORCH=1) is seen by the peers as by ours.
    site = ["--system-site-packages"] if sees_site() else []
    try:
        _run([sys.executable, "-m", "venv", *site, str(venv)])
        (venv / "constraints.txt").write_text("\n".join(constraints(name)) + "\n")
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--quiet"]
        _run([*pip, "-c", str(venv / "constraints.txt"), *NEEDS[name], f"torch=={torch_version()}", "numpy"])
    except NotInstalled:
        shutil.rmtree(venv, ignore_errors=True)
        raise
    mark.write_text(wanted)
    return python


def requirements(name: str) -> list[str]:
    """All that decides what is installed."""
    return [*NEEDS[name], *constraints(name)]


def constraints(name: str) -> list[str]:
    """The lines of constraints.txt, less what the peer has in another version, with this program's own torch."""
    own = {_package(need) for need in NEEDS[name] if "==" in need} | {"torch"}
    lines = (line.strip() for line in CONSTRAINTS.read_text().splitlines())
    kept = [line for line in lines if line and not line.startswith("#") and _package(line) not in own]
    return [*kept, f"torch=={torch_version()}"]


def installed_versions(name: str, folder: Path = VENVS) -> dict[str, str]:
    """What the result names of a peer's environment: the packages that it was asked for, and torch."""
    (site_packages,) = (folder / name / "lib").glob("python*/site-packages")
    found = {_package(d.name): d.version for d in importlib.metadata.distributions(path=[str(site_packages)])}
    asked = [_package(need) for need in (*NEEDS[name], "torch")]
    return {package: found[package] for package in asked if package in found}


def torch_version() -> str:
    """As its package names it, so that with "+cpu" pip can take no build for CUDA."""
    return importlib.metadata.version("torch")


def sees_site() -> bool:
    settings = Path(sys.prefix) / "pyvenv.cfg"
    return settings.exists() and "include-system-site-packages = true" in settings.read_text()


def _package(requirement: str) -> str:
    return re.split(r"[=<>!~\[; ]", requirement, maxsplit=1)[0].lower().replace("-", "_")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise NotInstalled(f"pip did not end within {INSTALL_LIMIT_S:.0f} s") from None
    if done.returncode:
        words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in words if line.startswith("ERROR")] or words or ["no words"]
        raise NotInstalled(f"pip ended with {done.returncode}: {errors[-1]}")
