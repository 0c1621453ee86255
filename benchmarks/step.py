"""Optimizer steps of a recipe, as training does them: the same plan, engine, batches and order of kernels.

Needs no prepared text unless --data real. With several ranks: mpirun, srun or torchrun start this file.
"""

from __future__ import annotations

import math
import time
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aifactory_train.bench.fingerprints import code_sha256
from aifactory_train.bench.record import Protocol, Scalar
from aifactory_train.launch.env import set_deterministic, set_local_rank
from aifactory_train.measure import steps
from aifactory_train.measure.meters import join_windows
from aifactory_train.measure.mllog import MlLog
from aifactory_train.measure.program import Program, start
from aifactory_train.measure.surroundings import probe_rank
from aifactory_train.measure.timing import sample, warm_up
from aifactory_train.metrics.meter import peak_memory_bytes
from aifactory_train.plan.launchable import make_launch_plan
from aifactory_train.plan.layout import describe, n_devices
from aifactory_train.plan.plan import Plan
from aifactory_train.recipe.load import load_recipe
from aifactory_train.train.ranks import check_world_size
from aifactory_train.train.setup import build_engine, enter

BUDGET_S = 60.0
# A step of a large model on few nodes takes minutes.
TIMEOUT_S = 600.0


def add_options(parser: ArgumentParser) -> None:
    parser.set_defaults(timeout_s=TIMEOUT_S)
    parser.add_argument("--recipe", required=True, help="configs/recipes/NAME.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as for launch")
    parser.add_argument("--grow-batch", action="store_true", help="the recipe's batch is of one node: weak scaling")
    parser.add_argument("--data", choices=("synthetic", "real"), default="synthetic", help="rows (default synthetic)")
    parser.add_argument("--steps", type=int, help="timed steps, however wide their interval; default: by the interval")
    parser.add_argument("--fingerprint", action="store_true", help="deterministic kernels, and what they compute")
    parser.add_argument("--mllog", type=Path, metavar="FILE", help="also lines with MLPerf's keys, as it runs")


def main() -> None:
    with start("step", __doc__ or "", add_options) as program:
        set_local_rank()
        if program.options.fingerprint:
            set_deterministic()
            torch.use_deterministic_algorithms(True)
        budget_s = BUDGET_S if program.options.budget_s is None else program.options.budget_s
        program.limits = replace(program.limits, budget_s=budget_s)
        if program.options.steps is not None:
            program.limits = replace(program.limits, min_samples=program.options.steps, ci_half_width_frac=math.inf)
        plan = steps.agree_on_plan(lambda: plan_here(program), program.control, program.options.timeout_s)
        measure(program, plan)


def plan_here(program: Program) -> Plan:
    """For the ranks that were started, as `launch` plans."""
    n_nodes = len(set(program.control.hosts))
    recipe = load_recipe(program.options.recipe, program.options.set)
    if program.options.grow_batch:
        batch = f"train.global_batch_tokens={n_nodes * recipe.train.global_batch_tokens}"
        recipe = load_recipe(program.options.recipe, [*program.options.set, batch])
    return make_launch_plan(recipe, program.machine, n_nodes, program.control.size // n_nodes, None, None)


def cell_of(plan: Plan, data: str, fingerprint: bool) -> dict[str, Scalar | None]:
    at, recipe = plan.layout, plan.recipe
    return {
        "model": recipe.name,
        "nodes": at.n_nodes,
        "devices": n_devices(plan.machine, at),
        "seq": recipe.data.seq_len_tokens,
        "gbs_tokens": recipe.train.global_batch_tokens,
        "dtype": at.precision,
        "layout": describe(at),
        "engine": at.engine,
        "compile": at.compile,
        "data": data,
        "deterministic": fingerprint,
    }


def measure(program: Program, plan: Plan) -> None:
    """Build, rehearse, warm up, time, and write the record. Collective: all ranks arrive."""
    options, control, timeout_s = program.options, program.control, program.options.timeout_s
    cell = cell_of(plan, options.data, options.fingerprint)
    log = MlLog(options.mllog if control.rank == 0 else None)
    log.mark("init_start")
    log.settings(plan, options.recipe)
    t0_s = time.monotonic()
    check_world_size(program.ranks, plan.layout.world_size)
    device = enter(plan, program.ranks, f"{options.recipe} on machine {plan.machine.name}", timeout_s)
    batches = steps.build_batches(plan, program.ranks, device, options.data)
    engine = build_engine(plan, device, fresh=True)
    t1_s = time.monotonic()
    engine.rehearse(batches.batch(0))  # compiling may take longer than the time-out, so nobody watches it
    facts: dict[str, Any] = {"build_s": t1_s - t0_s, "rehearse_s": time.monotonic() - t1_s}
    log.mark("init_stop", "run_start")
    stepper = steps.Stepper(engine, batches, program.alive)
    with program.watched(cell):
        warmed = warm_up(stepper.step, device, program.limits, control, None, timeout_s)
        log.mark("block_start", "power_measurement_start")
        with program.meters.window() as window:
            seconds, ci_reached = sample(stepper.step, device, program.limits, control, None, warmed, timeout_s)
        log.mark("power_measurement_stop", "block_stop")
        own = {"seconds": seconds, "wait_s": stepper.wait_s[warmed.calls :], "peak_bytes": peak_memory_bytes(device)}
        own |= {"window": window.as_json(), "rank": probe_rank(device)}
        while options.fingerprint and len(stepper.wait_s) < steps.FINGERPRINT_STEPS[-1]:
            stepper.step()
        losses, grad_norms = stepper.numbers()
        n_parameters = steps.count_parameters(plan, engine, control, timeout_s)
        stepper.close()
        program.alive()
        own["gemm_flops_per_s"] = steps.measure_gemm_flops_per_s(plan, device)
    by_rank = control.gather(own, timeout_s)
    if by_rank is None:
        return
    protocol = Protocol(
        warmup_steps=warmed.calls, warmup_rule=program.limits.warmup_rule(), steady=warmed.steady,
        timed_steps=len(seconds), timer="device_event+wall" if device.type == "cuda" else "wall",
        rank_reduction="max", ci_reached=ci_reached,
    )  # fmt: skip
    gemm, missed = steps.slowest_device_flops_per_s(plan, by_rank, control.hosts)
    samples = steps.samples_of(plan, by_rank, gemm)
    read = join_windows([each["window"] for each in by_rank])
    log.results(len(seconds) * plan.recipe.global_batch_rows, read.energy)
    log.mark("run_stop", status="success")
    facts |= {"ranks": [each["rank"] for each in by_rank], **read.facts()}
    facts |= steps.facts_of(plan, samples, read.energy) | {"gemm_flops_per_s": gemm, "loss": [losses[0], losses[-1]]}
    validity = steps.validity_of(losses, grad_norms, n_parameters, read)
    if options.fingerprint:
        digest, facts["fingerprint"] = steps.fingerprint(losses, grad_norms)
        facts["code_sha256"] = code_sha256()
        validity = validity.model_copy(update={"fingerprint": digest})
    if validity.loss_finite:
        samples |= {"loss_nats": {0: losses}, "grad_norm": {0: grad_norms}}
    program.write(
        cell, samples, protocol, facts=facts, flops=steps.flops_of(plan), validity=validity,
        energy=read.energy, unavailable=[*missed, *read.unavailable],
    )  # fmt: skip


if __name__ == "__main__":
    main()
