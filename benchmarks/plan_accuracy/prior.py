"""What is believed of each constant before any published row is seen, and why: the fit starts and ends here where no
row speaks. A fit without a publication must not know it, so these never change with the fitted values."""

from __future__ import annotations

from aifactory_train.errors import AifactoryError
from aifactory_train.plan.constants import Constants
from benchmarks.plan_accuracy.fit import from_values, names_of

_MAMF = "largest matrix products, measured (ml-engineering, MAMF), less the power limit in long runs"
_FLASH = "FlashAttention 1, 2, 3 papers: their share of the A100's or H100's peak, forward and backward"
_NCCL = "bus bandwidth of large collectives, nccl-tests on reference nodes"

# Name -> (value, why).
PRIORS: dict[str, tuple[float, str]] = {
    "gemm_frac.volta": (0.75, _MAMF),
    "gemm_frac.ampere": (0.85, _MAMF),
    "gemm_frac.hopper": (0.75, _MAMF),
    "gemm_frac.hopper fp8": (0.65, _MAMF),
    "gemm_frac.blackwell": (0.75, _MAMF),
    "gemm_frac.blackwell fp8": (0.65, _MAMF),
    "gemm_frac.cdna2": (0.62, _MAMF),
    "gemm_frac.cdna3": (0.50, _MAMF),
    "gemm_frac.cdna3 fp8": (0.40, _MAMF),
    "gemm_frac.other": (0.60, "between the others"),
    "gemm_frac.cpu": (1.0, "measured by probe, so nothing is lost"),
    "gemm_half_size": (60.0, "half of a 128 x 128 tile is lost at the edges of a product"),
    "attention_frac.unfused": (0.40, "batched products of 64 to 128 columns"),
    "attention_frac.flash1": (0.35, _FLASH),
    "attention_frac.flash2": (0.55, _FLASH),
    "attention_frac.flash3": (0.60, _FLASH),
    "newer_attention_frac": (0.65, "FlashAttention-2 on H100: 35 to 40 % of the peak, on A100 50 to 70 %"),
    "memory_frac": (0.75, "stream kernels reach 80 to 90 %, kernels with reductions less"),
    "kernel_gap_s": (3e-6, "start of a kernel on a full queue"),
    "node_link_frac": (0.75, _NCCL),
    "nic_frac": (0.75, _NCCL),
    "node_latency_s": (10e-6, _NCCL),
    "nic_latency_s": (25e-6, _NCCL),
    "tp_overlap_frac": (0.5, "Megatron-Core reports about half of it hidden"),
    "cp_overlap_frac": (0.7, "ring exchange beside attention"),
    "dp_overlap_frac": (0.8, "all of the backward pass but its ends"),
    "contention_frac": (0.15, "collectives take a few of 100 multiprocessors, and memory bandwidth"),
    "straggler_frac": (0.005, "weak scaling of bucketed data parallelism loses a few percent to 1000 nodes"),
    "step_host_s": (0.02, "reading the norm, logging, the optimizer's launches"),
    "power_exponent": (0.5, "dynamic power ~ clock x voltage^2"),
}


def load_prior(shipped: Constants) -> Constants:
    """`shipped` with every number replaced by its prior."""
    names = names_of(shipped)
    missing, extra = [n for n in names if n not in PRIORS], [n for n in PRIORS if n not in names]
    if missing or extra:
        raise AifactoryError(
            f"constants without a prior: {', '.join(missing) or 'none'}; priors without a constant: "
            f"{', '.join(extra) or 'none'}",
            where="benchmarks/plan_accuracy/prior.py: PRIORS",
            do="add or remove these lines; a value must not come from the published rows",
        )
    return from_values({name: PRIORS[name][0] for name in names}, shipped)
