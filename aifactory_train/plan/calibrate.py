"""Measured results correct the plan: rates and ratios for the `measured` block of a machine file, and their use.

The ratio is of measured to predicted step time, where the prediction is made anew, by this planner, from the rates
that the machine file ends up with. So it holds what the model of the step leaves out, and nothing is counted twice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aifactory_train.errors import MachineError
from aifactory_train.machine.facts import FactSource
from aifactory_train.machine.machine import Machine, Measured, Ratio, RatioByDtype
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.rates import Precision, rate_key
from aifactory_train.plan.steptime import estimate_step_time_s, total_step_time_s
from aifactory_train.plan.work import Work
from aifactory_train.units import format_bytes_per_s, format_difference, format_flops_per_s, format_fraction

# Without a measured ratio: nine of ten published results lie so far from their prediction (docs/planner-accuracy.md).
UNCALIBRATED_RANGE_FRAC = 0.25
# Two runs of one plan differ by this much from day to day: neighbours on the network, clocks, which nodes.
LEAST_RANGE_FRAC = 0.10

# What tells one machine from another; limits, quotas and rates of a file may change without making it another.
_IDENTITY = (
    ("device", "kind"),
    ("device", "name"),
    ("device", "per_node"),
    ("host", "cpu"),
    ("host", "cores"),
    ("network", "fabric"),
    ("network", "nics_per_node"),
    ("network", "nic_gbit_per_s"),
)


@dataclass(frozen=True)
class RunObservation:
    """One run: what it did, and how long it took. `origin` names run, code and host, for the machine file.

    step_time_s: median of the steady state. checkpoint_bytes_per_s: until the commit; None: it saved nothing.
    doubt: why it may be far from what the machine does; None: nothing says so.
    """

    origin: str
    work: Work
    layout: Layout
    step_time_s: float
    checkpoint_bytes_per_s: float | None = None
    doubt: str | None = None


@dataclass(frozen=True)
class RateObservation:
    """Rates of one device, as a benchmark or `probe` took them. `origin` names the record; doubt: as of a run."""

    origin: str
    measured: Measured
    doubt: str | None = None


@dataclass(frozen=True)
class StepTimeRange:
    """What a step is expected to take, and where nine of ten such predictions lie; None: nothing is known of that."""

    expected_s: float
    low_s: float | None
    high_s: float | None
    why: str


def calibrate(machine: Machine, rates: Sequence[RateObservation], runs: Sequence[RunObservation], date: str) -> Machine:
    """The machine with what was measured on it. Rates stay where none are given; ratios are of `runs` alone.

    Args:
        date: of today, YYYY-MM-DD, for the sources.

    Raises:
        MachineError: no time can be predicted for a run, so it has no ratio.
    """
    machine = _with_rates(machine, rates, date)
    machine = _with_checkpoint_rate(machine, runs, date)
    return _with_ratios(machine, runs, date)


def correct_step_time(machine: Machine, precision: Precision, predicted_s: float) -> StepTimeRange:
    """What was measured on this machine in this precision, applied to a predicted step time."""
    key = rate_key(precision)
    ratio = getattr(machine.measured.step_time_ratio, key)
    if ratio is None:
        why = "no run was measured on this machine (aifactory-train calibrate)"
        if machine.device.kind == "cpu":
            return StepTimeRange(predicted_s, None, None, why)
        far = 1 + UNCALIBRATED_RANGE_FRAC
        why += (
            f"; nine of ten published results lie within {format_fraction(UNCALIBRATED_RANGE_FRAC)} of their prediction"
        )
        return StepTimeRange(predicted_s, predicted_s / far, predicted_s * far, why)
    low, high = (ratio.median * (1 + sign * LEAST_RANGE_FRAC) for sign in (-1, 1))
    runs = f"{ratio.n_results} {key} run" + ("" if ratio.n_results == 1 else "s")
    return StepTimeRange(
        expected_s=predicted_s * ratio.median,
        low_s=predicted_s * min(low, ratio.low),
        high_s=predicted_s * max(high, ratio.high),
        why=f"corrected by {format_difference(ratio.median - 1)}, as measured in {runs}",
    )


def differing_facts(machine: Machine, other: Machine) -> list[tuple[str, Any, Any]]:
    """(key, value, other's value) of each fact that makes them two machines; what one does not know is no difference.

    The name is not among them: `probe` does not know what its users call the machine.
    """
    pairs = [(f"{a}.{b}", getattr(getattr(machine, a), b), getattr(getattr(other, a), b)) for a, b in _IDENTITY]
    return [(key, one, two) for key, one, two in pairs if one is not None and two is not None and one != two]


def render_measured(machine: Machine) -> str:
    """One line for each thing that was measured, with what it is from."""
    measured, lines = machine.measured, []
    rows: list[tuple[str, Callable[[Any], str], Any]] = [
        (f"matmul_flops_per_s.{p}", format_flops_per_s, getattr(measured.matmul_flops_per_s, p))
        for p in ("fp32", "bf16", "fp8")
    ]
    rows.append(("memory_bytes_per_s", format_bytes_per_s, measured.memory_bytes_per_s))
    rows.append(("checkpoint_bytes_per_s", format_bytes_per_s, measured.checkpoint_bytes_per_s))
    rows += [
        (f"step_time_ratio.{p}", _shown_ratio, getattr(measured.step_time_ratio, p)) for p in ("fp32", "bf16", "fp8")
    ]
    for key, show, value in rows:
        if value is not None:
            source = machine.source_of(f"measured.{key}")
            lines.append(f"{key}: {show(value)}" + ("" if source is None else f"\n    {source.source}, {source.date}"))
    return "\n".join(lines)


def _shown_ratio(ratio: Ratio) -> str:
    return f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def _with_rates(machine: Machine, rates: Sequence[RateObservation], date: str) -> Machine:
    if not rates:
        return machine
    found = machine.measured.model_dump()
    keys = []
    for key in ("fp32", "bf16", "fp8"):
        taken = [getattr(r.measured.matmul_flops_per_s, key) for r in rates]
        if any(rate is not None for rate in taken):
            found["matmul_flops_per_s"][key] = statistics.median(rate for rate in taken if rate is not None)
            keys.append(f"measured.matmul_flops_per_s.{key}")
    for key in ("memory_bytes_per_s", "checkpoint_bytes_per_s"):
        taken = [getattr(r.measured, key) for r in rates]
        if any(rate is not None for rate in taken):
            found[key] = statistics.median(rate for rate in taken if rate is not None)
            keys.append(f"measured.{key}")
    machine = machine.model_copy(update={"measured": Measured.model_validate(found)})
    return _with_source(machine, keys, f"median of {_listed(r.origin for r in rates)}", date)


def _with_checkpoint_rate(machine: Machine, runs: Sequence[RunObservation], date: str) -> Machine:
    taken = {run.origin: run.checkpoint_bytes_per_s for run in runs if run.checkpoint_bytes_per_s is not None}
    if not taken:
        return machine
    measured = machine.measured.model_copy(update={"checkpoint_bytes_per_s": statistics.median(taken.values())})
    machine = machine.model_copy(update={"measured": measured})
    return _with_source(machine, ["measured.checkpoint_bytes_per_s"], f"median of {_listed(taken)}", date)


def _with_ratios(machine: Machine, runs: Sequence[RunObservation], date: str) -> Machine:
    ratios: dict[str, list[float]] = {}
    origins: dict[str, list[str]] = {}
    for run in runs:
        predicted_s = total_step_time_s(estimate_step_time_s(run.work, machine, run.layout))
        if predicted_s is None:
            raise MachineError(
                f"no rate of {machine.device.name} in {run.layout.precision} is known, so no step time is predicted",
                where=f"{machine.name}: measured.matmul_flops_per_s and memory_bytes_per_s; {run.origin}",
                do="on the machine: aifactory-train probe --out rates.yaml, and name rates.yaml beside the runs",
            )
        key = rate_key(run.layout.precision)
        ratios.setdefault(key, []).append(run.step_time_s / predicted_s)
        origins.setdefault(key, []).append(run.origin)
    found = {
        precision: Ratio(median=statistics.median(taken), low=min(taken), high=max(taken), n_results=len(taken))
        for precision, taken in ratios.items()
    }
    measured = machine.measured.model_copy(update={"step_time_ratio": RatioByDtype(**found)})
    machine = machine.model_copy(update={"measured": measured})
    machine = _with_source(machine, ["measured.step_time_ratio"], "", date)
    for precision, named in origins.items():
        machine = _with_source(
            machine, [f"measured.step_time_ratio.{precision}"], f"step time of {_listed(named)}", date
        )
    return machine


def _with_source(machine: Machine, keys: list[str], text: str, date: str) -> Machine:
    """The machine with `text` as the only source of `keys`; with no source of them where `text` is empty."""
    sources = []
    for source in machine.sources:
        kept = [fact for fact in source.facts if not any(fact == key or fact.startswith(f"{key}.") for key in keys)]
        if kept:
            sources.append(source.model_copy(update={"facts": kept}))
    if text and keys:
        sources.append(FactSource(facts=keys, source=text, by="measured", date=date))
    return machine.model_copy(update={"sources": sources})


def _listed(names: Iterable[str]) -> str:
    return "; ".join(names)
