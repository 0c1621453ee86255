"""Predictions beside measurements, and the figures that sum them up. Pure: no fit, no files."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from aifactory_train.plan.constants import Constants
from aifactory_train.plan.memory import FIT_FRAC, Memory, estimate_memory
from aifactory_train.plan.search import first_choice
from aifactory_train.plan.shape import n_parameters
from aifactory_train.plan.steptime import estimate_step_time_s, total_step_time_s
from benchmarks.plan_accuracy.rows import MemoryMetric, Row

SIZE_BOUNDS = (1e9, 5e9, 12e9, 40e9, 120e9)
SIZES = ("< 1 B", "1 to 5 B", "5 to 12 B", "12 to 40 B", "40 to 120 B", "> 120 B")
Key = tuple[str | int, ...]
NEAR_BEST_FRAC = 0.05
MIN_LAYOUTS = 3
# Terms that a metric does not see: the allocator knows nothing of the driver, tensors nothing of the allocator.
UNSEEN: dict[MemoryMetric, tuple[str, ...]] = {
    "device": (),
    "reserved": ("runtime", "communicators"),
    "allocated": ("runtime", "communicators", "fragmentation"),
}


@dataclass(frozen=True)
class Scored:
    """A row and what the planner says of it; None where it was not measured or cannot be predicted."""

    row: Row
    tokens_per_s_per_device: float | None
    peak_bytes: int
    seen_bytes: int
    fits: bool

    @property
    def filled_frac(self) -> float:
        """Of the device's memory by the predicted peak; 0 where it is unknown."""
        at_hand = self.row.machine.device.memory_bytes
        return self.peak_bytes / at_hand if at_hand else 0.0

    @property
    def speed_error(self) -> float | None:
        """Predicted over measured, less 1."""
        measured = self.row.tokens_per_s_per_device
        if measured is None or self.tokens_per_s_per_device is None:
            return None
        return self.tokens_per_s_per_device / measured - 1

    @property
    def memory_error(self) -> float | None:
        return None if self.row.peak_memory_bytes is None else self.seen_bytes / self.row.peak_memory_bytes - 1


def predict_tokens_per_s(row: Row, constants: Constants) -> float | None:
    """Of one device; None where the machine's rates are unknown."""
    terms = estimate_step_time_s(row.work, row.machine, row.layout, row.software, constants)
    step_s = total_step_time_s(terms)
    return None if step_s is None else row.work.global_batch_tokens / step_s / row.layout.world_size


def seen_bytes(memory: Memory, metric: MemoryMetric | None) -> int:
    """What of the predicted peak the row's metric counts."""
    return memory.peak_bytes - sum(memory.terms_bytes.get(name, 0) for name in UNSEEN[metric or "device"])


def score(rows: Sequence[Row], constants_of: Callable[[Row], Constants]) -> list[Scored]:
    """`constants_of`: those that may predict this row."""
    scored = []
    for row in rows:
        memory = estimate_memory(row.work, row.machine.device.kind, row.layout, row.software)
        scored.append(
            Scored(
                row,
                predict_tokens_per_s(row, constants_of(row)),
                memory.peak_bytes,
                seen_bytes(memory, row.memory_metric),
                memory.peak_bytes <= FIT_FRAC * (row.machine.device.memory_bytes or math.inf),
            )
        )
    return scored


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two values next to it; nan of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def size_of(row: Row) -> int:
    """Bin of the number of parameters: an index of SIZES."""
    return bisect(SIZE_BOUNDS, n_parameters(row.work.model))


@dataclass(frozen=True)
class Group:
    """Layouts of one model on one machine that one source measured. `loss`: of the chosen one to the best."""

    name: str
    n_layouts: int
    n_out_of_memory: int
    loss: float
    chosen: Row
    best: Row

    @property
    def near_best(self) -> bool:
        return self.loss <= NEAR_BEST_FRAC


def setting_of(row: Row) -> tuple[object, ...]:
    """What is alike in a group: all but the layout. Sequence parallelism is part of a layout."""
    software = dataclasses.replace(row.software, sequence_parallel=True)
    name = row.machine.name, row.layout.world_size, row.layout.precision
    heads = f"{row.work.model.n_heads} heads"
    work = row.model_name, heads, row.work.seq_len_tokens, row.work.global_batch_tokens
    return row.source, *name, *work, software


def rank_groups(scored: Sequence[Scored]) -> list[Group]:
    """The planner's choice in every group of at least 3 layouts that ran.

    It chooses as the planner does, of those that it says fit. Where it chooses one that ran out of memory the loss
    is 1. Repeated measurements of a layout count as their median.
    """
    by_setting: dict[tuple[object, ...], list[Scored]] = defaultdict(list)
    for s in scored:
        if s.tokens_per_s_per_device is not None and (s.row.outcome == "OOM" or s.row.tokens_per_s_per_device):
            by_setting[setting_of(s.row)].append(s)
    groups = []
    for setting, members in by_setting.items():
        layouts: dict[tuple[object, ...], list[Scored]] = defaultdict(list)
        for s in members:
            layouts[(s.row.layout.model_dump_json(), s.row.software.sequence_parallel)].append(s)
        group = _group(_words(setting, members[0].row), list(layouts.values()))
        if group is not None:
            groups.append(group)
    return groups


