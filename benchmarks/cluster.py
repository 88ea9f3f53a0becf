"""What a cluster's driver can feed, by its parts.

    python benchmarks/cluster.py schedule [--workers 64 256] [--items 2000] [--megabytes 2.5]
    python benchmarks/cluster.py driver CLIP
    python benchmarks/cluster.py workers CLIP [--frames 400] [--model tiny] [--rounds 3]
    python benchmarks/cluster.py tiles [--workers 32] [--frames 200] [--tile 768]
    python benchmarks/cluster.py pool CLIP [--frames 300] [--model tiny]
    python benchmarks/cluster.py death [--items 24] [--seconds 4]

schedule: workers/schedule.py alone, with real-sized bytes in and out. The workers are threads of
this process that sleep 2 s: there is no Ray, no network and no second machine, so this is what the
scheduler itself costs and what it holds in memory, and nothing else.
driver: what one segment of CLIP costs the driver, each step by itself, in one thread.
workers: a whole restore_batch with two workers of one core and one thread each against one of
them, on a private Ray; CLIP with a keyframe every 20 frames, so that all segments are alike; the
slope of the frames done over time, from when each has brought a segment to when one has no more to
do. And what two processes without Ray gain, for the cores of a virtual machine may not be whole.
tiles: restore_frames and RayPool on real planes of 1080p; the workers, processes of Ray on this
machine, sleep 40 ms a batch. pool: LocalPool against a RayPool of one worker, frames already
decoded, one thread each, after the warm-up. death: RayCrew on two machines (two raylets here) of
one worker each that sleeps 4 s a segment; one of them is killed in the middle.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median

import cluster_ray
import numpy as np
import psutil
from end_to_end import cut as shortened
from machine import machine

from pipeline import RestoreConfig
from pipeline.batch import BatchProgress, Cluster, restore_batch
from pipeline.cut import CutPlan
from pipeline.decode import VideoSource
from pipeline.derived import encode_settings
from pipeline.encode import VideoWriter
from pipeline.inputs import BatchItem
from pipeline.segments import plan
from workers import Limits, ray_session, spread

PART = 20
"""Frames of a segment of `workers`."""
SECONDS = 2.0
"""The time of a simulated segment."""


class Sleepers:
    """A crew of threads."""

    def __init__(self, n_workers: int, result: bytes) -> None:
        self._threads = {n: ThreadPoolExecutor(1) for n in range(n_workers)}
        self._result = result

    def workers(self) -> list[int]:
        return list(self._threads)

    def hold(self, item: bytes) -> bytes:
        return item

    def hold_again(self, held: bytes) -> bytes:
        return held

    def start(self, worker: int, held: bytes) -> Future[bytes]:
        return self._threads[worker].submit(self._do, held)

    def dismiss(self, worker: int) -> None:
        """Threads end by themselves."""

    def room(self) -> str:
        return f"{len(self._threads)} threads"

    def _do(self, held: bytes) -> bytes:
        time.sleep(SECONDS)
        return self._result[:-1]  # a copy, as from another process

    def close(self) -> None:
        for thread in self._threads.values():
            thread.shutdown()


def simulate(n_workers: int, n_items: int, n_bytes: int) -> None:
    """One line: how busy the workers were, and the memory a tenth of the way in and at the end."""
    crew = Sleepers(n_workers, bytes(n_bytes))
    process = psutil.Process()
    items = (bytes(n_bytes) for _ in range(n_items))
    start = time.perf_counter()
    early = 0
    cpu = process.cpu_times().user + process.cpu_times().system
    for done, _ in enumerate(spread(crew, items, Limits()), start=1):
        if done == n_items // 10:
            early = process.memory_info().rss
    seconds = time.perf_counter() - start
    cpu = process.cpu_times().user + process.cpu_times().system - cpu
    busy = n_items * SECONDS / (n_workers * seconds)
    mib = (early / 2**20, process.memory_info().rss / 2**20)
    each = cpu / n_items * 1e3
    print(
        f"| {n_workers} | {n_items} | {busy:.1%} | {n_items / seconds:.1f} | {each:.2f} "
        f"| {mib[0]:.0f} | {mib[1]:.0f} |",
        flush=True,
    )
    crew.close()


def driver(clip: Path, length: int) -> None:
    """Milliseconds of the driver for one segment."""
    with tempfile.TemporaryDirectory() as name, VideoSource(clip) as source:
        start = time.perf_counter()
        cuts = CutPlan(source, length)
        planned = time.perf_counter() - start
        if not cuts.spans:
            raise SystemExit(f"{clip} cannot be cut")
        start = time.perf_counter()
        sizes = [sum(len(p.data) for p in cut.packets) for cut in cuts.cuts(cuts.spans)]
        cutting = time.perf_counter() - start
        n = len(cuts.spans)
        once = _segments(clip, source, Path(name) / "once.mkv", length)
        again = VideoWriter(
            Path(name) / "again.mkv", source.info, _settings(Path(name) / "again.mkv", source),
            copy_from=clip, job={}, out_of_order=True,
        )  # fmt: skip
        start = time.perf_counter()
        for segment, data in once:
            again.add(segment, data)
        securing = time.perf_counter() - start
        start = time.perf_counter()
        again.close()
        joining = time.perf_counter() - start
        frames = sum(span.n_frames for span in cuts.spans)
        info = source.info
    print(f"{info.width}x{info.height}, {frames} frames in {n} segments")
    print(
        f"bytes a segment: {sum(sizes) / n / 2**20:.2f} MiB in, "
        f"{sum(len(data) for _, data in once) / n / 2**20:.2f} MiB out"
    )
    for what, seconds in (("plan (demux)", planned), ("cut", cutting),
                          ("secure (write, fsync)", securing), ("join", joining)):  # fmt: skip
        print(
            f"{what}: {seconds / n * 1e3:.1f} ms a segment, {seconds / frames * 1e6:.1f} µs a frame"
        )
    total = (planned + cutting + securing + joining) / n
    print(f"all of them in one thread: {1 / total:.0f} segments/s")


def _settings(path: Path, source: VideoSource) -> "object":
    return encode_settings(path, source.info, RestoreConfig())


def _segments(clip: Path, source: VideoSource, path: Path, length: int) -> list:
    """The segments of an encoded copy, with their bytes."""
    with VideoWriter(path, source.info, _settings(path, source), copy_from=clip) as writer:
        for frame in plan(source.frames(), length):
            writer.write(frame)
        writer._finish_segment()
        folder = path.with_name(f".{path.name}.restore")
        return [(s, (folder / f"{s.index:06d}.segment").read_bytes()) for s in writer.finished]


def two_workers(clip: Path, frames: int, model: str, rounds: int) -> None:
    """Frames per second of one and of two, and what two processes without Ray gain here."""
    print("| one | two | two / one | two processes / one |\n| ---: | ---: | ---: | ---: |")
    gains, ceilings = [], []
    with tempfile.TemporaryDirectory() as name, ray_session():
        keyframes = {"g": PART, "keyint_min": PART, "sc_threshold": 0}
        config = RestoreConfig.load(overrides={"encode.options": keyframes})
        clip = shortened(clip, frames, Path(name), config)
        for number in range(rounds):
            folder = Path(name) / str(number)
            one, two = (throughput(clip, n, model, folder) for n in (1, 2))
            gains.append(two / one)
            ceilings.append(ceiling(model))
            print(f"| {one:.2f} | {two:.2f} | {gains[-1]:.3f} | {ceilings[-1]:.3f} |", flush=True)
    print(f"medians: {median(gains):.3f} of {median(ceilings):.3f}")


PINNED = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
import numpy as np
from workers import PlaneSpec, WorkerSpec
from workers.worker import TileWorker
planes = PlaneSpec(3, 1, 1, 8, "bt709", False, "left")
restore = TileWorker(WorkerSpec(checkpoint=sys.argv[2], device="cpu", planes=planes, threads=1))
rng = np.random.default_rng(0)
tile = tuple(rng.integers(0, 255, (1, h, w), dtype=np.uint8)
             for h, w in ((384, 336), (192, 168), (192, 168)))
restore(tile)
n, start = 0, time.monotonic()
while (seconds := time.monotonic() - start) < 10:
    restore(tile)
    n += 1
print(n / seconds)
"""


