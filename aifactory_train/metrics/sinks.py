"""Where log lines go: metrics.jsonl first and always, then the console, then W&B if the recipe asks for it."""

from __future__ import annotations

import secrets
import sys
import time
from typing import Any

from tqdm import tqdm

from aifactory_train.errors import StorageError, UserError
from aifactory_train.plan.plan import Plan
from aifactory_train.rundir import RunDir, append_jsonl, write_atomic
from aifactory_train.units import format_fraction, format_rate, format_seconds


class Sinks:
    """Used on rank 0 only.

    Args:
        bar_columns: width of a progress bar, for a terminal; 0 prints one plain line per row, for a batch log.
    """

    def __init__(self, run: RunDir, plan: Plan, first_step: int, bar_columns: int) -> None:
        self.run, self.n_steps = run, plan.recipe.n_steps
        self._bar = None
        if bar_columns:
            # mpirun gives its ranks a terminal of 0 x 0, on which tqdm shows nothing: say the size.
            size = {"ncols": bar_columns, "nrows": 24}
            self._bar = tqdm(
                total=self.n_steps, initial=first_step, unit="step", file=sys.stdout, mininterval=0.5, **size
            )
        self._wandb = _open_wandb(run, plan)

    def write(self, row: dict[str, Any]) -> None:
        try:
            append_jsonl(self.run.metrics, row)
        except OSError as error:
            raise StorageError(
                f"{error.strerror} while writing a log line",
                where=str(self.run.metrics),
                do="free some space and launch again: it resumes at the last commit",
            ) from None
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.4f}, {format_rate(row['tokens_per_s'], 'tokens')}")
            self._bar.update(row["step"] - self._bar.n)
        else:
            print(self._line(row), flush=True)

    def note(self, text: str) -> None:
        """One line for the reader that is not a row: a commit, a stop."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _line(self, row: dict[str, Any]) -> str:
        mfu = "" if row["mfu_frac"] is None else f"  MFU {format_fraction(row['mfu_frac'])}"
        left_s = (self.n_steps - row["step"]) * row["step_time_s"]
        return (
            f"{time.strftime('%H:%M:%S')}  step {row['step']}/{self.n_steps}  loss {row['loss']:.4f}  "
            f"grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  {format_rate(row['tokens_per_s'], 'tokens')}{mfu}  "
            f"left {format_seconds(left_s)}"
        )


def _open_wandb(run: RunDir, plan: Plan) -> Any:
    """A W&B run in the run folder, or None. Resumes under the same id after a restart."""
    metrics = plan.recipe.metrics
    if metrics.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(
            "metrics.wandb is on and the package wandb is not installed",
            where="recipe: metrics.wandb",
            do="pip install 'aifactory-train[wandb]', or --set metrics.wandb=off",
        ) from None
    return wandb.init(
        project=metrics.wandb_project,
        name=plan.recipe.name,
        id=_wandb_id(run),
        dir=run.root,
        mode=metrics.wandb,
        resume="allow",
        settings=wandb.Settings(silent=True),
        config=plan.recipe.model_dump(mode="json"),
    )


def _wandb_id(run: RunDir) -> str:
    """The same for all attempts of a run folder, another for each folder."""
    if not run.wandb_id.exists():
        write_atomic(run.wandb_id, secrets.token_hex(6))
    return run.wandb_id.read_text()
