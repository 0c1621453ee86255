"""Checks on the numbers of a log line, before they are written or saved."""

from __future__ import annotations

import math
from typing import Any

from aifactory_train.errors import TrainingFault


def check_finite(row: dict[str, Any]) -> None:
    """Stop before a state with a loss or gradient that is no number reaches a checkpoint."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise TrainingFault(
                f"{name} is {row[name]} at step {row['step']}; nothing of this state was saved",
                where=f"step {row['step']}, lr {row['lr']:.3g}",
                do="launch again: it resumes at the last commit; if it comes back, lower optim.lr",
            )
