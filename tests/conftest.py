"""What all tests share: the order (cheap before dear) and the skip of GPU tests where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Ranks of several tests share the cores. A thread that spins at a barrier would keep the one it waits for from its
# core, and that multiplies the time of a small step. Read by libgomp when torch is loaded, here and in all ranks.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from training_runs import aifactory, write_corpus, write_recipe

# Cheap before dear. With two workers, of which each takes the next file: first of the dear ones the longest file.
ORDER = ("test_house.py", "test_promises.py", "unit", "golden", "slurm", "cpu", "parity", "gpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def part(item: pytest.Item) -> str:
        return item.path.relative_to(here).parts[0]

    items.sort(key=lambda item: ORDER.index(part(item)) if part(item) in ORDER else len(ORDER))
    needs_gpu = [item for item in items if part(item) == "gpu" or item.get_closest_marker("gpu")]
    if needs_gpu and not _has_gpu():
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, torch sees none"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small corpus, prepared once: keyword arguments for `write_recipe`."""
    folder = tmp_path_factory.mktemp("words")
    paths = {"corpus": write_corpus(folder), "prepared": folder / "prepared"}
    done = aifactory("prepare", write_recipe(folder, **paths))
    assert done.returncode == 0, done.stdout + done.stderr
    return paths
