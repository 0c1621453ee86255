"""A run folder as training would have left it, written through the real functions."""

import math
import random

from aifactory_train.machine.machine import ByDtype, Device, FactSource, Host, Machine, Measured
from aifactory_train.plan.plan import make_plan
from aifactory_train.recipe.load import dump_recipe, load_recipe
from aifactory_train.rundir import RunDir, append_jsonl, write_atomic
from aifactory_train.strictyaml import configs_dir

START_S = 1_790_000_000.0
ENTROPY_NATS = 5.87
ORIGIN = {
    "git_sha": "0123456789abcdef0123456789abcdef01234567",
    "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.1.0", "mpi4py": "4.1.2"},
    "hostname": "node1",
    "platform": "Linux-6.1-x86_64",
    "cpu": "AMD EPYC 9354",
}


def a_plan():
    memory_bytes = 24 * 1024**3
    machine = Machine(
        name="local",
        device=Device(kind="cpu", name="AMD EPYC 9354", per_node=1, memory_bytes=memory_bytes, native_bf16=True),
        host=Host(cores=2, memory_bytes=memory_bytes),
        measured=Measured(matmul_flops_per_s=ByDtype(fp32=1.2e11, bf16=3.5e11), memory_bytes_per_s=1.8e10),
        sources=[FactSource(facts=["device"], source="/proc/cpuinfo", by="probed", date="2026-09-21")],
    )
    return make_plan(load_recipe(configs_dir() / "recipes" / "demo.yaml"), machine, cpu_ranks=2)


def start(run, attempt=1, step=0, at_s=0.0, **changes):
    fields = {
        "attempt": attempt, "step": step, "world_size": 2, "hosts": ["node1"], "device": "cpu",
        "unigram_entropy_nats": ENTROPY_NATS, "n_parameters": 2_361_024, "provenance": ORIGIN,
    }  # fmt: skip
    event(run, "start", at_s, **{**fields, **changes})


def event(run, kind, at_s, **fields):
    append_jsonl(run.events, {"time_s": START_S + at_s, "event": kind, **fields})


def line(run, step, attempt=1, at_s=None, **changes):
    """One plausible log line; the loss falls from 8.3 towards 2.6."""
    noise = random.Random(step)
    tokens_per_s = 12_000 * (1 + 0.04 * noise.uniform(-1, 1))
    row = {
        "step": step,
        "tokens": step * 4096,
        "time_s": START_S + (step * 0.35 if at_s is None else at_s),
        "attempt": attempt,
        "loss": 2.6 + 5.7 * math.exp(-step / 45) + 0.06 * noise.uniform(-1, 1),
        "grad_norm": 0.6 + 2.2 * math.exp(-step / 30) + 0.1 * noise.random(),
        "lr": 3e-3,
        "step_time_s": 4096 / tokens_per_s,
        "tokens_per_s": tokens_per_s,
        "model_flops_per_s": tokens_per_s * 15.3e6 / 2,
        "mfu_frac": None,
        "memory_peak_bytes": 560 * 1024**2 + step * 1000,
        "data_wait_frac": 0.004,
    }
    append_jsonl(run.metrics, {**row, **changes})


def a_run(root, steps, resumed_from=None):
    """A finished run with a log line at each of `steps`; with `resumed_from` it was killed after half of them."""
    run = RunDir(root)
    plan = a_plan()
    write_atomic(run.plan, plan.to_json())
    write_atomic(run.recipe, dump_recipe(plan.recipe))
    steps, attempt = list(steps), 1
    start(run)
    for index, step in enumerate(steps):
        if resumed_from is not None and attempt == 1 and index == len(steps) // 2:
            attempt = 2
            event(run, "fault", step * 0.35, message="rank 1 died of signal 9")
            start(run, attempt=2, step=resumed_from, at_s=step * 0.35)
        line(run, step, attempt)
        if step % 100 == 0:
            event(run, "commit", step * 0.35, step=step, seconds=0.21, bytes=28_400_000)
    event(run, "finish", steps[-1] * 0.35 + 1, step=steps[-1], wall_s=steps[-1] * 0.35 + 1)
    return run
