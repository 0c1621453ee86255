"""Advice is typed back: what a refusal proposes must work."""

from __future__ import annotations

import json
import re

import pytest

from aifactory_train.cli import main
from aifactory_train.errors import PlanError, RecipeError
from aifactory_train.machine.load import load_machine
from aifactory_train.plan.launchable import make_launch_plan
from aifactory_train.plan.nodes import choose_nodes
from aifactory_train.plan.plan import load_plan, make_plan
from aifactory_train.recipe.load import load_recipe
from plan_machines import DEMO, GIB, LLAMA_8B, LLAMA_70B, UNTRAINABLE, cpu, gpus


def options_of(text: str) -> dict[str, str]:
    """`--nodes 4 --set a=1` as {"nodes": "4", "a": "1"}."""
    found = dict(pair.split("=", 1) for pair in re.findall(r"--set ([\w.]+=[\w.]+)", text))
    return found | dict(re.findall(r"--(nodes|qos|cpu-ranks|deadline) ([\w.]+)", text))


def answer(verb, recipe, machine, given):
    """What `plan` or `launch` does with options; the machine may be made up."""
    sets = [f"{key}={value}" for key, value in given.items() if "." in key]
    recipe, qos = load_recipe(recipe, sets), given.get("qos")
    nodes, ranks = int(given.get("nodes", 0)) or None, int(given.get("cpu-ranks", 1))
    if verb == "launch":
        return make_launch_plan(recipe, machine, nodes or 1, ranks, None, qos)
    n_nodes, _ = choose_nodes(recipe, machine, nodes, qos=qos, deadline=given.get("deadline"))
    return make_plan(recipe, machine, n_nodes, ranks)


def typed_back(verb, recipe, machine, asked: str) -> str:
    """The refusal of `asked`, after each way that it proposes was found to work."""
    given = options_of(asked)
    with pytest.raises(PlanError) as caught:
        answer(verb, recipe, machine, given)
    ways = re.split(r",? or ", caught.value.do)
    for way in ways:
        said = options_of(way)
        assert said, f"nothing to type in {way!r}"
        rest = {k: v for k, v in given.items() if not (k == "qos" and "without" in way)}
        answer(verb, recipe, machine, rest | said)
    return caught.value.render()


LEONARDO = load_machine("leonardo-booster")


@pytest.mark.parametrize(
    ("recipe", "asked", "cause", "advice"),
    [
        (LLAMA_8B, "--nodes 37", "cannot be shared by 148 ranks", ["--nodes 32", "--nodes 64"]),
        (LLAMA_70B, "--nodes 4", "layout(s) do not fit", ["--nodes 8"]),
    ],
)
def test_launch_names_the_cause_and_the_nearest_nodes_that_train(recipe, asked, cause, advice):
    said = typed_back("launch", recipe, LEONARDO, asked)
    assert cause in said
    assert all(way in said for way in advice) and "leave the key at auto" not in said


@pytest.mark.parametrize("wishes", [["layout.tp=16"], ["layout.tp=3"], UNTRAINABLE])
def test_launch_sets_a_key_that_it_does_not_train_to_auto(wishes):
    key, _ = wishes[-1].removeprefix("layout.").split("=")
    asked = " ".join(f"--set {wish}" for wish in wishes)
    said = typed_back("launch", LLAMA_8B, LEONARDO, f"--nodes 4 {asked}")
    assert f"--set layout.{key}=auto" in said and key in said.splitlines()[0]


def test_launch_takes_deepspeed_with_offload_where_nothing_else_fits():
    layout = answer("launch", LLAMA_8B, gpus(28 * GIB), {}).layout
    assert (layout.engine, layout.offload) == ("deepspeed", "optimizer")
    assert answer("launch", LLAMA_8B, gpus(64 * GIB), {}).layout.engine == "fsdp2"


def test_launch_tells_the_limit_of_the_partition_before_what_follows_from_it():
    with pytest.raises(PlanError) as caught:
        answer("launch", LLAMA_8B, LEONARDO, {"nodes": "99999"})
    assert caught.value.what == "99999 nodes; partition boost_usr_prod allows 64"


@pytest.mark.parametrize("tokens", [8192, 57344])
def test_a_batch_too_small_for_the_ranks_names_nodes_and_batch(tokens):
    said = typed_back("plan", LLAMA_8B, LEONARDO, f"--nodes 16 --set train.global_batch_tokens={tokens}")
    assert f"the {tokens // 8192} row(s) of 8192 tokens" in said
    assert f"--set train.global_batch_tokens={64 * 8192}" in said and "--nodes" in said