def ceiling(model: str) -> float:
    """How much two pinned processes that only run the network get done against one of them."""

    def rate(cores: list[int]) -> float:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", PINNED, str(core), model], stdout=subprocess.PIPE, text=True
            )
            for core in cores
        ]
        return sum(float(process.communicate()[0]) for process in started)

    first, second = sorted(psutil.Process().cpu_affinity())[:2]
    return 2 * rate([first, second]) / (rate([first]) + rate([second]))


def throughput(clip: Path, n_workers: int, model: str, folder: Path) -> float:
    """Frames per second once every worker works."""
    times: list[tuple[float, int]] = []

    def on_progress(now: BatchProgress) -> None:
        times.append((time.perf_counter(), now.n_frames))

    config = RestoreConfig.load(
        overrides={"model.model": model, "segment.frames": PART, "encode.threads": 1}
    )
    item = BatchItem(clip, folder / f"{n_workers}.mkv", config)
    pinner = threading.Thread(target=_pin, args=(n_workers,), daemon=True)
    pinner.start()
    report = restore_batch(
        [item], folder, Cluster(n_workers=n_workers), on_progress=on_progress
    )  # fmt: skip
    if not report.succeeded:
        raise SystemExit(report.files[0].error)
    # From when each worker has brought one, for before they started, to when one has no more to do.
    # The very last is the join. Two workers may bring theirs together or in turns: the difference
    # of two moments would depend on that by a segment, the slope does not.
    steady = times[n_workers - 1 : len(times) - n_workers]
    return float(np.polyfit(*zip(*steady, strict=True), 1)[0])


