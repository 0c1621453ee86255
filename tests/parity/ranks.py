"""Trains cases of the matrix, each on ranks of its own: forks of this process, with gloo and one thread each.

    python ranks.py JOBS.json FOLDER

JOBS.json is a list of jobs: {"case": ..., "saves": bool, "loads": [names], "saves_again": bool}. For each,
FOLDER/<name>.json appears with losses and norms, or the error; FOLDER/<name>/ holds the weights after the last step
and, where the job saves, a checkpoint; where it saves again, one of each state that it loaded. Forking after the
imports costs milliseconds where a new Python costs seconds for each rank.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from aifactory_train.checkpoint.dcp import read_tensors, write_tensors
from aifactory_train.data.loader import Batch
from aifactory_train.machine.machine import Device, Host, Machine
from aifactory_train.models.flat import FlatSlice
from aifactory_train.plan.contract import Layout, Prediction
from aifactory_train.plan.plan import Plan
from aifactory_train.plan.shape import build_shape
from aifactory_train.recipe.schema import Recipe, fingerprint
from aifactory_train.train.engine import Engine
from aifactory_train.train.setup import build_engine
from parity.cases import MODELS, ROWS, SAVED_AFTER, STEPS, TOKENS, Case
from parity.faults import FAULTS

TIMEOUT_S = 240
# To gather whole weights for the comparison takes two collectives under tp; that is no news here.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
MODEL = {
    "family": "llama", "vocab_size": 96, "hidden_size": 48, "ffn_size": 64, "n_layers": 4, "n_heads": 8,
    "n_kv_heads": 4, "head_size": 8, "max_seq_len_tokens": TOKENS, "rope_theta": 10000.0, "norm_eps": 1e-5,
    "tied_embeddings": False,
}  # fmt: skip


def build_plan(case: Case) -> Plan:
    """Of exactly this layout: no planner has a say here."""
    recipe = Recipe.model_validate({
        "name": "parity",
        "model": MODEL | MODELS[case.model],
        "data": {
            "sources": [{"name": "none", "path": "none"}], "tokenizer": {"train_vocab_size": 96},
            "prepared_dir": "none", "seq_len_tokens": TOKENS, "document_mask": case.documents,
        },
        "train": {
            "budget_tokens": 100 * ROWS * TOKENS, "global_batch_tokens": ROWS * TOKENS, "precision": case.precision,
        },
        # Adam with its own eps would blow up differences of rounding where gradients are next to nothing, and would
        # hide a wrong scale of all of them.
        "optim": {"name": case.optimizer, "lr": 3e-3, "eps": 1e-3, "grad_clip_norm": 0.5},
        "checkpoint": {"every_steps": 10},
    })  # fmt: skip
    machine = Machine(
        name="here",
        device=Device(kind="cpu", name="CPU", per_node=1, memory_bytes=1 << 33, native_bf16=True),
        host=Host(cores=1, memory_bytes=1 << 33),
        sources=[],
    )
    layout = Layout(
        engine=case.engine,
        zero_stage=case.zero_stage,
        world_size=case.world_size,
        **{axis: getattr(case, axis) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")},
        pipeline_schedule=case.pipeline_schedule,
        stages_per_rank=case.stages_per_rank,
        cp_attention=case.cp_attention,
        micro_batch_rows=case.micro_batch_rows,
        accumulation=case.rows_per_rank // case.micro_batch_rows,
        reshard_after_forward=case.reshard,
        reduce_each_micro_batch=case.reduce_each,
        remat=case.remat,
        offload=case.offload,
        remat_budget_frac=0.5 if case.remat == "budget" else None,
        compile=case.compile,
        precision=case.precision,
        threads_per_rank=1,
    )
    nothing = Prediction(
        memory_bytes={}, peak_memory_bytes=0, step_time_s={}, total_step_time_s=None, tokens_per_s=None, mfu_frac=None,
        run_time_s=None, device_hours=None,
    )  # fmt: skip
    return Plan(
        recipe=recipe,
        recipe_hash=fingerprint(recipe),
        machine=machine,
        machine_hash="",
        layout=layout,
        shape=build_shape(recipe.model, TOKENS),
        predicted=nothing,
    )


def batch_of(step: int, case: Case, data_rank: int) -> Batch:
    """This rank's rows of the global batch of a step: documents of uneven lengths, some targets that do not count."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, MODEL["vocab_size"], (ROWS, TOKENS + 1), generator=random)
    starts = torch.rand(ROWS, TOKENS, generator=random) < 0.15
    starts[:, 0] = True
    document = starts.cumsum(1) - 1
    index = torch.arange(TOKENS).expand(ROWS, -1)
    position = index - torch.where(starts, index, 0).cummax(1).values
    target = tokens[:, 1:].clone()
    target[torch.rand(ROWS, TOKENS, generator=random) < 0.1] = -100
    target[0, : TOKENS // 2] = -100
    mine = slice(data_rank * case.rows_per_rank, (data_rank + 1) * case.rows_per_rank)
    return Batch(
        tokens[mine, :-1],
        target[mine],
        document[mine].int() if case.documents else None,
        position[mine] if case.documents else None,
        int((target[mine] != -100).sum()),
    )


def train(job: dict[str, Any], rank: int, folder: Path) -> dict[str, Any]:
    """Collective. The losses and norms of all steps, or of the steps behind each checkpoint that is loaded."""
    case = Case(**job["case"])
    plan = build_plan(case)
    data_rank = plan.layout.data_rank(rank)
    engine = build_engine(plan, torch.device("cpu"), fresh=not job["loads"])
    curves: dict[str, Any] = {}
    for source in job["loads"]:
        state = engine.state_dict()
        read_tensors(state, folder / source / "checkpoint", dist.group.WORLD)
        engine.load_state_dict(state)
        if job["saves_again"]:
            write_tensors(engine.state_dict(), folder / job["name"] / source, dist.group.WORLD)
        curves[source] = steps_of(engine, case, data_rank, range(SAVED_AFTER + 1, STEPS + 1))
    if job["loads"]:
        return {"curves": curves}
    engine.rehearse(batch_of(0, case, data_rank))
    first = steps_of(engine, case, data_rank, range(1, SAVED_AFTER + 1))
    if job["saves"]:
        write_tensors(engine.state_dict(), folder / case.name / "checkpoint", dist.group.WORLD)
    curve = first + steps_of(engine, case, data_rank, range(SAVED_AFTER + 1, STEPS + 1))
    save_weights(engine, folder / case.name)
    return {"curve": curve}


def steps_of(engine: Engine, case: Case, data_rank: int, steps: range) -> list[list[float]]:
    """[loss, gradient norm] of each step."""
    curve = []
    for step in steps:
        stats = engine.train_step(batch_of(step, case, data_rank), step)
        # Not by all_reduce: deliberate faults may change it for the whole process.
        shares: list[Any] = [None] * case.world_size
        dist.all_gather_object(shares, stats.loss_sum.item())
        curve.append([sum(shares) / stats.n_valid_tokens.item(), stats.grad_norm.item()])
    return curve


def save_weights(engine: Engine, folder: Path) -> None:
    """Whole tensors; one file for each rank of pp, from the first of its ranks."""
    whole = {name: whole_tensor(weight) for name, weight in engine.state_dict()["model"].items()}
    layout, rank = engine.plan.layout, dist.get_rank()
    per_stage = layout.world_size // layout.pp
    if rank % per_stage == 0:
        folder.mkdir(exist_ok=True)
        torch.save(whole, folder / f"weights-{rank // per_stage}.pt")


def whole_tensor(weight: Tensor) -> Tensor:
    """Collective over the ranks that have a part of it."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if not isinstance(weight, FlatSlice):
        return weight
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (weight.start, weight.local_X))
    return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])]).view(weight.shape)


def run_rank(job: dict[str, Any], rank: int, rendezvous: Path, folder: Path) -> None:
    """What a fork does, to its end."""
    world_size, name = Case(**job["case"]).world_size, rendezvous.name
    try:
        torch.set_num_threads(1)
        os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it; launchers set it
        store = dist.FileStore(str(rendezvous / "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S)
        )
        with FAULTS[job["case"]["fault"]]() if job["case"]["fault"] else _nothing():
            result = train(job, rank, folder)
        dist.barrier()  # axis: all; nobody leaves while others still talk to it
        if rank == 0:
            (rendezvous / "result").write_text(json.dumps(result))
    except BaseException:
        (rendezvous / f"error-{rank}").write_text(f"rank {rank} of {name}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def run_job(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fork the ranks of one job and wait for them; the first that fails takes the others with it."""
    rendezvous = Path(tempfile.mkdtemp())
    start_s = time.monotonic()
    pids = []
    for rank in range(Case(**job["case"]).world_size):
        pid = os.fork()
        if pid == 0:
            run_rank(job, rank, rendezvous, folder)
        pids.append(pid)
    failed = not _wait(pids, start_s + TIMEOUT_S)
    errors = [path.read_text() for path in sorted(rendezvous.glob("error-*"), key=lambda p: p.stat().st_mtime)]
    if failed:
        result = {"error": errors[0] if errors else f"no end within {TIMEOUT_S} s"}
    else:
        result = json.loads((rendezvous / "result").read_text())
    shutil.rmtree(rendezvous)
    return result | {"seconds": round(time.monotonic() - start_s, 1)}


def _wait(pids: list[int], end_s: float) -> bool:
    """Whether all end well in time. None is left behind."""
    left = set(pids)
    good = True
    while left and good:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                good = good and status == 0
        good = good and time.monotonic() < end_s
        time.sleep(0.005)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return good


def main(path: Path, folder: Path) -> None:
    jobs = json.loads(path.read_text())
    if any(job["case"]["engine"] == "deepspeed" for job in jobs):
        # Once for all forks: both take seconds, the second because of torch's compiler.
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

        import aifactory_train.train.engine_deepspeed  # noqa: F401
    for job in jobs:
        result = run_job(job, folder)
        partial = folder / "result.tmp"
        partial.write_text(json.dumps(result))
        partial.rename(folder / f"{job['name']}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
