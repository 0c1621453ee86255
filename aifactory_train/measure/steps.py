"""Optimizer steps to be timed: the engine as training builds it, on made-up rows or on those of the real loader.

Shapes: B rows of this rank, T tokens of a row (U = T + 1: inputs and targets overlap).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.bench.record import EnergyWindow, Flops, Unavailable, Validity
from aifactory_train.data.loader import Batch
from aifactory_train.data.packing import IGNORE
from aifactory_train.data.shards import check_fits_model, load_prepared
from aifactory_train.errors import PlanError, TrainingFault, UserError
from aifactory_train.measure.control import Control
from aifactory_train.measure.meters import Joined
from aifactory_train.metrics.rates import measure_matmul_flops_per_s
from aifactory_train.models.parts import DTYPES
from aifactory_train.plan.layout import n_devices
from aifactory_train.plan.plan import Plan, peak_flops_per_s
from aifactory_train.plan.rates import rate_key
from aifactory_train.train.engine import Engine, StepStats
from aifactory_train.train.ranks import Ranks
from aifactory_train.train.setup import build_loader

STEP_DURATION = "aifactory_train_step_duration_seconds"
# Steps at which a fingerprint holds the loss.
FINGERPRINT_STEPS = (1, 10, 20, 30)
# Batches that are made up before the clock starts, and come round again.
N_BATCHES = 16
DOCUMENTS_PER_ROW = 4


class Batches(Protocol):
    """Where steps get their rows from. wait_s: how long the consumer has waited so far."""

    wait_s: float

    def batch(self, step: int) -> Batch: ...

    def batches(self, first_step: int) -> Generator[Batch]: ...


class SyntheticBatches:
    """Random rows, a pure function of (seed, step modulo N_BATCHES, share of the batch); they cost no time.

    Token k comes about as often as 1 / (k + 1), as words do in text: that is something to learn, so the loss falls.
    With a document mask a row has DOCUMENTS_PER_ROW documents on average, which begin anywhere.
    """

    wait_s = 0.0

    def __init__(self, plan: Plan, rank: int, device: torch.device) -> None:
        recipe, layout = plan.recipe, plan.layout
        self._shape = (recipe.global_batch_rows // layout.dp, recipe.data.seq_len_tokens)
        self._document_mask, self._vocab_size = recipe.data.document_mask, recipe.model.vocab_size
        self._seed = (recipe.train.seed, layout.data_rank(rank))
        self._pin_memory = device.type == "cuda"
        self._made = [self._make(number) for number in range(N_BATCHES)]

    def batch(self, step: int) -> Batch:
        return self._made[step % N_BATCHES]

    def batches(self, first_step: int) -> Generator[Batch]:
        while True:
            yield self.batch(first_step)
            first_step += 1

    def _make(self, number: int) -> Batch:
        rng = np.random.default_rng((*self._seed, number))
        n_rows, n_tokens = self._shape
        # The logarithm is uniform, so the density falls as 1 / k.
        tokens_BU = np.exp(rng.random((n_rows, n_tokens + 1)) * math.log(self._vocab_size)).astype(np.int64) - 1
        input_BT, target_BT = tokens_BU[:, :-1].copy(), tokens_BU[:, 1:].copy()
        document_BT = position_BT = None
        if self._document_mask:
            start_BU = rng.random(tokens_BU.shape) < DOCUMENTS_PER_ROW / n_tokens
            target_BT[start_BU[:, 1:]] = IGNORE
            document_BT = np.cumsum(start_BU[:, :-1], axis=1, dtype=np.int32)
            T = np.arange(n_tokens, dtype=np.int64)
            position_BT = T - np.maximum.accumulate(np.where(start_BU[:, :-1], T, 0), axis=1)
        return Batch(
            self._tensor(input_BT),
            self._tensor(target_BT),
            None if document_BT is None else self._tensor(document_BT),
            None if position_BT is None else self._tensor(position_BT),
            n_valid_tokens=int((target_BT != IGNORE).sum()),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._pin_memory else tensor


class Stepper:
    """One optimizer step for each call of `step`, which waits for nothing that training does not wait for.

    alive: called with each step, for whoever watches for hangs.
    wait_s: seconds that this rank waited for its batch, for each step so far.
    """

    def __init__(self, engine: Engine, batches: Batches, alive: Callable[[], None]) -> None:
        self.engine, self.batches, self._alive = engine, batches, alive
        self.wait_s: list[float] = []
        self._stats: list[StepStats] = []
        self._stream = batches.batches(0)

    def step(self) -> None:
        """The next step. Collective: all ranks arrive."""
        self._alive()
        before_s = self.batches.wait_s
        batch = next(self._stream)
        self.wait_s.append(self.batches.wait_s - before_s)
        self._stats.append(self.engine.train_step(batch, len(self._stats) + 1))

    def numbers(self) -> tuple[list[float], list[float]]:
        """Of each step: loss in nats per valid token, gradient norm; of all ranks. Collective; waits for the device."""
        loss_sums = torch.stack([s.loss_sum.double() for s in self._stats])
        dist.all_reduce(loss_sums)  # all axes: every rank has made the same steps
        losses = loss_sums / torch.stack([s.n_valid_tokens.double() for s in self._stats]).clamp(min=1)
        norms = torch.stack([s.grad_norm.double() for s in self._stats])
        return losses.tolist(), norms.tolist()

    def close(self) -> None:
        """End the reader of batches, and give the device's memory back."""
        self._stream.close()
        self.engine.close()


