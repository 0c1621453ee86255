"""Each layout that the planner proposes starts, or training refuses it with the planner's own sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from aifactory_train.errors import PlanError
from aifactory_train.launch.env import local_environment
from aifactory_train.launch.local import write_run_folder
from aifactory_train.launch.mpi import mpirun_command
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.plan import Plan, load_plan, make_ranked_plan
from aifactory_train.plan.search import Candidate, search
from aifactory_train.plan.support import refuse_untrainable, why_not_trainable
from aifactory_train.recipe.load import load_recipe
from aifactory_train.rundir import RunDir, read_jsonl
from plan_machines import gpus
from training_runs import aifactory, write_recipe

# The planner proposes other axes on a CPU only where they are asked for.
WISHES: dict[str, dict[str, object]] = {
    "auto": {},
    "remat-full": {"layout__remat": "full", "layout__reshard_after_forward": False, "train__micro_batch_rows": 4},
    "reduced-each": {"layout__reduce_each_micro_batch": True, "train__micro_batch_rows": 2},
    "remat-selective": {"layout__remat": "selective"},
    "tp": {"layout__tp": 2},
    "cp": {"layout__cp": 2},
    "pp": {"layout__pp": 2},
    "replicas": {"layout__dp_replicate": 2},
    "zero-1": {"layout__zero_stage": 1},
    "offload": {"layout__offload": "optimizer"},
}


def proposed(words: dict[str, Path], folder: Path, wish: str, ranks: int) -> tuple[Plan, list[Candidate]]:
    """A plan of two steps, and every candidate of its search."""
    steps = {"train__budget_tokens": 2048, "schedule__warmup_tokens": 0}
    recipe = load_recipe(write_recipe(folder, **words, **steps, **WISHES[wish]))
    plan, ranking = make_ranked_plan(recipe, load_machine("local"), cpu_ranks=ranks)
    return plan, ranking.candidates


def trained(plan: Plan, folder: Path) -> str | None:
    """None where training did both steps, else what it said. The ranks are started by the launcher's own command."""
    run = RunDir(folder)
    write_run_folder(plan, run)
    program = [sys.executable, "-m", "aifactory_train", "train", str(folder)]
    command = mpirun_command(plan.machine, plan.layout.world_size, program)
    with tempfile.TemporaryDirectory(prefix="aifactory-train-") as mpi_folder:  # a short path: it will hold sockets
        env = local_environment(plan, mpi_folder)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 0:
        assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2]
        return None
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("wish", "ranks"),
    [("auto", 1), ("auto", 2), ("auto", 4), ("remat-full", 2), ("reduced-each", 2)],
)
def test_a_layout_that_is_called_trainable_trains(words, tmp_path, wish, ranks):
    plan, candidates = proposed(words, tmp_path, wish, ranks)
    assert why_not_trainable(plan.layout) is None
    assert trained(plan, tmp_path / "run") is None
    assert load_plan(RunDir(tmp_path / "run").plan) == plan
    others = [c for c in candidates if c.layout != plan.layout]
    assert all(c.why_not is None for c in candidates) and (others or wish != "auto")
    for i, candidate in enumerate(others):
        other = plan.model_copy(update={"layout": candidate.layout})
        assert trained(other, tmp_path / f"run{i}") is None, candidate.layout


@pytest.mark.parametrize("wish", ["remat-selective", "tp", "cp", "pp", "replicas", "zero-1", "offload"])
def test_a_layout_that_is_not_is_refused_by_launch_with_the_sentence_of_the_plan(words, tmp_path, wish):
    plan, _ = proposed(words, tmp_path, wish, 2)
    sentence = why_not_trainable(plan.layout)
    assert sentence is not None and any(sentence in note for note in plan.notes)
    launched = aifactory("launch", tmp_path / "recipe.yaml", "--run", tmp_path / "run", "--cpu-ranks", 2)
    assert launched.returncode == 2 and sentence in launched.stderr
    assert not (tmp_path / "run").exists()


def test_training_refuses_a_plan_with_such_a_layout_with_the_same_sentence_said_once(words, tmp_path):
    plan, _ = proposed(words, tmp_path, "pp", 2)
    sentence, said = why_not_trainable(plan.layout), trained(plan, tmp_path / "run")
    assert sentence and said is not None and said.count(sentence) == 1, said


def test_every_layout_proposed_for_two_gpus_trains_or_is_refused_with_its_own_sentence(words, tmp_path):
    plan, here = proposed(words, tmp_path, "auto", 2)
    candidates = search(plan.recipe, gpus(per_node=2), n_nodes=1).candidates
    # What can be trained there is what is started here above, compiled.
    same = {"compile": False, "threads_per_rank": plan.layout.threads_per_rank}
    trainable = [c.layout.model_copy(update=same) for c in candidates if c.why_not is None]
    assert trainable and all(layout in [c.layout for c in here] for layout in trainable)
    refused = [c for c in candidates if c.why_not is not None]
    assert {c.layout.engine for c in refused} == {"fsdp2", "deepspeed"}
    for candidate in refused:
        with pytest.raises(PlanError, match=re.escape(candidate.why_not)):
            refuse_untrainable(candidate.layout, where="plan.json")
    # Training asks that function too: one start for each sentence shows it.
    for i, candidate in enumerate({c.why_not: c for c in refused}.values()):
        said = trained(plan.model_copy(update={"layout": candidate.layout}), tmp_path / f"run{i}")
        assert said is not None and candidate.why_not in said, candidate.layout
