"""Seconds that one device computes for one micro-batch: a block and the output head, without communication.

Matrix products run at a share of the peak that falls with small sides; attention at a share of its own; everything
between them moves bytes. Sources of the forms: docs/planner-accuracy.md.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from aifactory_train.machine.machine import Device, Machine
from aifactory_train.plan import rates, shape
from aifactory_train.plan.constants import Constants
from aifactory_train.plan.contract import Layout
from aifactory_train.plan.work import Software, Work

# Of the stock parts, by their data sheets; each works on one tile of a product's result at a time.
MULTIPROCESSORS = {
    "volta": 80,
    "ampere": 108,
    "hopper": 132,
    "blackwell": 148,
    "cdna2": 110,
    "cdna3": 304,
    "xe": 64,
    "cpu": 0,
}
TILE_ELEMENTS = 256 * 128
# Tensor cores want sides that are multiples of 8; batched products over other heads are slower by about this.
UNALIGNED_HEAD_FACTOR = 4.0
# What the vendor allows the stock part of each architecture to draw, by its data sheet; a GCD draws half of a package.
STOCK_POWER_W = {"volta": 300, "ampere": 400, "hopper": 700, "blackwell": 1000, "cdna2": 280, "cdna3": 750}
_ARCHITECTURES = (
    (r"V100", "volta"),
    (r"A[18]00", "ampere"),
    (r"GB[23]00|B[23]00", "blackwell"),
    (r"G?H[12]00|H800", "hopper"),
    (r"MI2\d\d", "cdna2"),
    (r"MI3\d\d", "cdna3"),
    (r"Max.1550", "xe"),
)
# Kernels that the forward of a block starts: a library's or compiled ones, and one by one from Python.
KERNELS_FUSED, KERNELS_EAGER = 14, 32
# Numbers of 2 bytes that a norm reads and writes: one kernel; or cast, square, mean, product, cast, weight in fp32.
NORM_ELEMENTS, EAGER_NORM_ELEMENTS = 2, 18


def architecture_of(device: Device) -> str:
    """The vendor's name of the generation, "cpu", or "other"."""
    return "cpu" if device.kind == "cpu" else _architecture(device.name)


@functools.cache
def _architecture(device_name: str) -> str:
    return next((name for pattern, name in _ARCHITECTURES if re.search(pattern, device_name, re.IGNORECASE)), "other")


@dataclass(frozen=True)
class Pace:
    """What one rank sustains, in FLOP/s and bytes/s. On a CPU the ranks of a node share it."""

    gemm_flops_per_s: float
    head_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    wave_elements: float
    gemm_half_depth: float
    kernel_gap_s: float


@dataclass(frozen=True)
class Forward:
    """Seconds of one forward, by what bounds them; of its last product; of every second one (which selective
    remat computes again); of the products of its backward pass."""

    gemm_s: float
    backward_gemm_s: float
    last_gemm_s: float
    second_gemms_s: float = 0.0
    attention_s: float = 0.0
    elementwise_s: float = 0.0
    gaps_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.gemm_s + self.attention_s + self.elementwise_s + self.gaps_s


