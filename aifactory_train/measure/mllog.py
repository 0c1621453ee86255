"""A run as lines with MLPerf's keys, for tools that read those. This is no MLPerf submission, and follows no rules.

Source of format and keys: mlperf_logging.mllog of MLCommons' repository `logging`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aifactory_train.bench.record import EnergyWindow
from aifactory_train.errors import storage_errors
from aifactory_train.plan.plan import Plan


class MlLog:
    """Adds `:::MLLOG` lines to a file as things happen; without a path (other ranks, not asked for) it does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        if path is not None:
            self._write("w", "")

    def mark(self, *keys: str, **metadata: Any) -> None:
        """Begin or end an interval: keys end in `_start` or `_stop`."""
        for key in keys:
            self._line("INTERVAL_START" if key.endswith("_start") else "INTERVAL_END", key, None, metadata)

    def settings(self, plan: Plan, config_filename: str) -> None:
        """Batch sizes are in rows; axes that are not used are 1."""
        at, recipe = plan.layout, plan.recipe
        values = {"config_filename": config_filename, "seed": recipe.train.seed}
        values |= {"global_batch_size": recipe.global_batch_rows, "micro_batch_size": at.micro_batch_rows}
        values |= {"gradient_accumulation_steps": at.accumulation, "max_sequence_length": recipe.data.seq_len_tokens}
        values |= {"tensor_parallelism": at.tp, "pipeline_parallelism": at.pp, "context_parallelism": at.cp}
        for key, value in (values | {"expert_parallelism": 1}).items():
            self._line("POINT_IN_TIME", key, value, {})

    def results(self, n_rows: int, energy: Sequence[EnergyWindow]) -> None:
        """Rows that the timed steps trained on; mean watts of each scope and method over these."""
        self._line("POINT_IN_TIME", "trained_samples", n_rows, {})
        for window in energy:
            metadata = {"scope": window.scope, "method": window.method, "seconds": window.seconds}
            self._line("POINT_IN_TIME", "power_reading", window.joules / window.seconds, metadata)

    def _line(self, event: str, key: str, value: Any, metadata: dict[str, Any]) -> None:
        row = {"namespace": "", "time_ms": int(time.time() * 1e3), "event_type": event, "key": key, "value": value}
        if self._path is not None:
            self._write("a", f":::MLLOG {json.dumps(row | {'metadata': metadata})}\n")

    def _write(self, mode: str, text: str) -> None:
        assert self._path is not None
        do = "name another file with --mllog"
        with storage_errors("writing the MLLOG file", self._path, do), open(self._path, mode) as file:
            file.write(text)
