"""Which compilations happen in a stretch of a program: for tests that a step after the first compiles nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.callback import CallbackArgs, callback_handler
from torch._dynamo.utils import get_compilation_metrics


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Fills the list with one line per compilation inside: its number, what it is of, and which guard failed.

    Forward graphs, and backward graphs where they are compiled when they first run. It sees this process only.
    """
    lines: list[str] = []

    def begins(args: CallbackArgs) -> None:
        lines.append(f"{args.compile_id} {args.callback_trigger.name.lower()}")

    callback_handler.register_start_callback(begins)
    try:
        yield lines
    finally:
        callback_handler.remove_start_callback(begins)
        # torch keeps the newest only, and counts from 0 after each reset: a later one takes the place of its namesake.
        why = {str(m.compile_id): f"{m.co_name}: {m.recompile_reason}" for m in get_compilation_metrics()}
        lines[:] = [f"{line} {why.get(line.split()[0], '')}".rstrip() for line in lines]
