"""Both engines have the numbers of one process: loss, gradient norm and every weight, at 1, 2 and 4 ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest

from parity.cases import Case
from parity.runs import TOLERANCE, Runs, job, started

# A rank rounds its share of a gradient to 8 bits of mantissa (2^-9) before shares are summed in float32, which one
# process does after the sum. The mean over all tokens evens that out in the loss; a weight keeps it, since each first
# step of Adam is nearly as large as the last bits of its gradient make it. fsdp2 has the same distances.
BF16_LOSS_RTOL, BF16_NORM_RTOL, BF16_WEIGHTS_RTOL = 1e-4, 2e-3, 8e-3


def zero(stage: int, n: int = 2, **changes: object) -> Case:
    return Case(engine="deepspeed", zero_stage=stage, dp_shard=n, **changes)  # type: ignore[arg-type]


EXACT = [
    *[Case(dp_shard=n) for n in (2, 4)],
    *[zero(stage, n) for stage in (1, 2, 3) for n in (1, 2, 4)],
    *[zero(stage, accumulate=True) for stage in (1, 2, 3)],
    *[zero(stage, model="tied") for stage in (2, 3)],
    zero(2, remat="selective"),
    zero(3, remat="full"),
    zero(3, 4, model="uneven"),
    zero(3, documents=False),
    zero(2, offload="optimizer"),
    zero(3, offload="parameters", accumulate=True),
]
if os.environ.get("PARITY") == "all":
    EXACT += [zero(stage, compile=True, model="shallow", remat=r) for stage in (1, 3) for r in ("none", "full")]
BF16 = [Case(dp_shard=2, precision="bf16"), *[zero(stage, precision="bf16") for stage in (1, 2, 3)]]
BF16 += [zero(stage, precision="bf16", accumulate=True) for stage in (1, 2, 3)]
WRONG = [
    zero(2, fault="own_rows_in_deepspeed"),
    zero(3, accumulate=True, fault="micro_batches_averaged"),
]


def name(case: Case) -> str:
    return case.name


NOT_FINITE = [
    zero(stage, 1, precision=precision, fault="gradients_not_finite")
    for stage, precision in ((1, "bf16"), (2, "fp32"), (3, "fp32"))
]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Trains what the selected tests ask for, and the one process that each is held against."""
    mine = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [item.callspec.params["case"] for item in mine]
    jobs = [job(case) for case in dict.fromkeys(each for case in cases for each in (case.reference, case))]
    with started(tmp_path_factory.mktemp("engines"), jobs) as runs:
        yield runs


@pytest.mark.parametrize("case", EXACT, ids=name)
def test_an_engine_has_the_numbers_of_one_process(case: Case, runs: Runs) -> None:
    difference = runs.difference(case)
    assert all(x <= TOLERANCE for x in difference), difference


@pytest.mark.parametrize("case", BF16, ids=name)
def test_in_bf16_an_engine_stays_within_the_rounding_of_one_process(case: Case, runs: Runs) -> None:
    loss, norm, weights = runs.difference(case)
    assert loss <= BF16_LOSS_RTOL and norm <= BF16_NORM_RTOL and weights <= BF16_WEIGHTS_RTOL, (loss, norm, weights)


@pytest.mark.parametrize("case", WRONG, ids=name)
def test_a_deliberate_fault_in_an_engine_is_seen(case: Case, runs: Runs) -> None:
    assert max(runs.difference(case)) > 100 * TOLERANCE


@pytest.mark.parametrize("case", NOT_FINITE, ids=name)
def test_a_step_that_deepspeed_passes_over_has_a_loss_that_is_not_finite(case: Case, runs: Runs) -> None:
    losses = [loss for loss, _ in runs.result(case.name)["curve"]]
    assert losses and not any(math.isfinite(loss) for loss in losses), losses
