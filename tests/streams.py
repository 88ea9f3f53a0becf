"""A server, cameras, a viewer, a sink and a pool that a test starts, freezes, slows and kills."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from media import numbered_picture, read_index

from pipeline import pools
from pipeline.address import Address
from pipeline.config import EncodeConfig, LiveConfig
from pipeline.errors import SinkError
from pipeline.frames import Frame, PixelFormat, StreamInfo
from pipeline.live import Take
from pipeline.output import LiveOutput
from pipeline.pacing import TIME_BASE
from pipeline.planes import planes_of
from pipeline.publish import target_of
from pipeline.stats import StreamStats

HERE = Path(__file__).parent
PASSWORD = "p@ss:w/rd#1"
ENCODED = "p%40ss%3Aw%2Frd%231"
YUV = PixelFormat("yuv420p", 3, 1, 1, 8, "bt601", False, "left")


class _Process:
    def __init__(self, *arguments, **options):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=environment, **options
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def freeze(self):
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)


class RtspServer(_Process):
    """rtsp_server.py on a free port, or on the one that it had."""

    def __init__(self, port=0, *login):
        self._login = login
        super().__init__(HERE / "rtsp_server.py", port, *login, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())

    def url(self, name, login=""):
        return f"rtsp://{login}127.0.0.1:{self.port}/{name}"

    def restart(self):
        self.kill()
        self.__init__(self.port, *self._login)


class Camera(_Process):
    """camera.py."""

    def __init__(self, url, *arguments):
        super().__init__(HERE / "camera.py", url, *arguments)


class Viewer:
    """Reads a stream in a thread, opening it again and again; `seen` is what it got."""

    def __init__(self, url, audio=False):
        self.url, self.audio = url, audio
        self.seen = []
        """(monotonic time, pts in seconds, number shown, (width, height)) of every frame."""
        self.heard = []
        """pts in seconds of every audio packet."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join(10)

    def wait_for(self, n, timeout=20):
        """Until n more frames were seen."""
        until, target = time.monotonic() + timeout, len(self.seen) + n
        while len(self.seen) < target:
            assert time.monotonic() < until, f"{len(self.seen)} frames, {target} wanted"
            time.sleep(0.01)
        return self.seen[-n:]

    def _run(self):
        options = {"rtsp_transport": "tcp", "fflags": "nobuffer", "flags": "low_delay",
                   "max_delay": "0", "analyzeduration": "500000"}  # fmt: skip
        while not self._stop.is_set():
            with (
                suppress(av.FFmpegError, OSError),
                av.open(self.url, options=options, timeout=(3, 1)) as container,
            ):
                self._watch(container)
            time.sleep(0.05)

    def _watch(self, container):
        video = container.streams.video[0]
        video.thread_type = "SLICE"
        for packet in container.demux():
            if self._stop.is_set():
                return
            if packet.stream is not video and packet.pts is not None:
                self.heard.append(float(packet.pts * packet.time_base))
                continue
            with suppress(av.InvalidDataError):
                for picture in packet.decode() if packet.size else ():
                    if picture.pts is None:
                        continue
                    luma = picture.to_ndarray()[: picture.height]
                    size = picture.width, picture.height
                    at = float(picture.pts * Fraction(picture.time_base))
                    now = time.monotonic()
                    self.seen.append((now, at, read_index([np.ascontiguousarray(luma)]), size))


def take_of(number=1, size=(160, 120), audio=None):
    return Take(StreamInfo(*size, TIME_BASE, Fraction(25), YUV), audio, "h264", number)


class Feeder:
    """Writes numbered frames in real time until it leaves; `silent` makes the source go away."""

    def __init__(self, sink, take=None, **settings):
        self.stats = StreamStats()
        self.take = take or take_of()
        target = target_of(Address.parse(str(sink)))
        config = LiveConfig(backoff_most_seconds=0.5, **settings)
        self.output = LiveOutput(target, EncodeConfig(crf=18), config, self.stats)
        self.silent = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.n, self.rate = 0, 25

    def __enter__(self):
        self.output.__enter__()
        self.output.repeat_while(self.silent.is_set)
        self.output.begin(self.take)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        began = time.monotonic()
        with suppress(SinkError):  # as of `failure`
            self.output.__exit__(None, None, None)
        self.closing_seconds = time.monotonic() - began

    def _run(self):
        began = time.monotonic()
        due = began
        while not self._stop.wait(max(0, due - time.monotonic())):
            due += 1 / self.rate
            if not self.silent.is_set():
                info = self.take.info
                size = info.width, info.height
                picture = numbered_picture(self.n % 256, size, info.pixel_format.name)
                now = time.monotonic()
                planes = planes_of(picture, info, "test")
                pts = round((due - began - 1 / self.rate) * 90000)
                self.output.write(Frame(self.n, pts, planes, captured_seconds=now))
            self.n += 1

    def failure(self):
        try:
            self.output.check()
        except SinkError as error:
            return error
        return None

    def wait_for(self, condition, timeout=15):
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until, self.stats.values()
            time.sleep(0.01)


def increasing(seen):
    return all(a[1] < b[1] for a, b in pairwise(seen))


class SlowPool:
    """Stands at `submit`: gives every batch back after `seconds`."""

    n_workers = 1

    def __init__(self, seconds):
        self.seconds = seconds
        self._executor = ThreadPoolExecutor(1)

    def submit(self, batch, planes=None, smaller=False):
        def restore():
            time.sleep(0.002 if smaller else self.seconds)
            return tuple(255 - plane for plane in batch) if smaller else batch

        future: Future = self._executor.submit(restore)
        return future

    def warm_up(self, batch, planes=None):
        pass


def slow(monkeypatch, seconds):
    @contextmanager
    def open_pool(*_):
        yield SlowPool(seconds)

    monkeypatch.setattr(pools, "open_pool", open_pool)
