"""Every layout has the numbers of one process: loss, gradient norm and every weight, in float32.

`make test` trains the short list of cases.py, `make parity` the long one too (PARITY=all). How far each case may lie
from one process is TOLERANCE; how far it does lie stands in docs/parity.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from parity import page
from parity.cases import FAULTY, LONG, SHORT, Case
from parity.runs import TOLERANCE, Difference, Runs, job, largest, started

CASES = SHORT + (LONG if os.environ.get("PARITY") == "all" else [])


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Trains what the selected tests of this file ask for, and the one process that each is held against."""
    mine = [item for item in request.session.items if item.path == request.path]
    cases = [item.callspec.params["case"] for item in mine if hasattr(item, "callspec")]
    trained = [case for case in cases if isinstance(case, Case)]
    jobs = [job(case) for case in dict.fromkeys(each for case in trained for each in (case.reference, case))]
    with started(tmp_path_factory.mktemp("parity"), jobs) as runs:
        yield runs


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
