"""The cluster that all tests here share. Where Slurm is not installed they skip and say so; in CI they fail."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from slurm.cluster import Cluster, Munge, missing_programs


@pytest.fixture(scope="session")
def munge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Munge]:
    missing = missing_programs()
    if missing:
        reason = f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
        could_be_there = os.geteuid() == 0 and shutil.which("apt-get")
        if os.environ.get("CI") or could_be_there:
            pytest.fail(reason)
        pytest.skip(reason)
    # A SIGTERM, as from a time limit of CI, ends the tests as Ctrl-C does: with everything stopped.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    daemon = Munge(tmp_path_factory.mktemp("munge"))
    yield daemon
    daemon.stop()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def cluster(munge: Munge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; runs take two of them."""
    slurm = Cluster(tmp_path_factory.mktemp("slurm"), munge, 3)
    yield slurm
    slurm.stop()


@pytest.fixture
def settled(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, cleared of what the test leaves behind."""
    yield cluster
    cluster.settle()
