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

from aifactory_train.metrics import rates
from aifactory_train.strictyaml import configs_dir
from aifactory_train.train.ranks import find_ranks, join
from benchmarks.gpu_check.__main__ import check, circumstances
from benchmarks.gpu_check.parity import CASES, Case, _curve, _row
from benchmarks.gpu_check.setting import TINY, Sizes, gpu_sizes

CPU = torch.device("cpu")
SMALL = TINY.model_copy(update={"vocab_size": 256, "hidden_size": 64, "ffn_size": 128, "n_layers": 2, "head_size": 16})
SMALL = SMALL.model_copy(update={"n_heads": 4, "n_kv_heads": 2})
SIZES = Sizes(
    parity=SMALL, parity_tokens=64, parity_rows=2, wide=SMALL, tokens=64, memory_layers=(2,), memory_rows=(2, 1),
    speed_layers=(2,), speed_rows=2,
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
    for part in ("parity", "step", "memory"):
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
