"""Each layout that the planner proposes starts, or training refuses it with the planner's own sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aifactory_train.errors import PlanError
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.plan import Plan, load_plan, make_plan, make_ranked_plan
from aifactory_train.plan.search import search
from aifactory_train.plan.support import refuse_untrainable, why_not_trainable
from aifactory_train.recipe.load import load_recipe
from aifactory_train.recipe.schema import Recipe
from aifactory_train.rundir import RunDir, read_jsonl
from forked_ranks import in_forks
from plan_machines import gpus
from training_runs import aifactory, launched, write_recipe

STEPS = {"train__budget_tokens": 2048, "schedule__warmup_tokens": 0, "model__n_layers": 4}
# What the planner proposes on a CPU only where it is asked for.
WISHES: dict[str, dict[str, object]] = {
    "remat": {"layout__remat": "full", "layout__reshard_after_forward": False, "train__micro_batch_rows": 4},
    "remat-selective": {"layout__remat": "selective"},
    "cp": {"layout__cp": 2},
    "ring": {"layout__cp": 2, "layout__cp_attention": "ring"},
    "zbv": {"layout__pp": 2, "layout__pipeline_schedule": "zbv", "train__micro_batch_rows": 1},
    "dualpipev": {"layout__pp": 2, "layout__pipeline_schedule": "dualpipev", "train__micro_batch_rows": 1},
    "tied-pp": {"layout__pp": 2, "model__tied_embeddings": True},
    "replicas": {"layout__dp_replicate": 2},
    "zero-3": {"layout__engine": "deepspeed", "layout__zero_stage": 3},
    "offload-optimizer": {"layout__offload": "optimizer", "layout__zero_stage": 2},
    "offload-parameters": {"layout__offload": "parameters"},
    "transformers": {"layout__model_code": "transformers"},
}
REFUSED: dict[str, object] = {
    "layout__pp": 2,
    "layout__pipeline_schedule": "zbv",
    "layout__reshard_after_forward": True,
    "train__micro_batch_rows": 1,
}
REFUSED_LAYOUTS: dict[str, dict[str, object]] = {
    "offload-fsdp2": {"offload": "optimizer"},
    "split-transformers": {"model_code": "transformers", "dp_shard": 1, "tp": 2, "micro_batch_rows": 16},
}


def recipe_of(words: dict[str, Path], folder: Path, **changes: object) -> Recipe:
    """Two steps."""
    return load_recipe(write_recipe(folder, **words, **STEPS, **changes))


def kind_of(layout: Layout) -> tuple[object, ...]:
    """Layouts of a kind differ in how many rows a micro-batch has."""
    sizes = ("micro_batch_rows", "accumulation", "compile", "threads_per_rank", "device_order")
    return tuple(layout.model_dump(exclude=set(sizes)).values())


def proposed(words: dict[str, Path], folder: Path) -> dict[str, Plan]:
    """What 1 and 4 ranks of a CPU are given, and wishes; each kind of layout that is proposed for 2, and for 2 GPUs."""
    here = load_machine("local")
    plans = {f"ranks-{n}": make_plan(recipe_of(words, folder), here, cpu_ranks=n) for n in (1, 4)}
    for name, wish in WISHES.items():
        plans[name] = make_plan(recipe_of(words, folder, **wish), here, cpu_ranks=2)
    base, ranking = make_ranked_plan(recipe_of(words, folder), here, cpu_ranks=2)
    assert all(c.why_not is None for c in ranking.candidates)
    kinds = {kind_of(c.layout): c.layout for c in ranking.candidates}
    same = {"compile": False, "threads_per_rank": base.layout.threads_per_rank}
    trainable = [c.layout for c in search(base.recipe, gpus(per_node=2), n_nodes=1).candidates if c.why_not is None]
    assert {axis for at in trainable for axis in ("pp", "tp", "dp_shard") if getattr(at, axis) == 2} == {
        "pp", "tp", "dp_shard",
    }  # fmt: skip
    kinds |= {kind_of(at): at.model_copy(update=same) for at in trainable}
    return plans | {f"kind-{i}": base.model_copy(update={"layout": at}) for i, at in enumerate(kinds.values())}


def test_every_layout_that_is_proposed_trains(words, tmp_path):
    plans = proposed(words, tmp_path)
    assert all(why_not_trainable(plan.layout) is None for plan in plans.values())
    for name, codes in in_forks(plans, tmp_path / "runs").items():
        layout, run = plans[name].layout, RunDir(tmp_path / "runs" / name)
        assert codes == [0] * layout.world_size, f"{layout}\n{Path(f'{run.root}.txt').read_text()}"
        assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2], layout
        assert load_plan(run.plan) == plans[name]


def test_the_launcher_starts_a_pipeline_of_two_ranks(words, tmp_path):
    recipe = write_recipe(tmp_path, **words, **STEPS, layout__pp=2)
    assert [row["step"] for row in launched(recipe, tmp_path / "run", 2)] == [1, 2]


def test_a_layout_that_cannot_be_trained_is_refused_by_launch_with_the_sentence_of_the_plan(words, tmp_path):
    plan = make_plan(recipe_of(words, tmp_path, **REFUSED), load_machine("local"), cpu_ranks=2)
    sentence = why_not_trainable(plan.layout)
    assert sentence is not None and any(sentence in note for note in plan.notes)
    done = aifactory("launch", tmp_path / "recipe.yaml", "--run", tmp_path / "run", "--cpu-ranks", 2)
    assert done.returncode == 2 and sentence in done.stderr
    assert not (tmp_path / "run").exists()


def test_training_refuses_what_is_not_trainable_with_the_same_sentence_said_once(words, tmp_path):
    base = make_plan(recipe_of(words, tmp_path), load_machine("local"), cpu_ranks=2)
    plans = {
        name: base.model_copy(update={"layout": base.layout.model_copy(update=change)})
        for name, change in REFUSED_LAYOUTS.items()
    }
    assert in_forks(plans, tmp_path) == {name: [2, 2] for name in plans}
    for name, plan in plans.items():
        sentence, said = str(why_not_trainable(plan.layout)), (tmp_path / f"{name}.txt").read_text()
        with pytest.raises(PlanError, match=re.escape(sentence)):
            refuse_untrainable(plan.layout, where="plan.json")
        assert said.count(sentence) == 1 and "Traceback" not in said, said
