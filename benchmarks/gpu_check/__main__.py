"""Checks one GPU in at most 8 minutes, without a network, and writes benchmarks/results/gpu-check-DEVICE-DATE.json.

Exit code 0: all parts passed; 2: there is no GPU, or no commit to name; 4: a part did not pass, which the file says.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from aifactory_train.errors import AifactoryError, UserError
from aifactory_train.results.provenance import provenance
from aifactory_train.rundir import write_atomic
from aifactory_train.train.ranks import find_ranks, join
from benchmarks.gpu_check.context import measure_context
from benchmarks.gpu_check.memory import measure_memory
from benchmarks.gpu_check.parity import measure_parity
from benchmarks.gpu_check.setting import Sizes, gpu_sizes
from benchmarks.gpu_check.step import measure_step

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Compiling takes most of it. What is left after the cases of parity is enough for the other parts; the cases
# of axis cp come last, and the last of them has half a minute.
LIMIT_S, PARITY_S, CONTEXT_S = 480.0, 200.0, 450.0
NOT_PASSED = 4


def main() -> int:
    try:
        device = _gpu()
        facts = circumstances(device)
    except AifactoryError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    torch.cuda.set_device(device)
    result = facts | check(device, gpu_sizes())
    path = RESULTS / f"gpu-check-{_slug(facts['device']['name'])}-{facts['date'][:10]}.json"
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    print(f"{'passed' if result['passed'] else 'NOT PASSED'} in {result['seconds']:.0f} s: {os.path.relpath(path)}")
    return 0 if result["passed"] else NOT_PASSED


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError(
            "gpu-check needs a GPU, and torch sees none",
            where=f"torch {torch.__version__} on this machine",
            do="run make gpu-check on a machine with a GPU, with a torch built for it (make gpu-check SITE_TORCH=1)",
        )
    return torch.device("cuda", 0)


def circumstances(device: torch.device) -> dict[str, Any]:
    """What one needs to judge or repeat the numbers. Raises UserError where there is no commit to name."""
    facts = provenance()
    if facts["git_sha"] is None:
        raise UserError("no result without a commit to name", do="run it in a git checkout, with git installed")
    for package in ("torchao", "triton"):
        try:
            facts["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts["versions"][package] = None
    facts["versions"] |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "schema": "aifactory-gpu-check/1",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "device": {
            "name": properties.name if properties else "CPU",
            "memory_bytes": properties.total_memory if properties else None,
            "capability": [properties.major, properties.minor] if properties else None,
        },
        "cores": os.cpu_count(),
    }


def check(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """All parts on one device, in one process that is a run of one rank. A part that fails does not stop the others."""
    begin_s = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message=".*context_fn is passed.*")
    join(find_ranks(env={}), device)
    try:
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "parity": lambda: measure_parity(device, sizes, begin_s + PARITY_S),
            "step": lambda: measure_step(device, sizes),
            "memory": lambda: measure_memory(device, sizes),
            "context": lambda: measure_context(device, sizes, begin_s + CONTEXT_S),
        }
        found = {name: _measured(name, measure, begin_s) for name, measure in parts.items()}
    finally:
        dist.destroy_process_group()
    seconds = round(time.monotonic() - begin_s, 1)
    return {"passed": all(part["passed"] for part in found.values()), "seconds": seconds, **found}


def _measured(name: str, measure: Callable[[], dict[str, Any]], run_begin_s: float) -> dict[str, Any]:
    begin_s = time.monotonic()
    print(f"{name} ...", flush=True)
    try:
        part = measure()
    except Exception as error:  # told in the result with its place; the other parts are measured all the same
        traceback.print_exc()
        part = {"passed": False, "error": traceback.format_exception(error)[-3:]}
    part["seconds"] = round(time.monotonic() - begin_s, 1)
    if time.monotonic() - run_begin_s > LIMIT_S:
        part |= {"passed": False, "late": f"ended after the {LIMIT_S:.0f} s that the check may take"}
    print(f"{name}: {'passed' if part['passed'] else 'NOT PASSED'} in {part['seconds']:.0f} s", flush=True)
    return part


def _slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" to nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    raise SystemExit(main())
