"""What a run costs: hours in the unit that the site counts, energy, chained jobs, checkpoints and failures.

Time that the devices are held, of which waiting in the queue is no part:
    the steps
  + the stall of each save: an asynchronous one stops training only for the copy to host memory
  + what failures destroy: the steps since the last commit, and the start of the next job
  + of each job its start, the restore, and the last save
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aifactory_train import units
from aifactory_train.machine.machine import Machine
from aifactory_train.plan import shape
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.failures import (
    MAX_SEGMENT_MTBFS,
    PACKAGE_MTBF_RANGE_H,
    best_interval_s,
    devices_per_package,
    expected_time_s,
    mtbf_s,
)
from aifactory_train.plan.limits import job_limits
from aifactory_train.plan.rates import family_rates
from aifactory_train.plan.steptime import STAGE_BYTES_PER_S
from aifactory_train.recipe.schema import Recipe

if TYPE_CHECKING:
    from aifactory_train.plan.plan import Plan

# One rank's stream to a busy parallel file system, and the share of it that is left to one job, as faults/deadline.py
# takes them as long as no save was measured: a cautious guess.
RANK_SAVE_BYTES_PER_S = 100e6
JOB_SAVE_BYTES_PER_S = 2e9
# Prologue of the job, imports on all nodes, the communicators, the first step with what is compiled for it.
STARTUP_S = 180.0

# Power of a node over the most that its devices may draw. In training devices draw 60 to 100 % of that; host,
# network cards and fans add 20 to 50 %. A node of 8 H100 (8 x 700 W) was seen at 8.4 kW at most, 1.5 times its
# devices' limit, and at 7.7 kW under heavy work (arXiv 2412.08602, 2506.14551). Where `power_w` is of a module with its
# CPU, the upper end is too high.
NODE_POWER_FRAC = (0.6 + 0.2, 1.0 + 0.5)

# Checkpoints are advised as rare as they may be with stalls and lost work at this share of the run's time.
ADVISED_OVERHEAD_FRAC = 0.01
# Nor any rarer than this where no limit of a job is known: a job saves at its end.
LONGEST_INTERVAL_S = 24 * 3600.0


@dataclass(frozen=True)
class RunSize:
    """What of a recipe decides the cost. `checkpoint_bytes`: of one checkpoint, all ranks together."""

    n_steps: int
    step_tokens: int
    checkpoint_bytes: int
    checkpoint_every_steps: int
    asynchronous_save: bool


@dataclass(frozen=True)
class SaveCost:
    """One save: `write_s` until it is committed, of which training stands still for `stall_s`."""

    write_s: float
    stall_s: float


@dataclass(frozen=True)
class RunCost:
    """Of the whole run. `held_time_s`: devices held by its jobs, failures included, waiting in the queue not.

    training_time_s: the steps alone. step_time_s: of one of them.
    best_every_steps: the rarest checkpoints with an overhead of ADVISED_OVERHEAD_FRAC or less, else with the least;
        never closer to each other than the time that one takes to be written, nor farther than a job is long.
    stall_frac, lost_frac: time of saves, and of failures, as shares of training_time_s.
    makes_progress: False where failures come so much faster than checkpoints that the run does not end; its times
        are then of no use. energy_kwh: lowest and highest at the nodes' plugs, cooling (PUE) not included.
    expected_failures: in held_time_s; failures_range: at the rates of the clusters where fewest and most were counted.
    """

    step_time_s: float
    training_time_s: float
    held_time_s: float
    job_time_s: float | None
    n_jobs: int
    device_hours: float
    node_hours: float
    grant_amount: float
    grant_unit: str
    tokens_per_device_hour: float
    energy_kwh: tuple[float, float] | None
    checkpoint_bytes: int
    save: SaveCost
    mtbf_s: float
    expected_failures: float
    failures_range: tuple[float, float]
    every_steps: int
    best_every_steps: int
    stall_frac: float
    lost_frac: float
    best_overhead_frac: float
    makes_progress: bool

    @property
    def overhead_frac(self) -> float:
        """Saves and failures at the recipe's interval, as a share of training_time_s."""
        return self.stall_frac + self.lost_frac


def estimate_cost(machine: Machine, n_nodes: int, seconds: float) -> tuple[float, str]:
    """(amount, unit) of so many nodes for so long; node-hours where the site's unit is not known."""
    node_hours = n_nodes * seconds / 3600
    if machine.accounting is None:
        return node_hours, "node-hours"
    return node_hours * machine.accounting.units_per_node_hour, machine.accounting.unit


