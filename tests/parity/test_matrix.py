"""Every layout has the numbers of one process: loss, gradient norm and every weight, in float32.

`make test` trains the short list of cases.py, `make parity` the long one too (PARITY=all). How far each case may lie
from one process is TOLERANCE; how far it does lie stands in docs/parity.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from parity import page
from parity.cases import CHECKPOINTS, FAULTY, LONG, SAVED_AFTER, SHORT, STEPS, Case

# Relative, of the loss and gradient norm of each step, and of the norm of the difference of each weight tensor.
TOLERANCE = 1e-5
WAIT_S = 900
RANKS = Path(__file__).with_name("ranks.py")
CASES = SHORT + (LONG if os.environ.get("PARITY") == "all" else [])


class Difference(NamedTuple):
    """The largest relative difference to one process."""

    loss: float
    norm: float
    weights: float


class Runs:
    """What ranks.py leaves, as it comes: one process trains all cases of this session, one after the other."""

    def __init__(self, folder: Path, jobs: list[dict[str, Any]]) -> None:
        self.folder = folder
        (folder / "jobs.json").write_text(json.dumps(jobs))
        self.log = open(folder / "log.txt", "w")  # noqa: SIM115
        command = [sys.executable, str(RANKS), str(folder / "jobs.json"), str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    def result(self, name: str) -> dict[str, Any]:
        path, end_s = self.folder / f"{name}.json", time.monotonic() + WAIT_S
        while not path.exists():
            ended = self.process.poll() is not None and not path.exists()
            assert not ended, (self.folder / "log.txt").read_text()[-3000:]
            assert time.monotonic() < end_s, f"no result of {name} within {WAIT_S} s"
            time.sleep(0.05)
        result: dict[str, Any] = json.loads(path.read_text())
        assert "error" not in result, result["error"]
        return result

    def difference(self, case: Case) -> Difference:
        """Between a case and one process."""
        ours, theirs = (self.result(c.name)["curve"] for c in (case, case.reference))
        assert len(ours) == len(theirs) == STEPS
        losses, norms = (largest(relative(a[k], b[k]) for a, b in zip(ours, theirs, strict=True)) for k in (0, 1))
        whole = torch.load(self.folder / case.reference.name / "weights-0.pt")
        parts = [torch.load(path) for path in sorted((self.folder / case.name).glob("weights-*.pt"))]
        assert len(parts) == case.pp
        assert set().union(*parts) == set(whole), "some weights are in no stage"
        weights = largest(((w - whole[n]).norm() / whole[n].norm()).item() for part in parts for n, w in part.items())
        return Difference(losses, norms, weights)


def largest(values: Iterable[float]) -> float:
    """NaN where one is NaN, which Python's max would pass over."""
    return torch.tensor(list(values), dtype=torch.float64).max().item()


def relative(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def job(case: Case, loads: tuple[str, ...] = ()) -> dict[str, Any]:
    name = f"{case.name}-loads" if loads else case.name
    return {"name": name, "case": asdict(case), "saves": case in CHECKPOINTS, "loads": list(loads)}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Trains what the selected tests of this file ask for, and the one process that each is held against."""
    mine = [item for item in request.session.items if item.path == request.path]
    cases = [item.callspec.params["case"] for item in mine if hasattr(item, "callspec")]
    moves = any("checkpoint" in item.name for item in mine)
    trained = [case for case in cases if isinstance(case, Case)] + (CHECKPOINTS if moves else [])
    in_order = dict.fromkeys(each for case in trained for each in (case.reference, case))
    jobs = [job(case) for case in in_order]
    if moves:
        jobs += [job(case, tuple(other.name for other in CHECKPOINTS)) for case in CHECKPOINTS]
    started = Runs(tmp_path_factory.mktemp("parity"), jobs)
    yield started
    started.process.kill()
    started.process.wait()
    started.log.close()


@pytest.fixture
def each(runs: Runs) -> Callable[[Case], Difference]:
    return runs.difference


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_layout_has_the_numbers_of_one_process(case: Case, each: Callable[[Case], Difference]) -> None:
    difference = each(case)
    assert all(x <= TOLERANCE for x in difference), difference


@pytest.mark.parametrize("case", FAULTY, ids=lambda case: case.name)
def test_a_deliberate_fault_is_seen(case: Case, each: Callable[[Case], Difference]) -> None:
    assert max(each(case)) > 100 * TOLERANCE


@pytest.mark.parametrize("case", CHECKPOINTS, ids=lambda case: case.name)
def test_a_checkpoint_of_any_layout_goes_on_in_this_one(case: Case, runs: Runs) -> None:
    expected = runs.result(Case().name)["curve"][SAVED_AFTER:]
    curves = runs.result(f"{case.name}-loads")["curves"]
    assert list(curves) == [other.name for other in CHECKPOINTS]
    for source, curve in curves.items():
        for step, (ours, theirs) in enumerate(zip(curve, expected, strict=True), start=SAVED_AFTER + 1):
            assert ours == pytest.approx(theirs, rel=TOLERANCE), f"{source}, step {step}"


def test_the_page_and_the_readme_show_the_cases_that_are_tested(request: pytest.FixtureRequest) -> None:
    """With the long list it writes both first."""
    if os.environ.get("PARITY") == "all":
        runs = request.getfixturevalue("runs")
        page.write({case.name: runs.difference(case) for case in (*SHORT, *LONG, *FAULTY)})
    rows = [line.split(" | ") for line in page.PAGE.read_text().splitlines() if line.startswith("| ")]
    shown = {row[0].removeprefix("| ") for row in rows} - {"case"}
    assert shown == {case.name for case in (*SHORT, *LONG, *FAULTY)}, "make parity  writes docs/parity.md anew"
    assert page.render_layouts() in page.README.read_text(), "make parity  writes the table of the README anew"


def test_a_nan_is_no_small_difference() -> None:
    assert not largest([1e-7, float("nan"), 1e-7]) <= TOLERANCE