def device_pace(machine: Machine, layout: Layout, software: Software, constants: Constants) -> Pace | None:
    """None where no rate of the matrix products or of the memory is known or can be assumed."""
    fp8 = rates.rate_key(layout.precision) == "fp8"
    base = rates.device_rates(machine, "bf16" if fp8 else layout.precision)
    low = rates.device_rates(machine, "fp8") if fp8 else base
    if base.peak_flops_per_s is None or low.peak_flops_per_s is None or base.memory_bytes_per_s is None:
        return None
    architecture = architecture_of(machine.device)
    n_devices = layout.n_nodes * (1 if machine.device.kind == "cpu" else machine.device.per_node)
    share = min(1.0, n_devices / layout.world_size)
    power = _power_factor(machine, architecture, constants)
    low_key = f"{architecture} fp8" if fp8 else architecture
    # Attention has a share of the peak: a measured rate of products is taken back to the peak that goes with it.
    gemm_frac = constants.gemm_frac.get(architecture, constants.gemm_frac["other"])
    peak = base.peak_flops_per_s / (gemm_frac if base.matmul_source == "measured" else 1.0)
    memory_frac = 1.0 if base.memory_source == "measured" else constants.memory_frac
    head_rate = share * base.peak_flops_per_s * _gemm_frac(base, architecture, power, constants)
    gemm_rate = share * low.peak_flops_per_s * _gemm_frac(low, low_key, power, constants)
    attention_frac = constants.attention_frac[software.attention]
    if software.attention in ("flash1", "flash2") and architecture not in ("volta", "ampere", "cpu"):
        attention_frac *= constants.newer_attention_frac
    return Pace(
        gemm_flops_per_s=gemm_rate,
        head_flops_per_s=head_rate,
        attention_flops_per_s=share * peak * attention_frac * power,
        memory_bytes_per_s=share * base.memory_bytes_per_s * memory_frac,
        wave_elements=constants.wave_frac * TILE_ELEMENTS * MULTIPROCESSORS.get(architecture, 100),
        gemm_half_depth=constants.gemm_half_depth,
        kernel_gap_s=constants.kernel_gap_s,
    )


def _gemm_frac(found: rates.Rates, key: str, power: float, constants: Constants) -> float:
    """A measured rate is what large products reach already, power limit and all."""
    if found.matmul_source == "measured":
        return 1.0
    return constants.gemm_frac.get(key, constants.gemm_frac["other"]) * power


def _power_factor(machine: Machine, architecture: str, constants: Constants) -> float:
    stock_w, power_w = STOCK_POWER_W.get(architecture), machine.device.power_w
    if stock_w is None or power_w is None or power_w >= stock_w:
        return 1.0
    return (power_w / stock_w) ** constants.power_exponent


def gemm_s(m: float, n: float, k: float, flops_per_s: float, pace: Pace, n_bytes: int = 2) -> float:
    """Seconds of one product [m, k] x [k, n]: the slower of its FLOPs and of its bytes.

    The multiprocessors take the tiles of the result in waves, the last of which is not full; a short k leaves little
    between the start and the end of a tile.
    """
    lost = (1 + pace.wave_elements / (m * n)) * (1 + pace.gemm_half_depth / k)
    flops_s = 2 * m * n * k / flops_per_s * lost
    return max(flops_s, n_bytes * (m * k + k * n + m * n) / pace.memory_bytes_per_s)


def backward_gemm_s(m: float, n: float, k: float, flops_per_s: float, pace: Pace, n_bytes: int = 2) -> float:
    """Seconds of the gradients of a product: [m, n] x [n, k] of its input, [k, m] x [m, n] of its weight."""
    return gemm_s(m, k, n, flops_per_s, pace, n_bytes) + gemm_s(k, n, m, flops_per_s, pace, n_bytes)


