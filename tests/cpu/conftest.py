"""Prepared data and small disks for the tests that run real stages."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aifactory_train.data import tokenize
from aifactory_train.data.prepare import prepare
from aifactory_train.recipe.schema import Data
from prepared_data import UNIT_TEXT_BYTES, build_data, write_corpus


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    return {
        "one": write_corpus(folder / "one.jsonl", 1500, 1),
        "two": write_corpus(folder / "two.jsonl", 200, 2),
    }


@pytest.fixture(scope="session")
def whole(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A prepared folder that nothing interrupted; tests that change it take a copy."""
    data = build_data(tmp_path_factory.mktemp("whole") / "prepared", corpora)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "UNIT_TEXT_BYTES", UNIT_TEXT_BYTES)
        prepare(data)
    return data


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A real file system of that many MiB; needs the right to mount."""
    mounted = []

    def mount(n_mib: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={n_mib}m", "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no mount command: {error}")
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # this process may still have files mapped
