"""Benchmark programs alone, under mpirun and under torchrun; and what is left when a rank of them dies or hangs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aifactory_train.bench.record import Record, build_metric, read_record, read_samples

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MPIRUN = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--continuous", "-n", "2", sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
QUICK = ("--budget-s", "0.2")

BROKEN = '''
"""A benchmark whose last rank breaks in the middle of a cell."""
import os, signal, sys, threading, time
from aifactory_train.measure.program import Quantity, start

def add_options(parser):
    parser.add_argument("--how")

def die(program, calls):
    if program.control.rank == 0 and len(calls) == 12 and program.options.how == "terminated":
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise RuntimeError("connection reset by peer")
    if program.control.rank == program.control.size - 1 and len(calls) == 12:
        if program.options.how in ("killed", "terminated"):
            os.kill(os.getpid(), signal.SIGKILL)
        if program.options.how == "hangs":
            time.sleep(600)
        raise ValueError("a bug of the benchmark")

with start("broken", __doc__, add_options) as program:
    calls = []
    def work():
        calls.append(1)
        die(program, calls)
    program.measure({}, [Quantity("aifactory_collective_duration_seconds")], work)
'''


def run(launcher: list[str], program: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launcher, str(program), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=ROOT, check=False)


def records(out: Path) -> list[Record]:
    return [read_record(path) for path in sorted((out / "records").glob("*.json"))]


def the_record(done: subprocess.CompletedProcess[str], out: Path) -> Record:
    found = records(out)
    assert len(found) == 1, done.stdout + done.stderr
    return found[0]


def broken(tmp_path: Path) -> Path:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    return path


def test_a_record_holds_what_its_samples_say_and_where_they_come_from(tmp_path):
    program = ROOT / "benchmarks/memory.py"
    done = run([sys.executable], program, tmp_path, "--mib", "1", "--kernels", "triad", "--suite", "smoke", *QUICK)
    record = the_record(done, tmp_path)
    (metric,) = record.metrics
    assert "memory kernel=triad" in done.stdout and f"n {metric.n}" in done.stdout
    samples = read_samples(tmp_path / "records" / record.samples)[metric.name]
    assert build_metric(metric.name, "higher", samples, record.hosts, "max") == metric
    assert record.validity.wrong_values == 0 and record.suite == "smoke" and record.protocol.warmup_steps >= 10
    assert record.provenance["git_sha"] and record.provenance["environment"]["OMP_NUM_THREADS"] == "1"
    assert record.facts["ranks"][0]["threads"] == 1
    listed = {one.probe for one in record.unavailable}
    assert record.energy or {"rapl", "pm_counters"} <= listed


@pytest.mark.parametrize("launcher", [MPIRUN, TORCHRUN], ids=["mpirun", "torchrun"])
def test_two_ranks_make_one_record_with_the_samples_of_both(tmp_path, launcher):
    options = ("--dtypes", "fp32", "--sizes", "64", *QUICK)
    done = run(launcher, ROOT / "benchmarks/gemm.py", tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    record = the_record(done, tmp_path)
    assert len(record.hosts) == 2 == len(record.facts["ranks"])
    by_rank = read_samples(tmp_path / "records" / record.samples)[record.metrics[0].name]
    assert {len(by_rank[0]), len(by_rank[1])} == {record.metrics[0].n}
    assert record.metrics[0].worst_rank.rank in (0, 1)


def test_a_killed_rank_is_named_within_the_time_out_and_in_a_record(tmp_path):
    t0_s = time.monotonic()
    done = run(MPIRUN, broken(tmp_path), tmp_path, "--how", "killed", "--timeout-s", "5")
    assert done.returncode != 0 and time.monotonic() - t0_s < 90
    record = the_record(done, tmp_path)
    assert "1 of 2 ranks did not answer within 5 s: 1 on " in record.fault
    assert record.facts["missing_ranks"] == [1] and record.metrics == []
    assert "Traceback" not in done.stderr and "  do:" in done.stderr


def test_a_launchers_signal_does_not_end_a_rank_that_is_asking_who_is_left(tmp_path):
    done = run(MPIRUN, broken(tmp_path), tmp_path, "--how", "terminated", "--timeout-s", "5")
    record = the_record(done, tmp_path)
    assert record.fault.startswith("RuntimeError: connection reset by peer; missing: 1 on ")
    assert record.facts["missing_ranks"] == [1] and done.returncode != 0


def test_work_that_hangs_ends_with_a_record(tmp_path):
    done = run([sys.executable], broken(tmp_path), tmp_path, "--how", "hangs", "--timeout-s", "1")
    assert done.returncode == 3, done.stderr
    assert "did not come to an end within 11 s: broken" in the_record(done, tmp_path).fault


def test_a_bug_of_a_benchmark_leaves_a_record_and_its_traceback(tmp_path):
    done = run([sys.executable], broken(tmp_path), tmp_path, "--how", "bug")
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert the_record(done, tmp_path).fault == "ValueError: a bug of the benchmark"


def test_an_unknown_machine_is_a_message_and_no_record(tmp_path):
    done = run([sys.executable], ROOT / "benchmarks/memory.py", tmp_path, "--machine", "nowhere")
    assert done.returncode == 2 and "unknown machine 'nowhere'" in done.stderr and "Traceback" not in done.stderr
    assert records(tmp_path) == []


def test_without_a_gpu_there_is_no_link_to_measure(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run([sys.executable], ROOT / "benchmarks/hostlink.py", tmp_path)
    assert done.returncode == 0 and "hostlink: skipped: no GPU" in done.stdout
    assert records(tmp_path) == []


class Once:
    """Stands for a Program: makes each call once, and keeps how many elements were wrong."""

    device = torch.device("cpu")

    def measure(self, cell, quantities, work, *, before, wrong):
        before()
        work()
        self.n_wrong = wrong()


def load_gemm():
    spec = importlib.util.spec_from_file_location("gemm", ROOT / "benchmarks/gemm.py")
    gemm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gemm)
    return gemm


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_wrong_product_is_counted_and_rounding_is_not(monkeypatch, dtype):
    gemm, program, matmul = load_gemm(), Once(), torch.matmul
    gemm.measure_product(program, dtype, "square", 96, 80, 300)
    assert program.n_wrong == 0

    def broken_matmul(a, b, out):
        matmul(a, b, out=out)
        out[3, 5] *= 1.05
        out[7, 2] = float("nan")

    monkeypatch.setattr(torch, "matmul", broken_matmul)
    gemm.measure_product(program, dtype, "square", 96, 80, 300)
    assert program.n_wrong == 2


def test_a_wrong_product_of_fp8_is_counted_and_rounding_is_not(monkeypatch):
    gemm, program, plain = load_gemm(), Once(), torch._scaled_mm
    if gemm.why_no_fp8(program.device):
        pytest.skip(gemm.why_no_fp8(program.device))
    gemm.measure_fp8(program, "square", 96, 80, 304)
    assert program.n_wrong == 0

    def broken_mm(*inputs, out, **options):
        plain(*inputs, out=out, **options)
        out[3, 5] += out.abs().max()
        out[7, 2] = float("nan")

    monkeypatch.setattr(torch, "_scaled_mm", broken_mm)
    gemm.measure_fp8(program, "square", 96, 80, 304)
    assert program.n_wrong == 2


def test_a_device_without_fp8_is_skipped_with_what_torch_says(monkeypatch):
    gemm = load_gemm()

    def refuse(*_, **__):
        raise RuntimeError("needs compute capability 8.9\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    written = []
    program = Once()
    program.options = SimpleNamespace(dtypes=["fp8"])
    program.write = lambda cell, samples, protocol, facts: written.append((cell, samples, protocol, facts))
    monkeypatch.setattr(gemm, "start", lambda *_: nullcontext(program))
    gemm.main()
    why = "no products of fp8 here: needs compute capability 8.9"
    assert written == [({"dtype": "fp8", "init": "randn"}, {}, None, {"skipped": why})]
