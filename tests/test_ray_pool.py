"""Workers in processes of a real Ray: what is lost with one of them, and that no other waits."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import psutil
import pytest
from commands import wait_until
from tiles_of_noise import assert_equal, saying, spec_of, tiles

import workers.local
import workers.pool
from pipeline.frames import Frame
from pipeline.restore import restore_frames
from pipeline.tiles import TileGrid
from workers import LocalPool, PlaneSpec, RayPool, WeightsError, WorkerError
from workers.cluster import ray_session

needs_ray = [pytest.mark.ray, pytest.mark.timeout(120), pytest.mark.usefixtures("ray_of_two_cpus")]


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


def test_ray_pool_without_ray_says_so_and_starts_none():
    code = (
        "from workers import *\n"
        "spec = WorkerSpec('some', PlaneSpec(1, 0, 0, 8, 'bt709', True, 'left'))\n"
        "try: RayPool(spec, 1, num_cpus_per_worker=1)\n"
        "except WorkerError as error: assert 'ray_session' in str(error)\n"
        "else: raise SystemExit('no error')\n"
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
