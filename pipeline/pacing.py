"""Owns what a live stream decides about time: when to try again, when a frame is due, which pts it
gets. Pure: told the time, it knows no clock, thread or socket.
"""

import math
import random
from fractions import Fraction

TIME_BASE = Fraction(1, 90_000)
"""The unit of every pts of a live session, whatever its connections count in."""
MAX_JUMP_SECONDS = 10
"""A source whose pts runs ahead of the clock by more, or back by a second, has reset its clock."""
MAX_HOLD_SECONDS = 2.0
"""No frame is held back for longer; a later one has other times."""
MAX_BEHIND_SECONDS = 0.2
"""A frame that comes later than that makes all that follow so much later, once."""
STOOD_SECONDS = 5.0
"""A connection that has given frames for so long was no failure: the delays begin anew."""
REFUSED_SECONDS = 30.0
"""The least delay where what has worked before is refused: a camera that starts, a login."""
LATE_SECONDS = 1.0
"""For so long frames that a repeat has overtaken are dropped; then the output's time moves on."""


def ticks(seconds: float | Fraction) -> int:
    """Seconds in TIME_BASE."""
    return round(seconds / TIME_BASE)


class Backoff:
    """Delays that double from `first` to `most` seconds, each shortened by up to a third at random.

    `limit` attempts in a row at most; None: without end.
    """

    def __init__(
        self, first: float, most: float, limit: int | None, seed: int | None = None
    ) -> None:
        self._first, self._most, self._limit = first, most, limit
        self._random = random.Random(seed)
        self.n_failed = 0

    def succeeded(self, seconds: float = math.inf) -> None:
        """The next delay is the first one again, if the connection has stood for long enough."""
        if seconds > STOOD_SECONDS:
            self.n_failed = 0

    def next_delay(self, *, refused: bool = False) -> float | None:
        """Seconds to wait after one more failure; None where the attempts are used up."""
        if self._limit is not None and self.n_failed >= self._limit:
            return None
        delay = min(self._most, self._first * 2.0 ** min(self.n_failed, 30))
        self.n_failed += 1
        delay *= 1 - self._random.random() / 3
        return max(delay, REFUSED_SECONDS) if refused else delay


class Timeline:
    """The pts of one connection after another as those of one session: strictly increasing.

    A connection begins where the last one left off plus the time that passed in between, so that
    the session neither jumps nor drifts from the clock by what was away.
    """

    def __init__(self) -> None:
        self._shift: int | None = None
        self._last: int | None = None
        self._last_seen = 0.0
        self._last_audio: int | None = None

    def connected(self) -> None:
        """What follows comes from a new connection, whose clock may be any."""
        self._shift = None

    def video(self, seconds: Fraction | None, now: float, interval: float) -> int:
        """The session's pts of a frame; `seconds` is its pts there, None if it has none."""
        step, elapsed = max(ticks(interval), 1), ticks(now - self._last_seen)
        if self._last is None:
            expected, latest = 0, 0
        else:
            expected = self._last + max(step, elapsed)
            latest = self._last + max(elapsed, 0) + ticks(MAX_JUMP_SECONDS)
        pts = expected
        if seconds is not None and self._shift is not None and self._last is not None:
            pts = ticks(seconds) + self._shift
            if not self._last - ticks(1) < pts <= latest:
                self._shift, pts = None, expected
        elif seconds is None and self._last is not None:
            pts = self._last + step
        if self._shift is None and seconds is not None:
            self._shift = pts - ticks(seconds)
        if self._last is not None:
            pts = max(pts, self._last + 1)
        self._last, self._last_seen = pts, now
        return pts

    def audio(self, seconds: Fraction | None) -> int | None:
        """The session's pts of a packet; None before the first frame, or where it goes back, or so
        far ahead of the frames that its clock has jumped: all after it would go back."""
        if self._shift is None or seconds is None or self._last is None:
            return None
        pts = ticks(seconds) + self._shift
        if pts > self._last + ticks(MAX_JUMP_SECONDS):
            return None
        if self._last_audio is not None and pts <= self._last_audio:
            return None
        self._last_audio = pts
        return pts


class Pace:
    """When the frames of a source are due that hands them out by the segment: as far apart as they
    were taken. A jump of their times, or a source that is late, begins anew with what is there."""

    def __init__(self) -> None:
        self._began: float | None = None  # on the clock, where the source's time is 0

    def until_due(self, seconds: float, now: float) -> float:
        """Seconds to hold back a frame whose pts is `seconds`."""
        wait = 0.0 if self._began is None else self._began + seconds - now
        if self._began is None or not -MAX_BEHIND_SECONDS < wait < MAX_HOLD_SECONDS:
            self._began, wait = now - seconds, 0.0
        return max(wait, 0.0)


class OutputClock:
    """The pts with which frames leave; fills the time while none comes with repeats."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.last: int | None = None
        self._last_sent = 0.0
        self._before: int | None = None
        self._shift = 0
        self._late_since: float | None = None

    def frame(self, pts: int, now: float) -> int | None:
        """The pts to give a frame; None: repeats have overtaken it, drop it."""
        before, self._before = self._before, pts
        out = pts + self._shift
        if self.last is None or before is None or out > self.last:
            out -= self._come_back(out, now)
        elif self.last - out < pts - before:
            out = self.last + 1  # by less than a gap of a slow source: there is none after it yet
        else:
            if self._late_since is None:
                self._late_since = now
            if now - self._late_since < LATE_SECONDS:
                return None
            # What was away came back with a clock that had stood still: late for ever.
            self._shift += self.last + ticks(self.interval) - out
            out = self.last + ticks(self.interval)
        self._late_since = None
        self.last, self._last_sent = out, now
        return out

    def _come_back(self, out: int, now: float) -> int:
        """Take off the shift what a source that has caught up is ahead by; returns that."""
        if self.last is None or not self._shift:
            return 0
        ahead = out - self.last - max(ticks(now - self._last_sent), 1)
        back = max(min(ahead, self._shift), 0)
        self._shift -= back
        return back

    def until_repeat(self, now: float) -> float:
        """Seconds until a repeat of the last frame is due."""
        return self._last_sent + self.interval - now

    def repeat(self, now: float) -> int:
        """The pts of a repeat that leaves now: it has moved on as the clock has."""
        assert self.last is not None
        self.last += max(ticks(now - self._last_sent), 1)
        self._last_sent = now
        return self.last

    def audio(self, pts: int) -> int:
        """The pts with which an audio packet leaves, in step with the frames."""
        return pts + self._shift