def has_fallen(losses: Sequence[float]) -> bool:
    """Whether the loss of the last fifth of the steps lies below that of the first, by their medians."""
    n = max(1, len(losses) // 5)
    return statistics.median(losses[-n:]) < statistics.median(losses[:n])


def fingerprint(losses: Sequence[float], grad_norms: Sequence[float]) -> tuple[str, dict[str, str]]:
    """What the numbers of a deterministic run boil down to, and its parts: equal on sound nodes of one kind.

    Args:
        losses, grad_norms: of steps 1, 2, ... from the first weights on; at least FINGERPRINT_STEPS[-1] of them.
    """
    last = FINGERPRINT_STEPS[-1]
    parts = {f"loss_step_{step}": losses[step - 1].hex() for step in FINGERPRINT_STEPS}
    norms = "\n".join(norm.hex() for norm in grad_norms[:last])
    parts["grad_norms_sha256"] = hashlib.sha256(norms.encode()).hexdigest()
    return hashlib.sha256("\n".join(f"{k} {v}" for k, v in parts.items()).encode()).hexdigest(), parts


def agree_on_plan(build: Callable[[], Plan], control: Control, timeout_s: float) -> Plan:
    """Rank 0's plan on all ranks, so that a machine that is looked at now is one for all. Raises what rank 0 raised."""
    told: dict[str, Any] | None = None
    if control.rank == 0:
        try:
            told = {"plan": build().to_json()}
        except UserError as error:
            told = {"fault": [error.what, error.where, error.do]}
    agreed: dict[str, Any] = control.broadcast(told, timeout_s)
    if "fault" in agreed:
        what, where, do = agreed["fault"]
        raise PlanError(what, where=where, do=do)
    return Plan.model_validate_json(agreed["plan"])


def build_batches(plan: Plan, ranks: Ranks, device: torch.device, data: str) -> Batches:
    """`synthetic` or `real`. Raises DataError where the recipe's text is not prepared."""
    if data == "synthetic":
        return SyntheticBatches(plan, ranks.rank, device)
    prepared = load_prepared(plan.recipe.data)
    check_fits_model(prepared.manifest, plan.recipe.model.vocab_size)
    return build_loader(plan, ranks, prepared, pin_memory=device.type == "cuda")


def measure_gemm_flops_per_s(plan: Plan, device: torch.device) -> float | None:
    """Of this rank, while all ranks do the same; None where torch's plain product does not know the precision."""
    key = rate_key(plan.layout.precision)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None if key == "fp8" else measure_matmul_flops_per_s(device, DTYPES[key])


def slowest_device_flops_per_s(
    plan: Plan, by_rank: Sequence[Mapping[str, Any]], hosts: Sequence[str]
) -> tuple[float | None, list[Unavailable]]:
    """Of what all ranks reached at once; ranks of a CPU node share one device. None with the reason."""
    rates = [own["gemm_flops_per_s"] for own in by_rank]
    if None in rates:
        reason = f"matrix products of {plan.layout.precision} are not timed beside the steps"
        return None, [Unavailable(probe="aifactory_train_mamfu_ratio", reason=reason)]
    if plan.machine.device.kind != "cpu":
        return min(rates), []
    of_host: dict[str, float] = {}
    for host, rate in zip(hosts, rates, strict=True):
        of_host[host] = of_host.get(host, 0.0) + rate
    return min(of_host.values()), []


def samples_of(
    plan: Plan, by_rank: Sequence[Mapping[str, Any]], gemm_flops_per_s: float | None
) -> dict[str, dict[int, list[float]]]:
    """Metric -> rank -> samples, in the units of bench/metric_names.py.

    Args:
        by_rank: of each rank `seconds` and `wait_s` of each timed step, and `peak_bytes`.
        gemm_flops_per_s: of the slowest device; None: no MAMFU.
    """
    devices, peak = n_devices(plan.machine, plan.layout), peak_flops_per_s(plan)
    flops = plan.recipe.train.global_batch_tokens * plan.shape.model_flops_per_token
    amounts = {
        "aifactory_train_tokens_per_second": plan.recipe.train.global_batch_tokens,
        "aifactory_train_tokens_per_second_per_gpu": plan.recipe.train.global_batch_tokens / devices,
        "aifactory_train_model_flops_per_second_per_gpu": flops / devices,
        "aifactory_train_mfu_ratio": None if peak is None else flops / peak,
        "aifactory_train_mamfu_ratio": None if gemm_flops_per_s is None else flops / devices / gemm_flops_per_s,
    }
    found: dict[str, dict[int, list[float]]] = {}
    for rank, own in enumerate(by_rank):
        seconds = own["seconds"]
        found.setdefault(STEP_DURATION, {})[rank] = seconds
        for name, amount in amounts.items():
            if amount is not None:
                found.setdefault(name, {})[rank] = [amount / s for s in seconds]
        waits = [min(1.0, wait_s / s) for wait_s, s in zip(own["wait_s"], seconds, strict=True)]
        found.setdefault("aifactory_train_data_wait_ratio", {})[rank] = waits
        found.setdefault("aifactory_train_peak_memory_bytes", {})[rank] = [float(own["peak_bytes"])]
    return found


def facts_of(
    plan: Plan, samples: Mapping[str, Mapping[int, Sequence[float]]], energy: Sequence[EnergyWindow]
) -> dict[str, Any]:
    """Plan and prediction beside what was measured. window: all timed steps, each as long as on its slowest rank.

    energy_per_token_j: of the same steps, by scope and method; scopes are never added.
    """
    worst_s = [max(each) for each in zip(*samples[STEP_DURATION].values(), strict=True)]
    tokens, predicted = len(worst_s) * plan.recipe.train.global_batch_tokens, plan.predicted
    return {
        "plan": plan.model_dump(mode="json"),
        "recipe_hash": plan.recipe_hash,
        "predicted": {
            "step_duration_s": predicted.total_step_time_s,
            "step_duration_low_s": predicted.step_time_low_s,
            "step_duration_high_s": predicted.step_time_high_s,
            "peak_memory_bytes": predicted.peak_memory_bytes,
        },
        "measured": {
            "step_duration_s": statistics.median(worst_s),
            "peak_memory_bytes": max(max(v) for v in samples["aifactory_train_peak_memory_bytes"].values()),
        },
        "window": {"tokens": tokens, "seconds": sum(worst_s), "tokens_per_s": tokens / sum(worst_s)},
        "energy_per_token_j": {f"{window.scope} {window.method}": window.joules / tokens for window in energy},
    }


def flops_of(plan: Plan) -> Flops:
    """Per token, and the peak of one device in the plan's precision."""
    key = rate_key(plan.layout.precision)
    peak = getattr(plan.machine.device.peak_flops_per_s, key)
    source = None if peak is None else plan.machine.source_of(f"device.peak_flops_per_s.{key}")
    return Flops(
        convention=plan.shape.flops_convention,
        per_token=plan.shape.model_flops_per_token,
        peak_flops_per_s=peak,
        peak_source=None if source is None else source.source,
    )


def validity_of(
    losses: Sequence[float], grad_norms: Sequence[float], n_parameters: int | None, read: Joined
) -> Validity:
    """Of all steps, those of warm-up too."""
    return Validity(
        loss_finite=all(math.isfinite(value) for value in (*losses, *grad_norms)),
        loss_decreased=has_fallen(losses),
        n_parameters=n_parameters,
        **read.validity(),
    )


def count_parameters(plan: Plan, engine: Engine, control: Control, timeout_s: float) -> int | None:
    """Of the whole model, each weight once, however it is shared out; None but on rank 0, and with adapters.

    Raises TrainingFault where they are not as many as the plan counts: then another model has run.
    """
    if plan.recipe.lora is not None:
        return None  # the state holds adapters alone
    own = {name: tensor.numel() for name, tensor in engine.state_dict()["model"].items()}
    gathered = control.gather(own, timeout_s)
    if gathered is None:
        return None
    found = sum({name: n for names in gathered for name, n in names.items()}.values())
    if found != plan.shape.n_parameters:
        raise TrainingFault(
            f"the model has {found} parameters, the plan counts {plan.shape.n_parameters}",
            where=f"recipe {plan.recipe.name}: model",
            do="report it: model and plan/shape.py disagree",
        )
    return found
