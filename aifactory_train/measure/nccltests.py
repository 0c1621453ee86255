"""The site's own nccl-tests binaries: run beside ours, their JSON read into the same records.

Keys and units are those of src/util.cu of https://github.com/NVIDIA/nccl-tests, 2.19 (JSON version 3): times in
microseconds, bandwidths in GB/s, nwrong null where nothing was checked, "true" and "false" as text.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from aifactory_train.bench.record import Protocol, Scalar, Validity
from aifactory_train.bench.statistics import steady_from
from aifactory_train.bench.wire import Op, bus_factor, estimate_wire
from aifactory_train.errors import UserError
from aifactory_train.measure.program import Cell, Program

BINARIES: dict[Op, str] = {
    "all_reduce": "all_reduce_perf",
    "all_gather": "all_gather_perf",
    "reduce_scatter": "reduce_scatter_perf",
    "all_to_all": "alltoall_perf",
    "sendrecv": "sendrecv_perf",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float"}
WARMUP_CALLS = 10
CALLS = 50


class Row(NamedTuple):
    """One size, out of place. seconds: of each call, by process; one row where the binary kept no others apart."""

    n_bytes: int
    seconds: dict[int, list[float]]
    n_wrong: int | None


def find_nccl_tests(folder: str | None) -> Path | None:
    """Where the binaries lie: `folder`, else on PATH; None if nowhere. Raises UserError for a wrong folder."""
    if folder is None:
        found = shutil.which(BINARIES["all_reduce"])
        return None if found is None else Path(found).parent
    if not (Path(folder) / BINARIES["all_reduce"]).is_file():
        what = f"no {BINARIES['all_reduce']} in {folder}"
        raise UserError(what, where="--nccl-tests", do="name the folder that holds it, often nccl-tests/build")
    return Path(folder)


def read_nccl_tests(path: Path) -> list[Row]:
    """Rows of a file that -J wrote with -I 1. Raises UserError where it is none."""
    try:
        document = json.loads(path.read_text())
        rows = [_row(result) for result in document["results"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"this is no JSON of nccl-tests with -I 1: {type(error).__name__}: {error}",
            where=str(path),
            do="build nccl-tests 2.19 or later, which times each call",
        ) from None
    errors = [text for text in document.get("errors", []) if text]
    if errors or not rows:
        what = f"nccl-tests measured {len(rows)} sizes and says: {'; '.join(errors) or 'nothing'}"
        raise UserError(what, where=str(path), do="run its command by hand; it stands in `args` of that file")
    return rows


def _row(result: dict[str, Any]) -> Row:
    timed = result["out_of_place_per_iter"]
    by_process = timed.get("per_process_max_times_us") or [timed["times_us"]]
    n_wrong = result["out_of_place"]["nwrong"]
    seconds = {process: [us / 1e6 for us in times] for process, times in enumerate(by_process)}
    return Row(int(result["size"]), seconds, None if n_wrong is None else int(float(n_wrong)))


def write_nccl_tests(
    program: Program, folder: Path, op: Op, dtype: str, min_bytes: int, max_bytes: int, algo: str
) -> None:
    """Run the binary of `op` over all sizes and write a record for each. All ranks arrive.

    Rank 0 alone starts it, as one process that drives all devices of the node.
    """
    control, timeout_s = program.control, program.options.timeout_s
    n_nodes = len(set(control.hosts))
    cell: dict[str, Scalar | None] = {"op": op, "dtype": dtype, "nodes": n_nodes, "algo": algo, "by": "nccl-tests"}
    if n_nodes > 1:
        why = "over several nodes its binaries are an MPI job of their own, which cannot be started inside this one"
        program.write(cell, {}, None, facts={"skipped": why})
        return
    with program.watched(cell):
        control.barrier(timeout_s)
        if control.rank == 0:
            rows, fault = _run(command(folder, op, dtype, min_bytes, max_bytes, control.size), timeout_s)
            if fault:
                program.write(cell, {}, None, fault=fault)
            for row in rows:
                _write_row(program, {**cell, "bytes": row.n_bytes}, op, row)
        control.barrier(2 * timeout_s)


def command(folder: Path, op: Op, dtype: str, min_bytes: int, max_bytes: int, n_devices: int) -> list[str]:
    """Without the file after -J. Sizes double; each call is timed and each size is checked."""
    sizes = ["-b", str(min_bytes), "-e", str(max_bytes), "-f", "2"]
    calls = ["-w", str(WARMUP_CALLS), "-n", str(CALLS), "-I", "1", "-c", "1"]
    return [str(folder / BINARIES[op]), *sizes, *calls, "-d", DTYPES[dtype], "-g", str(n_devices), "-J"]


def _run(command_line: list[str], timeout_s: float) -> tuple[list[Row], str]:
    """(rows, fault); the fault is "" where there is none."""
    with tempfile.TemporaryDirectory(prefix="nccl-tests-") as scratch:
        path = Path(scratch) / "out.json"
        try:
            done = subprocess.run(
                [*command_line, str(path)], capture_output=True, text=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return [], f"{command_line[0]} did not end within {timeout_s:.0f} s"
        if done.returncode:
            last = ([line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no words"])[-1]
            return [], f"{command_line[0]} ended with {done.returncode}: {last}"
        return read_nccl_tests(path), ""


def _write_row(program: Program, cell: Cell, op: Op, row: Row) -> None:
    n = program.control.size
    bus_bytes = row.n_bytes * bus_factor(op, n)
    amounts = {"algorithm_bandwidth": row.n_bytes, "bus_bandwidth": bus_bytes}
    samples = {
        f"aifactory_collective_{name}_bytes_per_second": {
            process: [amount / s for s in times] for process, times in row.seconds.items()
        }
        for name, amount in amounts.items()
    }
    samples["aifactory_collective_duration_seconds"] = row.seconds
    slowest = [max(times) for times in zip(*row.seconds.values(), strict=True)]
    steady = steady_from(slowest) is not None
    protocol = Protocol(
        warmup_steps=WARMUP_CALLS,
        warmup_rule=f"{WARMUP_CALLS} calls; then steady where the medians of two windows of 10 samples agree",
        steady=steady,
        timed_steps=len(slowest),
        timer="device_event+wall",
        rank_reduction="max",
        ci_reached=False,
    )
    wire = estimate_wire(program.machine, op, row.n_bytes, n, 1)
    validity = Validity(wrong_values=row.n_wrong)
    program.write(cell, samples, protocol, facts={"wire": wire._asdict()}, validity=validity)
