"""The step benchmark: what it trains is what training trains, and its record says so."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aifactory_train.bench.record import read_record, read_samples
from aifactory_train.data.packing import IGNORE
from aifactory_train.errors import PlanError
from aifactory_train.machine.load import load_machine
from aifactory_train.measure.control import Control
from aifactory_train.measure.steps import SyntheticBatches, agree_on_plan, fingerprint, has_fallen
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import load_recipe
from training_runs import write_recipe

ROOT = Path(__file__).resolve().parents[2]


def step_command(recipe, out, *options, ranks=1):
    mpirun = [str(Path(sys.executable).parent / "mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", str(ranks)]
    program = [sys.executable, str(ROOT / "benchmarks/step.py"), "--recipe", str(recipe), "--out", str(out)]
    return [*(mpirun if ranks > 1 else []), *program, "--budget-s", "2", "--steps", "8", *map(str, options)]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Of two runs alike, and one on two ranks."""
    folder = tmp_path_factory.mktemp("step")
    recipe = write_recipe(folder, folder / "prepared", folder / "corpus.jsonl")
    commands = {
        "one": step_command(recipe, folder / "one", "--fingerprint"),
        "again": step_command(recipe, folder / "again", "--fingerprint"),
        "two": step_command(
            recipe, folder / "two", "--set", "data.document_mask=false", "--mllog", folder / "two.log", ranks=2
        ),
    }
    # Threads that wait must not keep the cores busy: other tests run beside this one.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    found = {}
    for name, command in commands.items():
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
        paths = list((folder / name / "records").glob("*.json"))
        assert done.returncode == 0 and len(paths) == 1, done.stdout + done.stderr
        found[name] = read_record(paths[0])
        if found[name].samples:
            found[name].facts["mllog"] = path.read_text() if (path := folder / f"{name}.log").exists() else None
            found[name].facts["read"] = read_samples(paths[0].parent / found[name].samples)
    return found


def metric(record, name):
    [found] = [m for m in record.metrics if m.name == f"aifactory_train_{name}"]
    return found


def test_a_record_has_speed_memory_and_loss_with_the_plan_beside_them(records):
    record = records["one"]
    plan, rate = record.facts["plan"], metric(record, "tokens_per_second")
    assert record.fault is None and record.validity.loss_finite and record.validity.loss_decreased
    assert record.validity.n_parameters == plan["shape"]["n_parameters"]
    assert rate.n >= 8 and rate.median == pytest.approx(1024 / metric(record, "step_duration_seconds").median, rel=0.2)
    assert record.facts["predicted"]["peak_memory_bytes"] == plan["predicted"]["peak_memory_bytes"]
    assert record.facts["measured"]["peak_memory_bytes"] == metric(record, "peak_memory_bytes").max
    assert record.facts["recipe_hash"] == plan["recipe_hash"] and "layout" in record.cell
    assert record.flops.per_token == plan["shape"]["model_flops_per_token"] and record.flops.peak_flops_per_s is None
    assert not [m for m in record.metrics if "mfu_ratio" in m.name and "mamfu" not in m.name], "no peak, so no MFU"
    assert metric(record, "mamfu_ratio").median > 0
    window = record.facts["window"]
    assert window["tokens_per_s"] == pytest.approx(window["tokens"] / window["seconds"])


def test_two_ranks_give_samples_of_both_and_count_each_weight_once(records):
    record = records["two"]
    assert record.cell["ranks"] == 2 and record.facts["plan"]["layout"]["dp_shard"] == 2
    assert record.validity.n_parameters == records["one"].validity.n_parameters
    seconds = record.facts["read"]["aifactory_train_step_duration_seconds"]
    worst = [max(pair) for pair in zip(seconds[0], seconds[1], strict=True)]
    assert metric(record, "step_duration_seconds").max == max(worst)
    assert record.facts["window"]["seconds"] == pytest.approx(sum(worst))


