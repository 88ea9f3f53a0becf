"""Owns how SIGINT, SIGTERM and SIGHUP end a command at once. Knows no job."""

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

INTERRUPTED = 130
"""The exit code, as of a shell for SIGINT."""
# A terminal that is closed, a connection that drops; nohup has it ignored.
_HANGUP = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *_HANGUP)
TWICE_SECONDS = 0.05
"""No one presses Ctrl-C again so soon: one signal to a process group comes twice, for the process
that the command was started as passes on what it gets (supervise.py)."""


class Interrupt:
    """While entered, SIGNALS raise one KeyboardInterrupt in the main thread.

    `check`, called now and then, raises it again: where it met a bare `except` or C code that
    clears errors, as while torch and Numba are imported, it was lost. Later signals do nothing:
    what cleans up is not cut short. `waits(number)` is True where the job sees to it by itself.
    """

    def __init__(self, waits: Callable[[int], bool] = lambda number: False) -> None:
        self._waits = waits
        self._came = False
        self._last = (0, 0.0)

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._on_signal) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has asked for it."""
        if self._came:
            raise KeyboardInterrupt

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        last, self._last = self._last, (number, time.monotonic())
        if last[0] == number and self._last[1] - last[1] < TWICE_SECONDS:
            return
        if self._came or self._waits(number):
            return
        self._came = True
        raise KeyboardInterrupt


def ignore_signals() -> None:
    """For what is left of a command: a signal while Python ends would cost it its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
