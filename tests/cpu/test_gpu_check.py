"""The check of a GPU on a CPU with tiny sizes: everything in it but CUDA itself."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.nn.attention import flex_attention as flex

from aifactory_train.metrics import rates
from aifactory_train.models import attention
from aifactory_train.strictyaml import configs_dir
from aifactory_train.train.ranks import find_ranks, join
from benchmarks.gpu_check import context, parity
from benchmarks.gpu_check.__main__ import check, circumstances
from benchmarks.gpu_check.context import CONTEXT_CASES, ContextCase
from benchmarks.gpu_check.parity import CASES, STEPS, Case, Curve, _curve, _row
from benchmarks.gpu_check.setting import TINY, Sizes, gpu_sizes

CPU = torch.device("cpu")
SMALL = TINY.model_copy(update={"vocab_size": 256, "hidden_size": 64, "ffn_size": 128, "n_layers": 2, "head_size": 16})
SMALL = SMALL.model_copy(update={"n_heads": 4, "n_kv_heads": 2})
SIZES = Sizes(
    parity=SMALL, parity_tokens=64, parity_rows=2, wide=SMALL, tokens=64, memory_layers=(2,), memory_rows=(2, 1),
    speed_layers=(2,), speed_rows=2, cp_chunk_tokens=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def result():
    with pytest.MonkeyPatch.context() as patch:
        compile_in_place = nn.Module.compile
        patch.setattr(nn.Module, "compile", lambda self, **how: compile_in_place(self, backend="aot_eager", **how))
        patch.setitem(rates.MATMUL_SIZE, "cpu", 64)
        patch.setitem(rates.COPY_BYTES, "cpu", 1 << 16)
        found = check(CPU, SIZES)
    torch._dynamo.reset()
    torch._functorch.config.activation_memory_budget = 1.0
    return json.loads(json.dumps(found))


def test_every_part_runs_to_its_end(result):
    for part in ("parity", "step", "memory", "context"):
        assert "error" not in result[part] and "fault" not in result[part], result[part]
        assert result[part]["seconds"] > 0
    assert not result["passed"], "a CPU has no host syncs to count, and its memory is not that of a GPU"


def test_every_case_of_parity_is_within_its_bounds_or_refused_with_the_reason(result):
    cases = result["parity"]["cases"]
    assert [case["case"] for case in cases] == [case.name for case in CASES] and result["parity"]["passed"], cases
    refused = {case["case"].split()[0]: case["refused"] for case in cases if "refused" in case}
    assert set(refused) == {"fp8", "fp8_rowwise"} and all("needs a GPU" in why for why in refused.values())
    assert all(case["errors"]["change"] > 0 for case in cases if case["case"].startswith("bf16"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_forgotten_document_mask_is_beyond_the_bounds_of_parity(precision):
    join(find_ranks(env={}), CPU)
    try:
        right = _curve(Case("fp32", True, False, "none"), CPU, SIZES)
        forgotten = Case(precision, False, False, "none")
        row = _row(forgotten, CPU, SIZES, right, until_s=math.inf)
    finally:
        dist.destroy_process_group()
    assert not row["passed"] and "change is off" in row["fault"], row


@pytest.mark.parametrize("broken", range(STEPS))
@pytest.mark.parametrize("where", ["loss", "grad_norm", "change"])
def test_a_step_that_is_no_number_is_beyond_the_bounds_of_parity(monkeypatch, where, broken):
    numbers, start = [1.0 + step for step in range(STEPS)], {str(n): torch.zeros(2) for n in range(STEPS)}
    right = Curve(numbers, numbers, start, {name: torch.ones(2) for name in start}, 0, 0)
    no_number = [math.nan if step == broken else x for step, x in enumerate(numbers)]
    changed = {"change": {"end": right.end | {str(broken): torch.full((2,), math.nan)}}}
    found = replace(right, **changed.get(where, {where: no_number}))
    monkeypatch.setattr(parity, "_curve", lambda *_: found)
    row = _row(CASES[0], CPU, SIZES, right, until_s=math.inf)
    assert not row["passed"] and row["fault"] == f"{where} is off by nan", row


def test_every_case_of_context_parallel_is_plain_softmax_with_its_gradients(result):
    cases = result["context"]["cases"]
    assert [case["case"] for case in cases] == [case.name for case in CONTEXT_CASES] and len(cases) == 16
    assert result["context"]["passed"], cases
    for case in cases:
        assert all(set(of) == {"out", "grad_q", "grad_k", "grad_v"} for of in case["errors"].values())
        assert (case["n_blind_queries"] > 100) == (case["case"].startswith("ring") and "documents" in case["case"])


def context_row(precision, form="ring", documents=True):
    return context._row(ContextCase(form, documents, precision, 2), CPU, SIZES.cp_chunk_tokens, until_s=math.inf)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_wrong_in_context_parallel_is_beyond_its_bounds(monkeypatch, precision):
    attend_part, merge_parts, build_masks = context.attend_part, context.merge_parts, context.build_masks

    def no_gradient_of_lse(one, other):
        return merge_parts((one[0], one[1].detach()), (other[0], other[1].detach()))

    def one_query_is_no_number(*args):
        out, lse = attend_part(*args)
        hole = torch.zeros_like(out)
        hole[0, 0, 0, 0] = math.nan
        return out + hole, lse

    def no_mask(calls, n_chunks, chunk_tokens, device_type, document):
        return build_masks(calls, n_chunks, chunk_tokens, device_type, None)

    faults = {"merge_parts": no_gradient_of_lse, "attend_part": one_query_is_no_number, "build_masks": no_mask}
    for name, wrong in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(context, name, wrong)
            row = context_row(precision)
        assert not row["passed"] and "norm is off" in row["fault"] and "element is off" in row["fault"], (name, row)
    assert context_row(precision)["passed"]


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("form", ["ring", "all_gather"])
def test_the_formulas_of_flex_attention_have_the_gradient_of_the_log_sum_exp(monkeypatch, form, documents):
    """What a GPU runs, by torch's own formulas: its kernels have no backward on a CPU, and it refuses one there."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "_flex_attention", flex.flex_attention)
    monkeypatch.setattr(attention, "_create_block_mask", flex.create_block_mask)
    monkeypatch.setattr("aifactory_train.parallel.context.build_part_mask", attention.part_block_mask)
    monkeypatch.setattr(
        context, "attend_part", lambda q, k, v, mask, causal: attention._attend_part_flex(q, k, v, mask)
    )
    row = context_row("fp32", form, documents)
    assert row["passed"], row