def hours_of(unit: str) -> str:
    """The unit after an amount: "GPU-hours (one MI250X)" of "GPU-hour (one MI250X)"."""
    return re.sub(r"-hour\b", "-hours", unit)


def run_size_of(recipe: Recipe) -> RunSize:
    return RunSize(
        n_steps=recipe.n_steps,
        step_tokens=recipe.train.global_batch_tokens,
        checkpoint_bytes=checkpoint_bytes(recipe),
        checkpoint_every_steps=recipe.checkpoint.every_steps,
        asynchronous_save=recipe.checkpoint.asynchronous,
    )


def checkpoint_bytes(recipe: Recipe) -> int:
    """fp32 weights that are trained and moments: two per weight under AdamW; one for the block matrices under Muon."""
    n = shape.n_trained_parameters(recipe.model, recipe.lora)
    n_moments = 2 * n
    if recipe.optim.name == "muon":
        n_moments -= recipe.model.n_layers * shape.n_block_matrix_parameters(recipe.model)
    return 4 * (n + n_moments)


def assumed_save_bytes_per_s(n_ranks: int) -> float:
    """Of all ranks together, as long as no save was measured."""
    return min(RANK_SAVE_BYTES_PER_S * n_ranks, JOB_SAVE_BYTES_PER_S)


def estimate_save(machine: Machine, layout: Layout, n_bytes: int, asynchronous: bool) -> SaveCost:
    """Seconds of one save of `n_bytes` by all ranks together."""
    write_s = n_bytes / (machine.measured.checkpoint_bytes_per_s or assumed_save_bytes_per_s(layout.world_size))
    if not asynchronous:
        return SaveCost(write_s, write_s)
    staged_per_s = min(STAGE_BYTES_PER_S, machine.topology.host_bytes_per_s or STAGE_BYTES_PER_S)
    return SaveCost(write_s, n_bytes / (staged_per_s * layout.world_size))


def n_chained_jobs(work_s: float, job_time_s: float | None, first_s: float, next_s: float) -> int | None:
    """Jobs of `job_time_s` for `work_s`, of which the first spends `first_s` on other things, each further `next_s`.

    1 where jobs have no limit; None where a job has no time left for work.
    """
    if job_time_s is None or work_s + first_s <= job_time_s:
        return 1
    if job_time_s <= max(first_s, next_s):
        return None
    return 1 + math.ceil((work_s + first_s - job_time_s) / (job_time_s - next_s))


def estimate_run_cost(
    machine: Machine, layout: Layout, size: RunSize, step_time_s: float, job_time_s: float | None = None
) -> RunCost:
    """Hours, energy, jobs and checkpoints of a whole run whose steps take `step_time_s`, the stall of saves left out.

    Args:
        job_time_s: wall time of one job; None: the longest that the default partition and QoS allow.
    """
    limit_h = job_limits(machine).max_time_h
    job_time_s = job_time_s or (None if limit_h is None else limit_h * 3600)
    n_devices = layout.n_nodes * machine.device.per_node
    save = estimate_save(machine, layout, size.checkpoint_bytes, size.asynchronous_save)
    n_packages = n_devices / devices_per_package(machine.device)
    between_s = mtbf_s(n_packages)
    training_s = size.n_steps * step_time_s
    every = min(size.checkpoint_every_steps, size.n_steps)
    most_steps = min(size.n_steps, max(1, int((job_time_s or LONGEST_INTERVAL_S) / step_time_s)))
    best_every = advised_every_steps(save, between_s, step_time_s, most_steps)
    stall_frac, lost_frac, ends = _overhead(every * step_time_s, save, between_s)
    best_stall_frac, best_lost_frac, _ = _overhead(best_every * step_time_s, save, between_s)
    work_s = training_s * (1 + stall_frac + lost_frac)
    first_s = STARTUP_S + save.write_s
    n_jobs = n_chained_jobs(work_s, job_time_s, first_s, first_s + save.write_s)
    held_s = work_s + first_s + ((n_jobs or 1) - 1) * (first_s + save.write_s)
    amount, unit = estimate_cost(machine, layout.n_nodes, held_s)
    device_hours = n_devices * held_s / 3600
    most_s, least_s = (mtbf_s(n_packages, hours) for hours in PACKAGE_MTBF_RANGE_H)
    return RunCost(
        step_time_s=step_time_s,
        training_time_s=training_s,
        held_time_s=held_s,
        job_time_s=job_time_s,
        n_jobs=n_jobs or 1,
        device_hours=device_hours,
        node_hours=layout.n_nodes * held_s / 3600,
        grant_amount=amount,
        grant_unit=unit,
        tokens_per_device_hour=size.n_steps * size.step_tokens / device_hours,
        energy_kwh=_energy_kwh(machine, device_hours),
        checkpoint_bytes=size.checkpoint_bytes,
        save=save,
        mtbf_s=between_s,
        expected_failures=held_s / between_s,
        failures_range=(held_s / least_s, held_s / most_s),
        every_steps=every,
        best_every_steps=best_every,
        stall_frac=stall_frac,
        lost_frac=lost_frac,
        best_overhead_frac=best_stall_frac + best_lost_frac,
        makes_progress=ends and n_jobs is not None,
    )


