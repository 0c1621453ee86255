"""What the frameworks of published rows do: one table. The first line that fits a row holds.

Read from each framework's documentation or default settings at the time of the row. What a row says itself
(sequence parallelism, `compile`, the kernel in its notes) goes before the table.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from aifactory_train.plan.work import Software

# Kernels written by hand (norms, RoPE, activation, bias) and logits of the whole micro-batch with an fp32 loss.
# Their checkpoints repeat the whole forward of a block.
_HAND_FUSED = Software(
    fused_elementwise=True,
    loss_chunk_tokens=None,
    n_fp32_logits=1,
    stops_recomputing_early=False,
)

# (pattern for the column `framework`, what it does, why)
FRAMEWORKS: tuple[tuple[str, Software, str], ...] = (
    (
        r"Megatron-DeepSpeed \(BigScience\)|GPT-NeoX",
        dataclasses.replace(
            _HAND_FUSED,
            attention="unfused",
            fp32_gradients=False,
            overlap_dp=False,
            flat_step=True,
        ),
        "2021-22: fused masked softmax, scores in memory; one reduction of the gradients after the backward pass",
    ),
    (
        r"Megatron-DeepSpeed \(BigScience-style fork, ROCm\)",
        dataclasses.replace(_HAND_FUSED, attention="unfused", overlap_dp=False),
        "the same code on ROCm, with BF16_Optimizer, which adds gradients up in fp32",
    ),
    (
        r"Megatron-DeepSpeed",
        dataclasses.replace(_HAND_FUSED, overlap_dp=False),
        "2023 and later: --use-flash-attn",
    ),
    (
        r"BigCode Megatron-LM",
        dataclasses.replace(_HAND_FUSED, attention="flash1", overlap_dp=False),
        "2023: flash attention; distributed optimizer without overlap",
    ),
    (
        r"Megatron-LLaMA",
        _HAND_FUSED,
        "2023: flash attention; its own distributed optimizer overlaps, the standard one does not (see notes)",
    ),
    (r"^Megatron-LM", _HAND_FUSED, "flash attention on, distributed optimizer with overlap"),
    (
        r"MLPerf|NeMo/Megatron-core \+ TE",
        dataclasses.replace(_HAND_FUSED, overlap_tp=True, attention="flash3", fp32_gradients=False, fp8_inputs=True),
        "cuDNN attention; TP overlap in user buffers; grad_sync_dtype bf16; Transformer Engine saves fp8",
    ),
    (
        r"NeMo|Megatron-[Bb]ridge|Megatron-[Cc]ore|Transformer Engine",
        dataclasses.replace(_HAND_FUSED, overlap_tp=True, attention="flash3", fp32_gradients=False, fp8_inputs=True),
        "cuDNN attention; performance recipes: tp_comm_overlap, grad_reduce_in_fp32 off; Transformer Engine saves fp8",
    ),
    (
        r"MaxText|Pax",
        dataclasses.replace(_HAND_FUSED, attention="flash3"),
        "XLA fuses; cuDNN attention",
    ),
    (
        r"Aleph Alpha",
        dataclasses.replace(
            _HAND_FUSED,
            fused_elementwise=False,
            overlap_dp=False,
            fp32_gradients=False,
            vocab_parallel_loss=False,
            n_fp32_logits=3,
        ),
        "kernel= in the notes says attention and RMSNorm; ZeRO-1 after the backward pass, bf16 gradients",
    ),
    (
        r"llm-foundry",
        dataclasses.replace(_HAND_FUSED, attention="flash1", fused_elementwise=False, n_fp32_logits=0),
        "2023, FSDP1, eager: only attention (first generation) and the loss (loss_fn: fused_crossentropy) are fused",
    ),
    (
        r"torchtitan",
        Software(loss_chunk_tokens=None),
        "fused where the row is compiled; whole logits",
    ),
    (
        r"InternEvo",
        dataclasses.replace(
            _HAND_FUSED, fp32_gradients=False, n_fp32_logits=0, gathers_by_broadcast=True, flat_step=True
        ),
        "flash attention 2, fused RMSNorm and loss; ZeRO-1 reductions of bf16 gradients overlap, weights by broadcast",
    ),
    (r"PaddleNLP", _HAND_FUSED, "flash attention, fused RoPE and RMSNorm"),
    (
        r"Liger",
        Software(attention="flash3", fused_elementwise=True, overlap_dp=False),
        "attention 3 or 4; Liger kernels: fused norms and a loss in chunks; DeepSpeed ZeRO-3",
    ),
    (
        r"torchtune",
        Software(loss_chunk_tokens=None, fp32_gradients=False, fp32_states=False),
        "pure bf16; fused where the row is compiled",
    ),
    (r"nanotron", dataclasses.replace(_HAND_FUSED, fused_elementwise=False), "flash attention 2, eager"),
)
UNKNOWN = Software(loss_chunk_tokens=None)  # flash attention, whole logits, fused where compiled


def software_of(row: Mapping[str, str]) -> tuple[Software, bool]:
    """The software of a row, and whether its framework is in the table."""
    found = next((sw for pattern, sw, _ in FRAMEWORKS if re.search(pattern, row["framework"])), None)
    software = UNKNOWN if found is None else found
    # Counting the head is an opt-in where it exists at all; Megatron's backward passes gather and pass on once more.
    changes: dict[str, object] = {"stages_count_head": False, "moves_inputs_again": True}
    if row["seq_parallel"]:
        changes["sequence_parallel"] = row["seq_parallel"].startswith("yes")
    elif re.search(r"DeepSpeed|InternEvo|PaddleNLP|GPT-NeoX", row["framework"]):
        changes["sequence_parallel"] = False
    changes |= _before_flash(row)
    changes |= _kernel(row["notes"])
    if "torchtitan" in row["framework"] and row["compile"].startswith("yes") and row["date"] >= "2025":
        changes["n_fp32_logits"] = 1  # torchtitan compiles its loss too since January 2025
    notes = f"{row['sharding']}; {row['notes']}"
    if "standard distributed optimizer" in notes:
        changes["overlap_dp"] = False
    if "vanilla TP" in notes:
        changes["overlap_tp"] = False
    if re.search(r"async ?TP", notes, re.IGNORECASE):
        changes["overlap_tp"] = True
    if "MP mode PURE" in notes:
        changes["fp32_gradients"] = False  # Composer's PURE reduces in bf16, DEFAULT in fp32
    if "fp32 grad accum" in row["precision"]:
        changes["fp32_gradients"] = True
    if "fused kernels off" in notes:
        changes["fused_elementwise"] = False
    if "chunked cross entropy" in notes or "activation checkpointing" in notes:
        changes["loss_chunk_tokens"] = 1024  # torchtune's table is cumulative
    return dataclasses.replace(software, **changes), found is not None  # type: ignore[arg-type]


# FlashAttention is of May 2022 (arXiv:2205.14135), for Turing and newer parts.
FLASH_SINCE = "2022-06"


def _before_flash(row: Mapping[str, str]) -> dict[str, object]:
    """Scores in memory; where core attention alone is computed again none are kept, as with the first kernels."""
    if not ("2000" < row["date"] < FLASH_SINCE or "V100" in row["gpu"]):
        return {}
    return {"attention": "flash1" if row["act_ckpt"].startswith("selective") else "unfused"}


def _kernel(notes: str) -> dict[str, object]:
    """What notes say of kernels. Aleph Alpha's: torch, fused (Megatron's softmax), flash_attentionv1.0.8,
    flash_attention2, and + RMS kernel."""
    if re.search(r"attention FA[34]\b", notes):
        return {"attention": "flash3"}
    match = re.search(r"kernel=([^;]+)", notes)
    if match is None:
        return {}
    kernel = match[1].strip()
    if kernel in ("torch", "fused"):
        return {"attention": "unfused", "fused_elementwise": kernel == "fused", "fused_norm": False}
    fused = "RMS" in kernel
    return {"attention": "flash1" if "v1" in kernel else "flash2", "fused_elementwise": fused, "fused_norm": fused}
