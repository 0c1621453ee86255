"""A folder that all ranks of a benchmark see, and text to fill it."""

from __future__ import annotations

import json
import shutil
import sysconfig
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aifactory_train.errors import StorageError, storage_errors
from aifactory_train.machine.probe_look import run_tool
from aifactory_train.measure.program import Program
from aifactory_train.recipe.schema import Data
from aifactory_train.units import format_bytes

MOST_TEXT_BYTES = 64_000_000


def add_folder(parser: ArgumentParser) -> None:
    help_text = "on the file system to be measured, seen by all ranks; what is written there is removed (default: here)"
    parser.add_argument("--folder", type=Path, default=Path(), help=help_text)


@contextmanager
def shared_folder(program: Program, needed_bytes: float) -> Iterator[Path]:
    """A new folder below --folder, removed at the end. All ranks arrive.

    Raises StorageError where it cannot be written or has too little room.
    """
    base, timeout_s = program.options.folder.absolute(), program.options.timeout_s
    made = None
    if program.control.rank == 0:
        with storage_errors("making a folder for the benchmark", base, "name another one with --folder"):
            base.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(dir=base, prefix=f"bench-{program.benchmark}-")
        free = shutil.disk_usage(base).free
        if free < needed_bytes:
            shutil.rmtree(made)
            what = f"{format_bytes(free)} are free, the benchmark needs {format_bytes(needed_bytes)}"
            raise StorageError(what, where=str(base), do="free some space, or name another folder with --folder")
    folder = Path(program.control.broadcast(made, timeout_s))
    try:
        yield folder
        program.control.barrier(timeout_s)
    finally:
        if program.control.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def describe_storage(folder: Path) -> dict[str, str]:
    """What a benchmark of this folder measures. stripe: over which servers Lustre lays its files."""
    kind = run_tool(["stat", "--file-system", "--format=%T", str(folder)])
    told = {"file_system": kind.text.strip() or kind.fault}
    if told["file_system"] == "lustre":
        stripe = run_tool(["lfs", "getstripe", "-d", str(folder)])
        told["stripe"] = " ".join(stripe.text.split()) or stripe.fault
    return told


def write_text(path: Path, n_bytes: int) -> int:
    """Python's standard library as JSON lines, a document for each file, `n_bytes` of text at most. Bytes of the text.

    The same Python gives the same text; a library that is too small is repeated.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    written = 0
    with open(path, "w") as lines:
        while True:
            before = written
            for file in files:
                text = file.read_text(errors="ignore")
                size = len(text.encode())
                if written + size <= min(n_bytes, MOST_TEXT_BYTES):
                    lines.write(json.dumps({"text": text}) + "\n")
                    written += size
            if written == before:
                return written


def text_data(folder: Path, text: Path, vocab_size: int, seq_len_tokens: int) -> Data:
    """Settings to prepare that text in `folder`, with a tokenizer that is trained on it."""
    return Data.model_validate(
        {
            "sources": [{"name": "stdlib", "path": str(text)}],
            "tokenizer": {"train_vocab_size": vocab_size},
            "prepared_dir": str(folder),
            "seq_len_tokens": seq_len_tokens,
            "workers": 1,
        }
    )