def advised_every_steps(save: SaveCost, between_s: float, step_time_s: float, most_steps: int) -> int:
    """Steps between two saves, see RunCost.best_every_steps."""

    def overhead_frac(every_steps: int) -> float:
        stall_frac, lost_frac, _ = _overhead(every_steps * step_time_s, save, between_s)
        return stall_frac + lost_frac

    least = min(max(1, math.ceil(save.write_s / step_time_s)), most_steps)
    cheapest = min(max(round(best_interval_s(save.stall_s, between_s) / step_time_s), least), most_steps)
    if overhead_frac(cheapest) > ADVISED_OVERHEAD_FRAC:
        return cheapest
    low, high = cheapest, most_steps  # beyond the cheapest the overhead only grows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if overhead_frac(middle) <= ADVISED_OVERHEAD_FRAC else (low, middle - 1)
    return low


def tokens_for_device_hours(cost: RunCost, device_hours: float) -> int:
    """Tokens that so many device-hours buy at the run's own price, overheads included."""
    return int(cost.tokens_per_device_hour * device_hours)


def _overhead(interval_s: float, save: SaveCost, between_s: float) -> tuple[float, float, bool]:
    """(stalls, losses) as shares of the steps' time with a save after each `interval_s`; whether the run ends."""
    stall_s = max(save.stall_s, save.write_s - interval_s)  # a save waits for the one before it
    # What was trained while the last save was being written is lost with it, and the next job reads it first.
    restart_s = STARTUP_S + save.write_s + (save.write_s - save.stall_s)
    total = expected_time_s(interval_s, interval_s, stall_s, restart_s, between_s) / interval_s
    ends = max(interval_s + stall_s, restart_s) < MAX_SEGMENT_MTBFS * between_s
    return stall_s / interval_s, max(0.0, total - 1 - stall_s / interval_s), ends


def peak_power_w(machine: Machine) -> tuple[float | None, str | None]:
    """(the most that a device draws, name of the stock part where it is that one's)."""
    if machine.device.power_w is not None or machine.device.kind == "cpu":
        return machine.device.power_w, None
    family = family_rates(machine.device.name)
    return (None, None) if family is None else (family.power_w, family.name)


def _energy_kwh(machine: Machine, device_hours: float) -> tuple[float, float] | None:
    power_w = peak_power_w(machine)[0]
    if power_w is None:
        return None
    low, high = (device_hours * power_w * frac / 1000 for frac in NODE_POWER_FRAC)
    return low, high


def run_cost_of(plan: Plan, job_time_s: float | None = None) -> RunCost | None:
    """The cost of a plan's run; None where no step time is predicted."""
    step_time_s = plan.predicted.total_step_time_s
    return None if step_time_s is None else _cost_at(plan, step_time_s, job_time_s)


def run_cost_range_of(plan: Plan, job_time_s: float | None = None) -> tuple[RunCost, RunCost] | None:
    """At the fast and at the slow end of the predicted step time; None where no range is known."""
    low_s, high_s = plan.predicted.step_time_low_s, plan.predicted.step_time_high_s
    if low_s is None or high_s is None:
        return None
    return _cost_at(plan, low_s, job_time_s), _cost_at(plan, high_s, job_time_s)


def _cost_at(plan: Plan, step_time_s: float, job_time_s: float | None) -> RunCost:
    # Saves are counted here, with those that fail.
    step_time_s -= plan.predicted.step_time_s.get("checkpoint_stall") or 0.0
    return estimate_run_cost(plan.machine, plan.layout, run_size_of(plan.recipe), step_time_s, job_time_s)


