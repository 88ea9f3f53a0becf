"""What is given to whom, and what becomes of it: workers here are threads, failing as told."""

import gc
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from workers import Limits, WorkerError, schedule, spread
from workers.schedule import WorkerLostError


class Crew:
    """Threads that call `do(worker, item)`; a WorkerLostError from it ends the worker."""

    def __init__(self, do, n_workers=2, most=None):
        self.do, self.names = do, [f"w{i}" for i in range(n_workers)]
        self.most = n_workers if most is None else most
        self.threads, self.lost = {}, set()
        self.lock = threading.Lock()
        self.seen, self.waiting, self.most_waiting = Counter(), Counter(), 0
        self.held, self.held_again = 0, []
        self.dismissed = []

    def workers(self):
        alive = [name for name in self.names if name not in self.lost]
        while len(alive) < self.most:
            self.names.append(f"w{len(self.names)}")
            alive.append(self.names[-1])
        return alive

    def hold(self, item):
        self.held += 1
        return item

    def hold_again(self, item):
        self.held_again.append(item)
        return item

    def start(self, worker, item):
        thread = self.threads.setdefault(worker, ThreadPoolExecutor(1))
        self.waiting[worker] += 1
        self.most_waiting = max(self.most_waiting, self.waiting[worker])
        return thread.submit(self._do, worker, item)

    def _do(self, worker, item):
        if worker in self.lost:
            raise WorkerLostError("it is dead already")
        try:
            self.seen[item] += 1
            return self.do(worker, item)
        except WorkerLostError:
            self.lost.add(worker)
            raise
        finally:
            self.waiting[worker] -= 1

    def dismiss(self, worker):
        self.dismissed.append(worker)
        self.lost.add(worker)

    def room(self):
        return "2 threads"


class Ticking:
    """A clock that goes so many seconds each time that it is looked at."""

    def __init__(self, seconds):
        self.seconds, self.now = seconds, 0.0

    def __call__(self):
        self.now += self.seconds
        return self.now


def results(crew, items, **limits):
    """Every outcome, by the item's number; each comes once."""
    found = list(spread(crew, items, Limits(**limits)))
    assert len({outcome.number for outcome in found}) == len(found)
    return {outcome.number: outcome for outcome in found}


def test_every_item_is_done_once_and_all_workers_work():
    crew = Crew(lambda worker, item: (worker, item * item), 4)
    found = results(crew, range(100))
    assert [found[n].result[1] for n in range(100)] == [n * n for n in range(100)]
    assert {outcome.result[0] for outcome in found.values()} == {"w0", "w1", "w2", "w3"}
    assert all(outcome.tries == 1 for outcome in found.values())


def test_nothing_to_do_is_nothing():
    assert results(Crew(lambda worker, item: item), []) == {}


def test_items_are_taken_only_when_a_worker_has_room():
    taken = []

    def items():
        for n in range(50):
            taken.append(n)
            yield n

    crew = Crew(lambda worker, item: time.sleep(0.002), 3)
    for done, _ in enumerate(spread(crew, items(), Limits()), start=1):
        assert len(taken) <= done + 2 * 3 * 2  # as many are out as wait to be taken away
    assert crew.most_waiting == 2


def test_what_is_done_is_let_go_at_once():
    class Result:
        alive = 0

        def __init__(self):
            Result.alive += 1

        def __del__(self):
            Result.alive -= 1

    gc.collect()
    gc.disable()  # a cycle would keep it until the collector comes by
    try:
        for outcome in spread(Crew(lambda worker, item: Result()), range(50)):
            del outcome
            assert Result.alive <= 2 * 2 * 2
    finally:
        gc.enable()


def test_a_lost_worker_costs_only_what_it_had():
    def do(worker, item):
        if worker == "w0" and item > 4:
            raise WorkerLostError("killed")
        return item

    crew = Crew(do, 3)
    found = results(crew, range(40))
    assert sorted(outcome.result for outcome in found.values()) == list(range(40))
    assert sum(crew.seen.values()) <= 40 + 2
    assert 1 <= len(crew.held_again) <= 2  # so that no one looks for it where it was lost
    assert max(outcome.tries for outcome in found.values()) == 2


