"""Owns the workers in this process: threads that are given a batch and answer with a Future."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from mtair.memory import keep_freed_memory
from workers.deadlines import (
    BATCH_TIMEOUT_SECONDS,
    Deadlines,
    NoAnswer,
    allowed,
    allowed_for_warm_up,
    settle,
)
from workers.pool import RestorerPool, translated
from workers.spec import PlaneSpec, TileBatch, WorkerError, WorkerSpec
from workers.worker import TileWorker

_T = TypeVar("_T")

_WORKERS_OF = {"cuda": 2}
"""Of a device in this process, else 1: a GPU computes one batch while another is copied."""
_JOIN_SECONDS = 1.0
"""A thread whose batch is over ends at once; another hangs."""


class LocalPool(RestorerPool):
    """A worker in a thread of this process, two on a GPU: no other process, no copies.

    A batch fails after `batch_timeout_seconds`, more for large ones, for itself and each one before
    it: the device hangs, and every other batch, then and later, fails at once. Python cannot stop
    the thread that is in there; neither `close` nor the interpreter's exit waits for it after that,
    as a ThreadPoolExecutor's would.
    Raises WorkerError (WeightsError for the weights) where it cannot start.
    """

    def __init__(
        self, spec: WorkerSpec, *, batch_timeout_seconds: float = BATCH_TIMEOUT_SECONDS
    ) -> None:
        keep_freed_memory()
        self.n_workers = _WORKERS_OF.get(spec.device.partition(":")[0], 1)
        self._batch_timeout_seconds = batch_timeout_seconds
        self._lock = threading.Lock()
        self._deadlines = Deadlines()
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._in_flight: set[Future[Any]] = set()
        self._closed = False
        self._hangs: NoAnswer | None = None
        self._idle: SimpleQueue[TileWorker] = SimpleQueue()
        self._warming = threading.Lock()  # two callers would wait for each other's workers
        self._threads = [
            threading.Thread(target=self._work, name="restore", daemon=True)
            for _ in range(self.n_workers)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for _ in range(self.n_workers):
                started = self._submit(partial(TileWorker, spec), batch_timeout_seconds)
                self._idle.put(started.result())
        except BaseException:
            self.close()
            raise

    def submit(
        self, tiles: TileBatch, planes: PlaneSpec | None = None, smaller: bool = False
    ) -> Future[TileBatch]:
        def restored() -> TileBatch:
            worker = self._idle.get()
            try:
                return worker(tiles, planes, smaller)
            finally:
                self._idle.put(worker)

        return self._submit(restored, allowed(tiles, self._batch_timeout_seconds))

    def warm_up(self, tiles: TileBatch, planes: PlaneSpec | None = None) -> None:
        def warmed() -> TileWorker:
            worker = self._idle.get()
            try:
                worker.warm_up(tiles, planes)
            except BaseException:
                self._idle.put(worker)
                raise
            return worker

        seconds = allowed_for_warm_up(tiles, self._batch_timeout_seconds)
        done: list[TileWorker] = []  # kept from the others meanwhile, so that each has its turn
        with self._warming:
            try:
                for _ in range(self.n_workers):
                    done.append(self._submit(warmed, seconds).result())
            finally:
                for worker in done:
                    self._idle.put(worker)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            in_flight = list(self._in_flight)
        wait([future for future in in_flight if not future.cancel()])
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
        self._deadlines.close()

    def _submit(self, call: Callable[[], _T], seconds: float) -> Future[_T]:
        future: Future[_T] = Future()
        with self._lock:
            if self._closed:
                raise WorkerError("the pool is closed")
            if self._hangs is not None:
                raise WorkerError(str(self._hangs))
            self._in_flight.add(future)
            place = math.ceil(len(self._in_flight) / self.n_workers)
            self._calls.put((future, call))
        future.add_done_callback(self._forget)
        self._deadlines.bound(future, seconds, place)
        return future

    def _forget(self, future: Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        with self._lock:
            self._in_flight.discard(future)
            if self._hangs is not None or not isinstance(error, NoAnswer):
                return
            self._hangs = error
            others, self._in_flight = self._in_flight, set()
        for other in others:
            settle(other, WorkerError(str(error)))

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            with suppress(RuntimeError):  # it is given up this moment
                if not _given_up(future) and future.set_running_or_notify_cancel():
                    settle(future, _outcome(call))
            del item, future, call  # else they, and the batch, are kept until the next comes


def _given_up(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled()


def _outcome(call: Callable[[], _T]) -> _T | WorkerError:
    try:
        return call()
    except BaseException as error:  # else the thread ends, and what is submitted waits for nobody
        return translated(error)
