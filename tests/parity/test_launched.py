"""The same through the launcher, MPI, the loader and 20 steps of text: what test_matrix.py does not run through."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from aifactory_train.machine.load import load_machine
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import load_recipe
from aifactory_train.rundir import RunDir, read_jsonl, step_folder
from forked_ranks import in_forks
from training_runs import launched, write_recipe

LOSS_RTOL = 2e-6
NORM_RTOL = 2e-5
BF16_LOSS_RTOL = 4e-3  # one rounding to 8 bits of mantissa
LAYOUTS = {
    "dp_shard": (2, {}),
    "cp and dp_replicate": (4, {"layout__cp": 2, "layout__dp_replicate": 2}),
}


@pytest.fixture(scope="module")
def one_folder(words: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    launched(write_recipe(folder, **words), folder / "run", 1)
    return folder / "run"


@pytest.fixture
def one_process(one_folder: Path) -> list[dict]:
    return read_jsonl(RunDir(one_folder).metrics)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_launched_layout_has_the_loss_curve_of_one_process(words, tmp_path, one_process, name):
    ranks, changes = LAYOUTS[name]
    rows = launched(write_recipe(tmp_path, **words, **changes), tmp_path / "run", ranks)
    assert [r["step"] for r in rows] == list(range(1, 21))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1, "it learns"
    for ours, theirs in zip(rows, one_process, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM_RTOL), ours["step"]


def test_a_run_of_one_process_goes_on_as_a_pipeline_with_tensor_parallelism(words, tmp_path, one_folder, one_process):
    run = tmp_path / "run"
    shutil.copytree(one_folder, run)
    shutil.rmtree(step_folder(RunDir(run).checkpoints, 20))
    recipe = write_recipe(tmp_path, **words, layout__pp=2, layout__tp=2, train__micro_batch_rows=4)
    rows = launched(recipe, run, 4)[20:]
    assert [r["step"] for r in rows] == list(range(11, 21))
    for ours, theirs in zip(rows, one_process[10:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM_RTOL), ours["step"]


@pytest.mark.parametrize("first, then", [("fsdp2", "deepspeed"), ("deepspeed", "fsdp2")])
def test_a_run_goes_on_in_the_other_engine(words, tmp_path, one_process, first, then):
    for engine in (first, then):
        change = {"layout__engine": engine, "layout__zero_stage": 2 if engine == "deepspeed" else "auto"}
        plan = make_plan(load_recipe(write_recipe(tmp_path, **words, **change)), load_machine("local"), cpu_ranks=2)
        assert in_forks({"run": plan}, tmp_path) == {"run": [0, 0]}, (tmp_path / "run.txt").read_text()
        rows = read_jsonl(RunDir(tmp_path / "run").metrics)
        shutil.rmtree(step_folder(RunDir(tmp_path / "run").checkpoints, 20))
    assert [r["step"] for r in rows] == [*range(1, 21), *range(11, 21)]
    for ours in rows:
        theirs = one_process[ours["step"] - 1]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS_RTOL), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=NORM_RTOL), ours["step"]


def test_bf16_with_fp32_master_weights_follows_the_fp32_curve(words, tmp_path, one_process):
    rows = launched(write_recipe(tmp_path, **words, train__precision="bf16"), tmp_path / "run", 2)
    for ours, theirs in zip(rows, one_process, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=BF16_LOSS_RTOL), ours["step"]
    assert any(ours["loss"] != theirs["loss"] for ours, theirs in zip(rows, one_process, strict=True))
