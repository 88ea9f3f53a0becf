"""The parts of cluster.py that need a Ray: tiles over many workers, one pool against the other, and
a machine that dies. Each prints its figures."""

import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

import numpy as np
import psutil
from clips import crop, cropped

import workers.pool
from pipeline import RestoreConfig
from pipeline.decode import VideoSource
from pipeline.derived import plan_grid
from pipeline.frames import Frame, TileBatch
from pipeline.pools import worker_spec
from pipeline.restore import restore_frames
from pipeline.tiles import TileGrid
from workers import LocalPool, PlaneSpec, RayPool, WorkerSpec, describe_weights, ray_session

BATCH_SECONDS = 0.04
"""What a sleeping worker takes for a batch of tiles."""


TURN = 30
"""Frames in a row through one pool: what else the machine does meets both alike."""


class Sleeper:
    """In the place of a worker's process: sleeps, and gives back a copy."""

    def __init__(self, spec: WorkerSpec) -> None:
        pass

    def ready(self) -> None:
        pass

    def restore(self, tiles: TileBatch, planes: None, smaller: bool) -> TileBatch:
        time.sleep(BATCH_SECONDS)
        return tuple(np.array(plane) for plane in tiles)


class Clock:
    """Seconds spent in a function of the driver's thread."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function):  # noqa: ANN001, ANN201 - whatever it takes and gives
        def timed(*args):  # noqa: ANN002, ANN202
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def tiles(n_workers: int, n_frames: int, tile: int) -> None:
    """Real planes of 1080p over sleeping workers: how busy they are, and what holds them up."""
    grid = TileGrid.plan(
        1920, 1080, log2_chroma_w=1, log2_chroma_h=1, n_planes=3, tile=(tile, tile), overlap=32,
        batch_size=1, align=8,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = [(1080, 1920), (540, 960), (540, 960)]
    clip = [tuple(rng.integers(16, 235, s, np.uint8) for s in shapes) for _ in range(8)]
    frames = (Frame(n, n, planes) for n, planes in zip(range(n_frames), itertools.cycle(clip)))
    window = -(-2 * n_workers // grid.n_batches) + 1
    size = sum(plane.nbytes for plane in grid.split(clip[0])[0])
    split, merge, submit = Clock(), Clock(), Clock()
    with ray_session(num_cpus=2), _sleepers(n_workers) as pool:
        timed = _timed_grid(grid, split, merge)
        warm = (Frame(n, n, clip[0]) for n in range(2 * window))
        for _ in restore_frames(warm, grid, pool.submit, window):
            pass
        cpu, began = psutil.cpu_times(), time.perf_counter()
        own = psutil.Process().cpu_times()
        for _ in restore_frames(frames, timed, submit.of(pool.submit), window):
            pass
        seconds = time.perf_counter() - began
        own_after, after = psutil.Process().cpu_times(), psutil.cpu_times()
    n_batches = n_frames * grid.n_batches
    busy = n_batches * BATCH_SECONDS / (n_workers * seconds)
    used = (sum(after) - after.idle - after.iowait) - (sum(cpu) - cpu.idle - cpu.iowait)
    driver = own_after.user + own_after.system - own.user - own.system
    print(f"{grid.n_batches} batches a frame of {size / 2**20:.2f} MiB, window {window} frames")
    print(f"{n_workers} workers, {n_frames} frames in {seconds:.1f} s: busy {busy:.1%}")
    print(f"driver: {n_frames / seconds:.1f} frames/s, {n_batches / seconds:.0f} batches/s, "
          f"{n_batches * size / seconds / 2**20:.0f} MiB/s each way")  # fmt: skip
    print(f"if every worker were busy: {n_workers / BATCH_SECONDS / grid.n_batches:.1f} frames/s")
    print("of the driver's thread: " + ", ".join(
        f"{name} {clock.seconds / seconds:.0%}"
        for name, clock in (("split", split), ("submit", submit), ("merge", merge))
    ) + ", the rest waits")  # fmt: skip
    print(f"processors: {used / seconds / os.cpu_count():.0%} of {os.cpu_count()} cores in use, "
          f"{driver / seconds:.2f} cores by the driver's process")  # fmt: skip


def _sleepers(n_workers: int) -> RayPool:
    # Only now: Ray reads when it is imported whether it is to keep to the loopback address.
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    workers.pool._RayWorker = Sleeper
    spec = WorkerSpec("none", PlaneSpec(3, 1, 1, 8, "bt709", False, "left"))
    return RayPool(spec, n_workers, num_cpus_per_worker=0, start_timeout_seconds=240)


def _timed_grid(grid: TileGrid, split: Clock, merge: Clock) -> object:
    return SimpleNamespace(split=split.of(grid.split), merge=merge.of(grid.merge))


def pools(clip: Path, n_frames: int, model: str, rounds: int) -> None:
    """The same frames through a LocalPool and a RayPool of one worker, in turns."""
    import torch

    torch.set_num_threads(1)
    config = RestoreConfig.load(overrides={"model.model": model, "tile.size": 0})
    with VideoSource(clip) as source:
        some = [crop(f.planes, (320, 192)) for f in itertools.islice(source.frames(), 50)]
        info = cropped(source.info, some[0])
    grid = plan_grid(info, config, "cpu", describe_weights(model).stride)
    spec = replace(worker_spec(info.pixel_format, config, "cpu"), threads=1)
    found = {"LocalPool": [0.0] * rounds, "RayPool": [0.0] * rounds}

    def run(pool: LocalPool | RayPool) -> float:
        frames = (Frame(n, n, planes) for n, planes in zip(range(TURN), itertools.cycle(some)))
        began = time.perf_counter()
        for _ in restore_frames(frames, grid, pool.submit, config.pool.window):
            pass
        return time.perf_counter() - began

    print(f"{info.width}x{info.height}, {grid.n_batches} batches a frame, {n_frames} frames")
    with (
        ray_session(num_cpus=1),
        RayPool(spec, 1, num_cpus_per_worker=1) as ray,
        LocalPool(spec) as local,
    ):
        for pool in (local, ray):
            pool.warm_up(grid.split(some[0])[0])
            run(pool)
        for number in range(rounds):
            for _ in range(n_frames // TURN):
                for pool in (local, ray):
                    found[type(pool).__name__][number] += run(pool)
    for name, seconds in found.items():
        each = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"{name}: {each} s, {median(seconds) / n_frames * 1e3:.1f} ms a frame")
    ratios = [ray / local for local, ray in zip(*found.values(), strict=True)]
    print("RayPool against LocalPool: " + ", ".join(f"{ratio:.3f}" for ratio in ratios)
          + f"; median {median(ratios):.3f}")  # fmt: skip


DEATH = """
import os, sys, time
from workers import RayCrew, cluster, spread
cluster._stay_private()
import ray
from ray.cluster_utils import Cluster as Machines
seconds, n_items, phase = float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
small = {"object_store_memory": 200 << 20}
machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [machines.add_node(num_cpus=1, **small) for _ in range(2)]
ray.init(address=machines.address, log_to_driver=False)
def job(item):
    began = time.time()
    time.sleep(seconds)
    return ray.get_runtime_context().get_node_id(), began, time.time(), bytes(item[:-1])
