"""Owns how SIGINT and SIGTERM end a command at once. Knows no job."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """While entered, SIGINT and SIGTERM raise one KeyboardInterrupt in the main thread.

    `check`, called now and then, raises it again: where it met a bare `except` or C code that
    clears errors, as while torch and Numba are imported, it was lost. Later signals do nothing:
    what cleans up is not cut short. `waits(number)` is True where the job sees to it by itself.
    """

    def __init__(self, waits: Callable[[int], bool] = lambda number: False) -> None:
        self._waits = waits
        self._came = False

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
        if self._came or self._waits(number):
            return
        self._came = True
        raise KeyboardInterrupt


def ignore_signals() -> None:
    """For what is left of a command: a signal while Python ends would cost it its exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
