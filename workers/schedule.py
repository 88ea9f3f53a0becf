"""Owns which worker gets which item, and what becomes of it when a worker fails.

Items are given out in the order in which they come. Knows no Ray and no video: workers are a
`Crew`, and what they do with an item is theirs.
"""

import logging
import math
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

from workers.spec import WorkerError

logger = logging.getLogger(__name__)

SAID_AFTER_SECONDS = 10.0
"""Without any worker for so long, that is said."""
REFRESH_SECONDS = 1.0
"""How often the crew is asked who is there, and the running items are looked at."""
DURATIONS_KEPT = 64
"""The typical time of an item is the median of so many."""


class WorkerLostError(WorkerError):
    """A worker went away with what it had."""

    def __init__(self, message: str, *, with_its_machine: bool = False) -> None:
        super().__init__(message)
        self.with_its_machine = with_its_machine
        """Then the item that it was at is not to blame."""


class Crew(Protocol):
    """Workers that come and go. Each does what it was given one by one, in that order."""

    def workers(self) -> Collection[Hashable]:
        """Those that can be given items now. Asked about once a second: the place to start more.

        Raises WorkerError where there can never be one.
        """

    def hold(self, item: Any) -> Any:
        """Put an item where every worker can get it; `start` is given what this returns."""

    def hold_again(self, held: Any) -> Any:
        """Put an item that a worker had there anew, so that nothing is got from that worker."""

    def start(self, worker: Any, held: Any) -> Future[Any]:
        """Never waits. The Future raises WorkerLostError where the worker went away."""

    def dismiss(self, worker: Any) -> None:
        """Stop a worker that no longer answers, or is gone; what it has fails with
        WorkerLostError."""

    def room(self) -> str:
        """What a worker needs and what there is, for messages."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of every retry and wait."""

    tries: int = 3
    """An item on which so many workers died or failed is given up."""
    moves: int = 10
    """Likewise, where each of them died with its machine."""
    item_seconds: Callable[[Any], float] = lambda item: 6 * 3600
    """A worker that is at one item for so long is dismissed; that counts as a try."""
    no_worker_seconds: float = 900
    """Without any worker for so long everything is given up."""
    straggler_factor: float = 3
    """With nothing left to give out, an item that takes so many times the median is given to an
    idle worker too, once."""
    errors_in_row: int = 2
    """A worker that fails on so many items one after the other is dismissed: a GPU that has had a
    fault gives nothing else until its process ends."""
    queued: int = 2
    """Items that a worker has: one that it is at, and one that travels to it meanwhile."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the item that came as number `number`, from 0."""

    number: int
    result: Any = None
    error: WorkerError | None = None
    """Not None: it was given up."""
    tries: int = 1


@dataclass(slots=True, eq=False)
class _Item:
    number: int
    held: Any
    seconds: float
    """The longest that a worker may be at it."""
    was_out: bool = False
    failures: int = 0
    moves: int = 0
    copied: bool = False
    attempts: "set[_Attempt]" = field(default_factory=set)
    failed_on: set[Hashable] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class _Attempt:
    item: _Item
    worker: Hashable
    future: Future[Any] | None = None
    began: float | None = None
    """When its worker was free for it."""


def spread(
    crew: Crew,
    items: Iterable[Any],
    limits: Limits | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Outcome]:
    """Have the crew do all items; yields the outcome of each once, as they come.

    Items are taken from the iterable only when a worker has room for them, and let go when they
    are done; None stands for one that is not there yet, so that what is out is seen to meanwhile.
    Raises WorkerError where no worker is left or none ever comes.
    """
    return _Schedule(crew, iter(items), limits or Limits(), clock).outcomes()


