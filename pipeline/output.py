"""Owns what leaves when: frames and audio in step, repeats of the last frame or a stub while the
source is away. Knows neither the model nor how the sink is kept open: publisher.py does.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Self

from pipeline.capture import Sound
from pipeline.config import EncodeConfig, LiveConfig
from pipeline.errors import SinkError
from pipeline.frames import Frame, Planes
from pipeline.live import AWAY_SECONDS, Take
from pipeline.pacing import OutputClock
from pipeline.publish import Sent, Target
from pipeline.publisher import Publisher
from pipeline.stats import StreamStats
from pipeline.stub import Stub

logger = logging.getLogger(__name__)

WAITING_FRAMES = 8
"""Restored frames that may wait for the sink; the oldest is then given up and counted."""
WAITING_AUDIO = 500
"""Audio packets that may wait for their frame: some 10 s."""
POLL_SECONDS = 0.1
QUIET_SECONDS = 1.0
"""Without a frame for so long the last one is repeated though the source sends: the model stands
still, and a server would drop a publisher from which nothing comes."""
STUB_SECONDS = 3.0
"""So long the last frame is repeated; then the stub is, if there is one."""


class LiveOutput:
    """Publishes restored frames in order; outlives its source and its server.

    Raises ConfigError where `config.stub` is no picture.

    Its thread gives frames, repeats and audio to the Publisher when they are due. Nothing here
    waits without an end.
    """

    def __init__(
        self, target: Target, encode: EncodeConfig, config: LiveConfig, stats: StreamStats
    ) -> None:
        self._stats = stats
        self._publisher = Publisher(target, encode, config, stats)
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Take | Frame] = deque()
        self._audio: deque[tuple[Take, int, Sound]] = deque()
        self._last_audio = -1
        self._take: Take | None = None
        self._clock = OutputClock(AWAY_SECONDS)
        self._last: Frame | None = None
        self._last_at = 0.0
        self._stub = None if config.stub is None else Stub(config.stub)
        self._stub_planes: Planes | None = None
        self._source_is_away: Callable[[], bool] = lambda: False
        self._closing = False
        self._pacer = threading.Thread(target=self._pace, name="output", daemon=True)

    def __enter__(self) -> Self:
        self._publisher.start()
        self._pacer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Publish what waits, finish the sink in order, within its timeouts.

        Raises SinkError where a recording could not be completed.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._pacer.join()
        if error is None:
            self.check()

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
        if self._failure is not None:
            raise SinkError(f"{type(self._failure).__name__} in the output; see the log")
        if self._publisher.failure is not None:
            raise self._publisher.failure

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
        except Exception as error:
            logger.exception("the output failed")
            self._failure = error
        finally:
            self._publisher.close()

    def _next(self) -> Take | Frame | str | None:
        """What is due: a format, a frame, "repeat" or "nothing"; None at the end."""
        with self._changed:
            if not self._waiting and self._closing:
                return None
            if not self._waiting:
                self._changed.wait(self._patience())
            if self._waiting:
                return self._waiting.popleft()
        if self._last is None:
            return "nothing"
        overdue = -self._clock.until_repeat(time.monotonic())
        due = overdue >= 0 if self._source_is_away() else overdue >= QUIET_SECONDS
        return "repeat" if due else "nothing"

    def _patience(self) -> float:
        if self._last is None:
            return POLL_SECONDS
        until = self._clock.until_repeat(time.monotonic())
        return min(until, POLL_SECONDS) if until > 0 else 0.01

    def _begin(self, take: Take) -> None:
        self._take, self._last = take, None
        self._stub_planes = None if self._stub is None else self._stub.planes(take.info)
        self._clock.interval = take.interval
        self._publisher.begin(take)

    def _emit(self, frame: Frame) -> None:
        now = time.monotonic()
        pts = self._clock.frame(frame.pts, now)
        if pts is None:
            self._stats.count("frames_late")
            return
        self._last, self._last_at = frame, now
        self._send_audio_until(pts)
        self._send_frame(replace(frame, pts=pts), "frames_sent")

    def _repeat(self) -> None:
        assert self._last is not None
        now = time.monotonic()
        repeat = replace(self._last, pts=self._clock.repeat(now), captured_seconds=0.0)
        stub_is_due = now - self._last_at > STUB_SECONDS and self._source_is_away()
        if self._stub_planes is not None and stub_is_due:
            repeat = replace(repeat, planes=self._stub_planes)
        self._send_frame(repeat, "frames_repeated")

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
            # What an earlier format left behind fits into no stream of this one, and where the
            # clock has come back from being late a packet may lie before the one that has left.
            sent = take is self._take and out > self._last_audio and self._publisher.send(
                Sent(out, sound.data, sound.duration_seconds)
            )  # fmt: skip
            self._last_audio = max(self._last_audio, out)
            self._stats.count("audio_sent" if sent else "audio_dropped")

    def _send_frame(self, frame: Frame, name: str) -> None:
        sent = self._publisher.send_frame(frame)
        self._stats.count(name if sent else "frames_unpublished")
