"""Where each constant stands while no published row speaks of it, and why.

A fit without a publication must not know that publication, so these never follow the fitted values.
"""

from __future__ import annotations

from aifactory_train.errors import AifactoryError
from aifactory_train.plan.constants import Constants
from benchmarks.plan_accuracy.fit import from_values, names_of

_GUESS = "guess"

# Name -> (value, why). MAMF: largest matrix products that ml-engineering measured on these parts, in short runs.
PRIORS: dict[str, tuple[float, str]] = {
    "gemm_frac.volta": (0.75, _GUESS),
    "gemm_frac.ampere": (0.85, "MAMF 0.87"),
    "gemm_frac.hopper": (0.75, "MAMF 0.80, and the power limit in long runs"),
    "gemm_frac.hopper fp8": (0.65, "guess, below bf16"),
    "gemm_frac.blackwell": (0.75, "MAMF 0.73"),
    "gemm_frac.blackwell fp8": (0.65, "guess, below bf16"),
    "gemm_frac.cdna2": (0.62, _GUESS),
    "gemm_frac.cdna3": (0.50, _GUESS),
    "gemm_frac.cdna3 fp8": (0.40, "guess, below bf16"),
    "gemm_frac.xe": (0.50, _GUESS),
    "gemm_frac.other": (0.60, "guess, among the others"),
    "gemm_frac.cpu": (1.0, "probe measures the rate itself"),
    "wave_frac": (0.5, "the last wave of tiles is half full on average"),
    "gemm_half_depth": (60.0, "a few steps of 32 to fill and drain a tile's pipeline"),
    "attention_frac.unfused": (0.40, _GUESS),
    "attention_frac.flash1": (0.35, "its paper: 0.25 to 0.40 on A100"),
    "attention_frac.flash2": (0.55, "its paper: 0.50 to 0.73 on A100"),
    "attention_frac.flash3": (0.60, "its paper: up to 0.75 on H100"),
    "newer_attention_frac": (0.65, "FlashAttention-3's paper: version 2 reaches 0.35 on H100"),
    "memory_frac": (0.75, "guess: plain copies reach 0.8 to 0.9"),
    "kernel_gap_s": (3e-6, _GUESS),
    "node_link_frac": (0.75, _GUESS),
    "nic_frac": (0.75, _GUESS),
    "node_latency_s": (10e-6, _GUESS),
    "nic_latency_s": (25e-6, _GUESS),
    "tp_overlap_frac": (0.5, _GUESS),
    "cp_overlap_frac": (0.7, _GUESS),
    "dp_overlap_frac": (0.8, _GUESS),
    "contention_frac": (0.15, _GUESS),
    "broadcast_s": (1e-3, _GUESS),
    "straggler_frac": (0.005, _GUESS),
    "step_host_s": (0.02, _GUESS),
    "power_exponent": (0.5, _GUESS),
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
