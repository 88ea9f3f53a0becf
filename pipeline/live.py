"""Owns a live source for weeks: reads it in a child process, watches that, opens it again.
Knows neither FFmpeg (capture.py does) nor what becomes of the frames.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from types import TracebackType
from typing import Self

from pipeline.address import Address
from pipeline.admission import Admission, Treatment
from pipeline.capture import Damaged, LeftOut, Lost, Opened, Picture, Request, Sound
from pipeline.child import Child
from pipeline.config import LiveConfig
from pipeline.errors import RestoreError, SourceError, StreamLost
from pipeline.frames import Frame, StreamInfo
from pipeline.pacing import Backoff, Timeline
from pipeline.stats import StreamStats

logger = logging.getLogger(__name__)

SAME_RATE = 0.1
"""Frame rates that differ by less are one."""

GRACE_SECONDS = 0.5
"""How much later than FFmpeg's own deadlines the child is killed."""
FAREWELL_SECONDS = 0.5
"""How long the child may take to take leave of the server, at the end."""
TICK_SECONDS = 0.005
"""How often a consumer that has frames in flight is told that none has come."""
STOP_SECONDS = 0.1
"""How soon a reader sees that it shall stop."""
AWAY_SECONDS = 0.25
"""A source that sent no frame for so long, and for three frames, is away: the output repeats."""


@dataclass(frozen=True, slots=True)
class Take:
    """A stretch of the session in which nothing about the format changes."""

    info: StreamInfo
    audio: bytes | None
    """As in capture.Opened."""
    video_codec: str
    number: int
    """Counts the takes of a session from 1."""

    @property
    def interval(self) -> float:
        """Seconds from one frame to the next."""
        assert self.info.frame_rate
        return float(1 / self.info.frame_rate)


OnAudio = Callable[[Take, int, Sound], None]
"""A packet, the take that it belongs to and its pts in the session."""


