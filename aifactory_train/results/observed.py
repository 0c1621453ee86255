"""What was measured on a machine, read for `calibrate`: results of runs, rates of benchmarks, files of `probe`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.errors import RunFolderError
from aifactory_train.machine.load import load_machine
from aifactory_train.machine.machine import Machine, Measured
from aifactory_train.plan.calibrate import RateObservation, RunObservation, differing_facts
from aifactory_train.plan.plan import Plan, load_plan
from aifactory_train.plan.work import work_of
from aifactory_train.results.benchmarked import (
    SHA_DIGITS,
    BenchRecord,
    load_bench_records,
    plan_of,
    rates_of,
    run_of,
)
from aifactory_train.results.record import Result
from aifactory_train.rundir import RunDir, read_jsonl


def load_observations(machine: Machine, paths: list[Path]) -> tuple[list[RateObservation], list[RunObservation]]:
    """Everything that was measured, each file once.

    Args:
        paths: run folders or their result.json; bench folders or records of them (JSON); machine files written by
            `probe` (YAML).

    Raises:
        RunFolderError: nothing there, of another machine, without provenance, or without a steady state.
        PlanError, MachineError: plan.json or a machine file is damaged.
    """
    rates: list[RateObservation] = []
    runs: list[RunObservation] = []
    for path in dict.fromkeys(p.parent.resolve() if p.name == "result.json" else p.resolve() for p in paths):
        if path.suffix in (".yaml", ".yml"):
            rates.append(_probed(machine, path))
        elif path.is_file() or (path / "records").is_dir():
            more_rates, more_runs = _benchmarked(machine, path)
            rates += more_rates
            runs += more_runs
        else:
            runs.append(_ran(machine, RunDir(path)))
    return rates, runs


def _ran(machine: Machine, run: RunDir) -> RunObservation:
    result, plan = _load_result(run), load_plan(run.plan)
    _refuse_another_machine(machine, plan.machine, plan.machine.name, run.result)
    if result.machine_hash != plan.machine_hash or result.recipe_hash != plan.recipe_hash:
        raise RunFolderError(
            "result.json and plan.json are of two plans", where=str(run.root), do=f"aifactory-train report {run.root}"
        )
    sha = result.provenance.get("git_sha")
    if not sha:
        raise RunFolderError(
            "a result without git sha cannot be traced back to what ran",
            where=f"{run.result}: provenance",
            do="leave it out; train from a git checkout, or from a wheel built in one",
        )
    if result.steady_lines == 0 or not result.step_time_s.measured:
        raise RunFolderError(
            "no steady state: each attempt wrote a single log line, which holds the start",
            where=str(run.result),
            do="leave it out, or train for more steps; metrics.log_every_steps says how many make a line",
        )
    hosts = result.attempts[-1].hosts if result.attempts else []
    n_nodes = "1 node" if len(hosts) == 1 else f"{len(hosts)} nodes"
    return RunObservation(
        origin=f"run {result.name} (git {sha[:SHA_DIGITS]}, steps to {result.last_step}, {n_nodes})",
        work=work_of(plan.recipe),
        layout=plan.layout,
        step_time_s=result.step_time_s.measured,
        checkpoint_bytes_per_s=_checkpoint_bytes_per_s(run, plan),
    )


def _load_result(run: RunDir) -> Result:
    try:
        return Result.model_validate_json(run.result.read_text())
    except OSError as error:
        do = f"aifactory-train report {run.root}  writes it" if run.metrics.exists() else "give the folder of a run"
        raise RunFolderError(f"no result here: {error.strerror}", where=str(run.result), do=do) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise RunFolderError(
            f"not a result of this version: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            where=str(run.result),
            do=f"aifactory-train report {run.root}  writes it anew",
        ) from None


def _checkpoint_bytes_per_s(run: RunDir, plan: Plan) -> float | None:
    """Median over the commits that this many ranks made."""
    rates = []
    writers = None
    for event in read_jsonl(run.events):
        if event.get("event") == "start":
            writers = event.get("world_size")
        elif event.get("event") == "commit" and writers == plan.layout.world_size and event.get("seconds"):
            rates.append(event["bytes"] / event["seconds"])
    return statistics.median(rates) if rates else None


def _benchmarked(machine: Machine, path: Path) -> tuple[list[RateObservation], list[RunObservation]]:
    records, runs = load_bench_records(path), []
    for record in records:
        if record.benchmark == "step":
            plan = plan_of(record, path)
            _refuse_another_machine(machine, plan.machine, plan.machine.name, path)
            runs.append(run_of(record, plan))
        else:
            _refuse_differences(_differing_hardware(machine, record), machine, path)
    return rates_of(machine, records), runs


def _differing_hardware(machine: Machine, record: BenchRecord) -> list[tuple[str, Any, Any]]:
    """By the processor where both name it, by the machine's name elsewhere: a file may have another name than that."""
    seen = record.provenance.get("cpu")
    if machine.host.cpu is not None and seen is not None and record.machine != machine.name:
        return [] if machine.host.cpu == seen else [("host.cpu", machine.host.cpu, seen)]
    return [] if record.machine == machine.name else [("machine", machine.name, record.machine)]


def _probed(machine: Machine, path: Path) -> RateObservation:
    other = load_machine(path)
    _refuse_differences(differing_facts(machine, other), machine, path)
    measured = Measured(
        matmul_flops_per_s=other.measured.matmul_flops_per_s, memory_bytes_per_s=other.measured.memory_bytes_per_s
    )
    source = other.source_of("measured")
    if measured == Measured() or source is None:
        raise RunFolderError(
            "a machine file without measured rates, or without the source of them",
            where=str(path),
            do=f"on the machine: aifactory-train probe --out {path.name}",
        )
    return RateObservation(origin=f"{path.name} ({source.source}, {source.date})", measured=measured)


def _refuse_another_machine(machine: Machine, other: Machine, name: str, path: Path) -> None:
    names = [] if machine.name == name else [("name", machine.name, name)]
    _refuse_differences([*names, *differing_facts(machine, other)], machine, path)


def _refuse_differences(differences: list[tuple[str, Any, Any]], machine: Machine, path: Path) -> None:
    if differences:
        found = ", ".join(f"{key} {two} in place of {one}" for key, one, two in differences)
        raise RunFolderError(
            f"measured on another machine: {found}",
            where=str(path),
            do=f"leave it out; give results of {machine.name} alone, or the machine file that they were planned with",
        )
