"""Owns segments: where a stream is cut, one segment's file, and the way back into one stream.

A segment is encoded by a fresh encoder with the job's settings, so that its bytes depend on nothing
but its frames. Its file holds the encoder's packets and no container: Matroska rounds times to
milliseconds, NUT refuses negative ones, none takes every codec. Knows no model and no output.
"""

import contextlib
import errno
import hashlib
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import av

from pipeline.errors import IntegrityError
from pipeline.frames import Frame

logger = logging.getLogger(__name__)

_RECORD = struct.Struct("<qqBQ")  # pts, duration, is a keyframe, bytes of data that follow
_BLOCK = 1 << 20
_ENCODER_TICK = Fraction(1, 10_000_000)


@dataclass(frozen=True, slots=True)
class Segment:
    """A finished part of the output's video. Times are the source's, in its time_base."""

    index: int
    start_pts: int
    end_pts: int
    """Exclusive: the next segment's start."""
    n_frames: int
    sha256: str
    """Of its file."""
    delay: int
    """By how many packets at most the encoder moved a frame back in coded order."""
    last_pts: int
    last_planes: str
    """The hash of the last source frame: decoding must give it again before a job goes on."""
    before: str = ""
    """Likewise of the source frame before the first one, where this was decoded by itself."""
    counts: tuple[int, ...] = ()
    """Those of the last source frame."""


@dataclass(frozen=True, slots=True)
class Place:
    """A frame of the source that has been restored already; a resumed job goes on after it."""

    index: int
    pts: int
    planes: str
    """What `hash_of` gives for it."""
    counts: tuple[int, ...] = ()


class Packet(NamedTuple):
    """A compressed picture on its way from an encoder to the muxer; times as the encoder's."""

    pts: int
    duration: int
    is_keyframe: bool
    data: bytes


def hash_of(frame: Frame) -> str:
    """SHA-256 of a frame's planes."""
    digest = hashlib.sha256()
    for plane in frame.planes:
        digest.update(plane.tobytes())
    return digest.hexdigest()


def plan(frames: Iterable[Frame], length: int) -> Iterator[Frame]:
    """The same frames, the last one of each segment marked with `ends_segment`.

    A segment ends before the first keyframe after `length` frames, at the latest after twice as
    many. That depends on nothing before the segment's own first frame, so that a job which
    starts again at any boundary cuts where it would have cut. Holds one frame back.
    """
    held: Frame | None = None
    n_frames = 0
    for frame in frames:
        if held is not None:
            n_frames += 1
            ends = (n_frames >= length and frame.key) or n_frames >= 2 * length
            yield replace(held, ends_segment=hash_of(held)) if ends else held
            n_frames = 0 if ends else n_frames
        held = frame
    if held is not None:
        yield replace(held, ends_segment=hash_of(held))


@dataclass(slots=True)
class StopRequest:
    """How a job is asked to stop at the end of the segment in progress: set `asked`.

    `can_wait` is the job's answer: whether that would keep anything. Where it is False, stop the
    job at once (KeyboardInterrupt).
    """

    asked: bool = False
    can_wait: bool = False
    obeyed: bool = False


def until_asked(frames: Iterable[Frame], stop: StopRequest) -> Iterator[Frame]:
    """The same frames, up to the end of the segment in which the job is asked to stop."""
    ended = said = False
    for frame in frames:
        if stop.asked and ended:
            stop.obeyed = True
            return
        if stop.asked and not said:
            logger.warning("stopping at the end of this segment; Ctrl-C again stops at once")
            said = True
        ended = bool(frame.ends_segment)
        yield frame