def test_workers_that_come_later_are_used():
    crew = Crew(lambda worker, item: (time.sleep(0.05), worker)[1], 1)
    threading.Timer(0.3, setattr, [crew, "most", 4]).start()
    found = results(crew, range(60))
    assert len({outcome.result for outcome in found.values()}) == 4


def test_an_item_that_kills_every_worker_is_given_up_and_the_others_are_done():
    def do(worker, item):
        if item == 7:
            raise WorkerLostError("signal 11")
        return item

    crew = Crew(do, 2, most=2)
    found = results(crew, range(20), tries=3)
    assert [n for n, outcome in found.items() if outcome.error] == [7]
    assert "given up after 3 tries: signal 11" in str(found[7].error)
    assert crew.seen[7] == 3
    assert len(crew.lost) == 3
    # What only waited behind it is not to blame for it.
    assert all(outcome.tries == 1 for n, outcome in found.items() if n != 7)


def test_a_machine_that_goes_is_not_the_items_fault_up_to_a_bound():
    seen = Counter()

    def do(worker, item):
        seen[item] += 1
        if item == 3 and seen[3] <= 5:
            raise WorkerLostError("its node has died", with_its_machine=True)
        return item

    found = results(Crew(do), range(6), tries=2, moves=10)
    assert found[3].error is None
    assert found[3].tries == 6
    seen.clear()
    found = results(Crew(do), range(6), tries=2, moves=4)
    assert "given up" in str(found[3].error)


def test_an_error_is_tried_elsewhere_and_then_given_up():
    tried = []

    def do(worker, item):
        if item == 1:
            tried.append(worker)
            raise ValueError("no memory")
        return item

    found = results(Crew(do, 3), range(5), tries=3)
    assert "given up after 3 tries: no memory" in str(found[1].error)
    assert len(set(tried)) == 3


def test_an_item_that_failed_waits_for_another_worker_than_a_free_one():
    def do(worker, item):
        if item == 0 and worker == "w0":
            raise ValueError("broken card")
        time.sleep(0.02)
        return worker

    found = results(Crew(do), range(4), tries=2)
    assert found[0].result == "w1"


def test_a_machine_whose_every_worker_fails_at_once_costs_no_item(monkeypatch):
    """Its workers are replaced on it, have nothing to do and would draw every retry to them."""
    monkeypatch.setattr(schedule, "REFRESH_SECONDS", 0.02)
    good = {"w0", "w1", "w2"}

    def do(worker, item):
        if worker not in good:
            raise ValueError("no space left on device")
        time.sleep(0.3)
        return worker

    found = results(Crew(do, 4), range(24))
    assert {n: str(outcome.error) for n, outcome in found.items() if outcome.error} == {}
    assert {outcome.result for outcome in found.values()} == good


def test_an_item_that_cannot_be_held_is_given_up_alone():
    class Full(Crew):
        def hold(self, item):
            if item == 3:
                raise WorkerError("the object store is full")
            return super().hold(item)

    found = results(Full(lambda worker, item: item), range(6))
    assert {n: outcome.result for n, outcome in found.items() if n != 3} == {
        n: n for n in range(6) if n != 3
    }
    assert "the object store is full" in str(found[3].error)


def test_a_worker_that_fails_on_everything_is_replaced():
    def do(worker, item):
        if worker == "w0":
            raise ValueError("CUDA error: an illegal memory access")
        time.sleep(0.05)
        return worker

    crew = Crew(do, 2)
    found = results(crew, range(30))
    assert all(outcome.error is None for outcome in found.values())
    assert "w0" in crew.lost
    assert {outcome.result for outcome in found.values()} == {"w1", "w2"}
    assert sum(crew.seen.values()) <= 30 + 3
    assert max(outcome.tries for outcome in found.values()) == 2


