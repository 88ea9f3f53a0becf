"""Workers in this process: their own futures, a device that hangs, an error, the end."""

import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest
from commands import wait_until
from tiles_of_noise import YUV420, assert_equal, saying, spec_of, tiles

import workers.local
import workers.pool
from workers import LocalPool, PlaneSpec, WeightsError, WorkerError, WorkerSpec
from workers.worker import TileWorker


class Scripted:
    """Stands in for TileWorker: what a batch's first sample says is done."""

    def __init__(self, spec):
        pass

    def __call__(self, batch, planes=None, smaller=False):
        match batch[0].flat[0]:
            case 1:
                raise ZeroDivisionError("a bug\nin two lines")
            case 2:
                raise WorkerError("out of memory")
            case 3:
                time.sleep(0.3)
        return batch


@pytest.fixture
def scripted(monkeypatch):
    monkeypatch.setattr(workers.local, "TileWorker", Scripted)
    with LocalPool(WorkerSpec("some", YUV420)) as pool:
        yield pool


def test_local_pool_restores_each_batch_to_its_own_future(tiny_checkpoint):
    with LocalPool(spec_of(tiny_checkpoint)) as pool:
        pool.warm_up(tiles(0))
        futures = [pool.submit(tiles(seed)) for seed in (1, 2, 1)]
        first, second, again = (future.result(timeout=60) for future in futures)
    assert_equal(first, again)
    assert not np.array_equal(first[0], tiles(1)[0])
    assert not np.array_equal(first[0], second[0])


class Both:
    """Stands in for TileWorker: a batch comes back once the other worker has one as well."""

    meeting = threading.Barrier(2, timeout=20)

    def __init__(self, spec):
        self.warm = False

    def warm_up(self, batch, planes=None):
        self.warm = True

    def __call__(self, batch, planes=None, smaller=False):
        assert self.warm
        self.meeting.wait()
        return batch


def test_two_workers_of_a_device_work_at_once_each_warmed_up(monkeypatch):
    monkeypatch.setattr(workers.local, "TileWorker", Both)
    monkeypatch.setattr(workers.local, "_WORKERS_OF", {"cpu": 2})
    with LocalPool(WorkerSpec("some", YUV420)) as pool:
        assert pool.n_workers == 2
        pool.warm_up(saying(0))
        futures = [pool.submit(saying(number)) for number in range(8)]
        for number, future in enumerate(futures):
            assert_equal(future.result(timeout=60), saying(number))


def test_a_worker_that_is_busy_is_warmed_up_as_well(monkeypatch):
    warmed, release = [], threading.Event()

    class Busy(Scripted):
        def warm_up(self, batch, planes=None):
            warmed.append(self)

        def __call__(self, batch, planes=None, smaller=False):
            assert release.wait(20)
            return batch

    monkeypatch.setattr(workers.local, "TileWorker", Busy)
    monkeypatch.setattr(workers.local, "_WORKERS_OF", {"cpu": 2})
    with LocalPool(WorkerSpec("some", YUV420)) as pool:
        future = pool.submit(saying(1))
        threading.Timer(0.3, release.set).start()
        pool.warm_up(saying(0))
        assert len(set(warmed)) == 2
        assert_equal(future.result(timeout=20), saying(1))
        assert_equal(pool.submit(saying(2)).result(timeout=20), saying(2))