def _pin(n_workers: int) -> None:
    """Each worker on a core of its own, as soon as it is there."""
    cores = sorted(psutil.Process().cpu_affinity())
    pinned: set[int] = set()
    while len(pinned) < n_workers:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                name = process.cmdline()[:1]
                if name and name[0].startswith("ray::_JobWorker") and process.pid not in pinned:
                    for thread in process.threads():
                        psutil.Process(thread.id).cpu_affinity([cores[len(pinned) % len(cores)]])
                    pinned.add(process.pid)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = ["schedule", "driver", "workers", "tiles", "pool", "death"]
    parser.add_argument("what", choices=choices)
    parser.add_argument("clip", type=Path, nargs="?")
    parser.add_argument("--workers", type=int, nargs="+")
    parser.add_argument("--items", type=int)
    parser.add_argument("--megabytes", type=float, default=2.5)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--tile", type=int, default=768)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="tiny")
    asked = parser.parse_args()
    print(machine(), flush=True)
    if asked.what == "schedule":
        print("| workers | segments | busy | segments/s | driver CPU ms | MiB early | MiB late |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for n_workers in asked.workers or [64, 256]:
            simulate(n_workers, asked.items or 2000, round(asked.megabytes * 1e6))
    elif asked.what == "driver":
        driver(asked.clip, RestoreConfig().segment.frames)
    elif asked.what == "tiles":
        cluster_ray.tiles((asked.workers or [32])[0], asked.frames or 200, asked.tile)
    elif asked.what == "pool":
        cluster_ray.pools(asked.clip, asked.frames or 300, asked.model, rounds=3)
    elif asked.what == "death":
        cluster_ray.death(asked.seconds, asked.items or 24)
    else:
        two_workers(asked.clip, asked.frames or 400, asked.model, asked.rounds)


if __name__ == "__main__":
    main()
