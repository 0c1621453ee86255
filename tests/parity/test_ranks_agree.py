"""One process and N processes train the same model in float32."""

import pytest

from training_runs import launched, write_recipe

LOSS_RTOL = 2e-6
NORM_RTOL = 2e-5
BF16_LOSS_RTOL = 4e-3  # one rounding to 8 bits of mantissa
CASES = {
    "adamw": {},
    "muon": {"optim__name": "muon"},
    "plain-rows-tied-qwen3": {
        "data__document_mask": False,
        "model__family": "qwen3",
        "model__tied_embeddings": True,
    },
    "accumulation": {"train__micro_batch_rows": 2},
    "reduced-each": {"train__micro_batch_rows": 1, "layout__reduce_each_micro_batch": True},
    "resharded": {"layout__reshard_after_forward": True},
    "compiled": {"train__compile": True},
    "remat": {"layout__remat": "full"},
    "remat-compiled": {"layout__remat": "full", "train__compile": True},
}


@pytest.fixture(scope="module")
def one_process(words, tmp_path_factory):
    """The curve of one process, made once for each case that needs its own."""
    curves = {}
    alike = ("accumulation", "reduced-each", "resharded", "compiled", "remat", "remat-compiled")

    def curve(case: str):
        # How one rank cuts its rows, and when FSDP gathers, must not be seen in the numbers.
        key = "adamw" if case in alike else case
        if key not in curves:
            folder = tmp_path_factory.mktemp(key)
            curves[key] = launched(write_recipe(folder, **words, **CASES[key]), folder / "run", 1)
        return curves[key]

    return curve


@pytest.mark.parametrize(
    "case, ranks",
    [
        ("adamw", 2),
        ("adamw", 4),
        ("muon", 2),
        ("muon", 4),
        ("plain-rows-tied-qwen3", 2),
        ("accumulation", 1),
        ("accumulation", 2),
        ("reduced-each", 2),
        ("resharded", 2),
        ("compiled", 2),
        ("remat", 2),
        ("remat-compiled", 2),
    ],
)
def test_n_ranks_have_the_loss_curve_of_one(words, tmp_path, one_process, case, ranks):
    expected = one_process(case)
    rows = launched(write_recipe(tmp_path, **words, **CASES[case]), tmp_path / "run", ranks)
    assert [r["step"] for r in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1, "it learns"
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM_RTOL), ours["step"]


def test_bf16_with_fp32_master_weights_follows_the_fp32_curve(words, tmp_path, one_process):
    rows = launched(write_recipe(tmp_path, **words, train__precision="bf16"), tmp_path / "run", 2)
    for ours, theirs in zip(rows, one_process("adamw"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BF16_LOSS_RTOL), ours["step"]
    assert any(ours["loss"] != theirs["loss"] for ours, theirs in zip(rows, one_process("adamw"), strict=True))