def test_lines_with_mlperfs_keys_tell_the_run_once_and_in_order(records):
    lines = records["two"].facts["mllog"].splitlines()
    assert all(line.startswith(":::MLLOG ") for line in lines)
    events = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    intervals = [event["key"] for event in events if event["event_type"] != "POINT_IN_TIME"]
    order = ["init_start", "init_stop", "run_start", "block_start", "power_measurement_start", "power_measurement_stop"]
    assert intervals == [*order, "block_stop", "run_stop"]
    times = [event["time_ms"] for event in events]
    assert times == sorted(times) and events[-1]["metadata"] == {"status": "success"}
    said = {event["key"]: event["value"] for event in events}
    layout = records["two"].facts["plan"]["layout"]
    assert said["global_batch_size"] == 2 * layout["micro_batch_rows"] * layout["accumulation"]
    assert said["trained_samples"] == said["global_batch_size"] * metric(records["two"], "step_duration_seconds").n
    assert said["tensor_parallelism"] == said["expert_parallelism"] == 1 and records["one"].facts["mllog"] is None


def test_two_runs_alike_have_one_fingerprint_and_are_a_cell_of_their_own(records):
    one, again = records["one"], records["again"]
    assert one.validity.fingerprint == again.validity.fingerprint is not None
    assert one.cell["deterministic"] and not records["two"].cell["deterministic"]
    assert records["two"].validity.fingerprint is None


def test_a_recipe_that_the_planner_refuses_is_refused_on_every_rank_with_the_reason():
    def refuse():
        raise PlanError("tp 3 does not divide", where="layout.tp", do="--set layout.tp=1")

    with pytest.raises(PlanError, match="tp 3 does not divide") as refused:
        agree_on_plan(refuse, Control(), 1.0)
    assert (refused.value.where, refused.value.do) == ("layout.tp", "--set layout.tp=1")


def test_a_fingerprint_changes_with_the_last_bit_of_one_step():
    losses, norms = [5.0 - 0.01 * i for i in range(30)], [1.0 + 0.001 * i for i in range(40)]
    digest, parts = fingerprint(losses, norms)
    assert parts["loss_step_1"] == (5.0).hex()
    assert fingerprint(losses, norms[:30])[0] == digest, "what comes after the last step does not count"
    norms[17] = math.nextafter(norms[17], 2.0)
    assert fingerprint(losses, norms)[0] != digest


def test_a_loss_has_fallen_by_its_ends_and_not_by_a_single_step():
    assert has_fallen([5, 5, 4, 4, 3, 3, 2, 2, 1, 1])
    assert not has_fallen([1, 1, 2, 2, 3, 3, 4, 4, 5, 0.1])


def a_plan(tmp_path, ranks, **changes):
    recipe = load_recipe(write_recipe(tmp_path, tmp_path, tmp_path, **changes))
    return make_plan(recipe, load_machine("local"), 1, ranks)


def test_made_up_rows_depend_on_seed_step_and_share_alone(tmp_path):
    plan, cpu = a_plan(tmp_path, 2), torch.device("cpu")
    first, again, other = (SyntheticBatches(plan, rank, cpu) for rank in (0, 0, 1))
    assert torch.equal(first.batch(3).input_BT, again.batch(3).input_BT)
    assert not torch.equal(first.batch(3).input_BT, first.batch(4).input_BT)
    assert not torch.equal(first.batch(3).input_BT, other.batch(3).input_BT)
    batch = first.batch(0)
    assert batch.input_BT.shape == (8, 64) and int(batch.input_BT.max()) < 512 and int(batch.input_BT.min()) == 0
    stream = first.batches(5)
    assert torch.equal(next(stream).input_BT, first.batch(5).input_BT)


def test_made_up_rows_have_documents_where_the_recipe_masks_them(tmp_path):
    batch = SyntheticBatches(a_plan(tmp_path, 1), 0, torch.device("cpu")).batch(0)
    assert batch.document_BT.max() > 0 and batch.position_BT.max() < 64
    starts = batch.position_BT[:, 1:] == 0
    assert torch.equal(batch.document_BT[:, 1:] > batch.document_BT[:, :-1], starts)
    assert (batch.target_BT[:, :-1][starts] == IGNORE).all(), "nobody predicts over the border of a document"
    assert batch.n_valid_tokens == int((batch.target_BT != IGNORE).sum())
    plain = SyntheticBatches(a_plan(tmp_path, 1, data__document_mask=False), 0, torch.device("cpu")).batch(0)
    assert plain.document_BT is None and plain.n_valid_tokens == plain.target_BT.numel()
