"""How fast the data loader gives batches of prepared shards, and how long a training step would wait for one.

The shards are made here from the text of Python's standard library. Ranks share the rows of a step as in training. The
first cell asks for batches without a pause: what the loader can do. The second asks for one after each --step-s, as
training does while the loader reads ahead: its times are what a step waits.

    python benchmarks/loader.py
    mpirun -n 2 python benchmarks/loader.py --folder SCRATCH --rows 16 --seq-len 2048
"""

from __future__ import annotations

import time
from argparse import ArgumentParser

from aifactory_train.data.loader import Loader
from aifactory_train.data.prepare import prepare
from aifactory_train.data.shards import load_prepared
from aifactory_train.measure.program import Program, Quantity, start
from aifactory_train.measure.scratch import add_folder, describe_storage, shared_folder, text_data, write_text


def add_options(parser: ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--text-bytes", type=int, default=1_000_000, help="that are prepared (default: 1000000)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row (default: 2048)")
    parser.add_argument("--rows", type=int, default=4, help="of a rank in one step (default: 4)")
    parser.add_argument("--step-s", type=float, default=0.02, help="what a step computes (default: 0.02)")


def measure_loader(program: Program, loader: Loader, step_s: float, storage: dict[str, str]) -> None:
    options = program.options
    cell = {"seq_len_tokens": options.seq_len, "rows": options.rows, "step_s": step_s}
    quantities = [Quantity("aifactory_loader_batch_duration_seconds")]
    if not step_s:
        quantities.append(Quantity("aifactory_loader_tokens_per_second", options.rows * options.seq_len))
    batches = loader.batches(0)
    try:
        before = (lambda: time.sleep(step_s)) if step_s else None
        facts = {"rows_per_batch": options.rows, **storage}
        program.measure(cell, quantities, lambda: next(batches), before=before, facts=facts, reduction="none")
    finally:
        batches.close()


def main() -> None:
    with start("loader", __doc__ or "", add_options) as program:
        options, control = program.options, program.control
        with shared_folder(program, 20 * options.text_bytes) as folder:
            text = folder / "text.jsonl"
            data = text_data(folder / "prepared", text, 4096, options.seq_len)
            if control.rank == 0:
                write_text(text, options.text_bytes)
                prepare(data)
            control.barrier(options.timeout_s)
            loader = Loader(load_prepared(data), data, 1, options.rows * control.size, control.rank, control.size)
            storage = describe_storage(folder)
            measure_loader(program, loader, 0.0, storage)
            measure_loader(program, loader, options.step_s, storage)


if __name__ == "__main__":
    main()