class _Schedule:
    def __init__(
        self, crew: Crew, items: Iterator[Any], limits: Limits, clock: Callable[[], float]
    ) -> None:
        self._crew, self._items, self._limits, self._clock = crew, items, limits, clock
        self._queues: dict[Hashable, deque[_Attempt]] = {}
        self._errors: Counter[Hashable] = Counter()
        """How many items each worker has failed on since it last did one."""
        self._proven: set[Hashable] = set()
        """Those that have done an item."""
        self._again: deque[_Item] = deque()
        self._events: queue.SimpleQueue[_Attempt] = queue.SimpleQueue()
        self._durations: deque[float] = deque(maxlen=DURATIONS_KEPT)
        self._n_taken = 0
        self._exhausted = False
        self._refreshed = self._staffed = clock()
        self._said = False
        self._outcomes: deque[Outcome] = deque()

    def outcomes(self) -> Iterator[Outcome]:
        self._refresh()
        while True:
            self._give_out()
            while self._outcomes:
                yield self._outcomes.popleft()
            if self._exhausted and not self._again and not any(self._open_attempts()):
                self._leave_none_busy()
                return
            with suppress(queue.Empty):
                self._settle(self._events.get(timeout=REFRESH_SECONDS))
                while True:  # and whatever else has come
                    self._settle(self._events.get_nowait())
            if self._clock() - self._refreshed >= REFRESH_SECONDS:
                self._refresh()

    def _leave_none_busy(self) -> None:
        """Who is still at what another was quicker with would do nothing else for long."""
        for worker, waiting in self._queues.items():
            if any(a.future is not None and not a.future.done() for a in waiting):
                self._crew.dismiss(worker)

    def _open_attempts(self) -> Iterator[_Attempt]:
        return (a for q in self._queues.values() for a in q if a in a.item.attempts)

    def _refresh(self) -> None:
        now = self._refreshed = self._clock()
        for worker in self._crew.workers():
            self._queues.setdefault(worker, deque())
        if self._queues:
            self._staffed, self._said = now, False
        elif now - self._staffed > SAID_AFTER_SECONDS and not self._said:
            self._said = True
            logger.warning("Waiting for a worker: %s", self._crew.room())
        elif now - self._staffed > self._limits.no_worker_seconds:
            raise WorkerError(
                f"no worker for {now - self._staffed:.0f} s; run it again when there are machines "
                f"for one: {self._crew.room()}"
            )
        for worker, waiting in list(self._queues.items()):
            if waiting and now - (waiting[0].began or now) > waiting[0].item.seconds:
                logger.warning("A worker has been at one item for too long and is dismissed")
                self._crew.dismiss(worker)

    def _give_out(self) -> None:
        for item in list(self._again):
            worker = self._least_loaded(item)
            if worker is not None:
                self._again.remove(item)
                self._start(item, worker)
        most_again = self._limits.queued * len(self._queues)
        while not self._exhausted and (worker := self._least_loaded()) is not None:
            if len(self._again) > most_again:
                break  # each is held until it is done
            try:
                taken = next(self._items)
            except StopIteration:
                self._exhausted = True
            else:
                if taken is None:
                    break
                self._take(taken, worker)
        if self._exhausted and not self._again:
            self._share_the_rest()

    def _take(self, taken: Any, worker: Hashable) -> None:
        number, self._n_taken = self._n_taken, self._n_taken + 1
        try:
            held = self._crew.hold(taken)
        except WorkerError as error:  # no room for it, and there may be for the next
            self._outcomes.append(Outcome(number, None, error))
        else:
            self._start(_Item(number, held, self._limits.item_seconds(taken)), worker)

    def _least_loaded(self, item: _Item | None = None) -> Hashable | None:
        """One with room, for a new item or for `item` again.

        One that has failed goes to those that have done something and were not at it, if there are
        such or may be: where a machine is at fault its workers are new each time, and never busy.
        """
        workers: Collection[Hashable] = self._queues
        if item is not None and item.failed_on:
            if not self._proven and any(self._open_attempts()):
                return None
            others = [worker for worker in workers if worker not in item.failed_on]
            workers = [worker for worker in others if worker in self._proven] or others or workers
        worker = min(workers, key=lambda w: len(self._queues[w]), default=None)
        if worker is None or len(self._queues[worker]) >= self._limits.queued:
            return None
        return worker

    def _start(self, item: _Item, worker: Hashable) -> None:
        if item.was_out:
            item.held = self._crew.hold_again(item.held)
        item.was_out = True
        attempt = _Attempt(item, worker)
        item.attempts.add(attempt)
        waiting = self._queues[worker]
        waiting.append(attempt)
        if len(waiting) == 1:
            attempt.began = self._clock()
        attempt.future = self._crew.start(worker, item.held)
        attempt.future.add_done_callback(lambda _: self._events.put(attempt))

    def _share_the_rest(self) -> None:
        """Nothing is left to give out: idle workers take over what waits, and copy stragglers."""
        idle = [worker for worker, waiting in self._queues.items() if not waiting]
        if not idle:
            return
        now, typical = self._clock(), median(self._durations) if self._durations else math.inf
        # Those that wait first, then those that are longest at it.
        for attempt in sorted(self._open_attempts(), key=lambda a: a.began or 0):
            item, future = attempt.item, attempt.future
            able = self._proven - item.failed_on if item.failed_on else idle
            to = next((worker for worker in idle if worker in able), None)
            if to is None or future is None:
                continue
            if attempt.began is None:
                if not future.cancel():
                    continue
                item.attempts.discard(attempt)
            elif item.copied or now - attempt.began < self._limits.straggler_factor * typical:
                continue
            else:
                item.copied = True
                logger.warning("Item %d takes long: a second worker gets it", item.number)
            idle.remove(to)
            self._start(item, to)

    def _settle(self, attempt: _Attempt) -> None:
        """An attempt is over, one way or another."""
        future, attempt.future = attempt.future, None  # else a cycle keeps the result for long
        waiting = self._queues.get(attempt.worker)
        if future is None or waiting is None or attempt not in waiting:
            return  # its worker was lost, which settled it
        error = None if future.cancelled() else future.exception()
        if isinstance(error, WorkerLostError):
            self._lose(attempt.worker, error)
            return
        now = self._clock()
        waiting.remove(attempt)
        if waiting and waiting[0].began is None:
            waiting[0].began = now
        item = attempt.item
        if not future.cancelled():
            self._errors[attempt.worker] = self._errors[attempt.worker] + 1 if error else 0
        if attempt not in item.attempts:
            return  # a copy was quicker
        item.attempts.discard(attempt)
        if error is not None:
            self._fail(attempt, error, blamed=True)
            if self._errors[attempt.worker] >= self._limits.errors_in_row:
                self._replace(attempt.worker, error)
        elif not future.cancelled():
            self._proven.add(attempt.worker)
            self._durations.append(now - (attempt.began or now))
            self._finish(item, Outcome(item.number, future.result(), None, _tries(item)))

    def _lose(self, worker: Hashable, error: WorkerLostError) -> None:
        logger.warning("A worker was lost: %s", error)
        self._errors.pop(worker, None)  # the last that know it: Ray ends what nobody knows
        self._proven.discard(worker)
        self._crew.dismiss(worker)  # one whose connection broke may live, and keep its GPU
        for place, attempt in enumerate(self._queues.pop(worker)):
            if attempt in attempt.item.attempts:
                attempt.item.attempts.discard(attempt)
                # It does one thing at a time: what only waited there did not end it.
                self._fail(attempt, error, blamed=place == 0)

    def _replace(self, worker: Hashable, error: BaseException) -> None:
        logger.warning("A worker fails on every item and is dismissed: %s", error)
        self._errors.pop(worker, None)
        self._proven.discard(worker)
        for attempt in self._queues.pop(worker):
            if attempt in attempt.item.attempts:
                attempt.item.attempts.discard(attempt)
                self._fail(attempt, error, blamed=False)
        self._crew.dismiss(worker)

    def _fail(self, attempt: _Attempt, error: BaseException, *, blamed: bool) -> None:
        item = attempt.item
        if blamed and isinstance(error, WorkerLostError) and error.with_its_machine:
            item.moves += 1
        elif blamed:
            item.failures += 1
            item.failed_on.add(attempt.worker)
        if item.failures >= self._limits.tries or item.moves >= self._limits.moves:
            cause = f"given up after {_tries(item) - 1} tries: {error}"
            self._finish(item, Outcome(item.number, None, WorkerError(cause), _tries(item) - 1))
        elif not item.attempts:
            self._again.append(item)

    def _finish(self, item: _Item, outcome: Outcome) -> None:
        for attempt in item.attempts:
            waiting = self._queues.get(attempt.worker)
            if waiting and waiting[0] is not attempt and attempt.future is not None:
                attempt.future.cancel()
        item.attempts.clear()
        item.held = None
        self._outcomes.append(outcome)


def _tries(item: _Item) -> int:
    return item.failures + item.moves + 1
