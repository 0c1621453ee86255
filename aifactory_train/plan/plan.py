"""plan.json: the only thing that training reads.

`make_plan` joins a recipe and a machine; the plan is frozen and round-trips through JSON.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from aifactory_train.errors import PlanError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.calibrate import correct_step_time
from aifactory_train.plan.contract import Layout, Part, Prediction, Shape
from aifactory_train.plan.deepspeed import refuse_conflicts
from aifactory_train.plan.layout import (
    cp_fault,
    data_parallel_alone,
    describe,
    fp8_fault,
    fp8_tokens_fault,
    n_devices,
    schedule_takes,
    tp_fault,
)
from aifactory_train.plan.network import axis_links
from aifactory_train.plan.rates import device_rates, rate_key
from aifactory_train.plan.refuse import check_wishes, nothing_left
from aifactory_train.plan.search import Candidate, Ranking, search
from aifactory_train.plan.shape import build_shape
from aifactory_train.plan.stages import STAGES_PER_RANK, V_SCHEDULES
from aifactory_train.plan.steptime import estimate_step_time_s, total_step_time_s
from aifactory_train.plan.support import why_not_trainable
from aifactory_train.plan.work import work_of
from aifactory_train.recipe.schema import Recipe, fingerprint
from aifactory_train.units import format_difference, format_fraction

PLAN_SCHEMA: Final = "aifactory-plan/1"
# A layout that this version cannot train is worth a note where it is faster by more than this.
NOTABLE_FRAC = 0.01


class Plan(Part):
    schema_: Literal["aifactory-plan/1"] = PLAN_SCHEMA
    recipe: Recipe
    recipe_hash: str
    machine: Machine
    machine_hash: str
    layout: Layout
    shape: Shape
    predicted: Prediction
    notes: list[str] = []

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def load_plan(path: Path) -> Plan:
    """Read plan.json. Raises PlanError where it is missing, damaged, of another version, or contradicts itself."""
    do = "aifactory-train launch RECIPE --run RUN  writes it anew"
    try:
        plan = Plan.model_validate_json(path.read_text())
    except OSError as error:
        raise PlanError(f"cannot read the plan: {error.strerror}", where=str(path), do=do) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        fault = f"{key}: {first['msg']}" if key else first["msg"]
        raise PlanError(f"not a plan of this version: {fault}", where=str(path), do=do) from None
    faults = _arithmetic_faults(plan)
    if faults:
        raise PlanError("\n".join(faults), where=f"{path}: layout", do=do)
    return plan


def _arithmetic_faults(plan: Plan) -> list[str]:
    """What training would stumble over, or pass over in silence, in a plan that was edited by hand."""
    at, rows = plan.layout, plan.recipe.global_batch_rows
    degrees = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    counts = (*degrees, "n_nodes", "world_size", "stages_per_rank", "micro_batch_rows", "accumulation")
    faults = [f"{key} is {getattr(at, key)}" for key in (*counts, "threads_per_rank") if getattr(at, key) < 1]
    if faults:
        return faults
    if at.world_size % at.n_nodes:
        faults.append(f"world_size is {at.world_size}, no multiple of n_nodes {at.n_nodes}")
    if (at.remat == "budget") != (at.remat_budget_frac is not None and 0 < at.remat_budget_frac < 1):
        faults.append(f"remat is {at.remat} and remat_budget_frac {at.remat_budget_frac}; a budget is between 0 and 1")
    if (product := math.prod(getattr(at, key) for key in degrees)) != at.world_size:
        faults.append(f"world_size is {at.world_size}, and {' x '.join(degrees)} is {product}")
    if (shared := at.dp * at.accumulation * at.micro_batch_rows) != rows:
        faults.append(
            f"{at.dp} replicas x accumulation {at.accumulation} x micro_batch_rows {at.micro_batch_rows} are {shared} "
            f"rows, and the recipe's batch has {rows}"
        )
    return faults + _split_faults(plan) + _pipeline_faults(plan)


def _split_faults(plan: Plan) -> list[str]:
    """Of tp, cp and fp8. That tp stays inside a node is a matter of speed, so a plan may say otherwise."""
    at, model, seq = plan.layout, plan.recipe.model, plan.recipe.data.seq_len_tokens
    if sentence := tp_fault(model, seq, at.tp):
        return [f"tp {at.tp}: {sentence}"]  # what the others say of the share of a rank of tp would be rounded
    found = {f"cp {at.cp}": cp_fault(model, seq, at.cp, at.tp, at.cp_attention)}
    if rate_key(at.precision) == "fp8":
        found[f"precision {at.precision}"] = fp8_fault(model, at.tp) or fp8_tokens_fault(
            at.micro_batch_rows, seq, at.cp
        )
    return [f"{key}: {sentence}" for key, sentence in found.items() if sentence]


def _pipeline_faults(plan: Plan) -> list[str]:
    at, n_layers = plan.layout, plan.recipe.model.n_layers
    if at.pp == 1:
        return []
    faults = []
    of_schedule = STAGES_PER_RANK.get(at.pipeline_schedule)
    if at.stages_per_rank != of_schedule and (of_schedule or at.stages_per_rank == 1):
        has = of_schedule or "2 or more"
        faults.append(f"stages_per_rank is {at.stages_per_rank}, and {at.pipeline_schedule} has {has}")
    if (n_stages := at.pp * at.stages_per_rank) > n_layers:
        faults.append(
            f"pp {at.pp} x stages_per_rank {at.stages_per_rank} are {n_stages}, and there are {n_layers} layers"
        )
    if not schedule_takes(at.pipeline_schedule, at.pp, at.accumulation):
        faults.append(f"accumulation {at.accumulation} is no number of micro-batches for {at.pipeline_schedule}")
    if at.reduce_each_micro_batch:
        faults.append(f"reduce_each_micro_batch is true, and with pp {at.pp} gradients are reduced once a step")
    return faults


def make_plan(recipe: Recipe, machine: Machine, n_nodes: int = 1, cpu_ranks: int = 1) -> Plan:
    """Join recipe and machine: layout, counts and predictions. The same arguments give the same plan.

    Args:
        n_nodes: nodes of the machine that take part.
        cpu_ranks: ranks per node on a machine without GPUs; on others there is one rank per device.

    Raises:
        PlanError: what the recipe asks for contradicts itself, model or machine, or nothing fits into the memory.
    """
    return make_ranked_plan(recipe, machine, n_nodes, cpu_ranks)[0]


def make_ranked_plan(recipe: Recipe, machine: Machine, n_nodes: int = 1, cpu_ranks: int = 1) -> tuple[Plan, Ranking]:
    """As `make_plan`, with the layouts that were compared."""
    for option, value in (("--nodes", n_nodes), ("--cpu-ranks", cpu_ranks)):
        if value < 1:
            raise PlanError(f"{option} is {value}", where="command line", do=f"give 1 or more, such as {option} 1")
    check_wishes(recipe, machine, n_nodes, cpu_ranks)
    ranking = search(recipe, machine, n_nodes, cpu_ranks)
    if ranking.chosen is None:
        raise nothing_left(recipe, machine, n_nodes, cpu_ranks, ranking)
    shape = build_shape(recipe.model, recipe.data.seq_len_tokens, recipe.lora)
    layout = Layout.model_validate(ranking.chosen.layout.model_dump())
    if layout.engine == "deepspeed":
        refuse_conflicts(recipe, layout)
    predicted = _predict(recipe, machine, ranking.chosen, shape, ranking.order_only)
    plan = Plan(
        recipe=recipe,
        recipe_hash=fingerprint(recipe),
        machine=machine,
        # Facts alone: the same machine has the same hash whenever it was read.
        machine_hash=fingerprint(machine.model_copy(update={"sources": [], "unseen": {}})),
        layout=layout,
        shape=shape,
        predicted=predicted,
        notes=_notes(recipe, machine, ranking, predicted),
    )
    return plan, ranking


def peak_flops_per_s(plan: Plan) -> float | None:
    """Peak of all devices of the plan together in its precision: what MFU is a share of. None if not known."""
    peak = getattr(plan.machine.device.peak_flops_per_s, rate_key(plan.layout.precision))
    return None if peak is None else peak * n_devices(plan.machine, plan.layout)


def _predict(recipe: Recipe, machine: Machine, chosen: Candidate, shape: Shape, order_only: bool) -> Prediction:
    layout, memory = chosen.layout, chosen.memory
    # Rates that only stand in to rank by are no prediction.
    terms_s = estimate_step_time_s(work_of(recipe), machine, layout) if order_only else chosen.terms_s
    modelled_s = total_step_time_s(terms_s)
    within = None if modelled_s is None else correct_step_time(machine, layout.precision, modelled_s)
    total_s = None if within is None else within.expected_s
    if within is not None and modelled_s is not None and within.expected_s != modelled_s:
        terms_s = terms_s | {"measured_correction": within.expected_s - modelled_s}
    tokens_per_s = run_time_s = mfu_frac = None
    if total_s is not None:
        tokens_per_s = recipe.train.global_batch_tokens / total_s
        run_time_s = recipe.n_steps * total_s
        peak = getattr(machine.device.peak_flops_per_s, rate_key(layout.precision))
        if peak is not None:
            mfu_frac = tokens_per_s * shape.model_flops_per_token / (peak * n_devices(machine, layout))
    return Prediction(
        memory_bytes=memory.terms_bytes,
        peak_memory_bytes=memory.peak_bytes,
        peak_at=memory.peak_at,
        host_bytes=memory.host_bytes,
        step_time_s=terms_s,
        total_step_time_s=total_s,
        step_time_low_s=None if within is None else within.low_s,
        step_time_high_s=None if within is None else within.high_s,
        tokens_per_s=tokens_per_s,
        mfu_frac=mfu_frac,
        run_time_s=run_time_s,
        device_hours=None if run_time_s is None else n_devices(machine, layout) * run_time_s / 3600,
    )


def _notes(recipe: Recipe, machine: Machine, ranking: Ranking, predicted: Prediction) -> list[str]:
    """A sentence for each choice and figure that rests on something unknown, or is not what the user would expect."""
    chosen, best = ranking.chosen, ranking.best
    assert chosen is not None and best is not None
    layout, notes = chosen.layout, []
    if chosen.why_not is not None:
        notes.append(f"not trainable: {chosen.why_not}; no layout of these ranks is, so launch refuses this plan")
    elif best.why_not is not None and best.tokens_per_s > (1 + NOTABLE_FRAC) * chosen.tokens_per_s:
        less = format_difference(best.step_time_s / chosen.step_time_s - 1)
        notes.append(f"faster would be {describe(best.layout)}: step time {less}; but {best.why_not}")
    elif best.layout.engine != layout.engine and best.tokens_per_s > (1 + NOTABLE_FRAC) * chosen.tokens_per_s:
        less = format_difference(best.step_time_s / chosen.step_time_s - 1)
        notes.append(
            f"faster would be {describe(best.layout)}: step time {less}, by a model that nobody has held against "
            "DeepSpeed on a GPU, so auto takes fsdp2 where it fits; to take the other: "
            f"--set layout.engine=deepspeed --set layout.zero_stage={best.layout.zero_stage}"
            f" --set layout.offload={best.layout.offload}"
        )
    else:
        notes += _plainer_notes(ranking, chosen)
    notes += _fp8_notes(recipe, machine, chosen)
    if layout.precision == "fp8_rowwise":
        notes.append("the rate of fp8 with a scale for each matrix stands in for that with a scale for each row")
    if layout.remat == "budget":
        notes.append(
            f"remat within {layout.remat_budget_frac:g} of activation memory is predicted linearly, between all kept "
            "and the forward pass repeated but for half of its products; the compiler decides block by block"
        )
    if layout.pipeline_schedule in V_SCHEDULES:
        notes.append(f"pipeline_schedule {layout.pipeline_schedule} was measured by nobody here; auto does not try it")
    if recipe.train.precision == "auto" and machine.device.native_bf16 is None:
        notes.append("whether the device computes in bf16 is unknown: precision auto became fp32")
    if ranking.limit_bytes is None:
        notes.append(
            f"device memory is unknown: micro_batch_rows {layout.micro_batch_rows} gives"
            f" {layout.micro_batch_rows * recipe.data.seq_len_tokens} tokens and parameters are gathered block by"
            " block; give the machine file its device.memory_bytes"
        )
    rates = device_rates(machine, layout.precision)
    notes += rates.assumed
    links = axis_links(machine, layout).values()
    notes += dict.fromkeys(said for link in links if link.degree > 1 for said in link.assumed)
    if predicted.total_step_time_s is None:
        notes.append("the matmul rate is unknown, so no time is predicted; measure with: aifactory-train probe")
    if ranking.order_only:
        notes.append("layouts were compared by rates of common parts, in the place of those that are unknown")
    return notes


def _plainer_notes(ranking: Ranking, chosen: Candidate) -> list[str]:
    """Where one that can be trained is predicted to be faster, and one with other axes was taken."""
    engine = chosen.layout.engine
    fastest = next((c for c in ranking.candidates if c.why_not is None and c.layout.engine == engine), chosen)
    axes = [(axis, getattr(fastest.layout, axis)) for axis in ("pp", "cp", "tp")]
    if all(getattr(chosen.layout, axis) == degree for axis, degree in axes) or ranking.order_only:
        return []
    if fastest.step_time_s * (1 + NOTABLE_FRAC) > chosen.step_time_s:
        return []
    less = format_difference(fastest.step_time_s / chosen.step_time_s - 1)
    return [
        f"a little faster is predicted for {describe(fastest.layout)}: step time {less}; as predictions are not that "
        "exact, fewer axes, larger micro-batches and room in memory go first; to take it: "
        + " ".join(f"--set layout.{axis}={degree}" for axis, degree in axes)
    ]


def _fp8_notes(recipe: Recipe, machine: Machine, chosen: Candidate) -> list[str]:
    """What fp8 would bring to the chosen layout, where device and model can have it and the recipe leaves it open."""
    if recipe.train.precision != "auto" or device_rates(machine, "fp8").peak_flops_per_s is None:
        return []
    if data_parallel_alone(recipe):  # adapters and the code of transformers do without fp8, too
        return []
    bf16_s = total_step_time_s(chosen.terms_s)
    fp8_layout = chosen.layout.model_copy(update={"precision": "fp8"})
    fp8_s = total_step_time_s(estimate_step_time_s(work_of(recipe), machine, fp8_layout))
    if bf16_s is None or fp8_s is None or fp8_s >= bf16_s:
        return []
    refused = "" if (why := why_not_trainable(fp8_layout)) is None else f"; {why}"
    return [
        f"fp8 would make this layout {format_fraction(bf16_s / fp8_s - 1)} faster; it changes the numbers, so it is "
        f"taken only where asked for: --set train.precision=fp8{refused}"
    ]
