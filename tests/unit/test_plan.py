import json
import subprocess
import sys

import pytest

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import ByDtype, Measured
from aifactory_train.plan.memory import FIT_FRAC
from aifactory_train.plan.plan import Plan, load_plan, make_plan, peak_flops_per_s
from aifactory_train.recipe.load import load_recipe
from aifactory_train.strictyaml import configs_dir
from plan_machines import DEMO, GIB, LLAMA_8B, cpu, gpus


def refusal(*args, **kwargs):
    with pytest.raises(PlanError) as caught:
        make_plan(*args, **kwargs)
    return caught.value.render()


def test_the_rows_of_a_batch_are_ranks_times_accumulation_times_micro_batch():
    for ranks in (1, 2, 4, 8):
        layout = make_plan(load_recipe(DEMO), cpu(), cpu_ranks=ranks).layout
        assert layout.world_size == layout.dp_shard == ranks
        assert layout.world_size * layout.accumulation * layout.micro_batch_rows == 16
        assert layout.threads_per_rank == 8 // ranks


def test_more_ranks_than_cores_still_have_a_thread_each():
    assert make_plan(load_recipe(DEMO), cpu(), cpu_ranks=16).layout.threads_per_rank == 1


def test_nodes_multiply_the_ranks():
    layout = make_plan(load_recipe(DEMO), gpus(), n_nodes=2, cpu_ranks=7).layout
    assert (layout.world_size, layout.n_nodes, layout.threads_per_rank) == (8, 2, 16)


def test_a_plan_reads_back_equal_from_its_file(tmp_path):
    plan = make_plan(load_recipe(LLAMA_8B), gpus(), n_nodes=128)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "plan.json") == plan
    json.loads(plan.to_json(), parse_constant=pytest.fail)


def test_a_plan_cannot_be_changed():
    plan = make_plan(load_recipe(DEMO), cpu())
    with pytest.raises(ValueError, match="frozen"):
        plan.layout.world_size = 3


def test_a_damaged_or_missing_plan_is_refused(tmp_path):
    plan = make_plan(load_recipe(DEMO), cpu())
    (tmp_path / "plan.json").write_text(plan.to_json()[:-20])
    with pytest.raises(PlanError, match="not a plan"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="cannot read the plan"):
        load_plan(tmp_path / "gone.json")


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_nearest_good_values():
    text = refusal(load_recipe(DEMO), cpu(), cpu_ranks=3)
    assert "4096 is 16 rows" in text and f"{15 * 256} or {18 * 256}" in text
    assert make_plan(load_recipe(DEMO, [f"train.global_batch_tokens={15 * 256}"]), cpu(), cpu_ranks=3)


def test_a_batch_smaller_than_the_ranks_is_refused_with_one_row_each():
    assert f"nearest good values: {32 * 256}, " in refusal(load_recipe(DEMO), cpu(), cpu_ranks=32)


def test_a_micro_batch_that_does_not_divide_is_refused_with_the_divisors():
    text = refusal(load_recipe(DEMO, ["train.micro_batch_rows=3"]), cpu(), cpu_ranks=2)
    assert "3 does not divide the 8 rows" in text and "1, 2, 4, 8" in text


def test_a_given_micro_batch_is_kept():
    layout = make_plan(load_recipe(DEMO, ["train.micro_batch_rows=2"]), cpu(), cpu_ranks=2).layout
    assert (layout.micro_batch_rows, layout.accumulation) == (2, 4)


def test_dp_shard_other_than_all_ranks_is_refused():
    assert "dp_shard 4 does not divide the 2 ranks" in refusal(
        load_recipe(DEMO, ["layout.dp_shard=4"]), cpu(), cpu_ranks=2
    )
    assert make_plan(load_recipe(DEMO, ["layout.dp_shard=2"]), cpu(), cpu_ranks=2).layout.dp_shard == 2


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32"), (None, "fp32")])
def test_precision_auto_follows_the_device(native, expected):
    plan = make_plan(load_recipe(DEMO), cpu(bf16=native))
    assert plan.layout.precision == expected
    assert any("bf16 is unknown" in note for note in plan.notes) is (native is None)


def test_precision_in_the_recipe_wins():
    assert make_plan(load_recipe(DEMO, ["train.precision=fp32"]), cpu()).layout.precision == "fp32"


