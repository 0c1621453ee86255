"""Constants of the time model: few, physical, each with its meaning and unit.

Fitted on published results by `make plan-accuracy`, which says in docs/planner-accuracy.md how well they carry over
to results that they were not fitted on. A rate that was measured on the machine takes the place of its share.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Time of a forward and backward pass of the code of transformers over that of our decoder: the same Llama, float32,
# uncompiled, one thread of a CPU, 1.06 (0.96 to 1.11) for the yardstick and 0.99 (0.95 to 1.08) for the demo
# (benchmarks/model_code.py): no difference is shown, and the first is taken with the interval of its middle 80 %. It
# stands in for a GPU, where nobody has measured it.
TRANSFORMERS_CODE_FACTOR = 1.06
TRANSFORMERS_CODE_FACTOR_RANGE = (0.96, 1.11)


def _gemm_frac() -> dict[str, float]:
    return {
        "volta": 0.794,
        "ampere": 0.7,
        "hopper": 0.718,
        "hopper fp8": 0.717,
        "blackwell": 0.684,
        "blackwell fp8": 0.658,
        "cdna2": 0.469,
        "cdna3": 0.401,
        "cdna3 fp8": 0.206,
        "xe": 0.3,
        "other": 0.6,
        "cpu": 1.0,
    }


def _attention_frac() -> dict[str, float]:
    return {"unfused": 0.347, "flash1": 0.358, "flash2": 0.415, "flash3": 0.56}


@dataclass(frozen=True)
class Constants:
    """Shares of a peak are between 0 and 1.

    gemm_frac: of the peak, by a large matrix product that runs again and again within the power limit.
    wave_frac: of a wave of tiles over all multiprocessors, that a product loses at its end.
    gemm_half_depth: products over so short an inner side have half the rate.
    attention_frac: of the peak, by the attention kernel over the causal half; "unfused" is its matrix products alone.
    newer_attention_frac: what is left of that for kernels of before Hopper (flash1, flash2) on newer devices.
    memory_frac: of the memory rate, by operations between the matrix products and by the optimizer.
    kernel_gap_s: a device waits so long between two kernels.
    node_link_frac, nic_frac: of the links' rate, by a large collective. *_latency_s: start of one, and per hop.
    tp_overlap_frac: of tensor-parallel communication, hidden where the software overlaps it.
    cp_overlap_frac: of context-parallel communication, hidden behind the attention.
    dp_overlap_frac: of the computation, behind which gathers and reductions of data parallelism can hide.
    contention_frac: of hidden communication, paid for by slower computation beside it.
    broadcast_s: per rank that returns its share of the weights by a broadcast of its own, where the software does so.
    straggler_frac: of the step, by which it grows with each doubling of the number of nodes.
    step_host_s: per step, what no kernel hides: reading the norm, logging, the optimizer's many small launches.
    power_exponent: rate of a device ~ (its power limit / that of the stock part) to this power.
    """

    gemm_frac: dict[str, float] = field(default_factory=_gemm_frac)
    wave_frac: float = 0.534
    gemm_half_depth: float = 62.3
    attention_frac: dict[str, float] = field(default_factory=_attention_frac)
    newer_attention_frac: float = 0.496
    memory_frac: float = 0.728
    kernel_gap_s: float = 3.4e-6
    node_link_frac: float = 0.704
    nic_frac: float = 0.714
    node_latency_s: float = 9.75e-6
    nic_latency_s: float = 18.5e-6
    tp_overlap_frac: float = 0.586
    cp_overlap_frac: float = 0.7
    dp_overlap_frac: float = 0.788
    contention_frac: float = 0.202
    broadcast_s: float = 0.0012
    straggler_frac: float = 0.00531
    step_host_s: float = 0.0229
    power_exponent: float = 0.52


CONSTANTS = Constants()
