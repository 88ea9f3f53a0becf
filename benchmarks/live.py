"""The bars of live streams, over real RTSP on loopback: a camera, a relay, a viewer's side.

    python benchmarks/live.py [latency slow cameras kills stall soak fast] [--seconds 60]

latency: what the pipeline adds at 640x360, 25 fps, around a network of 5 ms (a sleep at `submit`).
slow:    a network of 80 ms, twice too slow: p99 against the bound, the counts of what was dropped.
cameras: three cameras on one network, of 5 ms and, too slow for all, of 50: latency and shares.
kills:   ten rounds of killing the camera; repeats, time until frames flow again, what is left over.
stall:   the server stopped with SIGSTOP, default stall timeout: when it is noticed.
soak:    15 fps with audio into a recording: the slope of memory over its second half with its
         95 % interval, the order of the frames, sound against picture by the camera's cues.
fast:    the same at 60 fps: four times as many frames in the same time.
The figures of latency are from a packet read from FFmpeg to its frame muxed: what the network and
FFmpeg's demuxer (which gives an RTSP frame when the next one begins) take is not in them.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from machine import machine  # noqa: E402
from media import read_index  # noqa: E402
from streams import Camera, RtspServer  # noqa: E402

from pipeline import RestoreConfig, pools, restore_stream  # noqa: E402
from pipeline.address import Address  # noqa: E402
from pipeline.cameras import Camera as Stream  # noqa: E402
from pipeline.cameras import restore_cameras  # noqa: E402
from pipeline.frames import TileBatch  # noqa: E402
from pipeline.stats import StreamStats  # noqa: E402


class SleepingPool:
    """A network that takes `seconds` a batch and changes nothing."""

    n_workers = 1

    def __init__(self, seconds: float) -> None:
        self._seconds, self._executor = seconds, ThreadPoolExecutor(1)

    def submit(self, batch: TileBatch, *_: Any, **__: Any) -> Future[TileBatch]:
        return self._executor.submit(lambda: (time.sleep(self._seconds), batch)[1])

    def warm_up(self, batch: TileBatch, planes: object = None) -> None:
        pass


def use_network_of(seconds: float) -> None:
    """From now on the pool that pools.py opens is a SleepingPool."""

    @contextmanager
    def open_pool(*_: Any) -> Iterator[SleepingPool]:
        yield SleepingPool(seconds)

    pools.open_pool = open_pool


@contextmanager
def stream(
    server: RtspServer, sink: str, model_seconds: float, **settings: Any
) -> Iterator[StreamStats]:
    """restore_stream around a SleepingPool, from `cam` to `sink`; gives its stats."""
    use_network_of(model_seconds)
    stats, stop = StreamStats(), threading.Event()
    config = RestoreConfig.load(overrides={"tile.size": 0, **settings})
    thread = threading.Thread(
        target=restore_stream, args=(server.url("cam"), sink, config),
        kwargs={"stats": stats, "stop": stop},
    )  # fmt: skip
    thread.start()
    try:
        until(lambda: stats["frames_published"] > 50)
        yield stats
    finally:
        stop.set()
        thread.join()


def until(condition: Callable[[], bool | int], timeout: float = 60) -> float:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)
    return time.monotonic()


def quantiles(stats: StreamStats) -> str:
    return ", ".join(f"p{q * 100:.0f} {s * 1000:.1f} ms" for q, s in stats.quantiles().items())


def latency(seconds: float, model_seconds: float = 0.005) -> None:
    with RtspServer() as server, Camera(server.url("cam"), "640x360", 25):
        with stream(server, server.url("out"), model_seconds) as stats:
            stats.forget_latencies()
            time.sleep(seconds)
            print(f"network of {model_seconds * 1000:.0f} ms, {seconds:g} s: {quantiles(stats)}")
        done = stats.values()
        print("  " + ", ".join(f"{k} {v}" for k, v in done.items() if k.startswith("frames") and v))
        kept = done["frames_restored"] + done["frames_passed"]
        lost = done["frames_in"] - kept - done["frames_dropped"]
        print(f"  frames in - dropped - restored - passed = {lost}")


def slow(seconds: float) -> None:
    latency(seconds, 0.08)


def cameras(seconds: float) -> None:
    rates = {"a": 15, "b": 15, "c": 5}
    with ExitStack() as stack:
        server = stack.enter_context(RtspServer())
        for name, rate in rates.items():
            stack.enter_context(Camera(server.url(name), "640x360", rate))
        for model_seconds in (0.005, 0.05):
            use_network_of(model_seconds)
            config = RestoreConfig.load(overrides={"tile.size": 0})
            ends = [(Address.parse(server.url(n)), Address.parse(server.url(f"{n}-out")))
                    for n in rates]  # fmt: skip
            streams = [Stream(source, sink, config) for source, sink in ends]
            stop = threading.Event()
            thread = threading.Thread(target=restore_cameras, args=(streams, stop))
            thread.start()
            until(lambda all_=streams: min(s.stats["frames_published"] for s in all_) > 20)
            before = [each.stats.values() for each in streams]
            for each in streams:
                each.stats.forget_latencies()
            time.sleep(seconds)
            print(f"network of {model_seconds * 1000:.0f} ms, {seconds:g} s")
            for (name, rate), each, then in zip(rates.items(), streams, before, strict=True):
                now = each.stats.values()
                a_second = {
                    key: round((now[f"frames_{key}"] - then[f"frames_{key}"]) / seconds, 1)
                    for key in ("in", "restored", "passed", "dropped")
                }
                print(f"  {name}, {rate} fps: {quantiles(each.stats)}; frames a second {a_second}")
            stop.set()
            thread.join()


def left_over() -> dict[str, float]:
    process = psutil.Process()
    children = process.children(recursive=True)
    pipeline = [p for p in children if "pipeline." in " ".join(p.cmdline())]
    rss = [process.memory_info().rss] + [p.memory_info().rss for p in pipeline]
    return {
        "threads": process.num_threads(), "descriptors": process.num_fds(),
        "children": len(pipeline), "MiB": round(sum(rss) / 2**20, 1),
    }  # fmt: skip


def kills(_: float) -> None:
    with RtspServer() as server:
        camera = Camera(server.url("cam"), "640x360", 25)
        with stream(server, server.url("out"), 0.005) as stats:
            worst_gap, back = 0.0, []
            print("| round | longest output gap s | flows again after s | left over |")
            print("| ---: | ---: | ---: | --- |")
            for number in range(1, 11):
                camera.kill()
                gap = longest_gap(stats, 3)
                frames = stats["frames_in"]
                camera = Camera(server.url("cam"), "640x360", 25)
                # The source is back when its server answers for it, not when it starts to start.
                up = until(lambda: camera_is_up(server))
                flows = until(lambda n=frames: stats["frames_in"] > n) - up
                gap = max(gap, longest_gap(stats, 2))
                worst_gap, back = max(worst_gap, gap), [*back, flows]
                print(f"| {number} | {gap:.2f} | {flows:.2f} | {left_over()} |", flush=True)
            print(f"worst gap {worst_gap:.2f} s, slowest return {max(back):.2f} s")
        camera.kill()


def camera_is_up(server: RtspServer) -> bool:
    import socket

    with socket.create_connection(("127.0.0.1", server.port)) as asking:
        asking.sendall(f"DESCRIBE {server.url('cam')} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
        return b" 200 " in asking.recv(64)


def longest_gap(stats: StreamStats, seconds: float) -> float:
    """The longest time in which nothing was published."""
    end, last, longest = time.monotonic() + seconds, stats["frames_published"], 0.0
    since = time.monotonic()
    while (now := time.monotonic()) < end:
        if (n := stats["frames_published"]) != last:
            longest, last, since = max(longest, now - since), n, now
        time.sleep(0.005)
    return max(longest, time.monotonic() - since)


def stall(_: float) -> None:
    with (
        RtspServer() as server,
        RtspServer() as sink,
        Camera(server.url("cam"), "640x360", 25),
        stream(server, sink.url("out"), 0.005) as stats,
    ):
        server.freeze()
        frozen = time.monotonic()
        noticed = until(lambda: stats["source_stalls"])
        print(f"SIGSTOP noticed after {noticed - frozen:.2f} s, stall timeout 10 s; "
              f"{stats['frames_repeated']} repeats published meanwhile")  # fmt: skip
        server.thaw()
        frames = stats["frames_in"]
        flows = until(lambda: stats["frames_in"] > frames)
        print(f"frames flow again {flows - noticed:.2f} s after that")


def soak(seconds: float, rate: int = 15) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.mkv"
        with (
            RtspServer() as server,
            Camera(server.url("cam"), "640x360", rate, "aac"),
            stream(server, str(path), 0.005),
        ):
            samples = []
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                samples.append((time.monotonic(), left_over()["MiB"]))
                time.sleep(min(5, seconds / 20))
        half = samples[len(samples) // 2 :]  # allocators grow for the first few thousand frames
        slope, error = slope_of(half)
        print(f"{seconds:g} s at {rate} fps, second half: {half[0][1]} to {half[-1][1]} MiB, slope "
              f"{slope * 60:+.3f} ± {error * 60:.3f} MiB a minute (95 %)")  # fmt: skip
        check_recording(path)


def fast(seconds: float) -> None:
    soak(seconds, 60)


def slope_of(samples: list[tuple[float, float]]) -> tuple[float, float]:
    """Of a line through the means of up to 20 stretches, and half its 95 % interval.

    Neighbouring samples of a process's memory are not independent; far fewer means nearly are.
    """
    from scipy.stats import linregress, t

    stretches = np.array_split(np.array(samples), max(3, min(20, len(samples) // 3)))
    times, sizes = np.array([stretch.mean(axis=0) for stretch in stretches]).T
    line = linregress(times, sizes)
    return line.slope, t.ppf(0.975, len(times) - 2) * line.stderr


def check_recording(path: Path) -> None:
    """Order and pts of its frames; its sound against its picture, by the camera's tone."""
    pts, numbers, levels = [], [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0, audio=0):
            if isinstance(frame, av.AudioFrame):
                samples = np.abs(frame.to_ndarray()[0])
                for start in range(0, len(samples), 240):  # 5 ms
                    at = frame.time + start / frame.sample_rate
                    levels.append((at, samples[start : start + 240].max() > 0.1))
            else:
                pts.append(frame.time)
                numbers.append(read_index(planes_of_gray(frame)))
    steps = [(b - a) % 256 for a, b in pairwise(numbers)]
    print(f"  {len(pts)} frames; pts strictly increasing: {all(a < b for a, b in pairwise(pts))}; "
          f"order kept: {all(n < 128 for n in steps)}; longest step {max(steps)}")  # fmt: skip
    turns = [b[0] for a, b in pairwise(levels) if a[1] != b[1]]
    cues = [t for t, number in zip(pts, numbers, strict=True) if number % 128 == 0]
    offsets = [min((turn - cue for turn in turns), key=abs) * 1000 for cue in cues if turns]
    near = [round(offset) for offset in offsets if abs(offset) < 1000]
    if near:
        print(f"  sound against picture at {len(near)} cues: first {near[0]:+d}, "
              f"last {near[-1]:+d}, {min(near):+d} to {max(near):+d} ms")  # fmt: skip


def planes_of_gray(frame: Any) -> list[Any]:
    return [frame.to_ndarray()[: frame.height]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="*", default=["latency", "slow", "kills", "stall", "soak"])
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    print(f"{machine()}; load average {os.getloadavg()[0]:.1f}\n")
    for what in args.what:
        print(f"## {what}", flush=True)
        {
            "latency": latency,
            "slow": slow,
            "cameras": cameras,
            "kills": kills,
            "stall": stall,
            "soak": soak,
            "fast": fast,
        }[what](args.seconds)
        print(flush=True)


if __name__ == "__main__":
    main()
