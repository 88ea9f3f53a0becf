"""Owns what the monitor page shows of one live stream: its newest frame, twice, and its figures.

Knows the stream's counters, and neither HTTP nor the stages.
"""

import threading
import time
from collections.abc import Callable

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.frames import Frame, StreamInfo
from pipeline.page import CameraFigures, pair_jpeg
from pipeline.pictures import to_picture
from pipeline.stats import StreamStats

SAMPLE_SECONDS = 1.0
"""Rates are of the last time so long, whoever looks how often."""
WIDEST = 1280
"""Pixels of a picture on the page; wider frames are reduced."""


class StreamView:
    """What there is to see of a stream named `name`. Its pictures are made only when asked for."""

    def __init__(
        self, name: str, stats: StreamStats, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._stats, self._clock = stats, clock
        self._lock = threading.Lock()
        self._newest: tuple[StreamInfo, Frame, Frame] | None = None
        self._made: tuple[Frame, bytes] | None = None
        self._before = self._sample()
        self._rates: dict[str, float] = dict.fromkeys(self._before, 0.0)

    def show(self, info: StreamInfo, before: Frame, after: Frame) -> None:
        """A frame, as it came and as it was restored. Never waits."""
        self._newest = (info, before, after)

    def pair(self) -> bytes | None:
        """The newest frame's JPEG, before left of after; None before the first one."""
        newest = self._newest
        if newest is None:
            return None
        info, before, after = newest
        with self._lock:
            if self._made is None or self._made[0] is not after:
                self._made = (after, pair_jpeg(_rgb(before, info), _rgb(after, info)))
            return self._made[1]

    def figures(self) -> CameraFigures:
        """The counts as they are now, the rates of the last whole second."""
        with self._lock:
            now = self._sample()
            seconds = now["time"] - self._before["time"]
            if seconds >= SAMPLE_SECONDS:
                self._rates = {key: (now[key] - self._before[key]) / seconds for key in now}
                self._before = now
        stats = self._stats
        latency = {f"p{round(100 * q)}": 1000 * s for q, s in stats.quantiles().items()}
        return CameraFigures(
            name=self.name, state=self._state(), fps=round(self._rates["sent"], 1),
            latency_ms={name: round(latency.get(name, 0.0), 1) for name in ("p50", "p95", "p99")},
            frames_in=stats["frames_in"], frames_out=stats["frames_published"],
            dropped=stats["frames_dropped"], bypassed=stats["frames_passed"],
            repeated=stats["frames_repeated"],
            reconnects=max(0, stats["source_connects"] - 1),
        )  # fmt: skip

    def _state(self) -> str:
        if self._stats.ended:
            return "ended"
        if not self._stats.source_up:
            return "source away"
        if not self._stats.sink_up:
            return "sink away"
        return "late" if self._rates["given_up"] > 0 else "live"

    def _sample(self) -> dict[str, float]:
        stats = self._stats
        given_up = stats["frames_dropped"] + stats["frames_passed"]
        return {"time": self._clock(), "sent": stats["frames_sent"], "given_up": given_up}


def _rgb(frame: Frame, info: StreamInfo) -> NDArray[np.uint8]:
    picture = to_picture(frame, info, av.VideoFormat(info.pixel_format.name))
    pixels: NDArray[np.uint8] = picture.to_ndarray(format="rgb24")
    if info.width > WIDEST:
        size = (WIDEST, round(info.height * WIDEST / info.width))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    return pixels
