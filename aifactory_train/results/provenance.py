"""Which code, on which machine: what a result must carry to be believed."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from aifactory_train.machine.probe import cpu_name

# Found in the environment of some sites only.
EXTRA_PACKAGES = ("transformer_engine", "flash_attn", "torchao", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
PACKAGES = ("torch", "deepspeed", "peft", "transformers", "datasets", "tokenizers", "mpi4py", "numpy", "pydantic")
_PACKAGE_DIR = Path(__file__).resolve().parent.parent
# What decides a run; a changed README or a new measurement does not make the code another one.
_CODE = ("aifactory_train", "configs", "launchers", "setup.py", "constraints.txt")


def provenance() -> dict[str, Any]:
    """Commit of our code ("+dirty" if it was changed since), versions, and the machine this process runs on.

    `git_sha` is None where neither a checkout nor the wheel's `_commit.txt` tells it; `diff_sha256` is that of the
    changes of a dirty checkout, else None. Imports no torch.
    """
    return {
        "git_sha": git_sha(_PACKAGE_DIR),
        "diff_sha256": diff_sha256(_PACKAGE_DIR),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "hostname": platform.node(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
    }


def packages() -> dict[str, Any]:
    """All that is installed, as one sum over sorted `name==version` lines; and versions of what makes kernels."""
    lines = sorted({f"{found.name.lower().replace('_', '-')}=={found.version}" for found in metadata.distributions()})
    extra = {name: version for name in EXTRA_PACKAGES if (version := _version(name)) is not None}
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return {"n_packages": len(lines), "packages_sha256": digest, "packages": extra}


def git_sha(package_dir: Path) -> str | None:
    """Commit of the checkout that holds the package, else the one that the wheel was built from."""
    checkout = package_dir.parent
    # A virtual environment may lie inside somebody's repository; only a .git right beside the package is ours.
    if (checkout / ".git").exists():
        sha = _git(checkout, "rev-parse", "HEAD")
        changes = _git(checkout, "status", "--porcelain", "--", *_CODE)
        if sha and changes is not None:
            return f"{sha}+dirty" if changes else sha
    try:
        return (package_dir / "_commit.txt").read_text().strip() or None
    except OSError:
        return None


def diff_sha256(package_dir: Path) -> str | None:
    """Sum over what the checkout has beyond its commit: the diff, and new files with their contents.

    None where there is nothing of it, and where git does not tell.
    """
    checkout = package_dir.parent
    if not (checkout / ".git").exists():
        return None
    changes = _git(checkout, "diff", "--binary", "--no-ext-diff", "HEAD", "--", *_CODE)
    new = _git(checkout, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE)
    if changes is None or new is None or not changes + new:
        return None
    digest = hashlib.sha256(changes.encode(errors="surrogateescape"))
    for name in new.split("\0"):
        if (checkout / name).is_file():
            digest.update(name.encode(errors="surrogateescape") + b"\0" + (checkout / name).read_bytes())
    return digest.hexdigest()


def _git(checkout: Path, *arguments: str) -> str | None:
    # In a container the checkout often belongs to another user, which git refuses without safe.directory.
    command = ["git", "-c", f"safe.directory={checkout}", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=30, check=True)
        return done.stdout.decode(errors="surrogateescape").strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