def test_nodes_that_do_not_share_the_batch_name_the_nearest_with_their_qos():
    said = typed_back("plan", LLAMA_8B, LEONARDO, "--nodes 65 --qos boost_qos_bprod")
    assert "--nodes 64 without --partition and --qos, or --nodes 128 --qos boost_qos_bprod" in said
    # 1 and 2 rows for each of 260 ranks are the batches around 512 rows.
    assert f"={260 * 8192}, " in said and said.endswith(f"={520 * 8192}")


def test_wishes_that_do_not_fit_together_are_told_to_go():
    asked = "--nodes 16 --set layout.remat=none --set train.micro_batch_rows=16"
    said = typed_back("plan", LLAMA_8B, LEONARDO, asked)
    assert said.endswith("--set layout.remat=auto or --set train.micro_batch_rows=auto")


def test_too_many_ranks_for_the_memory_of_a_cpu_node_are_told_to_be_fewer():
    asked = "--cpu-ranks 64 --set train.global_batch_tokens=16384"
    said = typed_back("plan", DEMO, cpu(memory_bytes=24 * GIB), asked)
    assert "do:    --cpu-ranks 32" in said


def test_the_degree_that_a_product_of_degrees_proposes_has_a_layout():
    said = typed_back("plan", LLAMA_8B, gpus(), "--nodes 4 --set layout.dp_shard=8 --set layout.dp_replicate=3")
    assert "dp_replicate 3 x dp_shard 8 = 24 does not divide the 16 ranks" in said


@pytest.mark.parametrize(("deadline", "shorter"), [("1s", False), ("20min", True), ("10h", True)])
def test_a_deadline_that_cannot_be_met_names_keys_that_are_accepted(deadline, shorter):
    given = options_of("--set layout.pp=1 --set layout.cp=1 --set layout.tp=1 --set layout.dp_replicate=1")
    given = given | {"layout.remat": "full", "deadline": deadline}
    with pytest.raises(PlanError) as caught:
        answer("plan", LLAMA_8B, LEONARDO, given)
    first, *rest = caught.value.do.split(", or ")
    assert answer("plan", LLAMA_8B, LEONARDO, given | options_of(first))
    assert len(rest) == shorter
    for way in rest:
        assert answer("plan", LLAMA_8B, LEONARDO, given | options_of(way)).recipe.n_steps >= 1
    if deadline == "20min":
        assert "--set schedule.warmup_tokens=" in rest[0]
        with pytest.raises(RecipeError):
            load_recipe(LLAMA_8B, [f"train.budget_tokens={options_of(rest[0])['train.budget_tokens']}"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"micro_batch_rows": 0}, "micro_batch_rows is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"micro_batch_rows": 7}, "2 replicas x accumulation 1 x micro_batch_rows 7 are 14 rows"),
        ({"pp": 2, "dp_shard": 1}, "1 replicas x accumulation 1 x micro_batch_rows 8 are 8 rows"),
        ({"pp": 2, "dp_shard": 1, "micro_batch_rows": 16}, "accumulation 1 is no number of micro-batches for 1f1b"),
        ({"pp": 2, "dp_shard": 1, "pipeline_schedule": "zbv"}, "stages_per_rank is 1, and zbv has 2"),
        ({"pp": 2, "dp_shard": 1, "stages_per_rank": 9}, "pp 2 x stages_per_rank 9 are 18, and there are 4 layers"),
        ({"pp": 2, "dp_shard": 1, "pipeline_schedule": "interleaved"}, "is 1, and interleaved has 2 or more"),
        ({"n_nodes": 3}, "world_size is 2, no multiple of n_nodes 3"),
        ({"remat": "budget"}, "remat is budget and remat_budget_frac None"),
        ({"remat_budget_frac": 0.5}, "remat is none and remat_budget_frac 0.5"),
        ({"world_size": 3}, "world_size is 3, and pp x dp_replicate x dp_shard x cp x tp is 2"),
    ],
)
def test_a_plan_that_was_edited_into_a_contradiction_is_refused(tmp_path, change, sentence):
    plan = json.loads(make_plan(load_recipe(DEMO), cpu(), cpu_ranks=2).to_json())
    plan["layout"] |= {"micro_batch_rows": 8, "accumulation": 1}  # 16 rows of the batch / 2 replicas
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    assert load_plan(path).layout.micro_batch_rows == 8
    plan["layout"] |= change
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert sentence in caught.value.what and caught.value.where == f"{path}: layout"
    assert "aifactory-train launch RECIPE" in caught.value.do


def test_plan_refuses_a_bad_run_folder_before_it_prints_the_page(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    assert main(["plan", str(DEMO), "--run", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "holds files but no run" in said.err


@pytest.mark.parametrize("option", ["--partition", "--qos"])
def test_plan_refuses_options_of_a_batch_system_where_there_is_none(option, capsys):
    assert main(["plan", str(DEMO), option, "fast"]) == 2
    assert f"{option}: the ranks are started on this node" in capsys.readouterr().err
