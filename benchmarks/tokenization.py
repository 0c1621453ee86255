"""How fast a process turns text into tokens and writes them as a shard, as `prepare` does in each of its workers.

The text is Python's standard library, the tokenizer a byte-level BPE that is trained on it. Ranks work alone, each on
the same text: as many of them as a node has cores show what `prepare` reaches there.

    python benchmarks/tokenization.py
    mpirun -n 2 python benchmarks/tokenization.py --folder SCRATCH
"""

from __future__ import annotations

import multiprocessing
from argparse import ArgumentParser

from aifactory_train.data.sources import open_source
from aifactory_train.data.tokenize import load_encoder, load_tokenizer, plan_units, tokenize_unit, train_tokenizer
from aifactory_train.measure.program import Quantity, start
from aifactory_train.measure.scratch import add_folder, shared_folder, text_data, write_text


def add_options(parser: ArgumentParser) -> None:
    add_folder(parser)
    parser.add_argument("--text-bytes", type=int, default=200_000, help="of each call (default: 200000)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer (default: 4096)")


def main() -> None:
    with start("tokenization", __doc__ or "", add_options) as program:
        options, timeout_s = program.options, program.options.timeout_s
        with shared_folder(program, 20 * options.text_bytes * program.control.size) as folder:
            text, tokenizer = folder / "text.jsonl", folder / "tokenizer"
            data = text_data(folder, text, options.vocab_size, 128)
            if program.control.rank == 0:
                write_text(text, options.text_bytes)
                train_tokenizer([open_source(data.sources[0], folder / "cache-0")], options.vocab_size, tokenizer)
            program.control.barrier(timeout_s)
            dataset = open_source(data.sources[0], folder / f"cache-{program.control.rank}")
            own = folder / f"rank-{program.control.rank}"
            own.mkdir()
            [unit] = plan_units(dataset, own, "the standard library", False)
            info, count = load_tokenizer(tokenizer), multiprocessing.Value("q", 0)
            encoder = load_encoder(info.file)
            shard = tokenize_unit(unit, encoder, info, count)
            quantities = [
                Quantity("aifactory_tokenization_text_bytes_per_second", shard.n_text_bytes),
                Quantity("aifactory_tokenization_tokens_per_second", shard.n_tokens),
            ]
            cell = {"text_bytes": options.text_bytes, "vocab_size": options.vocab_size}
            facts = {"text_bytes": shard.n_text_bytes, "tokens": shard.n_tokens, "documents": shard.n_documents}
            program.measure(
                cell, quantities, lambda: tokenize_unit(unit, encoder, info, count), facts=facts, reduction="none"
            )


if __name__ == "__main__":
    main()