def render_cost(plan: Plan, job_time_s: float, job_time: str) -> list[str]:
    """Lines for people: the whole run as predicted, and the most that one job of `job_time_s` can take."""
    n_nodes = plan.layout.n_nodes
    amount, unit = estimate_cost(plan.machine, n_nodes, job_time_s)
    one_job = f"one job: at most {_shown(amount)} {unit} ({n_nodes} node(s) for {job_time})"
    cost = run_cost_of(plan, job_time_s)
    if cost is None:
        return ["the run: not predicted, no rate of the devices is known", one_job]
    return [*render_run_cost(cost, run_cost_range_of(plan, job_time_s)), one_job]


def render_run_cost(cost: RunCost, within: tuple[RunCost, RunCost] | None = None) -> list[str]:
    """Lines for people. `within`: the same run at the fast and at the slow end of its predicted step time."""
    if not cost.makes_progress:
        return [_endless(cost)]
    fast, slow = within or (cost, cost)
    unit = hours_of(cost.grant_unit)
    amounts = [_shown(c.grant_amount) for c in (fast, cost, slow)]
    times = [units.format_seconds(c.held_time_s) for c in (fast, cost, slow)]
    node_hours = "" if unit.startswith("node-hour") else f"{_shown(cost.node_hours)} node-hours, "
    limit = ", as no limit of a job's time is known"
    if cost.job_time_s is not None:
        limit = f" of at most {units.format_seconds(cost.job_time_s)}"
    least, most = fast.n_jobs, slow.n_jobs
    jobs = f"{least} to {most} chained jobs" if least != most else "1 job" if most == 1 else f"{most} chained jobs"
    lines = [
        f"the run: {_within(amounts)} {unit} (about {node_hours}{_shown(cost.device_hours)} device-hours)",
        f"time: {_within(times)} in {jobs}{limit}, waiting in the queue not counted",
    ]
    if not slow.makes_progress:
        lines.append("at the slow end of this range the run would not end: ask for longer jobs")
    if fast.energy_kwh is not None and slow.energy_kwh is not None:
        low, high = units.format_kwh(fast.energy_kwh[0]), units.format_kwh(slow.energy_kwh[1])
        lines.append(f"energy: {low} to {high} at the nodes, cooling not included")
    return [*lines, *_checkpoint_lines(cost)]


def _within(shown: list[str]) -> str:
    """ "about 5 d (4 d to 7 d)" of the fast end, the middle and the slow end."""
    fast, middle, slow = shown
    return f"about {middle}" + ("" if fast == slow else f" ({fast} to {slow})")


def _checkpoint_lines(cost: RunCost) -> list[str]:
    size, write, stall = units.format_bytes(cost.checkpoint_bytes), cost.save.write_s, cost.save.stall_s
    few, failures, many = (
        f"{n:.2g}" if n < 10 else f"{n:.0f}"
        for n in (cost.failures_range[0], cost.expected_failures, cost.failures_range[1])
    )
    lines = [
        f"checkpoints: {size}, written in {units.format_seconds(write)}, stall {units.format_seconds(stall)}; "
        f"saves and {failures} failures ({few} to {many}) cost {units.format_fraction(cost.overhead_frac)}",
    ]
    best, every = cost.best_every_steps, cost.every_steps
    if cost.overhead_frac > max(ADVISED_OVERHEAD_FRAC, cost.best_overhead_frac) and best != every:
        between = units.format_seconds(best * cost.step_time_s)
        lines.append(
            f"checkpoint.every_steps {every}: save every {best} steps ({between}), at a cost of "
            f"{units.format_fraction(cost.best_overhead_frac)}"
        )
    return lines


def _endless(cost: RunCost) -> str:
    if cost.job_time_s is not None and cost.job_time_s <= STARTUP_S + 2 * cost.save.write_s:
        return (
            f"the run: never ends; a job of {units.format_seconds(cost.job_time_s)} is spent on its start and its "
            f"checkpoints ({units.format_seconds(cost.save.write_s)} each): ask for longer jobs"
        )
    return (
        f"the run: never ends; on these nodes a failure is expected each {units.format_seconds(cost.mtbf_s)}, so set "
        f"checkpoint.every_steps {cost.best_every_steps} in place of {cost.every_steps}, or take fewer nodes"
    )


def _shown(amount: float) -> str:
    return units.format_count(amount).replace(" ", "\N{NO-BREAK SPACE}") if amount >= 1 else f"{amount:.3g}"
