import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import psutil
import pytest

import workers.local
import workers.pool
from pipeline.frames import Frame
from pipeline.restore import restore_frames
from pipeline.tiles import TileGrid
from workers import LocalPool, PlaneSpec, RayPool, WeightsError, WorkerError, WorkerSpec
from workers.cluster import available_devices, pick_device, ray_session
from workers.worker import TileWorker

YUV420 = PlaneSpec(3, 1, 1, 8, "bt709", False, "left")
needs_ray = [pytest.mark.ray, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_of_two_cpus")]


def tiles(seed, n=2, size=32):
    rng = np.random.default_rng(seed)
    shapes = [(n, size, size)] + 2 * [(n, size // 2, size // 2)]
    return tuple(rng.integers(16, 236, shape, np.uint8) for shape in shapes)


def spec_of(checkpoint, **kwargs):
    return WorkerSpec(checkpoint, YUV420, precision="fp32", threads=1, **kwargs)


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for plane, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(plane, other, strict=True)


def workers_of_ray():
    """The processes of this test run's actors, by their title."""
    return [p for p in psutil.Process().children(recursive=True) if title(p) == "ray::_RayWorker"]


def title(process):
    try:
        return "".join(process.cmdline()).partition(".")[0]
    except psutil.NoSuchProcess:
        return ""


def listening_addresses(process):
    try:
        connections = process.net_connections("inet")
    except psutil.NoSuchProcess:
        return []
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN]


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


def saying(number):
    return (np.full((1, 2, 2), number, np.uint8),)


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


def test_a_device_that_hangs_fails_its_batches_and_nothing_waits_for_it(monkeypatch):
    release = threading.Event()

    class Hanging(Scripted):
        def __call__(self, batch, planes=None, smaller=False):
            release.wait(60)
            return batch

    monkeypatch.setattr(workers.local, "TileWorker", Hanging)
    pool = LocalPool(WorkerSpec("some", YUV420), batch_timeout_seconds=0.5)
    futures = [pool.submit(saying(number)) for number in range(2)]
    for future in futures:
        with pytest.raises(WorkerError, match=r"no answer in 0\.504 s a batch"):
            future.result(timeout=20)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    release.set()


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


STANDS = """
import os, threading
from concurrent.futures import Future
from workers.deadlines import Deadlines
future = Future()
Deadlines().bound(future, 2)
print("bound", flush=True)
threading.Timer(1.5, future.set_result, ["restored"]).start()
print(future.result())
"""


def test_time_for_which_the_process_stood_still_does_not_count():
    with subprocess.Popen([sys.executable, "-c", STANDS], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"bound\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == b"restored\n"


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


def test_a_device_is_picked():
    assert pick_device() == available_devices()[0]
    assert pick_device("cpu") == "cpu"
    with pytest.raises(WorkerError, match="cuda:99"):
        pick_device("cuda:99")


def test_ray_pool_without_ray_says_so_and_starts_none():
    code = (
        "from workers import *\n"
        "spec = WorkerSpec('some', PlaneSpec(1, 0, 0, 8, 'bt709', True, 'left'))\n"
        "try: RayPool(spec, 1, num_cpus_per_worker=1)\n"
        "except WorkerError as error: assert 'ray_session' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_local_pool_never_loads_ray(tiny_checkpoint):
    code = (
        "import sys; from workers import *\n"
        f"spec = WorkerSpec({tiny_checkpoint!r}, PlaneSpec(1, 0, 0, 8, 'bt709', True, 'left'))\n"
        "LocalPool(spec).close()\n"
        "assert 'ray' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def ray_pool(ray_of_two_cpus, tiny_checkpoint):
    with RayPool(spec_of(tiny_checkpoint), 2, num_cpus_per_worker=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def expected(tiny_checkpoint):
    """What each seed's batch becomes, restored in this process."""
    with LocalPool(spec_of(tiny_checkpoint)) as pool:
        return [pool.submit(tiles(seed)).result() for seed in range(12)]


class LoggingWorker:
    """In the place of the actor: notes its process and the batch's last sample, then sleeps."""

    def __init__(self, spec):
        self.path = spec.checkpoint

    def ready(self):
        pass

    def restore(self, batch, planes=None, smaller=False):
        with open(self.path, "a") as log:
            log.write(f"{os.getpid()} {batch[-1].flat[-1]}\n")
        time.sleep(0.1)
        return batch


@pytest.fixture
def logging_worker(monkeypatch):
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(workers.pool, "_RayWorker", LoggingWorker)
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class TestRayPool:
    pytestmark = needs_ray

    def test_results_are_those_of_the_local_pool_bit_for_bit_in_order(self, ray_pool, expected):
        ray_pool.warm_up(tiles(0))
        futures = [ray_pool.submit(tiles(seed)) for seed in range(12)]
        for future, want in zip(futures, expected, strict=True):
            got = future.result(timeout=60)
            assert isinstance(got, tuple)
            assert_equal(got, want)
        assert len(workers_of_ray()) == ray_pool.n_workers == 2

    def test_a_batch_may_come_with_its_own_format(self, ray_pool, tiny_checkpoint):
        full = PlaneSpec(3, 1, 1, 8, "bt601", True, "left")
        with LocalPool(replace(spec_of(tiny_checkpoint), planes=full)) as pool:
            expected = pool.submit(tiles(1)).result()
        assert_equal(ray_pool.submit(tiles(1), full).result(timeout=60), expected)

    def test_both_workers_get_their_share(self, ray_pool):
        futures = [ray_pool.submit(tiles(seed, n=16, size=128)) for seed in range(6)]
        assert sorted(ray_pool._loads.values()) == [3, 3]
        for future in futures:
            future.result(timeout=60)
        wait_until(lambda: sorted(ray_pool._loads.values()) == [0, 0])
        assert not ray_pool._in_flight

    def test_a_killed_worker_comes_back_and_no_batch_is_lost(self, tiny_checkpoint, expected):
        others = {p.pid for p in workers_of_ray()}
        with RayPool(spec_of(tiny_checkpoint), 1, num_cpus_per_worker=0) as pool:
            before = {p.pid for p in workers_of_ray()}
            (worker,) = before - others
            futures = [pool.submit(tiles(seed)) for seed in range(12)]
            futures[3].result(timeout=60)
            os.kill(worker, signal.SIGKILL)
            for future, want in zip(futures, expected, strict=True):
                assert_equal(future.result(timeout=60), want)
            assert {p.pid for p in workers_of_ray()} - before

    def test_a_worker_that_dies_in_the_middle_of_a_frame_costs_its_tiles_alone(
        self, tmp_path, logging_worker
    ):
        log = tmp_path / "log"
        batches = [(*saying(0), np.full((1, 2, 2), seed, np.uint8)) for seed in range(12)]
        with RayPool(spec_of(str(log)), 2, num_cpus_per_worker=0) as pool:
            futures = [pool.submit(batch) for batch in batches]
            futures[3].result(timeout=60)
            os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
            for future, batch in zip(futures, batches, strict=True):
                assert_equal(future.result(timeout=60), batch)
        done = [line.split()[1] for line in log.read_text().splitlines()]
        assert set(done) == {str(seed) for seed in range(12)}
        assert len(done) <= 12 + 1  # the one that it was at

    def test_a_worker_that_stands_still_holds_nothing_but_what_it_has(
        self, tmp_path, logging_worker
    ):
        log = tmp_path / "log"
        grid = TileGrid.plan(
            64, 64, log2_chroma_w=0, log2_chroma_h=0, n_planes=1, tile=None, overlap=0,
            batch_size=1, align=1,
        )  # fmt: skip
        frames = (Frame(n, n, (np.full((64, 64), n, np.uint8),)) for n in range(20))
        with RayPool(spec_of(str(log)), 2, num_cpus_per_worker=0) as pool:
            pool.submit(saying(99)).result(timeout=60)
            slow = psutil.Process(int(log.read_text().split()[0]))
            restored = restore_frames(frames, grid, pool.submit, window=6)
            first = next(restored)
            slow.suspend()
            meanwhile = []

            def resume():
                lines = log.read_text().splitlines()
                meanwhile.extend(line for line in lines if int(line.split()[0]) != slow.pid)
                slow.resume()

            threading.Timer(4, resume).start()
            began, times = time.monotonic(), []
            for frame in restored:
                times.append(time.monotonic() - began)
                assert frame.planes[0].flat[0] == first.index + len(times)
        # It had two of the six at the most: the other did the rest of the window.
        assert max(times) >= 3
        assert len(meanwhile) >= 4

    def test_an_error_in_a_worker_names_its_cause_and_the_pool_goes_on(self, ray_pool, expected):
        ragged = (*tiles(0)[:2], np.zeros((2, 3, 5), np.uint8))
        with pytest.raises(WorkerError, match=r"^RuntimeError: .*size"):
            ray_pool.submit(ragged).result(timeout=60)
        assert_equal(ray_pool.submit(tiles(0)).result(timeout=60), expected[0])

    def test_missing_weights_keep_their_type_and_text(self, tmp_path):
        before = len(workers_of_ray())
        with pytest.raises(WeightsError, match=r"nothing\.safetensors"):
            RayPool(spec_of(str(tmp_path / "nothing.safetensors")), 1, num_cpus_per_worker=0)
        wait_until(lambda: len(workers_of_ray()) == before)

    def test_workers_that_the_cluster_has_no_room_for_are_an_error(self, tiny_checkpoint):
        with pytest.raises(WorkerError, match=r"1 workers were not .* of 2 CPUs and 0 of"):
            RayPool(spec_of(tiny_checkpoint), 1, num_cpus_per_worker=64, start_timeout_seconds=1)

    def test_a_gpu_worker_needs_a_gpu_to_be_asked_for(self):
        with pytest.raises(ValueError, match="num_gpus_per_worker"):
            RayPool(spec_of("some", device="cuda:0"), 1, num_cpus_per_worker=1)

    def test_a_worker_that_never_answers_is_an_error(self, tiny_checkpoint):
        spec = spec_of(tiny_checkpoint)
        with RayPool(spec, 1, num_cpus_per_worker=0, batch_timeout_seconds=0.5) as pool:
            stopped = workers_of_ray()[-1]
            stopped.suspend()
            with pytest.raises(WorkerError, match=r"no answer in 2\.55 s"):
                pool.submit(tiles(0)).result(timeout=60)
            stopped.resume()

    def test_closing_fails_what_is_in_flight_and_leaves_no_worker(self, tiny_checkpoint):
        before = len(workers_of_ray())
        pool = RayPool(spec_of(tiny_checkpoint), 1, num_cpus_per_worker=0)
        futures = [pool.submit(tiles(seed, n=16, size=256)) for seed in range(4)]
        futures[3].cancel()
        pool.close()
        pool.close()
        with pytest.raises(WorkerError, match="closed"):
            futures[2].result(timeout=0)
        with pytest.raises(CancelledError):
            futures[3].result(timeout=0)
        with pytest.raises(WorkerError, match="closed"):
            pool.submit(tiles(0))
        wait_until(lambda: len(workers_of_ray()) == before)

    def test_ray_listens_on_the_loopback_address_alone(self, ray_of_two_cpus):
        listening = [
            ip
            for process in psutil.Process().children(recursive=True)
            for ip in listening_addresses(process)
        ]
        assert listening
        assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}

    def test_a_session_inside_a_session_leaves_the_outer_one_running(self, ray_pool, expected):
        with ray_session():
            pass
        assert_equal(ray_pool.submit(tiles(0)).result(timeout=60), expected[0])


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no.such.host.invalid:1"]
)
def test_a_cluster_where_nothing_answers_is_an_error_at_once(address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
    # This process has a Ray already.
    code = "import sys; from workers import ray_session\nwith ray_session(sys.argv[1]): pass"
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60
    )
    assert f"{address}: nothing answers there (" in done.stderr.splitlines()[-1]


INTERRUPTED = """
import psutil, signal, threading, os
from workers import ray_session
for number in (signal.SIGINT, signal.SIGTERM):  # a background job inherits the first one ignored
    signal.signal(number, signal.default_int_handler)
def processes(): return psutil.Process().children(recursive=True)
for number in (signal.SIGINT, signal.SIGTERM):
    try:
        with ray_session(num_cpus=1):
            assert processes()
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
    except KeyboardInterrupt:
        print("interrupted", len(processes()))
"""


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_signal_with_a_handler_ends_the_session_and_the_next_one_starts(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["interrupted 0"] * 2, done.stderr
    assert not (tmp_path / ".ray").exists(), "the token is in the environment, not in a file"
