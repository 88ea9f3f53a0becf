"""The window: order, bounds, errors and early ends, with every way in which workers may finish."""

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from pipeline.errors import IntegrityError
from pipeline.frames import Frame
from pipeline.restore import restore_frames
from pipeline.tiles import TileGrid

GRID = TileGrid.plan(
    32, 16, log2_chroma_w=1, log2_chroma_h=1, n_planes=3, tile=(16, 16), overlap=4, batch_size=1
)  # three tiles in three batches


def frame(index):
    shapes = ((16, 32), (8, 16), (8, 16))
    planes = tuple(np.full(shape, index % 200, np.uint8) for shape in shapes)
    return Frame(index=index, pts=1000 + index * index, planes=planes, duration=index + 7)


def brighter(batch):
    return tuple(plane + 1 for plane in batch)


def finished(batch):
    future = Future()
    future.set_result(brighter(batch))
    return future


class Source:
    """Frames that count how many were pulled."""

    def __init__(self, n):
        self.pulled = 0
        self.n = n

    def __iter__(self):
        for index in range(self.n):
            self.pulled += 1
            yield frame(index)


class Workers:
    """A `submit` whose futures finish only by hand: `finish(number)`."""

    def __init__(self):
        self.work = []

    def __call__(self, batch):
        self.work.append((batch, Future()))
        return self.work[-1][1]

    def finish(self, number):
        batch, future = self.work[number]
        future.set_result(brighter(batch))

    def cancelled(self):
        return [number for number, (_, future) in enumerate(self.work) if future.cancelled()]


def check(restored, n):
    assert [f.index for f in restored] == list(range(n))
    for got, sent in zip(restored, map(frame, range(n)), strict=True):
        assert (got.pts, got.duration) == (sent.pts, sent.duration)
        for after, before in zip(got.planes, sent.planes, strict=True):
            np.testing.assert_array_equal(after, before + 1)
            assert not after.flags.writeable


