"""Published rows as the planner's own words: Work, Machine, Layout, Software, and what was measured."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from aifactory_train.errors import UserError
from aifactory_train.machine.machine import Machine
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.work import Software, Work
from benchmarks.plan_accuracy.hardware import find_node, machine_of
from benchmarks.plan_accuracy.model import PublishedModel, model_of, tokens_per_s_of_tflops
from benchmarks.plan_accuracy.software import software_of

REFERENCE = Path(__file__).parent.parent / "references" / "published_results.csv"
REQUIRED = ("id", "outcome", "source", "gpu", "n_gpus", "layers", "hidden", "heads", "vocab", "seq_len", "micro_batch")
GIB = 1024**3
MemoryMetric = Literal["reserved", "allocated", "device"]


class RowsError(UserError):
    """A file of published results that cannot be read."""


class Skip(Exception):
    """A row that is not predicted, and why."""


@dataclass(frozen=True)
class Row:
    """One published run. tokens_per_s_per_device: measured; None where only memory or an outcome was.

    memory_metric: "reserved" and "allocated" by the framework's allocator, "device": all that the driver counts.
    assumed: what the row does not say.
    """

    id: str
    source: str
    outcome: Literal["ok", "OOM"]
    tier: str
    gpu: str
    model_name: str
    work: Work
    machine: Machine
    layout: Layout
    software: Software
    tokens_per_s_per_device: float | None
    step_time_s: float | None
    peak_memory_bytes: int | None
    memory_metric: MemoryMetric | None
    notes: str
    assumed: tuple[str, ...] = field(default=())


class Loaded(NamedTuple):
    """`skipped`: (id, reason) of every row of the file that is not in `rows`."""

    rows: list[Row]
    skipped: list[tuple[str, str]]


def load_rows(path: Path) -> Loaded:
    """Every row of the file, as a Row or with the reason why not.

    Raises:
        RowsError: no such file, or a column is missing.
    """
    rows: list[Row] = []
    skipped: list[tuple[str, str]] = []
    for raw in _read(path):
        try:
            rows.append(row_of(raw))
        except Skip as why:
            skipped.append((raw["id"], str(why)))
    return Loaded(rows, skipped)


def _read(path: Path) -> Iterator[dict[str, str]]:
    """Every column of the reference file; "" where `path` lacks one."""
    with REFERENCE.open(newline="", encoding="utf-8") as file:
        blank = dict.fromkeys(next(csv.reader(file)), "")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark first
            reader = csv.DictReader(file)
            missing = [c for c in REQUIRED if c not in (reader.fieldnames or [])]
            if missing:
                raise RowsError(
                    f"columns are missing: {', '.join(missing)}",
                    where=f"{path}:1",
                    do=f"give a file with the columns of {REFERENCE.name}",
                )
            for raw in reader:
                yield blank | {key: (value or "").strip() for key, value in raw.items() if key is not None}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RowsError(f"cannot read {path}: {error}", where=str(path), do="check the path: ROWS=FILE.csv") from None


def row_of(raw: dict[str, str]) -> Row:
    """Raises Skip with the reason where the planner has no words for this row."""
    _refuse(raw)
    node = find_node(raw["gpu"], _count(raw, "gpu_mem_gb"))
    if node is None:
        raise Skip(f"no hardware file for {raw['gpu']}")
    n_gpus = _needed(raw, "n_gpus")
    machine, assumed = machine_of(node, n_gpus, _count(raw, "gpus_per_node"), raw["inter_node"])
    software, known = software_of(raw)
    if not known:
        assumed.append(f"software of {raw['framework'] or 'an unnamed framework'}")
    counts = {key: _needed(raw, key) for key in ("layers", "hidden", "heads", "ffn", "vocab", "seq_len")}
    counts["kv_heads"] = _count(raw, "kv_heads") or counts["heads"]
    try:
        model = model_of(raw, counts)
        layout = layout_of(raw, machine)
    except ValidationError as error:
        fault = error.errors()[0]
        raise Skip(f"model or layout: {fault['msg']}") from None
    if layout.precision == "fp8" and machine.device.peak_flops_per_s.fp8 is None:
        raise Skip(f"fp8 on {raw['gpu']}, which has no fp8 peak")
    # Megatron may count the embedding and the head as a layer each: 126 layers in 128 stages.
    if layout.pp * layout.stages_per_rank > model.n_layers + 2:
        raise Skip("more pipeline stages than layers")
    tokens, source = measured_tokens_per_s(raw, model)
    if raw["outcome"] == "ok" and tokens is None and not raw["peak_mem_gb"]:
        raise Skip("ran, but neither speed nor memory is given")
    if source is not None:
        assumed.append(source)
    assumed += remat_of(raw["act_ckpt"], raw["framework"])[1]
    if not raw["zero_stage"] and "distributed optimizer" not in raw["sharding"]:
        assumed.append("ZeRO stage taken as 1")
    memory, metric = measured_memory(raw)
    work = Work(
        model=model, seq_len_tokens=_needed(raw, "seq_len"), global_batch_rows=_needed(raw, "global_batch_seqs")
    )
    return Row(
        id=raw["id"],
        source=raw["source"],
        outcome="OOM" if raw["outcome"] == "OOM" else "ok",
        tier=raw["tier"],
        gpu=raw["gpu"],
        model_name=raw["model"],
        work=work,
        machine=machine,
        layout=layout,
        software=software,
        tokens_per_s_per_device=tokens,
        step_time_s=None if tokens is None else work.global_batch_tokens / (tokens * n_gpus),
        peak_memory_bytes=memory,
        memory_metric=metric,
        notes=raw["notes"],
        assumed=tuple(assumed),
    )


# What the planner has no words for: (column, pattern, reason).
REFUSED = (
    ("outcome", r"^(?!(ok|OOM)$)", "outcome is neither ok nor OOM"),
    ("completeness", r"^(?!(full)?$)", "incomplete configuration"),
    ("model", r"(?i)moe|mixtral|\d+x\d+b|-a\d+(\.\d+)?b|deepseek|grok|gpt-?oss", "mixture of experts"),
    ("act_ckpt", r"CPU activation offload", "activations are offloaded to the host"),
    ("precision", r"(?i)fp4", "FP4 is not in the planner"),
    ("task", r"(?i)lora|adapter", "not all weights are trained"),
    ("notes", r"8-bit AdamW|optimizer in backward|activation offloading", "fine-tuning trick: optimizer or offload"),
)


def _refuse(raw: dict[str, str]) -> None:
    for column, pattern, reason in REFUSED:
        if re.search(pattern, raw[column]):
            raise Skip(reason)
    if (_count(raw, "ep") or 1) > 1:
        raise Skip("mixture of experts")


def _count(raw: dict[str, str], column: str) -> int | None:
    text = raw[column]
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        raise Skip(f"{column} is not a number: {text}") from None
    if not number.is_integer() or number < 0:
        raise Skip(f"{column} is not a whole number: {text}")
    return int(number)


def _needed(raw: dict[str, str], column: str) -> int:
    number = _count(raw, column)
    if not number:
        raise Skip(f"{column} is not given")
    return number


def _rate(raw: dict[str, str], column: str) -> float | None:
    if not raw[column]:
        return None
    try:
        number = float(raw[column])
    except ValueError:
        raise Skip(f"{column} is not a number: {raw[column]}") from None
    if not 0 < number < math.inf:
        raise Skip(f"{column} is not a positive number: {raw[column]}")
    return number


def layout_of(raw: dict[str, str], machine: Machine) -> Layout:
    """Degrees as published; accumulation from the global batch, checked against `grad_accum`."""
    world, pp, tp = _needed(raw, "n_gpus"), _count(raw, "pp") or 1, _count(raw, "tp") or 1
    cp = _count(raw, "cp") or 1
    dp = _count(raw, "dp") or world // (pp * tp * cp)
    if pp * dp * cp * tp != world:
        raise Skip("pp * dp * cp * tp is not the number of devices")
    micro, batch = _needed(raw, "micro_batch"), _needed(raw, "global_batch_seqs")
    if batch % (micro * dp):
        raise Skip("global batch is not micro_batch * dp * accumulation")
    accumulation = batch // (micro * dp)
    stated = _count(raw, "grad_accum")
    if stated not in (None, accumulation):
        raise Skip("grad_accum disagrees with global batch, micro_batch and dp")
    zero_stage, dp_shard, reshard = sharding_of(raw, dp)
    stages = _count(raw, "vpp") or 1
    return Layout(
        engine="fsdp2" if zero_stage == 3 else "deepspeed",
        world_size=world,
        n_nodes=-(-world // machine.device.per_node),
        pp=pp,
        dp_replicate=dp // dp_shard,
        dp_shard=dp_shard,
        cp=cp,
        tp=tp,
        zero_stage=zero_stage,
        pipeline_schedule="1f1b" if stages == 1 else "interleaved",
        stages_per_rank=stages,
        cp_attention="ring",  # Megatron-Core's default, cp_comm_type p2p, and torchtitan's
        micro_batch_rows=micro,
        accumulation=accumulation,
        reshard_after_forward=reshard,
        # FSDP in llm-foundry, torchtitan and torchtune, and DeepSpeed from stage 2 on reduce with each backward pass;
        # torch's pipelines once per step.
        reduce_each_micro_batch=zero_stage > 1 and not (zero_stage == 3 and pp > 1),
        remat=remat_of(raw["act_ckpt"], raw["framework"])[0],
        compile=raw["compile"].startswith("yes"),
        precision=precision_of(raw["precision"]),
        offload="optimizer" if "offload" in raw["sharding"] else "none",
        threads_per_rank=1,
    )


def sharding_of(raw: dict[str, str], dp: int) -> tuple[Literal[1, 2, 3], int, bool]:
    """(ZeRO stage, dp_shard, reshard after forward). Plain data parallelism is stage 1 over one rank.

    A stage that is not published is taken as 1. FSDP's SHARD_GRAD_OP is stage 2 of the file; here it is stage 3
    whose parameters stay gathered.
    """
    text = raw["sharding"]
    if "SHARD_GRAD_OP" in text:
        return 3, dp, False
    if match := re.search(r"replicate (\d+) x shard (\d+)", text):
        return 3, _divisor(int(match[2]), dp), True
    if match := re.search(r"FSDP=(\d+) x DP=(\d+)", text):
        return 3, _divisor(int(match[1]), dp), True
    stage = _count(raw, "zero_stage")
    if stage is None or "optimizer states sharded" in text:
        stage = 1
    if stage == 0:
        return 1, 1, False
    if stage not in (1, 2, 3):
        raise Skip(f"ZeRO stage {stage} is not known")
    match = re.search(r"(?:over|degree) (\d+)", text)
    return stage, _divisor(int(match[1]), dp) if match else dp, stage == 3  # type: ignore[return-value]


def _divisor(shard: int, dp: int) -> int:
    """A group that is larger than dp holds all of dp."""
    if not shard or (shard < dp and dp % shard):
        raise Skip(f"sharding group of {shard} does not divide dp {dp}")
    return min(shard, dp)


def remat_of(text: str, framework: str) -> tuple[Literal["none", "selective", "full"], list[str]]:
    """Remat, and what had to be assumed for it.

    Megatron's "selective" recomputes core attention, which FlashAttention does anyhow: none. torchtitan's keeps
    every second matrix product: selective.
    """
    if text.startswith("full"):
        return "full", []
    if text.startswith("none"):
        return "none", []
    if text.startswith("selective"):
        op = "op" in text or "torchtitan" in framework
        return ("selective" if op else "none"), []
    if text == "minimal_flash":
        return "selective", ["remat policy minimal_flash taken as selective"]
    if text == "custom remat policy":
        return "full", ["unpublished remat policy taken as full"]
    raise Skip(f"remat {text or 'not given'}")


def precision_of(text: str) -> Literal["fp32", "bf16", "fp8"]:
    """fp16 has the rates and bytes of bf16."""
    lower = text.lower()
    if "fp8" in lower:
        return "fp8"
    if "bf16" in lower or "fp16" in lower:
        return "bf16"
    if "fp32" in lower:
        return "fp32"
    raise Skip(f"precision {text}")


def measured_tokens_per_s(raw: dict[str, str], model: PublishedModel) -> tuple[float | None, str | None]:
    """Tokens/s of one device: as given, else from the step time, else from TFLOP/s in the row's own convention."""
    if raw["outcome"] == "OOM":
        return None, None
    flops = _rate(raw, "tflops_gpu")
    convert = tokens_per_s_of_tflops(raw["flops_convention"], model, _needed(raw, "seq_len"), raw["act_ckpt"])
    if "use TFLOPs" in raw["notes"] and flops is not None and convert is not None:
        return flops * convert, "tokens/s from TFLOP/s (its tokens/s are rounded)"
    for column in ("tokens_s_gpu", "derived_tokens_s_gpu"):
        if (rate := _rate(raw, column)) is not None:
            return rate, None
    if (step_s := _rate(raw, "step_time_s")) is not None:
        tokens = _needed(raw, "global_batch_seqs") * _needed(raw, "seq_len")
        return tokens / step_s / _needed(raw, "n_gpus"), None
    if flops is not None and convert is not None:
        return flops * convert, "tokens/s from TFLOP/s"
    return None, None


def measured_memory(raw: dict[str, str]) -> tuple[int | None, MemoryMetric | None]:
    """Bytes, and what they count. torch, nvidia-smi and Paddle count in binary units, whatever letters follow."""
    value = _rate(raw, "peak_mem_gb")
    if value is None or raw["outcome"] == "OOM":
        return None, None
    text = raw["mem_metric"].lower()
    unit = 1000 * 1024**2 if "paddle" in text else GIB  # Paddle's table is in MiB and was divided by 1000
    if "smi" in text:
        return round(value * unit), "device"
    if "alloc" in text or "active" in text:
        return round(value * unit), "allocated"
    return round(value * unit), "reserved"
