"""The flag that a stop signal sets. Imports nothing heavy, so that it stands before torch is loaded."""

from __future__ import annotations

import signal
from types import FrameType

from aifactory_train.rundir import STOP_SIGNAL


class StopFlag:
    """Remembers the signal that this process got. Made first of all, so that start-up heeds it too."""

    def __init__(self) -> None:
        self.signal_number = 0
        for number in (STOP_SIGNAL, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