class LiveSource:
    """A live URL as a session of Frames whose pts, in pacing.TIME_BASE, increase strictly.

    Losing the connection is not the end: it is opened again, after delays that double, until
    `config.reconnects` attempts in a row have failed (StreamLost) or trying is no use (SourceError:
    a wrong password or no such protocol, before the first frame). Every wait has a deadline that
    this process enforces by killing the child. Frames that nobody takes are dropped by
    `config.drop_policy` and counted.
    Once `stop` is set nothing more is read; what waits can still be taken, then the session ends.
    `has_smaller`: where the model is too slow, the consumer has a smaller one.
    """

    def __init__(
        self,
        address: Address,
        config: LiveConfig,
        stats: StreamStats,
        on_audio: OnAudio,
        stop: threading.Event,
        has_smaller: bool = False,
    ) -> None:
        self.address = address
        self._has_smaller = has_smaller
        self._config, self._stats, self._on_audio = config, stats, on_audio
        self._changed = threading.Condition()
        self._take: Take | None = None
        self._admission = self._new_admission(0.04)
        self._failure: RestoreError | None = None
        self._ended = False
        self._stop, self._left = stop, threading.Event()
        self._timeline = Timeline()
        self._last_frame = time.monotonic()
        self._n_taken = 0
        self._frames_have_come = False
        self.treatment: Treatment = "restore"
        """What is to become of the frame yielded last."""
        self._thread = threading.Thread(target=self._run, name="capture", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()
        self._thread.join()

    def away(self) -> bool:
        """Whether the source has sent no frame for a while."""
        with self._changed:
            interval = self._take.interval if self._take else 0.0
            return time.monotonic() - self._last_frame > max(AWAY_SECONDS, 3 * interval)

    def takes(self) -> Iterator[tuple[Take, Iterator[Frame | None]]]:
        """Each stretch of one format with its frames; None among them: none has come just now.

        The frames of one must be used up before the next is asked for. Raises SourceError, and
        RestoreError where the reader fails.
        """
        done: Take | None = None
        while (take := self._take_after(done)) is not None:
            yield take, self._frames(take)
            done = take
        if self._failure is not None:
            raise self._failure

    def _take_after(self, done: Take | None) -> Take | None:
        with self._changed:
            self._changed.wait_for(lambda: self._take is not done or self._ended)
            return None if self._take is done else self._take

    def _frames(self, take: Take) -> Iterator[Frame | None]:
        while True:
            with self._changed:
                if self._take is not take:
                    return
                got = self._admission.take(time.monotonic())
                if got is None:
                    if self._ended:
                        return
                    self._changed.wait(TICK_SECONDS)
                else:
                    self._count_admission()
                    self._changed.notify_all()
            if got is None:
                yield None
                continue
            frame, self.treatment = got
            yield replace(frame, index=self._n_taken)
            self._n_taken += 1

    def _run(self) -> None:
        try:
            self._failure = self._connect_until_stopped()
        except BaseException:
            logger.exception("%s: the reader failed", self.address)
            self._failure = RestoreError(f"{self.address}: the reader failed; see the log")
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _connect_until_stopped(self) -> SourceError | None:
        config = self._config
        backoff = Backoff(config.backoff_first_seconds, config.backoff_most_seconds,
                          config.reconnects)  # fmt: skip
        child = _started()
        try:
            while True:
                lost = self._read(child, backoff)
                self._stats.source_up = False
                again = lost is not None and lost.asks_again
                if isinstance(child, Child) and not again:
                    child.end()
                if lost is None:
                    return None
                self._stats.count("source_stalls" if lost.stalled else "source_disconnects")
                if lost.final and not self._frames_have_come:
                    return SourceError(f"{self.address}: {lost.cause}")
                delay = backoff.next_delay(refused=lost.final)
                if delay is None:
                    return StreamLost(f"{self.address}: {lost.cause}; gave up after "
                                      f"{backoff.n_failed} attempts in a row")  # fmt: skip
                if backoff.n_failed & (backoff.n_failed - 1) == 0:  # 1, 2, 4 …: weeks of them
                    logger.warning("%s: %s; attempt %d in %.2f s", self.address, lost.cause,
                                   backoff.n_failed, delay)  # fmt: skip
                if not again:
                    child = _started()  # it starts while we wait
                if self._stops_within(delay):
                    return None
        finally:
            if isinstance(child, Child):
                child.end(FAREWELL_SECONDS)

    def _stops_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (self._stop.is_set() or self._left.is_set()):
            self._stats.alive("capture")
            left = until - time.monotonic()
            if left <= 0:
                return False
            self._left.wait(min(left, STOP_SECONDS))
        return True

    def _read(self, child: "Child | OSError", backoff: Backoff) -> Lost | None:
        """One connection, until it is lost; None: asked to stop."""
        if not isinstance(child, Child):
            return Lost(f"no process can be started ({child.strerror})")
        try:
            return self._hear_out(child, backoff)
        except BlockingIOError:
            return Lost("the reading process stands still", stalled=True)
        except (EOFError, OSError):
            return Lost("the reading process ended unexpectedly")

    def _hear_out(self, child: Child, backoff: Backoff) -> Lost | None:
        config = self._config
        self._timeline.connected()
        child.connection.send(
            Request(
                self.address,
                config.transport,
                config.audio,
                config.open_timeout_seconds,
                config.stall_timeout_seconds,
                None if config.drop_policy == "none" else config.max_latency_seconds,
            )
        )
        patience = config.stall_timeout_seconds + GRACE_SECONDS
        deadline = time.monotonic() + config.open_timeout_seconds + patience
        first: float | None = None
        while not self._stops_within(0):
            message = child.connection.recv() if child.connection.poll(STOP_SECONDS) else None
            if isinstance(message, Lost):
                return message
            if isinstance(message, Picture):
                first = first or time.monotonic()
                backoff.succeeded(time.monotonic() - first)
                self._offer(message)
                self._frames_have_come = True
            elif message is not None:
                self._take_in(message)
            if isinstance(message, Picture | LeftOut):
                deadline = time.monotonic() + patience
            elif time.monotonic() > deadline:  # whatever else comes: it may come for ever
                return Lost(f"no frame for {config.stall_timeout_seconds:g} s", stalled=True)
        return None

    def _take_in(self, message: Opened | Sound | Damaged | LeftOut) -> None:
        """What is no frame."""
        if isinstance(message, Opened):
            self._opened(message)
        elif isinstance(message, Damaged):
            self._stats.count("frames_damaged")
        elif isinstance(message, LeftOut):
            self._stats.count("frames_in")
            self._stats.count("frames_dropped")
        else:
            self._hear(message)

    def _opened(self, opened: Opened) -> None:
        before = self._take
        info = replace(opened.info, start_pts=0)  # where the source's clock stood is no format
        if before is not None and _is_about(before.info.frame_rate, info.frame_rate):
            # Where the stream does not state it, FFmpeg's estimate is another one each time.
            info = replace(info, frame_rate=before.info.frame_rate)
        take = Take(info, opened.audio, opened.video_codec, before.number + 1 if before else 1)
        if before is None or take != replace(before, number=take.number):
            with self._changed:
                self._admission.clear()
                self._count_admission()
                self._admission = self._new_admission(take.interval)
                self._take = take
                self._changed.notify_all()
        self._stats.count("source_connects")
        self._stats.source_up = True
        if opened.warning:
            logger.warning("%s: %s", self.address, opened.warning)
        info = take.info
        logger.info("%s: %dx%d %s, %s, %.5g fps, %s", self.address, info.width, info.height,
                    info.pixel_format.name, take.video_codec, info.frame_rate or 0,
                    "with audio" if take.audio else "no audio")  # fmt: skip

    def _offer(self, picture: Picture) -> None:
        assert self._take is not None
        captured = picture.captured_seconds
        pts = self._timeline.video(picture.seconds, captured, self._take.interval)
        frame = Frame(0, pts, picture.planes, key=picture.key, captured_seconds=captured)
        self._stats.count("frames_in")
        with self._changed:
            # Policy `none`: not reading is what slows the source down.
            while self._admission.full and not self._stops_within(0):
                self._changed.wait(STOP_SECONDS)
            self._last_frame = time.monotonic()
            self._admission.offer(frame, self._last_frame)
            self._count_admission()
            self._changed.notify_all()

    def _hear(self, sound: Sound) -> None:
        self._stats.count("audio_in")
        pts = self._timeline.audio(sound.seconds)
        if pts is None or self._take is None:
            self._stats.count("audio_dropped")
        else:
            self._on_audio(self._take, pts, sound)

    def _new_admission(self, interval: float) -> Admission:
        config = self._config
        return Admission(
            config.drop_policy, config.max_latency_seconds, interval, self._has_smaller
        )

    def _count_admission(self) -> None:
        """What the admission has decided since the last time, to the stream's counters."""
        for name, n in self._admission.counts.items():
            to = name.replace("level_", "decisions_") if "_" in name else f"frames_{name}"
            self._stats.count(to, n)
        self._admission.counts.clear()


def _started() -> "Child | OSError":
    """A reading process, or why there is none: this machine may have room for one later."""
    try:
        return Child("pipeline.capture")
    except OSError as error:
        return error


def _is_about(before: Fraction | None, now: Fraction | None) -> bool:
    return before is not None and now is not None and abs(now / before - 1) < SAME_RATE