def test_a_step_has_its_rates_and_the_prediction_beside_them(result):
    step = result["step"]
    assert step["n_layers"] == 2 and len(step["step_s"]["all"]) >= 10
    assert step["step_s"]["min"] <= step["step_s"]["median"] <= step["step_s"]["max"]
    assert step["tokens_per_s"] == pytest.approx(step["global_batch_tokens"] / step["step_s"]["median"])
    assert step["share_of_gemm_frac"] == pytest.approx(step["model_flops_per_s"] / step["gemm_flops_per_s"])
    assert step["predicted"]["step_s"] > 0 and step["syncs"]["n"] == 0 and step["syncs"]["steps"] == 10


def test_memory_of_each_remat_stands_beside_the_planners(result):
    remats = {row["remat"]: row for row in result["memory"]["remats"]}
    assert list(remats) == ["none", "selective", "full"]
    predicted = [row["predicted_bytes"] for row in remats.values()]
    assert predicted == sorted(predicted, reverse=True)
    for row in remats.values():
        assert row["measured_by_predicted"] == pytest.approx(row["measured_bytes"] / row["predicted_bytes"])
        assert row["predicted_bytes"] < row["predicted_peak_bytes"]


def test_a_fault_is_told_and_does_not_stop_the_other_parts(monkeypatch):
    def broken(*_):
        raise RuntimeError("a kernel went wrong")

    monkeypatch.setattr("benchmarks.gpu_check.__main__.measure_parity", broken)
    monkeypatch.setattr("benchmarks.gpu_check.__main__.measure_memory", lambda *_: {"passed": True})
    found = check(CPU, replace(SIZES, speed_layers=()))
    assert not found["passed"] and "a kernel went wrong" in found["parity"]["error"][-1]
    assert found["step"]["fault"] == "no number of layers fits" and found["memory"]["passed"]


def test_the_sizes_for_a_gpu_are_llama_3_8b_at_4096_tokens():
    sizes = gpu_sizes()
    assert (sizes.wide.hidden_size, sizes.wide.n_layers, sizes.tokens) == (4096, 32, 4096)
    assert sizes.speed_layers[0] == sizes.wide.n_layers and sizes.speed_rows >= 1


def test_circumstances_name_commit_versions_and_device():
    facts = circumstances(CPU)
    assert facts["git_sha"] and facts["versions"]["torch"] and facts["versions"]["torchao"] and facts["device"]["name"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which make gpu-check would use")
def test_without_a_gpu_it_says_so_and_ends_with_2():
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=configs_dir().parent, check=False
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "needs a GPU, and torch sees none" in done.stderr and "do: " in done.stderr
