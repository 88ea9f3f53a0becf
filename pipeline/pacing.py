"""Owns what a live stream decides about time: when to try again, which pts a frame gets, what is
given up when the model is too slow. Pure: told the time, it knows no clock, thread or socket.
"""

import math
import random
from collections import Counter, deque
from fractions import Fraction
from typing import Literal

from pipeline.frames import Frame

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
WATCH_SECONDS = 2.0
"""The span over which drops are counted before a decision."""
MAX_DROP_SHARE = 0.75
"""More dropped than that: pass frames through unrestored, so that the picture still moves."""
HOLD_SECONDS = (5.0, 80.0)
"""How long `pass` and `smaller` stand before the next step up is tried: at first, at most."""

DropPolicy = Literal["oldest", "latest", "none"]
Level = Literal["restore", "drop", "pass", "smaller"]
Treatment = Literal["restore", "pass", "smaller"]
"""What becomes of a frame: the network, nothing, or the smaller network."""


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


class Admission:
    """The frames that wait for the model, and what is given up when there are too many.

    In this order: `drop` keeps the newest frame alone (policy `oldest`) or turns new ones away
    (`latest`); `pass` hands frames on unrestored, once MAX_DROP_SHARE of them were dropped; after
    that, with `has_smaller`, `smaller` has the smaller network restore them. Dropping ends when
    nothing was dropped for WATCH_SECONDS; the other two are ended on trial after HOLD_SECONDS,
    doubled each time that the trial fails: passing for the smaller network, that for the full one.
    A trial of the full one that fails goes back to the smaller one, if that had kept up. Policy
    `none` drops nothing: the caller stops reading while `full`, and `pass` begins when frames wait
    too long.
    """

    def __init__(
        self, policy: DropPolicy, max_latency: float, interval: float, has_smaller: bool = False
    ) -> None:
        self._policy, self._max_latency, self._has_smaller = policy, max_latency, has_smaller
        self._room = min(max(1, int(max_latency / 2 / interval)), 64)
        self._waiting: deque[Frame] = deque()
        self._seen: deque[tuple[float, int]] = deque()  # (time, 1 if dropped)
        self.level: Level = "restore"
        self._since = float("-inf")
        self._relief: Level = "pass"  # what the full network is given up for
        self._holds: dict[Level, float] = {}
        self._left: dict[Level, float] = {}
        self.counts: Counter[str] = Counter()
        """dropped, passed, restored, of these smaller: frames; level_NAME: a level was entered."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Policy `none`: no more can be offered until one was taken."""
        return self._policy == "none" and len(self._waiting) >= self._room

    def offer(self, frame: Frame, now: float) -> None:
        """A frame has arrived; `captured_seconds` tells when."""
        room = 1 if self.level in ("drop", "smaller") else self._room
        n_dropped = 0
        self._waiting.append(frame)
        if self._policy != "none":
            while len(self._waiting) > room:
                self._waiting.popleft() if self._policy == "oldest" else self._waiting.pop()
                n_dropped += 1
        self._note(now, n_dropped)

    def take(self, now: float) -> tuple[Frame, Treatment] | None:
        """The next frame, and what is to become of it; None where none waits."""
        while self._waiting:
            frame = self._waiting.popleft()
            age = now - frame.captured_seconds
            if self._policy != "none" and age > self._max_latency:
                self._note(now, 1)
                continue
            self._adapt_to_age(age, now)
            self.counts["passed" if self.level == "pass" else "restored"] += 1
            if self.level == "smaller":
                self.counts["smaller"] += 1
            return frame, "restore" if self.level == "drop" else self.level
        return None

    def clear(self) -> int:
        """Drop what waits; returns how many frames."""
        n_dropped = len(self._waiting)
        self._waiting.clear()
        self.counts["dropped"] += n_dropped
        return n_dropped

    def _note(self, now: float, n_dropped: int) -> None:
        self.counts["dropped"] += n_dropped
        self._seen.append((now, n_dropped))
        while self._seen and self._seen[0][0] < now - WATCH_SECONDS:
            self._seen.popleft()
        if self._policy != "none":
            self._adapt_to_drops(now)

    def _adapt_to_drops(self, now: float) -> None:
        dropped = sum(n for _, n in self._seen)
        settled = now - self._since >= WATCH_SECONDS
        too_many = settled and dropped > MAX_DROP_SHARE * len(self._seen)
        if self.level == "restore":
            if dropped:
                self._enter("drop", now)
        elif self.level == "drop" and settled and not dropped:
            self._enter("restore", now)
        elif self.level == "drop":
            if too_many:
                self._enter(self._relief, now)
        else:
            self._try_more(too_many, self._held(now), "drop", now)

    def _adapt_to_age(self, age: float, now: float) -> None:
        if self._policy != "none":
            return
        old = age > self._max_latency / 2
        if self.level == "restore":
            if old:
                self._enter(self._relief, now)
        else:
            settled = now - self._since >= WATCH_SECONDS
            fresh = age < self._max_latency / 8
            self._try_more(old and settled, fresh and self._held(now), "restore", now)

    def _held(self, now: float) -> bool:
        return now - self._since >= self._holds[self.level]

    def _try_more(self, too_slow: bool, held: bool, full: Level, now: float) -> None:
        """From `pass` or `smaller`, where frames get less than the network, to what gives more."""
        if self.level == "smaller" and too_slow:
            self._relief = "pass"
            self._enter("pass", now)
        elif self.level == "pass" and held:
            self._enter("smaller" if self._has_smaller else full, now)
        elif held:
            self._relief = "smaller"
            self._enter(full, now)

    def _enter(self, level: Level, now: float) -> None:
        self._left[self.level] = now
        if level in ("pass", "smaller"):
            hold = self._holds.get(level, HOLD_SECONDS[0])
            failed = now - self._left.get(level, float("-inf")) < 2 * hold
            self._holds[level] = min(2 * hold, HOLD_SECONDS[1]) if failed else HOLD_SECONDS[0]
        self.level, self._since = level, now
        self.counts[f"level_{level}"] += 1