def test_the_micro_batch_is_the_largest_that_fits():
    roomy = make_plan(load_recipe(DEMO), cpu())
    assert roomy.layout.micro_batch_rows == 16
    tight = make_plan(load_recipe(DEMO), cpu(memory_bytes=int(0.9 * roomy.predicted.peak_memory_bytes / FIT_FRAC)))
    assert tight.layout.micro_batch_rows < 16
    assert tight.predicted.peak_memory_bytes < roomy.predicted.peak_memory_bytes


def test_parameters_stay_gathered_only_where_they_fit():
    recipe = load_recipe(LLAMA_8B)
    alone = load_recipe(LLAMA_8B, ["layout.pp=1", "layout.cp=1", "layout.tp=1"])
    assert make_plan(alone, gpus(24 * GIB), n_nodes=128).layout.reshard_after_forward is True
    assert make_plan(recipe, gpus(192 * GIB), n_nodes=128).layout.reshard_after_forward is False
    kept = make_plan(load_recipe(LLAMA_8B, ["layout.reshard_after_forward=true"]), gpus(192 * GIB), n_nodes=128)
    assert kept.layout.reshard_after_forward is True


def test_a_model_that_does_not_fit_is_refused_with_its_terms_and_a_number_of_ranks_that_does():
    recipe = load_recipe(LLAMA_8B, ["layout.remat=none"])
    text = refusal(recipe, gpus(24 * GIB))
    assert "activations" in text and "optimizer_state" in text
    ranks = int(text.split("do:    use ")[1].split()[0])
    assert make_plan(recipe, gpus(24 * GIB), n_nodes=ranks // 4).layout.world_size == ranks


def test_activations_are_computed_again_only_where_no_row_of_kept_ones_fits():
    recipe = load_recipe(LLAMA_8B, ["layout.engine=fsdp2", "layout.dp_shard=64", "layout.zero_stage=3"])
    few, many = make_plan(recipe, gpus(64 * GIB), n_nodes=16), make_plan(recipe, gpus(192 * GIB), n_nodes=16)
    assert (few.layout.remat, many.layout.remat) == ("full", "none")
    # One more forward of the blocks but for down, a quarter of their weights: less than a third of the three, and more
    # than a quarter of them.
    terms = few.predicted.step_time_s
    blocks = terms["matmul"] + terms["attention"] + terms["elementwise"] + terms["kernel_starts"]
    assert 0.25 < terms["recomputation"] / blocks < 0.30 and "recomputation" not in many.predicted.step_time_s
    given = make_plan(load_recipe(LLAMA_8B, ["layout.remat=full"]), gpus(192 * GIB), n_nodes=16)
    assert given.layout.remat == "full"


def test_a_model_that_fits_on_no_number_of_devices_says_so():
    assert "no number of devices" in refusal(load_recipe(LLAMA_8B), gpus(4 * GIB))


def test_unknown_memory_gives_a_safe_micro_batch_and_a_note():
    plan = make_plan(load_recipe(DEMO), cpu(memory_bytes=None))
    assert plan.layout.micro_batch_rows * 256 == 2048
    assert any("memory is unknown" in note for note in plan.notes)


def test_states_shrink_with_the_ranks_and_muon_needs_one_moment_for_the_matrices():
    one, four = (make_plan(load_recipe(DEMO), cpu(), cpu_ranks=n).predicted.memory_bytes for n in (1, 4))
    n = 2_361_024
    assert one["parameters"] == 4 * n and one["optimizer_state"] == 8 * n
    assert four["parameters"] == n
    assert one["checkpoint_copy"] == 12 * n
    assert "checkpoint_copy" not in make_plan(load_recipe(DEMO), gpus()).predicted.memory_bytes
    muon = make_plan(load_recipe(DEMO, ["optim.name=muon"]), cpu()).predicted.memory_bytes
    matrices = 4 * (192 * 192 * 2 + 192 * 64 * 2 + 3 * 192 * 512)
    assert muon["optimizer_state"] == 8 * n - 4 * matrices


def test_accumulation_holds_the_gradients_of_the_whole_model():
    terms = make_plan(load_recipe(DEMO, ["train.micro_batch_rows=2"]), cpu()).predicted.memory_bytes
    assert terms["unsharded_gradients"] == 4 * 2_361_024


def test_without_measured_rates_the_peak_counts_in_part_and_an_unpublished_one_is_assumed_by_name():
    recipe, machine = load_recipe(LLAMA_8B), gpus(80 * GIB)
    published = make_plan(recipe, machine.model_copy(update={"measured": Measured()}), n_nodes=64)
    assert 0.1 < published.predicted.mfu_frac < 0.7, "never the peak itself"
    named = machine.device.model_copy(update={"name": "NVIDIA A100-SXM-64GB", "peak_flops_per_s": ByDtype()})
    plan = make_plan(recipe, machine.model_copy(update={"device": named, "measured": Measured()}), n_nodes=64)
    assert plan.predicted.tokens_per_s and plan.predicted.mfu_frac is None, "a share of an unknown peak is unknown"
    assert any(note.startswith("assumed: the bf16 peak of NVIDIA A100-SXM-64GB") for note in plan.notes)


def test_without_a_matmul_rate_no_time_is_predicted_and_a_note_says_what_to_do():
    plan = make_plan(load_recipe(DEMO), cpu())
    assert plan.predicted.total_step_time_s is plan.predicted.tokens_per_s is plan.predicted.run_time_s is None
    assert any("aifactory-train probe" in note for note in plan.notes)


def test_ranks_on_a_cpu_share_its_rate_so_two_are_about_as_fast_as_one():
    measured = Measured(matmul_flops_per_s=ByDtype(bf16=1e11), memory_bytes_per_s=1e10)
    one, two = (make_plan(load_recipe(DEMO), cpu(measured=measured), cpu_ranks=n).predicted for n in (1, 2))
    assert one.step_time_s["matmul"] == pytest.approx(two.step_time_s["matmul"], rel=0.01)
    assert "data_parallel" not in one.step_time_s and two.step_time_s["data_parallel"] > 0
    assert 0.98 * one.tokens_per_s < two.tokens_per_s < one.tokens_per_s


def test_gpus_multiply_the_rate_less_what_their_exchange_costs():
    recipe = load_recipe(LLAMA_8B, ["layout.pp=1", "layout.cp=1", "layout.tp=1", "layout.dp_replicate=1"])
    two, four = (make_plan(recipe, gpus(), n_nodes=n).predicted for n in (16, 32))
    assert 1.8 * two.tokens_per_s < four.tokens_per_s < 2 * two.tokens_per_s


def test_mfu_is_the_share_of_the_peak_of_all_devices():
    plan = make_plan(load_recipe(LLAMA_8B), gpus(), n_nodes=16)
    assert peak_flops_per_s(plan) == 64e15
    flops_per_s = plan.predicted.tokens_per_s * plan.shape.model_flops_per_token
    assert plan.predicted.mfu_frac == pytest.approx(flops_per_s / 64e15)
    assert plan.predicted.mfu_frac == pytest.approx(0.295, abs=0.02), "the measured products alone would be 0.6"
    measured = Measured(matmul_flops_per_s=ByDtype(bf16=1e11), memory_bytes_per_s=1e10)
    plan = make_plan(load_recipe(DEMO), cpu(measured=measured, peak=2e11), cpu_ranks=2)
    flops_per_s = plan.predicted.tokens_per_s * plan.shape.model_flops_per_token
    assert plan.predicted.mfu_frac == pytest.approx(flops_per_s / 2e11), "the ranks of a CPU node share its peak"
    assert plan.predicted.device_hours == pytest.approx(plan.predicted.run_time_s / 3600), "and are one device"
    assert peak_flops_per_s(make_plan(load_recipe(DEMO), cpu())) is None


@pytest.mark.parametrize(("key", "option"), [("n_nodes", "--nodes"), ("cpu_ranks", "--cpu-ranks")])
def test_no_nodes_or_no_ranks_are_refused_with_the_option_to_type(key, option):
    text = refusal(load_recipe(DEMO), cpu(), **{key: 0})
    assert f"{option} is 0" in text and f"such as {option} 1" in text


def test_planning_imports_no_torch():
    code = (
        "import sys, aifactory_train.plan.explain, aifactory_train.machine.load, aifactory_train.results.report;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=configs_dir().parent).returncode == 0


def test_the_schema_of_a_plan_of_another_version_is_refused(tmp_path):
    text = make_plan(load_recipe(DEMO), cpu()).to_json().replace("aifactory-plan/1", "aifactory-plan/9")
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError, match="schema_"):
        load_plan(tmp_path / "plan.json")
    assert Plan.model_fields["schema_"].default == "aifactory-plan/1"
