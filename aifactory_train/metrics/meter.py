"""From the stats of each step to one row per log line, with one host sync."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.metrics.names import METRICS
from aifactory_train.plan.plan import Plan, peak_flops_per_s


class Meter:
    """Collects device tensors; `row` reduces them over ranks and brings them to the host together."""

    def __init__(self, plan: Plan, device: torch.device, attempt: int) -> None:
        self.device, self.attempt = device, attempt
        self.world_size = plan.layout.world_size
        self.batch_tokens = plan.recipe.train.global_batch_tokens
        self.flops_per_token = plan.shape.model_flops_per_token
        self.peak_flops_per_s = peak_flops_per_s(plan)
        self.start_window()

    def start_window(self) -> None:
        self._loss_sum = torch.zeros((), device=self.device, dtype=torch.float64)
        self._n_valid_tokens = torch.zeros((), device=self.device, dtype=torch.float64)
        self._n_steps = 0
        self._stall_s = 0.0
        self._t0_s = time.perf_counter()

    def add(self, loss_sum: torch.Tensor, n_valid_tokens: torch.Tensor) -> None:
        """One step: this rank's summed loss, the valid tokens of all ranks."""
        self._loss_sum += loss_sum
        self._n_valid_tokens += n_valid_tokens
        self._n_steps += 1

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Time in here is not training time."""
        t0_s = time.perf_counter()
        yield
        self._stall_s += time.perf_counter() - t0_s

    def row(self, step: int, grad_norm: torch.Tensor, lr: float, data_wait_s: float) -> dict[str, Any]:
        """The row of metrics.jsonl for the window that ends at `step`. Collective; the one host sync."""
        numbers = (data_wait_s, float(peak_memory_bytes(self.device)))
        # Filled on the device: torch.tensor would copy them there and wait for it, a second sync.
        worst = torch.stack([torch.full((), x, device=self.device, dtype=torch.float64) for x in numbers])
        dist.all_reduce(self._loss_sum)  # all axes: every rank logs at the same steps
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        # Where no token of the window counted, as chats may have it, the loss is 0.
        packed = torch.stack((self._loss_sum / self._n_valid_tokens.clamp(min=1), grad_norm.double(), *worst))
        loss, norm, wait_s, memory = packed.tolist()
        elapsed_s = time.perf_counter() - self._t0_s
        step_time_s = (elapsed_s - self._stall_s) / self._n_steps
        flops_per_s = self.batch_tokens * self.flops_per_token / step_time_s
        values = {
            "step": step,
            "tokens": step * self.batch_tokens,
            "time_s": round(time.time(), 3),
            "attempt": self.attempt,
            "loss": loss,
            "grad_norm": norm,
            "lr": lr,
            "step_time_s": step_time_s,
            "tokens_per_s": self.batch_tokens / step_time_s,
            "model_flops_per_s": flops_per_s / self.world_size,
            "mfu_frac": flops_per_s / self.peak_flops_per_s if self.peak_flops_per_s else None,
            "memory_peak_bytes": int(memory),
            "data_wait_frac": min(1.0, wait_s / elapsed_s),
            "save_stall_s": self._stall_s,
        }
        self.start_window()
        return {name: values[name] for name in METRICS}


def peak_memory_bytes(device: torch.device) -> int:
    """Peak since the start of the process; reading it does not synchronise the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
