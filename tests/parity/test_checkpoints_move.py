"""A checkpoint of any engine, layout and number of ranks goes on in any other, as if it had never been left.

Each case of a list of cases.py saves after a few steps, and each loads what every one saved: weights, both moments and
the step of the optimizer have moved if the next losses and gradient norms are those of one process that went on.
`make parity` adds the list of larger layouts (PARITY=all).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aifactory_train.checkpoint.dcp import read_tensors, stored_tensors
from parity import page
from parity.cases import BF16_CHECKPOINTS, CHECKPOINTS, LONG_CHECKPOINTS, SAVED_AFTER, Case
from parity.runs import TOLERANCE, Runs, job, job_of_loads, started

# One rounding to 8 bits of mantissa; by which order of sums, the layouts differ.
BF16_LOSS_RTOL = 4e-3
GROUPS = [CHECKPOINTS, *([LONG_CHECKPOINTS] if os.environ.get("PARITY") == "all" else [])]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All save; what the selected tests ask for loads."""
    mine = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    jobs = []
    for group in (*GROUPS, BF16_CHECKPOINTS):
        loading = [item.callspec.params["case"] for item in mine if item.callspec.params["case"] in group]
        if loading:
            jobs += [job(case, saves=True) for case in dict.fromkeys([group[0].reference, *group])]
            jobs += [job_of_loads(case, group, saves_again=group is BF16_CHECKPOINTS) for case in loading]
    with started(tmp_path_factory.mktemp("moves"), jobs) as runs:
        yield runs


@pytest.mark.parametrize("case", [case for group in GROUPS for case in group], ids=lambda case: case.name)
def test_a_checkpoint_of_any_engine_and_layout_goes_on_in_this_one(case: Case, runs: Runs) -> None:
    expected = runs.result(case.reference.name)["curve"][SAVED_AFTER:]
    (group,) = [group for group in GROUPS if case in group]
    curves = curves_of_loads(case, group, runs)
    assert list(curves) == [other.name for other in group]
    for source, curve in curves.items():
        for step, (ours, theirs) in enumerate(zip(curve, expected, strict=True), start=SAVED_AFTER + 1):
            assert ours == pytest.approx(theirs, rel=TOLERANCE), f"{source}, step {step}"


@pytest.mark.parametrize("case", BF16_CHECKPOINTS, ids=lambda case: case.name)
def test_with_bf16_compute_the_float32_state_moves_bit_for_bit(case: Case, runs: Runs) -> None:
    expected = [loss for loss, _ in runs.result(case.reference.name)["curve"][SAVED_AFTER:]]
    curves = curves_of_loads(case, BF16_CHECKPOINTS, runs)
    for other in BF16_CHECKPOINTS:
        saved, again = (
            whole_state(folder)
            for folder in (runs.folder / other.name / "checkpoint", runs.folder / f"{case.name}-loads" / other.name)
        )
        assert list(saved) == list(again)
        for name, tensor in saved.items():
            assert tensor.dtype == torch.float32 and torch.equal(tensor, again[name]), f"{other.name}, {name}"
        assert [loss for loss, _ in curves[other.name]] == pytest.approx(expected, rel=BF16_LOSS_RTOL), other.name


def curves_of_loads(case: Case, sources: list[Case], runs: Runs) -> dict[str, list[list[float]]]:
    for source in sources:
        runs.result(source.name)  # where a save failed, that is the error to be told
    curves: dict[str, list[list[float]]] = runs.result(f"{case.name}-loads")["curves"]
    return curves


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    state = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in sorted(stored_tensors(checkpoint).items())
    }
    read_tensors(state, checkpoint)
    return state


def test_the_page_lists_the_checkpoints_that_move() -> None:
    assert page.render_checkpoints() in page.PAGE.read_text(), "make parity  writes docs/parity.md anew"
