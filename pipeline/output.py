"""Owns a live sink for weeks: frames and audio in step, repeats while the source is away, a child
process that publishes, watched and started again. Knows neither the model nor the source.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from pipeline.capture import Sound
from pipeline.child import Child
from pipeline.config import EncodeConfig, LiveConfig
from pipeline.encoder import EncodeSettings
from pipeline.errors import SinkError
from pipeline.frames import Frame, StreamInfo
from pipeline.live import AWAY_SECONDS, Take
from pipeline.pacing import Backoff, OutputClock
from pipeline.publish import Closed, Failed, Published, Ready, Request, Sent, Target
from pipeline.stats import StreamStats

logger = logging.getLogger(__name__)

WAITING_FRAMES = 8
"""Restored frames that may wait for the sink; the oldest is then given up and counted."""
UNPUBLISHED_FRAMES = 4
"""Frames that the child may hold; while it does, further ones are given up and counted."""
WAITING_AUDIO = 500
"""Audio packets that may wait for their frame: some 10 s."""
POLL_SECONDS = 0.1


def live_settings(asked: EncodeConfig, info: StreamInfo) -> EncodeSettings:
    """An encoder that holds no frame back: no B-frames, no look-ahead, a keyframe every 2 s."""
    codec = asked.codec or "libx264"
    gop = str(max(1, round(2 * (info.frame_rate or 25))))
    options = {"g": gop}
    if codec in ("libx264", "libx265"):
        options |= {"tune": "zerolatency"}
    preset = asked.preset or ("veryfast" if codec in ("libx264", "libx265") else None)
    crf = 21 if asked.crf is None else asked.crf
    return EncodeSettings(codec, crf, preset, asked.pix_fmt, options)


class LiveOutput:
    """Publishes restored frames in order; outlives its source and its server.

    Two threads: one gives frames, repeats and audio to the child, the other hears what the child
    says and kills it when it says nothing. Neither waits without an end; `failure` tells why the
    output has ended, if it has.
    """

    def __init__(
        self, target: Target, encode: EncodeConfig, config: LiveConfig, stats: StreamStats
    ) -> None:
        self._target, self._encode, self._config, self._stats = target, encode, config, stats
        self.failure: SinkError | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Take | Frame] = deque()
        self._audio: deque[tuple[Take, int, Sound]] = deque()
        self._take: Take | None = None
        self._clock = OutputClock(AWAY_SECONDS)
        self._last: Frame | None = None
        self._source_is_away: Callable[[], bool] = lambda: False
        self._child: Child | None = None  # that stands and may be sent to
        self._finishing: Child | None = None  # that was told to close what it holds
        self._unpublished: deque[float] = deque()  # when they were sent
        self._sending_since: float | None = None
        self._closing = self._closed = False
        self._pacer = threading.Thread(target=self._pace, name="output", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="publish", daemon=True)

    def __enter__(self) -> Self:
        self._pacer.start()
        self._keeper.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Publish what waits, finish the sink in order, within its timeouts."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._pacer.join()
        self._keeper.join()

    def repeat_while(self, source_is_away: Callable[[], bool]) -> None:
        """From now on the last frame is repeated while this says True."""
        self._source_is_away = source_is_away

    def begin(self, take: Take) -> None:
        """What is written from now on has this format."""
        with self._changed:
            self._waiting.append(take)
            self._changed.notify_all()

    def write(self, frame: Frame) -> None:
        """Give a frame to the sink. Never waits."""
        with self._changed:
            if sum(isinstance(item, Frame) for item in self._waiting) >= WAITING_FRAMES:
                self._waiting.remove(next(i for i in self._waiting if isinstance(i, Frame)))
                self._stats.count("frames_unpublished")
            self._waiting.append(frame)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the SinkError that has ended the output, if one has."""
        if self.failure is not None:
            raise self.failure

    def write_audio(self, take: Take, pts: int, sound: Sound) -> None:
        """Give an audio packet to the sink: it leaves before the first frame that is later."""
        with self._changed:
            if len(self._audio) >= WAITING_AUDIO:
                self._audio.popleft()
                self._stats.count("audio_dropped")
            self._audio.append((take, pts, sound))

    # The pacer's thread.

    def _pace(self) -> None:
        try:
            while (item := self._next()) is not None:
                self._stats.alive("output")
                if isinstance(item, Take):
                    self._begin(item)
                elif isinstance(item, Frame):
                    self._emit(item)
                elif item == "repeat":
                    self._repeat()
            self._finish_child()
        except Exception as error:
            self._fail(error)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        logger.exception("%s: the output failed", self._target.address)
        self.failure = SinkError(f"{self._target.address}: {type(error).__name__} in the output")

    def _next(self) -> Take | Frame | str | None:
        """What is due: a format, a frame, "repeat" or "nothing"; None at the end."""
        with self._changed:
            if not self._waiting and self._closing:
                return None
            if not self._waiting:
                self._changed.wait(self._patience())
            if self._waiting:
                return self._waiting.popleft()
        away = self._last is not None and self._source_is_away()
        return "repeat" if away and self._clock.until_repeat(time.monotonic()) <= 0 else "nothing"

    def _patience(self) -> float:
        if self._last is None:
            return POLL_SECONDS
        until = self._clock.until_repeat(time.monotonic())
        return min(until, POLL_SECONDS) if until > 0 else 0.01

    def _begin(self, take: Take) -> None:
        if self._take is not None:
            self._finish_child()
        self._clock.interval = take.interval
        self._last = None
        with self._changed:
            self._take = take
            self._changed.notify_all()

    def _emit(self, frame: Frame) -> None:
        pts = self._clock.frame(frame.pts, time.monotonic())
        if pts is None:
            self._stats.count("frames_late")
            return
        self._last = frame
        self._send_audio_until(pts)
        self._send_frame(replace(frame, pts=pts), "frames_sent")

    def _repeat(self) -> None:
        assert self._last is not None
        pts = self._clock.repeat(time.monotonic())
        self._send_frame(replace(self._last, pts=pts, captured_seconds=0.0), "frames_repeated")

    def _send_audio_until(self, pts: int) -> None:
        assert self._take is not None
        while True:
            with self._changed:
                if not self._audio:
                    return
                take, at, sound = self._audio[0]
                out = self._clock.audio(at)
                if take.number > self._take.number or (take is self._take and out > pts):
                    return
                self._audio.popleft()
            # What an earlier format left behind fits into no stream of this one.
            sent = take is self._take and self._send(Sent(out, sound.data, sound.duration_seconds))
            self._stats.count("audio_sent" if sent else "audio_dropped")

    def _send_frame(self, frame: Frame, name: str) -> None:
        with self._changed:
            ready = self._child is not None and len(self._unpublished) < UNPUBLISHED_FRAMES
            if ready:
                self._unpublished.append(time.monotonic())
        sent = ready and self._send(frame)
        self._stats.count(name if sent else "frames_unpublished")

    def _send(self, message: Any) -> bool:
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

    def _finish_child(self) -> None:
        """Have the child write what it holds; the keeper sees it end."""
        with self._changed:
            # An entry that stays until the child has closed: the keeper's deadline for it.
            self._unpublished.append(time.monotonic())
            self._finishing = self._child
        self._send(None)
        with self._changed:
            self._child = None

    # The keeper's thread.

    def _keep(self) -> None:
        backoff = Backoff(self._config.backoff_first_seconds, self._config.backoff_most_seconds,
                          limit=None)  # fmt: skip
        while self._await_take():
            child = Child("pipeline.publish")
            try:
                failed = self._publish(child, backoff)
            except (EOFError, OSError):
                failed = Failed("the publishing process ended unexpectedly")
            except Exception as error:
                self._fail(error)
                return
            finally:
                self._leave(child)
            if failed is None:
                backoff.succeeded()
                continue
            if failed.final:
                self.failure = SinkError(f"{self._target.address}: {failed.cause}")
                return
            delay = backoff.next_delay() or 0.0
            if backoff.n_failed & (backoff.n_failed - 1) == 0:
                logger.warning("%s: %s; attempt %d in %.2f s", self._target.address, failed.cause,
                               backoff.n_failed, delay)  # fmt: skip
            with self._changed:
                self._changed.wait_for(lambda: self._closed, delay)

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
            start = self._clock.last or 0
        settings = live_settings(self._encode, take.info)
        child.connection.send(Request(self._fresh_target(), take.info, settings, take.audio, start))
        opened = time.monotonic()
        ready = False
        while True:
            if child.connection.poll(POLL_SECONDS):
                message = child.connection.recv()
                if isinstance(message, Failed):
                    self._stats.count("sink_disconnects")
                    return message
                if isinstance(message, Closed):
                    return None
                if isinstance(message, Ready):
                    ready = True
                    self._stand(child, take, message)
                elif isinstance(message, Published):
                    backoff.succeeded()
                    self._published(message)
                continue
            overdue = self._overdue(ready, opened)
            if overdue:
                self._stats.count("sink_stalls")
                return Failed(overdue)
            with self._changed:
                outdated = take is not self._take or self._closed
                if outdated and self._finishing is not child:
                    return None

    def _stand(self, child: Child, take: Take, ready: Ready) -> None:
        for warning in ready.warnings:
            logger.warning("%s: %s", self._target.address, warning)
        self._stats.count("sink_connects")
        self._stats.sink_up = True
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

    def _overdue(self, ready: bool, opened: float) -> str:
        """Why the child must be killed; empty while it need not."""
        now = time.monotonic()
        if not ready:
            allowed = self._config.open_timeout_seconds
            return f"could not be opened in {allowed:g} s" if now - opened > allowed else ""
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
        while free.exists():
            n += 1
            free = self._target.file.with_stem(f"{self._target.file.stem}.{n}")
        return replace(self._target, file=free)
