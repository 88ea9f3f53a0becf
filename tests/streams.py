"""A server, cameras and a viewer as processes and threads that a test starts, freezes and kills."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from media import read_index

HERE = Path(__file__).parent


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
