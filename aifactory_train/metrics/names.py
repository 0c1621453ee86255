"""The columns of metrics.jsonl: name -> unit and meaning. Nothing else is written there."""

from __future__ import annotations

METRICS = {
    "step": "optimizer steps done",
    "tokens": "tokens of all steps done, over all ranks, padding included",
    "time_s": "seconds since the epoch when the line was written",
    "attempt": "number of the launch that wrote the line",
    "loss": "nats per valid token, over all steps since the line before",
    "grad_norm": "global L2 norm of the gradient before clipping, last step",
    "lr": "learning rate of the last step",
    "step_time_s": "mean seconds per step since the line before, without checkpoint stalls",
    "tokens_per_s": "global batch tokens / step_time_s",
    "model_flops_per_s": "per rank, convention model_causal_v1",
    "mfu_frac": "model_flops_per_s of all ranks / peak of all devices in the machine file; null where that is unknown",
    "memory_peak_bytes": "largest over ranks: reserved by the caching allocator, or resident set on a CPU",
    "data_wait_frac": "share of the time that the slowest rank waited for its batch",
    "save_stall_s": "seconds that saving kept training waiting since the line before",
}
