"""Owns the process that publishes: started, told what to send, watched, killed, started again.
Knows neither the source nor what is sent when: output.py does.
"""

import io
import logging
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av

from pipeline.child import Child
from pipeline.config import EncodeConfig, LiveConfig
from pipeline.encoder import EncodeSettings, add_video, encoder_name, plan_format
from pipeline.errors import SinkError
from pipeline.frames import Frame, PixelFormat, StreamInfo
from pipeline.live import Take
from pipeline.pacing import TIME_BASE, Backoff
from pipeline.publish import (
    Closed,
    Failed,
    Published,
    Ready,
    Request,
    Started,
    Target,
    part_of,
)
from pipeline.quality import sets_rate, takes_crf
from pipeline.stats import StreamStats

logger = logging.getLogger(__name__)

UNPUBLISHED_FRAMES = 4
"""Frames that the child may hold; while it does, further ones are refused."""
POLL_SECONDS = 0.1
START_SECONDS = 60.0
"""How long a process may take to start, beside others and a network that uses every core."""


KEYFRAME_SECONDS = 2.0

_X26X = {"tune": "zerolatency"}
_VPX = {"lag-in-frames": "0", "deadline": "realtime", "cpu-used": "8"}
_NVENC = {"delay": "0", "zerolatency": "1", "bf": "0"}  # of FFmpeg's documentation: not run
_AT_ONCE = {
    "libx264": _X26X, "libx265": _X26X, "libvpx": _VPX, "libvpx-vp9": _VPX,
    "libsvtav1": {"svtav1-params": "pred-struct=1:lookahead=0"},
    "h264_nvenc": _NVENC, "hevc_nvenc": _NVENC, "av1_nvenc": _NVENC,
}  # fmt: skip
"""By encoder, what makes it hold no frame back: SVT-AV1 by itself holds 42, VP9 24."""


def live_settings(asked: EncodeConfig, info: StreamInfo) -> EncodeSettings:
    """An encoder that holds no frame back: no B-frames, no look-ahead, a keyframe every 2 s."""
    codec = encoder_name(asked.codec or "libx264")
    gop = str(max(1, round(KEYFRAME_SECONDS * (info.frame_rate or 25))))
    options = {"g": gop, **_AT_ONCE.get(codec, {}), **asked.options}
    if codec == "libsvtav1" and "svtav1-params" in asked.options:  # several in one; the last wins
        options["svtav1-params"] = ":".join(
            (_AT_ONCE[codec]["svtav1-params"], asked.options["svtav1-params"])
        )
    preset = asked.preset or ("veryfast" if codec in ("libx264", "libx265") else None)
    chooses = takes_crf(codec) and not sets_rate(asked.options)
    crf = 21 if asked.crf is None and chooses else asked.crf
    return EncodeSettings(codec, crf, preset, asked.pix_fmt, options, threads=asked.threads or 0)


def check_settings(target: Target, encode: EncodeConfig) -> None:
    """Open the encoder for an ordinary camera's pictures, before there are any.

    Raises the ConfigError that the first frame else would, perhaps days from now.
    """
    planes = PixelFormat("yuv420p", 3, 1, 1, 8, "bt709", False, "left")
    info = StreamInfo(1280, 720, TIME_BASE, Fraction(25), planes)
    settings = live_settings(encode, info)
    muxer = "matroska" if target.muxer in ("rtsp", "hls") else target.muxer
    output = av.open(io.BytesIO(), "w", format=muxer)
    try:
        form = plan_format(settings, info.pixel_format, [])
        add_video(output, target.address, settings, info, form)
    finally:
        with suppress(av.FFmpegError, ValueError):
            output.close()


