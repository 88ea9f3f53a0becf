"""Owns a thread whose work may never end: a decoder in a loop, a disk that does not answer.

Python cannot stop such a thread. Waiting for it ends, and no exit of the interpreter waits for it
after that, as it would for a ThreadPoolExecutor's.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from pipeline.errors import SourceError

T = TypeVar("T")

_POLL_SECONDS = 0.25


class WatchedThread:
    """Does one call after the other; `wait` for one fails once nothing has moved for a time.

    `name` is the file, for the message.
    """

    def __init__(self, name: str, stall_seconds: float) -> None:
        self.stalled = False
        """Something is still at work in there and will not end: leave alone what it works on."""
        self._name, self._stall_seconds = name, stall_seconds
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="decode", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have `call` done after all that was submitted before."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def wait(self, future: Future[T], progressed_at: Callable[[], float]) -> T:
        """The call's result. `progressed_at` tells when, by time.monotonic(), something moved last.

        Raises what the call raises, and SourceError when nothing moves for the time allowed.
        """
        moved_at, quiet = progressed_at(), 0.0
        while not future.done():
            if quiet >= self._stall_seconds:
                self.stalled = True
                raise SourceError(
                    f"{self._name}: no progress in decoding for {self._stall_seconds:g} s; check "
                    "its disk and get a complete copy, or allow more with --stall-timeout"
                )
            asked = time.monotonic()
            wait([future], timeout=_POLL_SECONDS)
            # A process that was stopped (Ctrl-Z, and fg an hour later) sees the hour in one poll.
            quiet += min(time.monotonic() - asked, _POLL_SECONDS)
            if (latest := progressed_at()) != moved_at:
                moved_at, quiet = latest, 0.0
        return future.result()

    def close(self) -> None:
        """Cancel what waits and end the thread, unless it is stalled."""
        with suppress(Empty):
            while (item := self._calls.get_nowait()) is not None:
                item[0].cancel()
        self._calls.put(None)
        if not self.stalled:
            self._thread.join(self._stall_seconds)
            self.stalled = self._thread.is_alive()

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