def _words(setting: tuple[object, ...], row: Row) -> str:
    norms = "" if row.software.fused_elementwise is None else " fused" if row.software.fused_elementwise else " eager"
    return f"{' '.join(str(part) for part in setting[:-1])} {row.software.attention}{norms}"


def _group(name: str, layouts: list[list[Scored]]) -> Group | None:
    speed = [_measured(same) for same in layouts]
    if sum(s > 0 for s in speed) < MIN_LAYOUTS:
        return None
    indices = range(len(layouts))
    fitting = [i for i in indices if layouts[i][0].fits] or list(indices)
    times_s = [1 / (layouts[i][0].tokens_per_s_per_device or 1e-9) for i in fitting]
    filled = [layouts[i][0].filled_frac for i in fitting]
    chosen = fitting[first_choice([layouts[i][0].row.layout for i in fitting], times_s, filled)]
    best = max(indices, key=lambda i: speed[i])
    return Group(
        name=name,
        n_layouts=sum(s > 0 for s in speed),
        n_out_of_memory=sum(s == 0 for s in speed),
        loss=1 - speed[chosen] / speed[best],
        chosen=layouts[chosen][0].row,
        best=layouts[best][0].row,
    )


def _measured(same: list[Scored]) -> float:
    """Median of the speeds; 0 where the layout ran out of memory each time."""
    ran = [s.row.tokens_per_s_per_device for s in same if s.row.tokens_per_s_per_device]
    return median(ran) if ran else 0.0


@dataclass(frozen=True)
class Summary:
    """Shares of 1; nan where the rows say nothing about it."""

    speed_median: float
    speed_p90: float
    memory_median: float
    false_unfit: float
    oom_recall: float
    ranking: float  # of the layouts that ran: what did not is in oom_recall
    n_rows: int

    def line(self) -> str:
        """The last line of the command."""
        return (
            f"accuracy throughput_median_pct {100 * self.speed_median:.1f} p90_pct {100 * self.speed_p90:.1f} "
            f"memory_median_pct {100 * self.memory_median:.1f} false_unfit_pct {100 * self.false_unfit:.1f} "
            f"oom_recall_pct {100 * self.oom_recall:.1f} ranking_pct {100 * self.ranking:.1f} rows {self.n_rows}"
        )


def summarize(scored: Sequence[Scored]) -> Summary:
    speed = [abs(s.speed_error) for s in scored if s.speed_error is not None]
    memory = [abs(s.memory_error) for s in scored if s.memory_error is not None]
    ran = [s.fits for s in scored if s.row.outcome == "ok"]
    failed = [s.fits for s in scored if s.row.outcome == "OOM"]
    groups = rank_groups([s for s in scored if s.row.outcome == "ok"])
    return Summary(
        speed_median=quantile(speed, 0.5),
        speed_p90=quantile(speed, 0.9),
        memory_median=quantile(memory, 0.5),
        false_unfit=_share(ran, False),
        oom_recall=_share(failed, False),
        ranking=_share([g.near_best for g in groups], True),
        n_rows=len(scored),
    )


def _share(values: Sequence[bool], wanted: bool) -> float:
    return sum(v == wanted for v in values) / len(values) if values else float("nan")


@dataclass(frozen=True)
class Line:
    """Errors of some rows: signed quantiles of speed, signed median of memory, outcomes."""

    key: Key
    n_speed: int
    speed_median: float
    speed_p10: float
    speed_p90: float
    speed_absolute: float
    n_memory: int
    memory_median: float
    n_ran: int
    n_false_unfit: int
    n_oom: int
    n_oom_found: int


def tabulate(scored: Sequence[Scored], key_of: Callable[[Row], Key]) -> list[Line]:
    """One line for each key, in the order of the keys."""
    groups: dict[Key, list[Scored]] = defaultdict(list)
    for s in scored:
        groups[key_of(s.row)].append(s)
    lines = []
    for key, members in sorted(groups.items(), key=lambda item: item[0]):
        speed = [s.speed_error for s in members if s.speed_error is not None]
        memory = [s.memory_error for s in members if s.memory_error is not None]
        ran = [s for s in members if s.row.outcome == "ok"]
        oom = [s for s in members if s.row.outcome == "OOM"]
        lines.append(
            Line(
                key=key,
                n_speed=len(speed),
                speed_median=quantile(speed, 0.5),
                speed_p10=quantile(speed, 0.1),
                speed_p90=quantile(speed, 0.9),
                speed_absolute=quantile([abs(e) for e in speed], 0.5),
                n_memory=len(memory),
                memory_median=quantile(memory, 0.5),
                n_ran=len(ran),
                n_false_unfit=sum(not s.fits for s in ran),
                n_oom=len(oom),
                n_oom_found=sum(not s.fits for s in oom),
            )
        )
    return lines