class Publisher:
    """One sink, kept open by a thread that hears what the child says and kills it when silent.

    Its methods are for one other thread. Sending is refused while no child stands; it waits at
    most `config.sink_timeout_seconds`. `failure` tells why it has ended for good, if it has.
    """

    def __init__(
        self, target: Target, encode: EncodeConfig, config: LiveConfig, stats: StreamStats
    ) -> None:
        self._target, self._encode, self._config, self._stats = target, encode, config, stats
        self.failure: SinkError | None = None
        self._changed = threading.Condition()
        self._take: Take | None = None
        self._last_pts = 0
        self._child: Child | None = None  # that stands and may be sent to
        self._finishing: Child | None = None  # that was told to close what it holds
        self._unpublished: deque[float] = deque()  # when they were sent
        self._sending_since: float | None = None
        self._closed = False
        self._has_stood = False
        self._thread = threading.Thread(target=self._keep, name="publish", daemon=True)

    def start(self) -> None:
        """Begin to keep the sink open, from the first `begin` on."""
        self._thread.start()

    def begin(self, take: Take) -> None:
        """What is sent from now on has this format; a sink that is open is finished in order."""
        if self._take is not None:
            self._finish()
        with self._changed:
            self._take = take
            self._changed.notify_all()

    def close(self) -> None:
        """Finish the sink in order, within its timeouts."""
        self._finish()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def send_frame(self, frame: Frame) -> bool:
        """Whether the child takes one more frame; at most UNPUBLISHED_FRAMES are with it."""
        self._last_pts = frame.pts
        with self._changed:
            if self._child is None or len(self._unpublished) >= UNPUBLISHED_FRAMES:
                return False
            self._unpublished.append(time.monotonic())
        return self.send(frame)

    def send(self, message: Any) -> bool:
        """Send a frame counted before, or audio; False where no child stands or it was killed."""
        with self._changed:
            child = self._child
            if child is None:
                return False
            self._sending_since = time.monotonic()
        try:
            child.connection.send(message)  # may block: then the keeper kills the child
        except OSError:
            return False
        finally:
            with self._changed:
                self._sending_since = None
                self._changed.notify_all()
        return True

    def _finish(self) -> None:
        """Have the child write what it holds; the keeper sees it end."""
        with self._changed:
            # An entry that stays until the child has closed: the keeper's deadline for it.
            self._unpublished.append(time.monotonic())
            self._finishing = self._child
        self.send(None)
        with self._changed:
            self._child = None

    # The keeper's thread.

    def _keep(self) -> None:
        backoff = Backoff(self._config.backoff_first_seconds, self._config.backoff_most_seconds,
                          limit=None)  # fmt: skip
        while self._await_take():
            try:
                failed = self._attempt(backoff)
            except Exception as error:
                self._fail(error)
                return
            if failed is None:
                backoff.succeeded()
                continue
            failure = SinkError(f"{self._target.address}: {failed.cause}")
            if failed.final and not self._has_stood:
                self.failure = failure
                return
            delay = backoff.next_delay(refused=failed.final) or 0.0
            if backoff.n_failed & (backoff.n_failed - 1) == 0:
                logger.warning("%s: %s; attempt %d in %.2f s", self._target.address, failed.cause,
                               backoff.n_failed, delay)  # fmt: skip
            with self._changed:
                self._changed.wait_for(lambda: self._closed, delay)
            # A recording that is not complete when all ends is no success; a stream has been seen.
            if self._closed and self._target.file is not None:
                self.failure = failure

    def _attempt(self, backoff: Backoff) -> Failed | None:
        """One process, from its start to its end; None: closed in order."""
        try:
            child = Child("pipeline.publish")
        except OSError as error:
            return Failed(f"no process can be started ({error.strerror})")
        try:
            return self._publish(child, backoff)
        except (EOFError, OSError):
            return Failed("the publishing process ended unexpectedly")
        finally:
            self._leave(child)

    def _leave(self, child: Child) -> None:
        self._stats.sink_up = False
        with self._changed:
            self._child = None
            self._unpublished.clear()
        child.kill()  # which ends a send in progress
        with self._changed:
            self._changed.wait_for(lambda: self._sending_since is None)
        child.end()

    def _await_take(self) -> bool:
        """Wait for something to publish; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._take is not None or self._closed)
            return not self._closed

    def _publish(self, child: Child, backoff: Backoff) -> Failed | None:
        """One connection; None: closed in order."""
        with self._changed:
            take = self._take
            assert take is not None
            start = self._last_pts
        settings = live_settings(self._encode, take.info)
        chosen = {"g", "keyint"} & set(self._encode.options)
        child.connection.send(
            Request(
                self._fresh_target(), take.info, settings, take.audio, start,
                keyframe_seconds=None if chosen else KEYFRAME_SECONDS,
            )
        )  # fmt: skip
        deadline, stood = time.monotonic() + START_SECONDS, float("inf")
        while True:
            if child.connection.poll(POLL_SECONDS):
                message = child.connection.recv()
                if isinstance(message, Failed):
                    self._stats.count("sink_disconnects")
                    return message
                if isinstance(message, Closed):
                    return None
                if isinstance(message, Started):
                    deadline = time.monotonic() + self._config.open_timeout_seconds
                elif isinstance(message, Ready):
                    deadline, stood = float("inf"), time.monotonic()
                    self._stand(child, take, message)
                elif isinstance(message, Published):
                    backoff.succeeded(time.monotonic() - stood)
                    self._published(message)
                continue
            overdue = self._overdue(deadline)
            if overdue:
                self._stats.count("sink_stalls")
                return Failed(overdue)
            with self._changed:
                outdated = take is not self._take or self._closed
                if outdated and self._finishing is not child:
                    return None

    def _fail(self, error: Exception) -> None:
        logger.exception("%s: the publisher failed", self._target.address)
        self.failure = SinkError(f"{self._target.address}: {type(error).__name__} in the publisher")

    def _stand(self, child: Child, take: Take, ready: Ready) -> None:
        for warning in ready.warnings:
            logger.warning("%s: %s", self._target.address, warning)
        self._stats.count("sink_connects")
        self._stats.sink_up = self._has_stood = True
        logger.info("%s: publishing", self._target.address)
        with self._changed:
            self._unpublished.clear()
            if take is self._take and not self._closed:
                self._child = child

    def _published(self, published: Published) -> None:
        with self._changed:
            if self._unpublished:
                self._unpublished.popleft()
        self._stats.count("frames_published")
        if published.captured_seconds:
            self._stats.latency(published.published_seconds - published.captured_seconds)

    def _overdue(self, deadline: float) -> str:
        """Why the child must be killed; empty while it need not. `deadline` is for the opening."""
        now = time.monotonic()
        if now > deadline:
            return f"could not be opened in {self._config.open_timeout_seconds:g} s"
        allowed = self._config.sink_timeout_seconds
        with self._changed:
            waits = [*list(self._unpublished)[:1], self._sending_since]
        late = any(since is not None and now - since > allowed for since in waits)
        return f"took no frame for {allowed:g} s" if late else ""

    def _fresh_target(self) -> Target:
        """A file is not written twice: each time that it is opened it gets a new name."""
        if self._target.file is None:
            return self._target
        free, n = self._target.file, 0
        while free.exists() or part_of(free).exists():  # or one that a killed process left
            n += 1
            free = self._target.file.with_stem(f"{self._target.file.stem}.{n}")
        return replace(self._target, file=free)