done, died, first = [], 0.0, {}
with RayCrew(job) as crew:
    while len(crew.workers()) < 2:
        time.sleep(0.1)
    for outcome in spread(crew, (bytes(2_500_000) for _ in range(n_items))):
        node, began, ended, _ = outcome.result
        done.append((node, began, ended, outcome.tries))
        if len(done) == 8 and not died:
            other = [d for d in done if d[0] == nodes[0].node_id][-1]
            time.sleep(max(0, other[2] + phase * seconds - time.time()))
            machines.remove_node(nodes[0], allow_graceful=False)
            died = time.time()
start = min(began for _, began, _, _ in done)
end = max(ended for _, _, ended, _ in done)
lost = [d for d in done if d[0] == nodes[0].node_id]
again = sum(d[3] - 1 for d in done)
print("FOUND", start, died, end, max(d[2] for d in lost), again, len(done))
ray.shutdown()
machines.shutdown()
"""


def death(seconds: float, n_items: int) -> None:
    """Two machines of one worker each, of which one dies: the wall time beyond what the workers
    that were there could have done it in."""
    print("| dies at | done again, s | in all, s | could have been, s | cost, s | tries again |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    costs = []
    for phase in (0.1, 0.5, 0.9):
        done = subprocess.run(
            [sys.executable, "-c", DEATH, str(seconds), str(n_items), str(phase)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        (found,) = (x for x in done.stdout.splitlines() if x.startswith("FOUND"))
        start, died, end, last, again, n_done = map(float, found.split()[1:])
        assert n_done == n_items
        # Both until the death, one after it; each worker does one item after another.
        possible = died - start + (n_items * seconds - 2 * (died - start))
        costs.append(end - start - possible)
        print(f"| {phase:.0%} of a segment | {died - last:.2f} | {end - start:.2f} "
              f"| {possible:.2f} | {costs[-1]:.2f} | {again:.0f} |", flush=True)  # fmt: skip
    print(f"a segment takes {seconds:g} s; cost {mean(costs):.2f} s in the mean, "
          f"{max(costs):.2f} s at the most")  # fmt: skip