def block_forward(work: Work, layout: Layout, software: Software, pace: Pace) -> Forward:
    """One block, one micro-batch, on one device of the tp and cp axes."""
    model, tp = work.model, layout.tp
    tokens = layout.micro_batch_rows * work.seq_len_tokens / layout.cp
    d, f = model.hidden_size, model.ffn_size * model.n_active_experts / tp
    q = model.n_heads * model.head_size / tp
    kv = model.n_kv_heads * model.head_size / min(tp, model.n_kv_heads)
    n_mlp = model.n_mlp_matrices
    size = shape.BYTES[layout.precision]
    products = ((tokens, q + 2 * kv, d), (tokens, d, q), (tokens, (n_mlp - 1) * f, d), (tokens, d, f))
    fused = layout.compile if software.fused_elementwise is None else software.fused_elementwise
    moved_bytes = _moved_elements(tokens, d, f, q, kv, layout, software, fused, n_mlp, model.qk_norm) * size
    if rates.rate_key(layout.precision) == "fp8":
        # Each input is read in bf16 and written in fp8 for its product, each gradient too in the backward pass.
        moved_bytes += 3 * sum(m * k for m, _, k in products)
    # Half of the square of scores, q k^T and scores v. Without flash attention the masked half is computed too.
    causal = 2 * tokens * work.seq_len_tokens * q
    attention_s = causal * (1 if software.flash_attention else 2) / pace.attention_flops_per_s
    if not software.flash_attention:
        scores = tokens * work.seq_len_tokens * model.n_heads / tp
        # Written, read and written by the softmax, read; one by one also mask and scale.
        if model.head_size % 8:
            attention_s *= UNALIGNED_HEAD_FACTOR
        attention_s += scores * size * (4 if fused else 8) / pace.memory_bytes_per_s
    rate = pace.gemm_flops_per_s
    forward_s = [gemm_s(m, n, k, rate, pace, size) for m, n, k in products]
    qkv_s, o_s, up_s, down_s = forward_s
    # Of q, k, v, o, gate, up, down: k, o and up; of a plain MLP's six: k, o and down.
    second_mlp_s = up_s / 2 if n_mlp == 3 else down_s
    return Forward(
        gemm_s=sum(forward_s),
        second_gemms_s=qkv_s * kv / (q + 2 * kv) + o_s + second_mlp_s,
        backward_gemm_s=sum(
            gemm_s(m, k, n, rate, pace, size) if work.lora else backward_gemm_s(m, n, k, rate, pace, size)
            for m, n, k in products
        ),
        last_gemm_s=down_s,
        attention_s=attention_s,
        elementwise_s=moved_bytes / pace.memory_bytes_per_s,
        gaps_s=(KERNELS_FUSED if fused else KERNELS_EAGER) * pace.kernel_gap_s,
    )


def _moved_elements(
    tokens: float,
    d: float,
    f: float,
    q: float,
    kv: float,
    layout: Layout,
    software: Software,
    fused: bool,
    n_mlp: int,
    qk_norm: bool,
) -> float:
    """Numbers read and written between the products of a block, forward.

    Fused: a norm with its residual sum (2 in, 2 out), RoPE in place, activation and product in one. One by one: norm
    (2) and sum (3) apart, RoPE in six passes, activation (2) and product (3) apart.
    """
    split = layout.tp if software.sequence_parallel else 1
    normed = 2 if qk_norm else 1
    if fused:
        per_token = 2 * 4 * d / split + 2 * (q + kv) * normed + n_mlp * f
    else:
        norm = NORM_ELEMENTS if software.fused_norm else EAGER_NORM_ELEMENTS
        per_token = 2 * (norm + 3) * d / split + (6 + norm * (normed - 1)) * (q + kv) + (5 if n_mlp == 3 else 4) * f
    return tokens * per_token


def head_forward(work: Work, layout: Layout, software: Software, pace: Pace) -> Forward:
    """Final norm, output head and loss of one micro-batch, split over tp.

    The loss passes over its logits in fp32 four times forward, one kernel over the logits themselves once; the
    backward pass is counted as twice the forward.
    """
    model, size = work.model, shape.BYTES[layout.precision]
    tokens = layout.micro_batch_rows * work.seq_len_tokens / layout.cp
    vocab = model.vocab_size / layout.tp
    n_logits = tokens * (vocab if software.vocab_parallel_loss else model.vocab_size)
    logit_bytes = 2 * size if software.n_fp32_logits == 0 else size + 4 * shape.BYTES["fp32"]
    chunks = 1 if software.loss_chunk_tokens is None else max(1.0, tokens / software.loss_chunk_tokens)
    product = tokens, vocab, model.hidden_size, pace.head_flops_per_s, pace, size
    return Forward(
        gemm_s=gemm_s(*product),
        backward_gemm_s=backward_gemm_s(*product),
        last_gemm_s=gemm_s(*product),
        elementwise_s=n_logits * logit_bytes / pace.memory_bytes_per_s,
        gaps_s=KERNELS_EAGER * chunks * pace.kernel_gap_s,
    )
