"""Owns how long a worker may take for an answer; one that has given none by then hangs."""

import threading
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from workers.spec import TileBatch, WorkerError

_T = TypeVar("_T")

BATCH_TIMEOUT_SECONDS = 600.0
"""More than a small batch ever takes."""
_SAMPLE_SECONDS = 1e-3
"""And for each sample of the first plane; the published network takes 0.3 ms on a busy core."""
_WARM_UP_BATCHES = 12
"""What `warm_up` takes at most, in batches: four passes each of 1, 2, 4 … tiles and of all."""
_LOOK_SECONDS = 0.25
_STOOD_SECONDS = 1.0
"""Where a look comes so much too late, this process was stopped meanwhile."""


def allowed(tiles: TileBatch, seconds: float) -> float:
    """How long a batch may take, of which a small one may take `seconds`."""
    return seconds + _SAMPLE_SECONDS * tiles[0].size


def allowed_for_warm_up(tiles: TileBatch, seconds: float) -> float:
    """How long it may take to warm up for such a batch."""
    return _WARM_UP_BATCHES * allowed(tiles, seconds)


def settle(future: Future[_T], outcome: _T | WorkerError) -> None:
    """Give `future` its outcome, unless it has one."""
    with suppress(InvalidStateError):  # cancelled, timed out or closed in the meantime
        if isinstance(outcome, WorkerError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


class NoAnswer(WorkerError):  # noqa: N818 - it is one of a worker, and says which
    """A worker hangs."""


class Deadlines:
    """Fails what is not done in time; a thread looks after all, until `close`.

    Time for which this process stood still (Ctrl-Z, and fg an hour later) does not count.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due: dict[Future[Any], tuple[float, float]] = {}
        """By time.monotonic(), and the seconds a batch, for the message."""
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="deadlines", daemon=True).start()

    def bound(self, future: Future[Any], seconds: float, place: int = 1) -> None:
        """Fail `future`, at that place of a worker's queue, after `seconds` for each one there."""
        with self._lock:
            self._due[future] = time.monotonic() + seconds * place, seconds
        future.add_done_callback(self._forget)

    def close(self) -> None:
        """Nothing fails from now on. Again does nothing."""
        self._closed.set()

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._due.pop(future, None)

    def _look(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_LOOK_SECONDS):
            last, before = time.monotonic(), last
            stood = last - before - _LOOK_SECONDS
            with self._lock:
                if stood > _STOOD_SECONDS:
                    self._due = {f: (due + stood, s) for f, (due, s) in self._due.items()}
                late = [(f, s) for f, (due, s) in self._due.items() if due <= last]
            for future, seconds in late:
                error = NoAnswer(f"a worker gave no answer in {seconds:.3g} s a batch")
                settle(future, error)
