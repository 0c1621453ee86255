"""result.json: what a run did, predicted beside measured, with what is needed to believe it."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from aifactory_train.errors import RunFolderError
from aifactory_train.plan.plan import Plan, load_plan
from aifactory_train.rundir import RunDir, read_jsonl, write_atomic

# The final loss is the mean of this many log lines, so that one lucky batch does not decide it.
FINAL_FRAC = 0.1  # share of the log lines, from the end, whose mean is the final loss; never the first line

Row = dict[str, Any]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pair(Part):
    """One quantity as the plan predicted it and as the clock or the allocator gave it."""

    predicted: float | None
    measured: float | None

    @property
    def difference_frac(self) -> float | None:
        """How much more was measured than predicted, as a share of the prediction."""
        if not self.predicted or self.measured is None:
            return None
        return self.measured / self.predicted - 1


class Attempt(Part):
    attempt: int
    time_s: float
    from_step: int
    world_size: int
    hosts: list[str]
    git_sha: str


class Result(Part):
    """Rates are medians over the steady state: all log lines but the first of each attempt.

    `steady_lines` is 0 where every attempt wrote a single line; the rates are then those of all lines.
    Losses are in nats per token, `model_flops_per_s` is per device.
    """

    schema_: Literal["aifactory-result/1"] = "aifactory-result/1"
    name: str
    recipe_hash: str
    machine: str
    machine_hash: str
    finished: bool
    first_step: int
    last_step: int
    planned_steps: int
    tokens: int
    wall_time_s: float
    loss_first_nats: float
    loss_final_nats: float
    loss_final_from_step: int
    unigram_entropy_nats: float | None
    tokens_per_s: Pair
    step_time_s: Pair
    step_time_p95_s: float
    memory_peak_bytes: Pair
    mfu_frac: Pair
    model_flops_per_s: float | None
    data_wait_frac: float | None
    steady_lines: int
    commits: int
    attempts: list[Attempt]
    provenance: dict[str, Any]


def read_metrics(run: RunDir) -> list[Row]:
    """The rows of metrics.jsonl that led to the newest state, by step.

    Lines are appended over attempts. What an older attempt did beyond the step from which a newer one
    resumed was lost with it, so those rows do not count; of a step that two attempts did, the newer counts.
    """
    resumed_from = {e["attempt"]: e["step"] for e in read_jsonl(run.events) if e.get("event") == "start"}
    by_step: dict[int, Row] = {}
    for row in read_jsonl(run.metrics):
        if not isinstance(row.get("step"), int) or not isinstance(row.get("loss"), int | float):
            continue
        attempt = row.get("attempt", 1)
        if any(newer > attempt and row["step"] > step for newer, step in resumed_from.items()):
            continue
        kept = by_step.get(row["step"])
        if kept is None or kept.get("attempt", 1) <= attempt:
            by_step[row["step"]] = row
    return [by_step[step] for step in sorted(by_step)]


def build_result(run: RunDir) -> Result:
    """Join plan, metrics and events of a run.

    Raises:
        RunFolderError: no metrics yet, or the run does not say which code ran where.
        PlanError: plan.json is missing or damaged.
    """
    plan, rows, events = load_plan(run.plan), read_metrics(run), read_jsonl(run.events)
    starts = [e for e in events if e.get("event") == "start"]
    _refuse_incomplete(run, plan, rows, starts)
    steady = _steady(rows)
    measured = steady or rows
    predicted = plan.predicted
    n_final = max(1, int(FINAL_FRAC * len(rows)))
    return Result(
        name=plan.recipe.name,
        recipe_hash=plan.recipe_hash,
        machine=plan.machine.name,
        machine_hash=plan.machine_hash,
        finished=any(e.get("event") == "finish" for e in events),
        first_step=rows[0]["step"],
        last_step=rows[-1]["step"],
        planned_steps=plan.recipe.n_steps,
        tokens=rows[-1]["tokens"],
        wall_time_s=_wall_time_s(starts, events, read_jsonl(run.metrics)),
        loss_first_nats=rows[0]["loss"],
        loss_final_nats=statistics.fmean(row["loss"] for row in rows[-n_final:]),
        loss_final_from_step=rows[-n_final - 1]["step"] + 1 if len(rows) > n_final else rows[0]["step"],
        unigram_entropy_nats=starts[-1].get("unigram_entropy_nats"),
        tokens_per_s=Pair(predicted=predicted.tokens_per_s, measured=_median(measured, "tokens_per_s")),
        step_time_s=Pair(predicted=predicted.total_step_time_s, measured=_median(measured, "step_time_s")),
        step_time_p95_s=quantile([row["step_time_s"] for row in measured], 0.95),
        memory_peak_bytes=Pair(
            predicted=predicted.peak_memory_bytes, measured=max(_values(rows, "memory_peak_bytes"), default=None)
        ),
        mfu_frac=Pair(predicted=predicted.mfu_frac, measured=_median(measured, "mfu_frac")),
        model_flops_per_s=_median(measured, "model_flops_per_s"),
        data_wait_frac=_median(measured, "data_wait_frac"),
        steady_lines=len(steady),
        commits=sum(e.get("event") == "commit" for e in events),
        attempts=[_attempt(e) for e in starts],
        provenance=starts[-1]["provenance"],
    )


def write_result(run: RunDir) -> Result:
    """Build the result and leave it in the run folder as result.json."""
    result = build_result(run)
    write_atomic(run.result, json.dumps(result.model_dump(mode="json"), indent=1) + "\n")
    return result


def quantile(values: list[float], frac: float) -> float:
    """Linear between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = frac * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _refuse_incomplete(run: RunDir, plan: Plan, rows: list[Row], starts: list[Row]) -> None:
    if not rows:
        raise RunFolderError(
            "no metrics: the run has not written its first log line",
            where=str(run.metrics),
            do="let it train longer, or look at the newest log below attempts/",
        )
    origin = starts[-1].get("provenance") or {} if starts else {}
    versions = origin.get("versions") or {}
    needed = {
        "git sha": origin.get("git_sha"),
        "recipe hash": plan.recipe_hash,
        "machine hash": plan.machine_hash,
        "versions": versions.get("python") and versions.get("torch"),
        "node list": starts[-1].get("hosts") if starts else None,
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise RunFolderError(
            f"no result without {', '.join(missing)}: it could not be traced back to what ran",
            where=str(run.events),
            do="train from a git checkout with git installed, or from a wheel built in one",
        )


def _attempt(start: Row) -> Attempt:
    return Attempt(
        attempt=start["attempt"],
        time_s=start["time_s"],
        from_step=start["step"],
        world_size=start["world_size"],
        hosts=start["hosts"],
        git_sha=(start.get("provenance") or {}).get("git_sha") or "unknown",
    )


def _steady(rows: list[Row]) -> list[Row]:
    seen: set[int] = set()
    steady = []
    for row in rows:
        if row.get("attempt", 1) in seen:
            steady.append(row)
        seen.add(row.get("attempt", 1))
    return steady


def _wall_time_s(starts: list[Row], events: list[Row], metrics: list[Row]) -> float:
    """Seconds in which ranks ran: of each attempt, from its start to the last that it wrote."""
    # `attempt` is written before the ranks start, when the queue has let the next job in.
    lines = [row for row in (*events, *metrics) if row.get("event") != "attempt"]
    written = sorted(row["time_s"] for row in lines if isinstance(row.get("time_s"), int | float))
    total = 0.0
    begins = [start["time_s"] for start in starts]
    for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
        total += max((t for t in written if begin <= t < end), default=begin) - begin
    return total


def _values(rows: list[Row], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _median(rows: list[Row], key: str) -> float | None:
    values = _values(rows, key)
    return statistics.median(values) if values else None
