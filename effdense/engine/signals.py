"""Being told to stop: a flag, and nothing else, is set when the signal comes."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from ..errors import speaks_for_all

# What batch systems and torchrun send before they kill, and Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A loader process that is told to end, and doesn't, ends after so many seconds.
_LOADER_SECONDS = 20


class StopSignals:
    """While entered, these signals are remembered instead of ending the process.

    A second Ctrl-C interrupts as it always does. The handler communicates nothing: processes
    agree on stopping at the boundary of a step, where all of them are (see
    :class:`effdense.engine.resumption.Keeper`).
    """

    def __init__(self) -> None:
        self.received = 0
        """The signal's number; 0: none yet."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python handles signals in the main thread only
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received == number:
                raise KeyboardInterrupt
            if speaks_for_all():
                # not print: what it interrupted may be in the middle of one
                os.write(
                    2, b"\nstopping after this step, with a checkpoint; Ctrl-C again: at once\n"
                )
        self.received = number

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def outlive_stop_signals(worker: int) -> None:
    """What a loader process does about these signals, which batch systems send to it too.

    Its trainer still needs it for the step that is under way, and ends it in its own way.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LOADER_SECONDS) and None)
