"""Owns which frames of a live stream the model gets, and what is given up when it is too slow.

Pure: told the time, it knows no clock, thread or socket.
"""

from collections import Counter, deque
from typing import Literal

from pipeline.frames import Frame

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