class SegmentWriter:
    """Encodes one segment into `path`, under a temporary name until `finish`.

    `encoder` is fresh and open. OSError and av.FFmpegError pass through, as does ValueError for a
    frame out of order. Raises IntegrityError where the encoder loses or invents a picture.
    """

    def __init__(self, path: Path, encoder: Any) -> None:
        self.path = path
        self._encoder = encoder
        self._temporary = path.with_suffix(".tmp")
        self._file = self._temporary.open("wb", _BLOCK)
        self._digest = hashlib.sha256()
        self._durations: dict[int, int] = {}
        self._pts: list[int] = []
        self._first: Frame | None = None
        self._last: Frame | None = None
        self._n_frames = 0

    def encode(self, frame: Frame, picture: Any) -> None:
        """Encode `picture`, made of `frame`; its pts may be another but goes up likewise."""
        if self._last is not None and frame.pts <= self._last.pts:
            raise ValueError(f"pts {frame.pts} comes after {self._last.pts}")
        # Without its planes: a segment must not keep them until it ends.
        self._last = replace(frame, planes=())
        self._first = self._first or self._last
        self._n_frames += 1
        self._durations[picture.pts] = frame.duration
        self._write(self._encoder.encode(picture))

    def finish(self, index: int) -> Segment:
        """Drain the encoder, secure the file on the disk and give it its name."""
        self._write(self._encoder.encode(None))
        first, last = self._first, self._last
        if first is None or last is None or len(self._pts) != self._n_frames:
            raise IntegrityError(
                f"{self.path}: {self._n_frames} frames given, {len(self._pts)} packets encoded; "
                "nothing was kept, report this with the source"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        return Segment(
            index=index, start_pts=first.pts, end_pts=last.pts + last.duration,
            n_frames=self._n_frames, sha256=self._digest.hexdigest(),
            delay=reorder_delay(self._pts), last_pts=last.pts, last_planes=last.ends_segment,
            counts=last.counts,
        )  # fmt: skip

    def abort(self) -> None:
        """Close without a result; the temporary file is the ledger's to remove."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, packets: list[Any]) -> None:
        for packet in packets:
            pts = self._pts_of(packet)
            # Encoders that reorder lose or invent it, and a muxer ends the last frame by it.
            duration = self._durations.pop(pts)
            data = bytes(packet)
            self._pts.append(pts)
            header = _RECORD.pack(pts, duration, packet.is_keyframe, len(data))
            for part in (header, data):
                self._digest.update(part)
                self._file.write(part)

    def _pts_of(self, packet: Any) -> int:
        """The pts of the frame that the packet holds."""
        if packet.pts in self._durations:
            return int(packet.pts)
        # libvpx counts in 10 MHz: in a finer time_base its pts come back a little off.
        nearest = min(self._durations, key=lambda pts: abs(pts - packet.pts), default=None)
        if nearest is None or abs(nearest - packet.pts) * packet.time_base > _ENCODER_TICK:
            raise IntegrityError(f"{self.path}: the encoder gave a packet for no frame")
        return nearest


def reorder_delay(pts: list[int]) -> int:
    """The most places that a picture is coded after its turn: the delay that dts <= pts needs."""
    shown = sorted(range(len(pts)), key=pts.__getitem__)
    return max((coded - turn for turn, coded in enumerate(shown)), default=0)


def write_secured(path: Path, data: bytes) -> None:
    """Write a whole file that a power cut leaves out or whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # no file system that can
            raise
    finally:
        os.close(descriptor)


def hash_of_file(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_packets(path: Path) -> Iterator[Packet]:
    """What was written with SegmentWriter. Raises IntegrityError for a file that breaks off."""
    with path.open("rb", _BLOCK) as file:
        while header := file.read(_RECORD.size):
            if len(header) == _RECORD.size:
                pts, duration, key, size = _RECORD.unpack(header)
                data = file.read(size)
                if len(data) == size:
                    yield Packet(pts, duration, bool(key), data)
                    continue
            raise IntegrityError(f"{path}: the segment is damaged; run again to redo it")


def joined(parts: Iterable[Path], delay: int, time_base: Fraction, stream: Any) -> Iterator[Any]:
    """The packets of all parts for the muxer, with dts that increase through the whole stream.

    Each encoder began its dts below its first pts, into the part before. They are made anew: the
    dts of the n-th packet is the n-th pts of all in order of showing, `delay` packets later,
    which is what an encoder does. `delay` is the largest of all segments.
    """
    packets = chain.from_iterable(map(read_packets, parts))
    # The first delay + 1 pictures shown are among these.
    head = list(islice(packets, 2 * delay + 1))
    first = sorted(packet.pts for packet in head)[: delay + 1]
    lead = first[-1] - first[0] if first else 0
    coming: list[int] = []
    for number, packet in enumerate(chain(head, packets)):
        heappush(coming, packet.pts)
        muxed = av.Packet(packet.data)
        muxed.time_base = time_base
        muxed.pts, muxed.duration = packet.pts, packet.duration
        muxed.dts = first[number] - lead if number < len(first) - 1 else heappop(coming)
        muxed.is_keyframe = packet.is_keyframe
        muxed.stream = stream
        yield muxed
