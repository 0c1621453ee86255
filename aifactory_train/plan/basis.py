"""Which terms of a plan were measured on the machine, which are published for it, and which are assumed."""

from __future__ import annotations

from aifactory_train import units
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.calibrate import correct_step_time
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.cost import FAILURES, assumed_save_bytes_per_s
from aifactory_train.plan.network import axis_links
from aifactory_train.plan.rates import Rates, RateSource, device_rates

Basis = tuple[str, RateSource, str]


def measured_vs_assumed(machine: Machine, layout: Layout) -> list[Basis]:
    """(term, where from, text) for each rate that the predictions of this layout rest on."""
    rates = device_rates(machine, layout.precision)
    found = [*_device(machine, layout, rates), *_links(machine, layout)]
    writes = machine.measured.checkpoint_bytes_per_s
    if writes is None:
        text = f"{units.format_bytes_per_s(assumed_save_bytes_per_s(layout.world_size))} for one job"
        found.append(("checkpoint writes", "assumed", text))
    else:
        text = _with_origin(machine, units.format_bytes_per_s(writes), "measured.checkpoint_bytes_per_s")
        found.append(("checkpoint writes", "measured", text))
    ratio = getattr(machine.measured.step_time_ratio, layout.precision)
    why = correct_step_time(machine, layout.precision, 1.0).why
    if ratio is not None:
        why = _with_origin(machine, why, f"measured.step_time_ratio.{layout.precision}")
    found.append(("whole step", "assumed" if ratio is None else "measured", why))
    found.append(("failures", "assumed", FAILURES))
    return found


def _device(machine: Machine, layout: Layout, rates: Rates) -> list[Basis]:
    rows: list[tuple[str, RateSource, float | None, str, str]] = [
        (
            "matrix products",
            rates.matmul_source,
            rates.peak_flops_per_s,
            units.format_flops_per_s(rates.peak_flops_per_s),
            f"matmul_flops_per_s.{layout.precision}",
        ),
        (
            "device memory",
            rates.memory_source,
            rates.memory_bytes_per_s,
            units.format_bytes_per_s(rates.memory_bytes_per_s),
            "memory_bytes_per_s",
        ),
    ]
    found: list[Basis] = []
    for term, source, rate, shown, key in rows:
        if source == "measured":
            found.append((term, source, _with_origin(machine, shown, f"measured.{key}")))
        elif rate is None:
            found.append((term, source, "no time is predicted without it; measure with: aifactory-train probe"))
        else:
            of = "the peak" if source == "published" else "the peak of the family's stock part"
            found.append((term, source, f"{shown}, {of}"))
    return found


def _links(machine: Machine, layout: Layout) -> list[Basis]:
    """The links that each axis crosses; `fsdp` is dp_shard and cp together."""
    found: list[Basis] = []
    for axis, link in axis_links(machine, layout).items():
        if link.degree == 1 or axis == "dp_shard":
            continue
        source: RateSource = "assumed" if link.assumed else "published"
        rate = units.format_bytes_per_s(link.bytes_per_s)
        found.append((f"links of {axis}", source, "; ".join((f"{rate} for each rank", *link.assumed))))
    return found


def _with_origin(machine: Machine, text: str, key: str) -> str:
    source = machine.source_of(key)
    return text if source is None else f"{text}: {source.source}, {source.date}"
