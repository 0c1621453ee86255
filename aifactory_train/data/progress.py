"""Progress on stderr: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from aifactory_train.units import format_seconds

LINE_EVERY_S = 5.0  # a log stays readable over hours and still shows within seconds that work goes on


def say(text: str) -> None:
    """One plain line on stderr."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """How much of `total` is done. Use as a context manager."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit, self.n = what, total, unit, 0
        self._start_s = self._last_line_s = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", file=sys.stderr) if sys.stderr.isatty() else None

    def update_to(self, n: int) -> None:
        """`n` of `total` are done; may be called as often as one likes."""
        done, self.n = n - self.n, n
        if self._bar is not None:
            self._bar.update(done)
            return
        now_s = time.monotonic()
        if now_s - self._last_line_s >= LINE_EVERY_S:
            self._last_line_s = now_s
            self._line()

    def _line(self) -> None:
        took = format_seconds(time.monotonic() - self._start_s)
        say(f"{self.what}: {self.n:,} of {self.total:,} {self.unit}, {took}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()
