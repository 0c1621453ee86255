"""How fast a checkpoint is written and read, beside the disk's own rate by dd, measured in turns on one machine.

A state of float32 weights and two Adam moments is saved and committed by CheckpointManager (on disk, with all sums),
and loaded (with all sums verified). dd writes as many random bytes in as many processes as there are ranks, and reads
the files of the checkpoint. Both go past the page cache (O_DIRECT), whose pages may be dearer than the disk: on a
virtual machine the first that needs them waits for its host. Turns alternate ABBA; the first round does not count.
Writes benchmarks/results/checkpoint-speed-DATE.json and prints as its last lines
`save_to_dd RATIO low LOW high HIGH` and the same of load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aifactory_train.bench.paired import MIN_BLOCKS, order_of_turns, ratio_of_medians
from aifactory_train.measure.state import BYTES_PER_PARAMETER, drop_from_cache
from aifactory_train.results.provenance import provenance
from aifactory_train.rundir import step_folder, write_atomic
from benchmarks.checkpoint_speed.ranks import Ranks, started

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = Path("/dev/shm")
DD_BYTES = 1 << 24
# dd reads so many random bytes from memory, over and over: disks of clouds write zeros twice as fast.
SOURCE_BLOCKS = 16


def make_room(*paths: Path) -> None:
    """Remove what a turn left when it was last there, in the same way before each: the disk, too, has work with it."""
    for path in paths:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    os.sync()


def seconds_of(scripts: list[str]) -> float:
    """Of shell scripts, all side by side, to the end of the last."""
    start_s = time.perf_counter()
    running = [subprocess.Popen(["sh", "-ec", script], stderr=subprocess.PIPE) for script in scripts]
    for script, process in zip(scripts, running, strict=True):
        _, words = process.communicate()
        if process.returncode:
            raise SystemExit(f"{script[:200]}: {words.decode()}")
    return time.perf_counter() - start_s


def dd_write(source: Path, file: Path, n_blocks: int) -> str:
    """Script that writes a file and has it on the disk when it ends."""
    lines = []
    for start in range(0, n_blocks, SOURCE_BLOCKS):
        count = min(SOURCE_BLOCKS, n_blocks - start)
        how = "notrunc" if start + count < n_blocks else "notrunc,fsync"
        lines.append(f"dd if={source} of={file} bs={DD_BYTES} count={count} seek={start} oflag=direct conv={how}")
    return "\n".join(lines)


def dd_read(file: Path) -> str:
    return f"dd if={file} of=/dev/null bs={DD_BYTES} iflag=direct"


class Turns:
    """The four things that are measured: each gives its seconds."""

    def __init__(self, ranks: Ranks, n_ranks: int, folder: Path, source: Path) -> None:
        self.ranks, self.n_ranks, self.folder, self.source = ranks, n_ranks, folder, source
        self.files = step_folder(folder / "checkpoints", 1)

    def dd_write(self) -> float:
        files = [self.folder / f"dd-{i}" for i in range(self.n_ranks)]
        n_blocks = round(self.ranks.n_bytes / self.n_ranks / DD_BYTES)
        make_room(*files)
        taken_s = seconds_of([dd_write(self.source, file, n_blocks) for file in files])
        return taken_s * self.ranks.n_bytes / (n_blocks * DD_BYTES * self.n_ranks)

    def save(self) -> float:
        make_room(*self.files.glob("*"), *self.files.parent.glob("step-*"))
        return self.ranks.save_s()

    def dd_read(self) -> float:
        drop_from_cache(self.folder)
        return seconds_of([dd_read(file) for file in sorted(self.files.glob("*.distcp"))])

    def load(self) -> float:
        drop_from_cache(self.folder)
        return self.ranks.load_s()


def measure(turns: Turns, rounds: int) -> dict[str, list[float]]:
    """Bytes per second of each turn that counts, by what it did."""
    pairs: list[list[tuple[str, Callable[[], float]]]] = [
        [("dd_write", turns.dd_write), ("save", turns.save)],
        [("dd_read", turns.dd_read), ("load", turns.load)],
    ]
    rates: dict[str, list[float]] = {name: [] for pair in pairs for name, _ in pair}
    orders = order_of_turns(2, rounds + 1)
    for number in range(rounds + 1):
        shown = []
        for pair in pairs:
            for turn in orders[2 * number : 2 * number + 2]:
                name, work = pair[turn]
                rate = turns.ranks.n_bytes / work()
                if number > 0:
                    rates[name].append(rate)
                shown.append(f"{name} {rate / 1e9:.2f}")
        print(f"round {number} of {rounds}  {'  '.join(shown)} GB/s{'  (does not count)' * (not number)}", flush=True)
    return rates


def file_system(folder: Path) -> str:
    """ "ext4" or the like."""
    command = ["stat", "--file-system", "--format=%T", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e9, help="of the model; the state has 12 bytes for each")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, default=6, help=f"that count, at least {MIN_BLOCKS}; an even number is best"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs", help="on the disk to be measured")
    args = parser.parse_args()
    if args.rounds < MIN_BLOCKS or args.ranks < 1:
        parser.error(f"--rounds {args.rounds} --ranks {args.ranks}: at least {MIN_BLOCKS}, 1")
    args.folder.mkdir(parents=True, exist_ok=True)
    needed, free = 2 * args.parameters * BYTES_PER_PARAMETER, shutil.disk_usage(args.folder).free
    if free < needed:
        parser.error(f"{args.folder} has {free / 1e9:.0f} GB free, this needs {needed / 1e9:.0f}")
    facts = provenance()
    if facts["git_sha"] is None:
        raise SystemExit("no result without a commit to name\n  do:    run it in a git checkout, with git installed")

    result: dict[str, Any] = {
        "schema": "aifactory-checkpoint-speed/1",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "cores": os.cpu_count(),
        "file_system": file_system(args.folder),
        "load_1min_before": round(os.getloadavg()[0], 2),
        "arguments": {"parameters": args.parameters, "ranks": args.ranks, "rounds": args.rounds},
    }
    with (
        tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-speed-") as scratch,
        started(args.ranks, args.parameters, Path(scratch)) as ranks,
        tempfile.NamedTemporaryFile(dir=MEMORY, prefix="checkpoint-speed-") as source,
    ):
        source.write(os.urandom(SOURCE_BLOCKS * DD_BYTES))
        source.flush()
        result["state_bytes"] = ranks.n_bytes
        print(f"{ranks.n_bytes / 1e9:.2f} GB in {args.ranks} ranks", flush=True)
        rates = measure(Turns(ranks, args.ranks, Path(scratch), Path(source.name)), args.rounds)
    report(result, rates)


def report(result: dict[str, Any], rates: dict[str, list[float]]) -> None:
    """Print and write what was found."""
    result["load_1min_after"] = round(os.getloadavg()[0], 2)
    result["median_bytes_per_s"] = {name: statistics.median(values) for name, values in rates.items()}
    result["ratio_to_dd"] = {
        ours: ratio_of_medians([[r] for r in rates[ours]], [[r] for r in rates[theirs]])._asdict()
        for ours, theirs in (("save", "dd_write"), ("load", "dd_read"))
    }
    result["bytes_per_s"] = rates
    path = RESULTS / f"checkpoint-speed-{result['date'][:10]}.json"
    write_atomic(path, json.dumps(result, indent=1) + "\n")
    for name, values in rates.items():
        low, high = min(values), max(values)
        print(f"{name:9s} {statistics.median(values) / 1e9:5.2f} GB/s  from {low / 1e9:.2f} to {high / 1e9:.2f}")
    print(os.path.relpath(path))
    for name, ratio in result["ratio_to_dd"].items():
        print("{}_to_dd {ratio:.2f} low {low:.2f} high {high:.2f}".format(name, **ratio))


if __name__ == "__main__":
    main()
