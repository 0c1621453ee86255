"""Which terms of a plan were measured on the machine, which are published for it, and which are assumed."""

from __future__ import annotations

import math

from aifactory_train import units
from aifactory_train.machine.machine import Machine
from aifactory_train.machine.node import network_bytes_per_s
from aifactory_train.plan.calibrate import correct_step_time
from aifactory_train.plan.constants import CONSTANTS
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.cost import STARTUP_S, assumed_save_bytes_per_s, peak_power_w
from aifactory_train.plan.failures import FAILURES
from aifactory_train.plan.network import AxisLink, axis_links
from aifactory_train.plan.rates import Rates, RateSource, device_rates, rate_key

Basis = tuple[str, RateSource, str]


def measured_vs_assumed(machine: Machine, layout: Layout) -> list[Basis]:
    """(term, where from, text) for each rate that the predictions of this layout rest on."""
    rates, key = device_rates(machine, layout.precision), rate_key(layout.precision)
    found = [*_device(machine, layout, rates), *_links(machine, layout)]
    writes = machine.measured.checkpoint_bytes_per_s
    if writes is None:
        text = f"{units.format_bytes_per_s(assumed_save_bytes_per_s(layout.world_size))} for one job"
        found.append(("checkpoint writes", "assumed", text))
    else:
        text = _with_origin(machine, units.format_bytes_per_s(writes), "measured.checkpoint_bytes_per_s")
        found.append(("checkpoint writes", "measured", text))
    ratio = getattr(machine.measured.step_time_ratio, key)
    why = correct_step_time(machine, layout.precision, 1.0).why
    if ratio is not None:
        why = _with_origin(machine, why, f"measured.step_time_ratio.{key}")
    found.append(("whole step", "assumed" if ratio is None else "measured", why))
    found.append(("start of a job", "assumed", units.format_seconds(STARTUP_S)))
    watts, stock_part = peak_power_w(machine)
    if stock_part is not None:
        text = f"{machine.device.name} draws {units.format_watts(watts)} at most, as {stock_part}"
        found.append(("power", "assumed", text))
    found.append(("failures", "assumed", FAILURES))
    return found


def _device(machine: Machine, layout: Layout, rates: Rates) -> list[Basis]:
    rows: list[tuple[str, RateSource, float | None, str, str]] = [
        (
            "matrix products",
            rates.matmul_source,
            rates.peak_flops_per_s,
            units.format_flops_per_s(rates.peak_flops_per_s),
            f"matmul_flops_per_s.{rate_key(layout.precision)}",
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
        elif source == "published":
            found.append((term, source, f"{shown}, the peak"))
        else:
            what = {"matrix products": " peak of ", "device memory": "memory rate of "}[term]
            said = next(said for said in rates.assumed if what in said)
            found.append((term, source, said.removeprefix("assumed: ")))
    return found


def _links(machine: Machine, layout: Layout) -> list[Basis]:
    """The links that the axes cross, once each; `fsdp` is dp_shard and cp together."""
    axes: dict[tuple[RateSource, str], list[str]] = {}
    for axis, link in axis_links(machine, layout).items():
        if link.degree == 1 or axis == "dp_shard":
            continue
        source: RateSource = "assumed" if link.assumed else "published"
        axes.setdefault((source, "; ".join((_reached(machine, link), *link.assumed))), []).append(axis)
    return [(f"links of {', '.join(names)}", source, text) for (source, text), names in axes.items()]


def _reached(machine: Machine, link: AxisLink) -> str:
    """The rate, and of what it is a share."""
    rate = f"{units.format_bytes_per_s(link.bytes_per_s)} a rank"
    if machine.device.kind == "cpu":
        return rate
    if link.crosses == "node":
        return f"{rate}: {units.format_fraction(CONSTANTS.node_link_frac)} of the links inside a node"
    total = network_bytes_per_s(machine)
    part = link.n_in_node / machine.device.per_node
    if total is None or not math.isclose(link.bytes_per_s, CONSTANTS.nic_frac * part * total):
        return rate
    share = "" if part == 1 else "its share of "
    reached, nics = units.format_fraction(CONSTANTS.nic_frac), units.format_bytes_per_s(total)
    return f"{rate}: ring over a node's NICs at {reached} of {share}the published {nics}"


def _with_origin(machine: Machine, text: str, key: str) -> str:
    source = machine.source_of(key)
    return text if source is None else f"{text}: {source.source}, {source.date}"
