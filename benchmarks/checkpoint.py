"""Saving and loading a checkpoint by the code of training: how long it stalls, until it is safe, and until it is back.

The state is that of Adam in float32, 12 bytes a parameter, its rows split over all ranks. A save is asynchronous:
the stall is the call, the duration ends with the commit on disk, all sums included. Then its pages are dropped from the
cache of this node, the state is cleared and loaded, and compared. A first round does not count.

    python benchmarks/checkpoint.py --folder SCRATCH
    srun python benchmarks/checkpoint.py --folder SCRATCH --parameters 8e9 70e9
"""

from __future__ import annotations

import time
from argparse import ArgumentParser

import torch.distributed as dist

from aifactory_train.bench.record import Protocol, Validity
from aifactory_train.checkpoint.manager import CheckpointManager
from aifactory_train.measure.program import Program, start
from aifactory_train.measure.scratch import add_folder, describe_storage, shared_folder
from aifactory_train.measure.state import BYTES_PER_PARAMETER, build_state, drop_from_cache, locals_of
from aifactory_train.train.ranks import join

PARAMETERS = {"cpu": [5e6], "cuda": [1e9]}
# The fewest whose median has an interval, and as many as MLPerf Storage takes.
ROUNDS = (6, 10)
Times = dict[str, list[float]]


def add_options(parser: ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--parameters", nargs="+", type=float, help=f"of the model (default: {PARAMETERS})")


def one_round(program: Program, manager: CheckpointManager, state: dict, step: int) -> tuple[dict[str, float], int]:
    """(seconds of each part on this rank, tensors that came back as others). All ranks arrive."""
    sums = [t.double().sum().item() for t in locals_of(state)]
    program.control.barrier(program.options.timeout_s)
    begin_s = time.perf_counter()
    manager.save(step, 0, state, {})
    stalled_s = time.perf_counter() - begin_s
    manager.wait()
    saved_s = time.perf_counter() - begin_s
    program.alive()
    for t in locals_of(state):
        t.zero_()
    manager.barrier()
    drop_from_cache(manager.folder)
    program.control.barrier(program.options.timeout_s)
    begin_s = time.perf_counter()
    commit = manager.latest()
    assert commit is not None
    manager.check(commit, {})
    manager.load(commit, state)
    loaded_s = time.perf_counter() - begin_s
    program.alive()
    others = sum(a != t.double().sum().item() for a, t in zip(sums, locals_of(state), strict=True))
    return {"save_duration_seconds": saved_s, "stall_seconds": stalled_s, "load_duration_seconds": loaded_s}, others


def measure_size(program: Program, n_parameters: float) -> None:
    control, timeout_s = program.control, program.options.timeout_s
    cell = {"parameters": int(n_parameters), "nodes": len(set(control.hosts))}
    times: Times = {}
    # One commit stays while the next one is written.
    with shared_folder(program, 3 * n_parameters * BYTES_PER_PARAMETER) as folder, program.watched(cell):
        state = build_state(n_parameters, control.size, program.device.type)
        manager = CheckpointManager(folder / "checkpoints", 1, True, program.device)
        n_wrong, begin_s = 0, time.monotonic()
        for step in range(ROUNDS[1] + 1):
            spent = time.monotonic() - begin_s > program.limits.budget_s
            if control.broadcast(step > ROUNDS[0] and spent, timeout_s):
                break
            seconds, others = one_round(program, manager, state, step)
            n_wrong += others
            for name, value in seconds.items() if step > 0 else ():
                times.setdefault(name, []).append(value)
        manager.wait()
        own_bytes = sum(t.nbytes for t in locals_of(state))
        storage = describe_storage(folder)
    reports = control.gather([times, n_wrong, own_bytes], timeout_s)
    if reports is not None:
        write(program, cell, reports, storage)


def write(program: Program, cell: dict, reports: list, storage: dict) -> None:
    n_bytes = sum(report[2] for report in reports)
    samples = {
        f"aifactory_checkpoint_{name}": {rank: report[0][name] for rank, report in enumerate(reports)}
        for name in reports[0][0]
    }
    for way in ("save", "load"):
        durations = samples[f"aifactory_checkpoint_{way}_duration_seconds"]
        rates = {rank: [n_bytes / s for s in seconds] for rank, seconds in durations.items()}
        samples[f"aifactory_checkpoint_{way}_bandwidth_bytes_per_second"] = rates
    n_rounds = len(samples["aifactory_checkpoint_stall_seconds"][0])
    protocol = Protocol(
        warmup_steps=1,
        warmup_rule="one round of saving and loading is discarded, whatever it took",
        steady=True,
        timed_steps=n_rounds,
        timer="wall",
        rank_reduction="max",
        ci_reached=False,
    )
    facts = {"bytes": n_bytes, **storage, "page_cache": "dropped by posix_fadvise before each load"}
    program.write(cell, samples, protocol, facts=facts, validity=Validity(wrong_values=sum(r[1] for r in reports)))


def main() -> None:
    with start("checkpoint", __doc__ or "", add_options) as program:
        join(program.ranks, program.device, program.options.timeout_s)
        for n_parameters in program.options.parameters or PARAMETERS[program.device.type]:
            measure_size(program, n_parameters)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
