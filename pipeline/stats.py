"""Owns the counters and latencies of one live stream, and their Prometheus text. Knows no stage."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial

WINDOW = 3000
"""Latencies that the percentiles are taken over: the newest, two minutes at 25 frames a second."""
QUANTILES = (0.5, 0.95, 0.99)
STUCK_SECONDS = 30
"""A thread that gave no sign of life for so long makes the stream unhealthy."""

COUNTERS = {
    "frames_in": "Frames that the source sent.",
    "frames_damaged": "Packets of frames that could not be decoded: lost or damaged on the way.",
    "frames_dropped": "Frames given up because the model was too slow, or their format had ended.",
    "frames_passed": "Frames handed on unrestored because the model was far too slow.",
    "frames_restored": "Frames given to the model.",
    "frames_smaller": "Of these, the ones given to the smaller model.",
    "frames_late": "Frames given up because repeats had overtaken them after a stall.",
    "frames_unpublished": "Frames, repeats among them, that came while the sink was away or full.",
    "frames_sent": "Frames given to the sink, repeats not counted.",
    "frames_repeated": "Repeats of the last frame, or of the stub, while no other came.",
    "frames_published": "Frames and repeats that the sink has taken.",
    "audio_in": "Audio packets that the source sent.",
    "audio_sent": "Audio packets given to the sink.",
    "audio_dropped": "Audio packets without a place: before the first frame, or the sink was away.",
    "source_connects": "Connections to the source that gave a frame.",
    "source_disconnects": "Times that the source closed the connection or refused one.",
    "source_stalls": "Times that the source was silent for too long.",
    "sink_connects": "Connections to the sink that stood.",
    "sink_disconnects": "Times that the sink closed the connection or refused one.",
    "sink_stalls": "Times that the sink took no frame for too long.",
    "decisions_restore": "Times that the controller went back to restoring every frame.",
    "decisions_drop": "Times that the controller began to drop frames.",
    "decisions_pass": "Times that the controller began to pass frames through.",
    "decisions_smaller": "Times that the controller changed to the smaller model.",
}

GAUGES = {
    "source_up": "1 while the source sends.",
    "sink_up": "1 while the sink stands.",
    "ended": "1 once this stream was stopped or has failed for good.",
}

_Samples = Mapping[tuple[str, ...], object]  # labels to value


class StreamStats:
    """Thread-safe. Names are those of COUNTERS; an unknown one is a KeyError."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self._latencies: deque[float] = deque(maxlen=WINDOW)
        self.source_up = False
        self.sink_up = False
        self.ended = False
        """Nothing more will come: it was stopped, or failed for good."""
        self._alive: dict[str, float] = {}

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter."""
        if name not in COUNTERS:
            raise KeyError(name)
        with self._lock:
            self._counts[name] += n

    def __getitem__(self, name: str) -> int:
        with self._lock:
            return self._counts[name]

    def alive(self, name: str) -> None:
        """A thread that must never stand still says so."""
        self._alive[name] = time.monotonic()

    def begin_anew(self) -> None:
        """The threads that were alive have ended; others will be."""
        self._alive.clear()

    def stuck(self) -> list[str]:
        """Those that have not, for STUCK_SECONDS."""
        now = time.monotonic()
        if self.ended:
            return []
        return [name for name, at in list(self._alive.items()) if now - at > STUCK_SECONDS]

    def latency(self, seconds: float) -> None:
        """A frame was published so long after its packet had been read."""
        with self._lock:
            self._latencies.append(seconds)

    def forget_latencies(self) -> None:
        """Begin the percentiles anew."""
        with self._lock:
            self._latencies.clear()

    def quantiles(self) -> dict[float, float]:
        """Seconds from a packet read to its frame published, nearest rank; empty without one."""
        with self._lock:
            latencies = sorted(self._latencies)
        if not latencies:
            return {}
        return {q: latencies[min(int(q * len(latencies)), len(latencies) - 1)] for q in QUANTILES}

    def values(self) -> dict[str, float]:
        """Everything, flat, for a log line."""
        with self._lock:
            counts: Mapping[str, float] = dict(self._counts)
        latencies = {f"latency_p{round(q * 100)}": round(s, 4) for q, s in self.quantiles().items()}
        return {**counts, **latencies, "source_up": self.source_up, "sink_up": self.sink_up}


Streams = Mapping[str, StreamStats]
"""By the name of each camera; a stream that is alone has the name "" and no label."""


def prometheus(streams: Streams) -> str:
    """All of them in the text exposition format 0.0.4, with the label `camera`."""
    lines = []

    def add(name: str, kind: str, text: str, samples: Callable[[StreamStats], _Samples]) -> None:
        full = f"restore_stream_{name}"
        lines.extend([f"# HELP {full} {text}", f"# TYPE {full} {kind}"])
        for camera, stats in streams.items():
            for labels, value in samples(stats).items():
                both = ",".join([*([f'camera="{camera}"'] if camera else []), *labels])
                lines.append(f"{full}{{{both}}} {value}" if both else f"{full} {value}")

    for name, text in COUNTERS.items():
        add(f"{name}_total", "counter", text, partial(_count, name))
    for name, text in GAUGES.items():
        add(name, "gauge", text, partial(_gauge, name))
    text = f"From a frame's packet read to the frame published, newest {WINDOW}."
    add("latency_seconds", "gauge", text, _latencies)
    return "\n".join(lines) + "\n"


def _count(name: str, stats: StreamStats) -> _Samples:
    return {(): stats[name]}


def _gauge(name: str, stats: StreamStats) -> _Samples:
    return {(): int(getattr(stats, name))}


def _latencies(stats: StreamStats) -> _Samples:
    return {(f'quantile="{q}"',): f"{s:.6f}" for q, s in stats.quantiles().items()}
