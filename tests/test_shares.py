"""Streams that share workers: turns, what goes together, errors and cancelled batches."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.shares import Shares
from workers import WorkerError


def batch(number, n=1, size=4):
    return (np.full((n, size, size), number, np.uint8), np.full((n, 2, 2), number, np.uint8))


def number_of(tiles):
    return tiles[0][:, 0, 0].tolist()


class Workers:
    """A `submit` whose futures finish only by hand, oldest first."""

    def __init__(self):
        self.work = []
        self.n_done = 0

    def __call__(self, tiles):
        self.work.append((tiles, Future()))
        return self.work[-1][1]

    def finish(self, error=None):
        tiles, future = self.work[self.n_done]
        self.n_done += 1
        if error is None:
            future.set_result(tuple(plane + 100 for plane in tiles))
        else:
            future.set_exception(error)

    def numbers(self):
        return [number_of(tiles) for tiles, _ in self.work]


def test_a_stream_with_many_batches_waits_behind_itself_alone():
    workers, shares = Workers(), Shares(1)
    many, one = shares.member(workers, "k"), shares.member(workers, "k")
    futures = [many(batch(n)) for n in (1, 2, 3, 4)]
    futures += [one(batch(9))]
    for _ in futures:
        workers.finish()
    assert workers.numbers() == [[1], [2], [9], [3], [4]]
    assert [number_of(f.result(0)) for f in futures] == [[101], [102], [103], [104], [109]]


def test_no_more_are_with_the_workers_than_keep_them_busy():
    workers, shares = Workers(), Shares(2)
    send = shares.member(workers, "k")
    for n in range(5):
        send(batch(n))
    assert len(workers.work) == 2
    workers.finish()
    assert len(workers.work) == 3


def test_of_two_streams_that_always_have_work_each_gets_half():
    shares, counts = Shares(1), {"a": 0, "b": 0}
    with ThreadPoolExecutor(1) as pool:

        def slow(tiles):
            time.sleep(0.01)
            return tiles

        def keep_busy(name, n_at_once):
            send = shares.member(lambda tiles: pool.submit(slow, tiles), "k")
            end = time.monotonic() + 1
            while time.monotonic() < end:
                for future in [send(batch(0)) for _ in range(n_at_once)]:
                    future.result()
                    counts[name] += 1

        with ThreadPoolExecutor(2) as streams:
            for running in [streams.submit(keep_busy, "a", 8), streams.submit(keep_busy, "b", 2)]:
                running.result()
    assert 0.6 < counts["a"] / counts["b"] < 1.6


def test_batches_that_wait_go_together_across_streams_and_come_back_apart():
    workers, shares = Workers(), Shares(1, most_tiles=4)
    a, b, other = (shares.member(workers, kind) for kind in ("k", "k", "another"))
    futures = [a(batch(1)), a(batch(2, 2)), b(batch(3)), other(batch(4)), a(batch(5, 2))]
    for _ in range(4):
        workers.finish()
    # The first found the workers idle and left alone; 5 would be a fifth tile.
    assert workers.numbers() == [[1], [2, 2, 3], [4], [5, 5]]
    assert [number_of(f.result(0)) for f in futures] == [
        [101], [102, 102], [103], [104], [105, 105],
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"size": 8}, {"n": 9}])
def test_what_is_not_alike_or_too_large_goes_alone(change):
    workers, shares = Workers(), Shares(1, most_tiles=4)
    a, b = shares.member(workers, "k"), shares.member(workers, "k")
    for send, tiles in ((a, batch(0)), (a, batch(1)), (b, batch(2, **change))):
        send(tiles)
    workers.finish()
    workers.finish()
    assert [set(numbers) for numbers in workers.numbers()] == [{0}, {1}, {2}]


def test_one_that_fails_in_company_does_not_take_the_others_with_it():
    workers, shares = Workers(), Shares(1, most_tiles=2)
    a, b = shares.member(workers, "k"), shares.member(workers, "k")
    first, good, bad = a(batch(0)), a(batch(1)), b(batch(2))
    workers.finish()
    workers.finish(RuntimeError("not finite"))
    workers.finish()
    workers.finish(RuntimeError("not finite"))
    assert number_of(first.result(0)) == [100]
    assert number_of(good.result(0)) == [101]
    with pytest.raises(RuntimeError, match="not finite"):
        bad.result(0)
    a(batch(7))
    assert workers.numbers()[-1] == [7], "the workers are free again"


def test_company_that_memory_has_no_room_for_is_sent_apart(monkeypatch):
    def full(_):
        raise MemoryError

    workers, shares = Workers(), Shares(1, most_tiles=2)
    a, b = shares.member(workers, "k"), shares.member(workers, "k")
    futures = [a(batch(0)), a(batch(1)), b(batch(2))]
    monkeypatch.setattr("pipeline.shares.np.concatenate", full)
    for _ in futures:
        workers.finish()
    assert [number_of(future.result(0)) for future in futures] == [[100], [101], [102]]


def test_a_submit_that_raises_and_a_cancelled_batch_hold_nobody_up():
    workers, shares = Workers(), Shares(1)

    def closed(tiles):
        raise RuntimeError("the pool is closed")

    a, b = shares.member(workers, "k"), shares.member(closed, "other")
    a(batch(1))
    cancelled, failed, last = a(batch(2)), b(batch(3)), a(batch(4))
    assert cancelled.cancel()
    workers.finish()
    with pytest.raises(RuntimeError, match="closed"):
        failed.result(0)
    workers.finish()
    assert number_of(last.result(0)) == [104]
    assert workers.numbers() == [[1], [4]]


def test_workers_that_have_failed_for_good_fail_all_that_waits():
    """A wall of cameras has hundreds of batches that wait, and each fails as soon as it is sent."""
    sent, shares = [], Shares(1)

    def submit(tiles):
        if sent:
            raise WorkerError("no answer in 60 s a batch")
        sent.append(Future())
        return sent[0]

    send = shares.member(submit, "k")
    futures = [send(batch(n % 100)) for n in range(1000)]
    sent[0].set_exception(WorkerError("no answer in 60 s a batch"))
    for future in futures:
        with pytest.raises(WorkerError):
            future.result(0)
