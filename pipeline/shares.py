"""Owns whose batch the workers get next, where several streams share them. Knows no stream, network
or time: it stands around `submit` and gives each stream a Submit of its own.
"""

import threading
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from pipeline.frames import TileBatch
from pipeline.restore import Submit


@dataclass(slots=True, eq=False)
class _Member:
    submit: Submit
    kind: Hashable
    waiting: deque[tuple[TileBatch, Future[TileBatch]]] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class _Group:
    """Batches that go to the workers as one."""

    submit: Submit
    batches: list[TileBatch]
    futures: list[Future[TileBatch]]


class Shares:
    """Turns go round the streams, a batch at a time: who sends much waits behind itself alone.

    At most `in_flight` batches are with the workers; only those that have to wait have an order.
    Among these, batches of the same kind and tile size go together, up to `most_tiles` tiles:
    nobody waits for company. One that fails in company is tried again alone. Thread-safe.
    """

    def __init__(self, in_flight: int, most_tiles: int = 1) -> None:
        self._in_flight, self._most_tiles = in_flight, most_tiles
        self._lock = threading.Lock()
        self._turns: deque[_Member] = deque()  # those with a batch that waits, next one first
        self._n_sent = 0
        self._sending = False

    def member(self, submit: Submit, kind: Hashable) -> Submit:
        """A Submit for one stream; what `submit` does must be the same for all of one `kind`."""
        return partial(self._add, _Member(submit, kind))

    def _add(self, member: _Member, batch: TileBatch) -> Future[TileBatch]:
        future: Future[TileBatch] = Future()
        with self._lock:
            if not member.waiting:
                self._turns.append(member)
            member.waiting.append((batch, future))
        self._send()
        return future

    def _send(self) -> None:
        with self._lock:
            if self._sending:  # whoever does goes on: a batch that fails at once ends up in here
                return
            self._sending = True
        while True:
            with self._lock:
                if self._n_sent >= self._in_flight or not self._turns:
                    self._sending = False
                    return
                group = self._next()
                self._n_sent += 1
            self._start(group)

    def _next(self) -> _Group:
        """The batch whose turn it is, and what may go with it."""
        first = self._turns[0]
        group = _Group(first.submit, [], [])
        room = max(self._most_tiles, len(first.waiting[0][0][0]))
        for member in list(self._turns):
            batch, future = member.waiting[0]
            if not (member is first or (member.kind == first.kind and _alike(batch, group))):
                continue
            if len(batch[0]) > room:
                continue
            self._turns.remove(member)
            member.waiting.popleft()
            if member.waiting:
                self._turns.append(member)
            if future.set_running_or_notify_cancel():
                room -= len(batch[0])
                group.batches.append(batch)
                group.futures.append(future)
        return group

    def _start(self, group: _Group) -> None:
        if not group.batches:  # cancelled, all of it
            self._done(group, None)
            return
        try:
            sent = group.submit(_together(group.batches))
        except Exception as error:
            sent = Future()
            sent.set_exception(error)
        sent.add_done_callback(partial(self._done, group))

    def _done(self, group: _Group, sent: Future[TileBatch] | None) -> None:
        """Runs in a thread of the pool's, which goes on only after this."""
        with self._lock:
            self._n_sent -= 1
        self._send()
        if sent is not None:
            self._deliver(group, sent)

    def _deliver(self, group: _Group, sent: Future[TileBatch]) -> None:
        try:
            restored = sent.result()
        except Exception as error:
            if len(group.futures) == 1:
                group.futures[0].set_exception(error)
                return
            for batch, future in zip(group.batches, group.futures, strict=True):
                with self._lock:
                    self._n_sent += 1
                self._start(_Group(group.submit, [batch], [future]))
            return
        if len(group.futures) == 1:
            group.futures[0].set_result(restored)
            return
        start = 0
        for batch, future in zip(group.batches, group.futures, strict=True):
            stop = start + len(batch[0])
            future.set_result(tuple(plane[start:stop] for plane in restored))
            start = stop


def _together(batches: list[TileBatch]) -> TileBatch:
    if len(batches) == 1:
        return batches[0]
    return tuple(np.concatenate(planes) for planes in zip(*batches, strict=True))


def _alike(batch: TileBatch, group: _Group) -> bool:
    """Whether it can be one array with those in the group, plane by plane."""
    return bool(group.batches) and [(p.shape[1:], p.dtype) for p in batch] == [
        (p.shape[1:], p.dtype) for p in group.batches[0]
    ]