@pytest.mark.parametrize("n", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_every_frame_once_in_order_with_its_pts(n, window):
    check(list(restore_frames(Source(n), GRID, finished, window)), n)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("window", [1, 3, 8])
def test_order_and_bound_hold_when_batches_finish_in_random_order(seed, window):
    rng = random.Random(seed)
    source, emitted = Source(25), []
    with ThreadPoolExecutor(4) as threads:

        def submit(batch):
            assert source.pulled - len(emitted) <= window
            delay = rng.random() * 0.004
            return threads.submit(lambda: (time.sleep(delay), brighter(batch))[1])

        for restored in restore_frames(source, GRID, submit, window):
            emitted.append(restored)
            assert source.pulled - len(emitted) < window
    check(emitted, 25)


@pytest.mark.parametrize("window", [1, 2, 6])
def test_the_source_is_pulled_until_the_window_is_full_and_no_further(window):
    source, workers = Source(20), Workers()
    emitted = []
    thread = threading.Thread(
        target=lambda: emitted.extend(restore_frames(source, GRID, workers, window)), daemon=True
    )
    thread.start()
    for number in range(20 * GRID.n_batches):
        admitted = min(20, number // GRID.n_batches + window)
        deadline = time.monotonic() + 10
        while len(workers.work) < admitted * GRID.n_batches and time.monotonic() < deadline:
            time.sleep(0.0005)
        assert source.pulled == admitted
        workers.finish(number)
    thread.join(10)
    check(emitted, 20)


def test_finished_heads_are_emitted_before_the_source_is_asked_again():
    source, workers = Source(9), Workers()
    restoring = restore_frames(source, GRID, workers, 4)
    # The oldest last, so that two more are done when it is.
    timer = threading.Timer(0.05, lambda: [workers.finish(n) for n in reversed(range(9))])
    timer.start()
    assert [next(restoring).index for _ in range(3)] == [0, 1, 2]
    assert source.pulled == 4
    timer.join()
    restoring.close()


def test_the_source_and_the_workers_run_at_the_same_time():
    asked = [threading.Event() for _ in range(9)]

    def source():
        for index, event in enumerate(asked):
            event.set()
            if index < 8:
                yield frame(index)

    def once_the_next_is_asked_for(batch):
        assert asked[batch[0].max() + 1].wait(10)
        return brighter(batch)

    with ThreadPoolExecutor(1) as threads:

        def submit(batch):
            return threads.submit(once_the_next_is_asked_for, batch)

        check(list(restore_frames(source(), GRID, submit, 2)), 8)


@pytest.mark.parametrize("failing", [0, 1, 4, 3 * 5 + 2])
def test_a_failing_batch_raises_its_own_error_with_the_frame_and_cancels_the_rest(failing):
    workers = Workers()

    def submit(batch):
        number, future = len(workers.work), workers(batch)
        if number == failing:
            future.set_exception(RuntimeError("the device is gone"))
        elif number < failing:
            workers.finish(number)
        return future

    index = failing // GRID.n_batches
    emitted = []
    with pytest.raises(RuntimeError, match="the device is gone") as caught:
        emitted.extend(restore_frames(Source(30), GRID, submit, 4))
    assert caught.value.__notes__ == [f"while restoring frame {index} (pts {1000 + index**2})"]
    assert workers.cancelled() == list(range(failing + 1, len(workers.work)))


def test_frames_before_the_failing_one_are_emitted():
    def submit(batch):
        future = finished(batch)
        if batch[0].max() >= 3:
            future = Future()
            future.set_exception(RuntimeError("no"))
        return future

    restoring = restore_frames(Source(9), GRID, submit, 5)
    check([next(restoring) for _ in range(3)], 3)
    with pytest.raises(RuntimeError, match="no"):
        next(restoring)
    assert list(restoring) == []


def test_an_error_of_submit_names_the_frame_and_cancels_what_it_had_started():
    workers = Workers()

    def submit(batch):
        if len(workers.work) == 4:
            raise OSError("no room")
        return workers(batch)

    with pytest.raises(OSError, match="no room") as caught:
        list(restore_frames(Source(9), GRID, submit, 8))
    assert caught.value.__notes__ == ["while restoring frame 1 (pts 1001)"]
    assert workers.cancelled() == [0, 1, 2, 3]


def test_an_error_of_the_source_is_left_as_it_is_and_cancels_the_rest():
    def breaking():
        yield frame(0)
        raise OSError("the file ends here")

    workers = Workers()
    with pytest.raises(OSError, match="ends here") as caught:
        list(restore_frames(breaking(), GRID, workers, 8))
    assert not hasattr(caught.value, "__notes__")
    assert workers.cancelled() == [0, 1, 2]


def test_closing_early_cancels_what_is_in_flight():
    workers = Workers()

    def submit(batch):
        future = workers(batch)
        if len(workers.work) <= GRID.n_batches:
            workers.finish(len(workers.work) - 1)
        return future

    source = Source(9)
    restoring = restore_frames(source, GRID, submit, 1)
    check([next(restoring)], 1)
    restoring.close()
    assert (source.pulled, workers.cancelled()) == (1, [])

    workers = Workers()
    restoring = restore_frames(Source(9), GRID, workers, 4)
    timer = threading.Timer(0.05, lambda: [workers.finish(n) for n in range(3)])
    timer.start()
    next(restoring)
    timer.join()
    restoring.close()
    assert workers.cancelled() == list(range(3, 12))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batch: batch[:2],
        lambda batch: (batch[0][:, :-1], *batch[1:]),
        lambda batch: (batch[0][:0], *batch[1:]),
        lambda batch: (batch[0], batch[1].astype(np.uint16), batch[2]),
    ],
)
def test_a_batch_that_comes_back_in_another_shape_is_an_integrity_error(spoil):
    def submit(batch):
        future = Future()
        future.set_result(spoil(batch) if batch[0].max() == 2 else batch)
        return future

    with pytest.raises(IntegrityError, match="frame 2") as caught:
        list(restore_frames(Source(5), GRID, submit, 2))
    assert caught.value.__notes__ == ["while restoring frame 2 (pts 1004)"]


def test_a_frame_of_another_size_names_itself():
    frames = [frame(0), Frame(1, 5, tuple(plane[:-2] for plane in frame(1).planes))]
    with pytest.raises(ValueError, match="do not fit") as caught:
        list(restore_frames(frames, GRID, finished, 2))
    assert caught.value.__notes__ == ["while restoring frame 1 (pts 5)"]


def test_a_window_without_room_is_refused_at_once():
    with pytest.raises(ValueError, match="not 0"):
        restore_frames([], GRID, finished, 0)