def test_a_straggler_is_given_to_an_idle_worker_once():
    release = threading.Event()

    def do(worker, item):
        if item == 0 and not release.is_set() and worker == first[0]:
            release.wait(20)
        time.sleep(0.01)
        return worker

    first = ["w0"]
    crew = Crew(do, 3)
    began = time.monotonic()
    found = results(crew, range(20))
    release.set()
    assert found[0].result != "w0"
    assert crew.seen[0] == 2
    assert time.monotonic() - began < 10


def test_what_waits_behind_a_straggler_is_taken_over():
    release = threading.Event()

    def do(worker, item):
        if item == 0:
            release.wait(20)
        return worker

    crew = Crew(do, 2)
    outcomes = spread(crew, range(4), Limits(straggler_factor=1e9))
    three = [next(outcomes) for _ in range(3)]
    assert {outcome.number for outcome in three} == {1, 2, 3}
    release.set()
    assert next(outcomes).number == 0


def test_a_worker_that_hangs_is_dismissed():
    hangs = Future()

    class Hanging(Crew):
        def start(self, worker, item):
            if worker == "w0" and item == 0:
                return hangs
            return super().start(worker, item)

        def dismiss(self, worker):
            super().dismiss(worker)
            if not hangs.done():
                hangs.set_exception(WorkerLostError("dismissed"))

    crew = Hanging(lambda worker, item: item, 2)
    found = results(
        crew, range(3), item_seconds=lambda item: 1e9 if item else 0.5, straggler_factor=1e9
    )
    assert [found[n].result for n in range(3)] == [0, 1, 2]
    assert found[0].tries == 2


def test_an_item_may_take_as_long_as_it_needs():
    """Its own bound, not that of the others; the clock goes ten thousand seconds at each look."""
    crew = Crew(lambda worker, item: time.sleep(0.3) or item, 1)
    patience = {0: 1e9, 1: 1e9}.__getitem__
    found = list(spread(crew, range(2), Limits(item_seconds=patience), Ticking(1e4)))
    assert [outcome.tries for outcome in found] == [1, 1]
    assert not crew.dismissed


def test_a_worker_that_was_lost_is_dismissed_and_no_longer_known():
    def do(worker, item):
        if worker == "w0":
            raise WorkerLostError("the connection broke")
        return item

    crew = Crew(do, 2)
    assert len(results(crew, range(6))) == 6
    assert crew.dismissed == ["w0"]


def test_who_is_still_at_what_another_has_done_is_not_left_so():
    release = threading.Event()

    def do(worker, item):
        if item == 7 and crew.seen[7] == 1:
            release.wait(30)
        time.sleep(0.05)
        return worker

    crew = Crew(do, 2)
    found = results(crew, range(8), straggler_factor=3)
    (hanging,) = {"w0", "w1"} - {found[7].result}
    assert crew.dismissed == [hanging]
    release.set()


def test_that_there_is_no_worker_is_said_before_it_is_the_end(caplog):
    crew = Crew(lambda worker, item: item, 0)
    with pytest.raises(WorkerError, match=r"no worker for .* s; run it again .*: 2 threads"):
        list(spread(crew, range(3), Limits(no_worker_seconds=30), Ticking(6.0)))
    assert [r.getMessage() for r in caplog.records] == ["Waiting for a worker: 2 threads"]


def test_without_workers_it_does_not_wait_for_ever():
    with pytest.raises(WorkerError, match="no worker"):
        results(Crew(lambda worker, item: item, 0), range(3), no_worker_seconds=1)


def test_what_is_out_is_seen_to_while_the_next_item_is_not_there_yet():
    found = []

    def items():
        yield 1
        while not found:
            yield None
        yield 2

    crew = Crew(lambda worker, item: item)
    for outcome in spread(crew, items(), Limits()):
        found.append((outcome.number, outcome.result))
    assert found == [(0, 1), (1, 2)]
