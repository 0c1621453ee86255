"""The verb calibrate: a machine file with what was measured."""

from __future__ import annotations

import datetime
from pathlib import Path

from aifactory_train.errors import MachineError, storage_errors
from aifactory_train.machine.load import load_machine, write_machine
from aifactory_train.plan.calibrate import calibrate, render_measured
from aifactory_train.results.observed import load_observations


def calibrate_file(name: str, measured: list[Path], out: Path | None) -> str:
    """Write the machine `name` with what was measured; returns what to tell the user.

    Raises:
        MachineError: `out` is there and is no machine file.
        RunFolderError, PlanError, StorageError: a record cannot be used, or `out` cannot be written.
    """
    before = load_machine(name)
    out = out or Path(f"{before.name}-measured.yaml")
    replaces = out.exists() and not out.is_dir()
    if replaces:
        _check_is_machine_file(out)
    rates, runs = load_observations(before, measured)
    after = calibrate(before, rates, runs, datetime.date.today().isoformat())
    with storage_errors("writing the machine file", out, "give another file: --out FILE"):
        write_machine(after, out)
    lines = [render_measured(after)]
    doubts = [*(rate.doubt for rate in rates), *(run.doubt for run in runs)]
    lines += [f"doubtful: {doubt}; measure it again on a quiet node" for doubt in doubts if doubt]
    for precision in ("fp32", "bf16", "fp8"):
        old, new = (getattr(m.measured.step_time_ratio, precision) for m in (before, after))
        if old is not None and new is None:
            lines.append(
                f"step_time_ratio.{precision}: dropped, because no {precision} run was given; name its runs too"
            )
    # A bare word would be looked up among the known machines.
    named = out if out.suffix in (".yaml", ".yml") or len(out.parts) > 1 else f"./{out}"
    lines.append(f"{'replaced' if replaces else 'written'}: {out}; plan with it: --machine {named}")
    return "\n".join(lines)


def _check_is_machine_file(path: Path) -> None:
    try:
        load_machine(path.resolve())
    except MachineError:
        raise MachineError(
            "the file exists and is no machine file, so it is not replaced",
            where=str(path),
            do="give another file: --out FILE",
        ) from None