def test_two_that_warm_up_at_once_do_not_wait_for_each_other(monkeypatch):
    """As two cameras do that connect at the same time."""

    class Slow(Scripted):
        def warm_up(self, batch, planes=None):
            time.sleep(0.1)

    monkeypatch.setattr(workers.local, "TileWorker", Slow)
    monkeypatch.setattr(workers.local, "_WORKERS_OF", {"cpu": 2})
    with LocalPool(WorkerSpec("some", YUV420)) as pool:
        callers = [
            threading.Thread(target=pool.warm_up, args=[saying(0)], daemon=True) for _ in range(3)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(10)
        assert not any(caller.is_alive() for caller in callers)


@pytest.fixture
def hanging(monkeypatch):
    """Every batch hangs until this is set."""
    release = threading.Event()

    class Hanging(Scripted):
        def __call__(self, batch, planes=None, smaller=False):
            release.wait(60)
            return batch

    monkeypatch.setattr(workers.local, "TileWorker", Hanging)
    return release


def test_a_device_that_hangs_fails_its_batches_and_nothing_waits_for_it(hanging):
    pool = LocalPool(WorkerSpec("some", YUV420), batch_timeout_seconds=0.5)
    futures = [pool.submit(saying(number)) for number in range(2)]
    for future in futures:
        with pytest.raises(WorkerError, match=r"no answer in 0\.504 s a batch"):
            future.result(timeout=20)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    hanging.set()


def test_warming_up_may_take_many_batches_and_a_large_batch_long(monkeypatch):
    class Slow(Scripted):
        def warm_up(self, batch, planes=None):
            time.sleep(2)

    monkeypatch.setattr(workers.local, "TileWorker", Slow)
    with LocalPool(WorkerSpec("some", YUV420), batch_timeout_seconds=0.25) as pool:
        pool.warm_up(saying(0))
        large = (np.full((1, 64, 64), 3, np.uint8),)  # takes 0.3 s
        assert_equal(pool.submit(large).result(), large)


HANGS = """
import sys, threading, numpy as np, workers.local
class Hanging:
    def __init__(self, spec): pass
    def __call__(self, *_): threading.Event().wait()
workers.local.TileWorker = Hanging
with workers.local.LocalPool(workers.WorkerSpec("some", None), batch_timeout_seconds=0.5) as pool:
    pool.submit((np.zeros((1, 2, 2)),)).result()
"""


def test_no_exit_waits_for_a_device_that_hangs():
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.endswith("no answer in 0.504 s a batch\n")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_two_workers_of_a_gpu_mix_nothing_up():
    spec = WorkerSpec("tiny", YUV420, device="cuda:0")
    alone = TileWorker(spec)
    batches = [tiles(seed, size=64 + 32 * (seed % 2)) for seed in range(20)]
    with LocalPool(spec) as pool:
        pool.warm_up(batches[0])
        futures = [pool.submit(batch) for batch in batches]
        for batch, future in zip(batches, futures, strict=True):
            for plane, other in zip(future.result(), alone(batch), strict=True):
                assert np.abs(plane.astype(int) - other).max() <= 1


def test_streams_of_different_formats_share_one_worker(tiny_checkpoint):
    full = PlaneSpec(3, 1, 1, 8, "bt601", True, "left")
    with LocalPool(replace(spec_of(tiny_checkpoint), planes=full)) as pool:
        expected = pool.submit(tiles(1)).result()
    with LocalPool(replace(spec_of(tiny_checkpoint), planes=None)) as pool:
        pool.warm_up(tiles(0), YUV420)
        futures = [pool.submit(tiles(1), planes) for planes in (full, YUV420, full)]
        first, other, again = (future.result() for future in futures)
    assert_equal(first, expected)
    assert_equal(again, expected)
    assert not np.array_equal(other[0], expected[0])


def test_local_pool_says_at_once_that_weights_are_missing(tmp_path):
    with pytest.raises(WeightsError, match="nothing"):
        LocalPool(spec_of(str(tmp_path / "nothing.safetensors")))


def test_an_error_in_a_batch_is_that_futures_own_and_the_pool_goes_on(scripted):
    futures = [scripted.submit(saying(number)) for number in (0, 1, 2, 0)]
    assert_equal(futures[0].result(), saying(0))
    with pytest.raises(WorkerError, match=r"^ZeroDivisionError: a bug in two lines$") as caught:
        futures[1].result()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(WorkerError, match=r"^out of memory$"):
        futures[2].result()
    assert_equal(futures[3].result(), saying(0))


def test_a_closed_pool_finishes_the_running_batch_cancels_the_rest_and_takes_no_more(scripted):
    running, waiting = scripted.submit(saying(3)), scripted.submit(saying(0))
    wait_until(running.running)
    scripted.close()
    scripted.close()
    assert_equal(running.result(timeout=0), saying(3))
    with pytest.raises(CancelledError):
        waiting.result()
    with pytest.raises(WorkerError, match="closed"):
        scripted.submit(saying(0))


def test_local_pool_never_loads_ray(tiny_checkpoint):
    code = (
        "import sys; from workers import *\n"
        f"spec = WorkerSpec({tiny_checkpoint!r}, PlaneSpec(1, 0, 0, 8, 'bt709', True, 'left'))\n"
        "LocalPool(spec).close()\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_device_that_hangs_fails_what_waits_for_it_at_once(hanging):
    """A wall of cameras would else end one after the other, for hours."""
    began = time.monotonic()
    with LocalPool(WorkerSpec("some", YUV420), batch_timeout_seconds=1) as pool:
        waiting = [pool.submit(saying(0)) for _ in range(4)]
        for future in waiting:
            with pytest.raises(WorkerError, match="no answer in"):
                future.result(30)
        with pytest.raises(WorkerError, match="no answer in"):
            pool.submit(saying(0))
        assert time.monotonic() - began < 3  # and not 1 s for each
        hanging.set()
