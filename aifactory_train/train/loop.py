"""The training loop. Read it from top to bottom: this is all there is."""

from __future__ import annotations

import signal
import time
from typing import Any

from aifactory_train.errors import TrainingFault
from aifactory_train.faults.guard import check_finite
from aifactory_train.faults.signals import build_interrupted
from aifactory_train.rundir import log_event
from aifactory_train.train.setup import Run
from aifactory_train.units import format_count


def train(run: Run) -> None:
    """Train from the step after `run.first_step` to the token budget, or until a signal or the job's end asks to stop.

    Raises:
        Interrupted: after everything up to the last step has been saved.
    """
    recipe, model = run.plan.recipe, run.plan.recipe.checkpoint_model()
    n_steps, log_every, save_every = recipe.n_steps, recipe.metrics.log_every_steps, recipe.checkpoint.every_steps
    t0_s = time.monotonic()
    wait_s = run.loader.wait_s
    stopped_by = run.stop.before_first_step(run.is_out_of_time(run.first_step))
    if stopped_by and run.first_step < n_steps:
        _report_stop(run, run.first_step, stopped_by)
    run.meter.start_window()

    for step, batch in enumerate(run.loader.batches(run.first_step), start=run.first_step + 1):
        if step > n_steps:
            break
        stats = run.engine.train_step(batch, step)
        run.meter.add(stats.loss_sum, stats.n_valid_tokens)

        stopped_by = run.stop.at_step_boundary(run.is_out_of_time(step))
        last = step == n_steps or stopped_by != 0
        save = last or step % save_every == 0
        # Before each save the numbers are looked at, so that a broken state is never committed.
        if save or step % log_every == 0 or step == run.first_step + 1:
            row = run.meter.row(step, stats.grad_norm, stats.lr, run.loader.wait_s - wait_s)
            wait_s = run.loader.wait_s
            run.deadline.synced(row["step_time_s"])
            _check_finite(run, row)
            if run.sinks is not None:
                run.sinks.write(row)
        if save:
            with run.meter.stalled():
                run.checkpoints.save(step, row["tokens"], run.state_dict(), model)
        if last:
            break

    run.checkpoints.wait()
    if stopped_by and step < n_steps:
        _report_stop(run, step, stopped_by)
    if run.sinks is not None:
        log_event(run.folder, "finish", step=n_steps, wall_s=round(time.monotonic() - t0_s, 3))
        run.sinks.note(f"finished: step {n_steps}, {format_count(n_steps * recipe.train.global_batch_tokens)} tokens")


def _check_finite(run: Run, row: dict[str, Any]) -> None:
    try:
        check_finite(row)
    except TrainingFault as fault:
        fault.on_every_rank = True  # the row is reduced over all ranks
        run.checkpoints.wait()  # the save under way is of an earlier, good state
        raise


def _report_stop(run: Run, step: int, number: int) -> None:
    if run.sinks is not None:
        name = signal.Signals(number).name
        log_event(run.folder, "stop", step=step, signal=name, **run.deadline.event_fields())
    raise build_interrupted(number, step, step > run.first_step, run.deadline, run.folder.checkpoints)
