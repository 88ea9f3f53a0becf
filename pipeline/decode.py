"""Owns the way from a video file to a StreamInfo and an iterator of Frame. Knows no output.

Every av rational becomes a Fraction here; every pts stays an integer in the stream's time_base.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import av
import numpy as np
from av.sidedata.sidedata import Type

from pipeline.deinterlace import can_deinterlace, deinterlaced
from pipeline.errors import SourceError
from pipeline.frames import Frame, Plane, StreamInfo
from pipeline.irregular import Irregular
from pipeline.probe import (
    MAX_PIXELS,
    STALL_SECONDS,
    cause_of,
    declared_end,
    declared_packets,
    file_start,
    missing_bytes,
    open_container,
    pick_video_stream,
    read_stream_info,
)
from pipeline.segments import Place, hash_of

MAX_CONSECUTIVE_DECODE_ERRORS = 8
"""So many packets in a row may be undecodable; one more ends the job."""
SEEK_BACK_SECONDS = (1, 10, 60)
"""How far before a trim start a keyframe is looked for; then decoding starts at the beginning."""
MIN_MISSING_SECONDS = Fraction(1)
"""A stream that ends so much before its declared duration counts as truncated."""
MAX_STEP_BACK_SECONDS = Fraction(1)
"""A pts that lies further back than that belongs to another clock: the file was joined of two."""
_SAID = ("n_corrupt", "n_retimed", "n_interlaced")
_COUNTS = ("n_demuxed", *_SAID, "_n_skipped")
_UNKEPT = {
    Type.A53_CC: "closed captions", Type.DYNAMIC_HDR_PLUS: "HDR10+ metadata",
    Type.DOVI_METADATA: "Dolby Vision metadata", Type.DOVI_RPU_BUFFER: "Dolby Vision metadata",
    Type.DYNAMIC_HDR_VIVID: "HDR Vivid metadata", Type.STEREO3D: "what makes it stereoscopic",
    Type.SPHERICAL: "what makes it spherical",
}  # fmt: skip
# Codecs whose packets may hold a picture that is never shown.
_HIDDEN = {"vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg4", "vc1", "wmv3", "vvc"}


def irregular_before(
    counts: tuple[int, ...], relabelled: str = "", unkept: frozenset[str] = frozenset()
) -> Irregular:
    """What had been counted when a frame with these `counts` was decoded."""
    found = dict(zip(_COUNTS, counts, strict=False))
    n_corrupt, n_retimed, n_interlaced = (found.get(name, 0) for name in _SAID)
    return Irregular(n_corrupt, n_retimed, n_interlaced, relabelled, unkept)


class VideoSource:
    """One local video file. Opening it reads the first frame; `frames()` decodes from the start.

    `start_seconds` and `end_seconds` count from the file's own start; a frame is kept when
    `start <= pts < end`. Raises SourceError, always naming the file; at once for one that is
    truncated by its own account, unless an end was chosen.

    Interlaced frames are made whole (`auto`), left as they are (`off`) or raise SourceError. A
    picture of more than `max_pixels` is refused before it is decoded; `stall_seconds` bounds one
    read. With `hwaccel="auto"` the first device that decodes the first frame decodes all, else
    the processor. `progressed_at` is the time.monotonic() of the last packet or picture.

    After `frames()` is exhausted `n_demuxed` is the number of video packets read, `n_decoded` the
    frames yielded, `n_corrupt` the packets that were damaged or could not be decoded and
    `n_retimed` the frames whose pts was absent or did not increase. Packets and frames need not
    be equal in number: a field pair is two packets and one frame. `n_interlaced` frames were.
    `relabelled` says where the aspect ratio, matrix or range of the samples first changes.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        threads: int = 0,
        deinterlace: Literal["auto", "off", "error"] = "auto",
        hwaccel: Literal["none", "auto"] = "none",
        max_pixels: int = MAX_PIXELS,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self.path = Path(path)
        self.progressed_at = time.monotonic()
        self.abandoned = False
        """Set when a thread hangs in the decoder: nothing is closed then."""
        self._threads = threads
        self._deinterlace = deinterlace
        self._hwaccel: str | None = None
        self._max_pixels = max_pixels
        self._stall_seconds = stall_seconds
        self._container: Any = None
        self._unkept: set[str] = set()
        self._reset()
        if hwaccel == "auto":
            self._hwaccel = self._find_hardware()
        with self._open() as container:
            stream = pick_video_stream(container, self.path)
            self._duration = container.duration
            self.container_name = str(container.format.name)
            self.info = self._probe(container, stream)
            missing = missing_bytes(self.path, container, stream)
            base = file_start(container)
        self._start_pts = self._to_pts(base, start_seconds)
        self._end_pts = self._to_pts(base, end_seconds)
        self._check_trim(start_seconds, end_seconds)
        if missing and end_seconds is None:
            self._fail_truncated(f"{self.path.stat().st_size} bytes, {missing} too early")
        self._reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; an iterator in progress must not be used afterwards."""
        # Another thread that hangs in there would go on in freed memory.
        if self._container is not None and not self.abandoned:
            self._container.close()
            self._container = None

    def frames(self, after: Place | None = None) -> Iterator[Frame]:
        """Yield every frame in presentation order, index 0, 1, 2 …, pts strictly increasing.

        With `after` only those that follow that frame, the same to the bit, and none is no error;
        `n_decoded` counts as if all had been yielded.

        A duration is the time to the next frame: what containers say of it is in coded order.
        A pts that is absent becomes the packet's dts or the previous pts plus one frame; one that
        does not increase becomes the previous plus one tick. Both are counted in `n_retimed`.
        Raises SourceError when the file breaks off, changes its format, starts its clock over or
        yields no frame.
        """
        held: Frame | None = None
        try:
            stream, kept = self._open_at_start() if after is None else self._open_after(after)
            for frame in kept:
                if held is not None and held is not self._known:
                    yield replace(held, duration=frame.pts - held.pts)
                held = frame
            if held is None:
                raise SourceError(f"{self.path}: no frame in the chosen range; check start and end")
            if held is not self._known:
                yield replace(held, duration=self._last_duration(self._container, stream, held))
            if not self._ended_early:
                self._check_complete(self._container, stream, held)
                self._count_missing(stream)
        finally:
            self.close()

    @property
    def irregular(self) -> Irregular:
        """What has been found so far; before `frames`, of `unkept` what the first picture has."""
        return Irregular(
            self.n_corrupt, self.n_retimed, self.n_interlaced, self.relabelled,
            frozenset(self._unkept),
        )  # fmt: skip

    @property
    def range_pts(self) -> tuple[int | None, int | None]:
        """Where the chosen range starts and ends (exclusive); None where nothing was chosen."""
        return self._start_pts, self._end_pts

    def packets(self) -> Iterator[Any]:
        """Yield the stream's packets in coded order, whatever the chosen range; decodes nothing.

        Counts and checks as `frames` does. Raises SourceError when the file breaks off.
        """
        try:
            self._reopen()
            stream = pick_video_stream(self._container, self.path)
            last = Frame(0, 0, ())
            for packet in self._packets(self._container, stream):
                if not packet.size:
                    break
                last = replace(last, duration=packet.duration or 0)
                yield packet
            ends_later = self._end_pts is not None and self._end_seen > self._end_pts
            if not ends_later:
                self._check_complete(self._container, stream, last)
        finally:
            self.close()

    def _kept(self, container: Any, stream: Any, start_pts: int | None) -> Iterator[Frame]:
        """The frames inside the trim, each with the duration that the decoder claims."""
        last: Frame | None = None
        for picture, shown in self._whole(self._pictures(container, stream)):
            pts = self._pts_of(picture, last)
            if self._end_pts is not None and pts >= self._end_pts:
                self._ended_early = True
                return
            key = bool(picture.key_frame)
            last = Frame(self.n_decoded, pts, (), picture.duration or 0, key)
            if start_pts is None or pts >= start_pts:
                if picture.interlaced_frame:
                    self._note_interlaced()
                self.n_decoded += 1
                planes = planes_of(shown, self.info, self.path)
                yield replace(last, planes=planes, counts=tuple(vars(self)[n] for n in _COUNTS))

    def _whole(self, pictures: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """Each picture with what is shown of it."""
        name = self.info.pixel_format.name
        if self._deinterlace == "auto" and can_deinterlace(self.info):
            return deinterlaced(pictures, lambda picture: _as_planar(picture, name))
        return ((picture, picture) for picture in pictures)

    def _note_interlaced(self) -> None:
        self.n_interlaced += 1
        if self._deinterlace == "off" or (
            self._deinterlace == "auto" and can_deinterlace(self.info)
        ):
            return
        what = f"{self.info.width}x{self.info.height} {self.info.pixel_format.name}"
        why = f" and {what} cannot be deinterlaced" if self._deinterlace == "auto" else ""
        raise SourceError(
            f"{self.path}: frame {self.n_decoded} is interlaced{why}; --deinterlace off restores "
            "it as if it were not"
        )

    def _last_duration(self, container: Any, stream: Any, last: Frame) -> int:
        # mp4 knows no duration of a frame, only the time to the next packet in coded order.
        if "mp4" in container.format.name and stream.duration and not self._ended_early:
            left = int((stream.start_time or 0) + stream.duration) - last.pts
            if left > 0:
                return left
        return last.duration

    def _reset(self) -> None:
        self.n_demuxed = self.n_decoded = self.n_corrupt = self.n_retimed = self.n_interlaced = 0
        self._last_packet_corrupt = self._ended_early = False
        self._labels: dict[str, Any] = {}
        self.relabelled = ""
        self._end_seen = 0
        self._n_skipped = 0  # by an edit list: decoded, never shown
        self._n_empty = 0
        self._known: Frame | None = None
        self._avi_times: deque[int] = deque()

    def _probe(self, container: Any, stream: Any) -> StreamInfo:
        picture = next(self._pictures(container, stream), None)
        if picture is None:
            raise SourceError(f"{self.path}: not one frame could be decoded; is the file complete?")
        self._format = (picture.width, picture.height, picture.format.name)
        return read_stream_info(container, stream, picture, self.path)

    def _to_pts(self, base: Fraction, seconds: float | None) -> int | None:
        if seconds is None:
            return None
        # 1.2 as a float is a little less than 1.2: whole microseconds say what was meant.
        exact = base + Fraction(round(seconds * av.time_base), av.time_base)
        return math.ceil(exact / self.info.time_base)

    def _check_trim(self, start: float | None, end: float | None) -> None:
        if (start or 0) < 0 or (end is not None and end <= (start or 0)):
            raise SourceError(
                f"{self.path}: start {start} and end {end} enclose nothing; swap them"
            )
        if start and self._duration and start * av.time_base >= self._duration:
            seconds = self._duration / av.time_base
            raise SourceError(
                f"{self.path}: start {start} s is beyond the end at {seconds:.3f} s; choose less"
            )

    def _open_at_start(self) -> tuple[Any, Iterator[Frame]]:
        """The stream, and the frames inside the trim."""
        stream = next(self._openings(self._start_pts))
        return stream, self._kept(self._container, stream, self._start_pts)

    def _open_after(self, place: Place) -> tuple[Any, Iterator[Frame]]:
        """Likewise from the frame at `place`, which becomes `_known`.

        What a seek gives is not trusted: leading pictures of an open GOP, gradual refresh and
        missing times all change what is decoded. The frame must come out as it did, else
        decoding starts further back and at last where it started the first time.
        """
        as_before = islice(self._openings(self._start_pts), 1)
        for stream in chain(self._openings(place.pts), as_before):
            kept = self._kept(self._container, stream, place.pts)
            with contextlib.suppress(SourceError):
                frame = next(kept, None)
                if frame is not None and (frame.pts, hash_of(frame)) == (place.pts, place.planes):
                    self._known = replace(frame, index=place.index)
                    self.n_decoded = place.index + 1
                    # What was counted since the seek had been counted before the interruption.
                    vars(self).update(zip(_COUNTS, place.counts, strict=False))
                    return stream, chain([self._known], kept)
        raise SourceError(
            f"{self.path}: frame {place.index} is not decoded as it was before the interruption; "
            "start over with --no-resume"
        )

    def _openings(self, pts: int | None) -> Iterator[Any]:
        """Open the file at a keyframe before `pts`, then at earlier ones, at last at its start."""
        for seconds in SEEK_BACK_SECONDS:
            # In AVI frames are told by their number in the file: see _pts_of.
            if pts is None or self.container_name == "avi":
                break
            self._reopen()
            stream = pick_video_stream(self._container, self.path)
            target = pts - math.ceil(seconds / self.info.time_base)
            if _lands_before(self._container, stream, target, pts):
                self._container.seek(target, stream=stream)
                yield stream
        self._reopen()
        yield pick_video_stream(self._container, self.path)

    def _reopen(self) -> None:
        self.close()
        self._reset()
        self._container = self._open()

    def _open(self, hwaccel: str | None = None) -> Any:
        device = hwaccel or self._hwaccel
        return open_container(self.path, self._stall_seconds, self._max_pixels, device)

    def _find_hardware(self) -> str | None:
        """The first device that decodes the first frame, or None: most machines have none."""
        for device in av.codec.hwaccel.hwdevices_available():
            # Where there is no such device, PyAV raises what FFmpeg does (EPERM for CUDA), even if
            # software fallback is allowed.
            errors = (av.FFmpegError, SourceError, RuntimeError, ValueError)
            with contextlib.suppress(*errors), self._open(device) as container:
                stream = pick_video_stream(container, self.path)
                if next(self._pictures(container, stream), None) is not None:
                    return str(device)
        return None

    def _pictures(self, container: Any, stream: Any) -> Iterator[Any]:
        """Every decodable picture of the stream, the decoder drained at the end."""
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = self._threads
        consecutive = 0
        for packet in self._packets(container, stream):
            try:
                pictures = stream.codec_context.decode(packet if packet.size else None)
            except av.EOFError:
                break
            except av.FFmpegError as error:
                self.n_corrupt += not packet.is_corrupt  # those are counted already
                if self._avi_times:
                    self._avi_times.popleft()
                consecutive += 1
                if consecutive > MAX_CONSECUTIVE_DECODE_ERRORS:
                    raise SourceError(
                        f"{self.path}: {consecutive} packets in a row cannot be decoded at frame "
                        f"{self.n_decoded} ({cause_of(error)}); repair the file or trim before it"
                    ) from error
                continue
            consecutive = 0
            for picture in pictures:
                self.progressed_at = time.monotonic()
                self._check_format(picture)
                self._note_labels(picture, stream.codec_context.sample_aspect_ratio)
                self._unkept.update(
                    _UNKEPT[data.type] for data in picture.side_data if data.type in _UNKEPT
                )
                yield picture

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """The stream's packets, then empty ones until the decoder is drained."""
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    self._n_empty += packet.dts is not None  # a gap; the last one ends the stream
                    continue
                self.n_demuxed += 1
                self.progressed_at = time.monotonic()
                if container.format.name == "avi" and packet.dts is not None:
                    self._avi_times.append(packet.dts)
                    # FFmpeg passes over an empty chunk, which stands for the frame before it.
                    self._n_empty = packet.dts + 1 - self.n_demuxed
                self._last_packet_corrupt = packet.is_corrupt
                self.n_corrupt += packet.is_corrupt
                self._n_skipped += packet.is_discard
                if packet.pts is not None:
                    self._end_seen = max(self._end_seen, packet.pts + (packet.duration or 0))
                yield packet
        except av.FFmpegError as error:
            raise SourceError(
                f"{self.path}: reading stops after {self.n_demuxed} packets ({cause_of(error)}); "
                "the file is damaged or truncated, get a complete copy"
            ) from error
        # A decoder that fails while it drains still holds pictures: ask again, until its EOFError.
        while True:
            yield av.Packet()

    def _check_format(self, picture: Any) -> None:
        if not hasattr(self, "_format"):
            return
        now = (picture.width, picture.height, picture.format.name)
        if now != self._format:
            was = "{}x{} {}".format(*self._format)
            raise SourceError(
                f"{self.path}: frame {self.n_decoded} is {now[0]}x{now[1]} {now[2]}, the frames "
                f"before it {was}; cut the file there and restore the parts"
            )

    def _note_labels(self, picture: Any, aspect: Fraction | None) -> None:
        """Remember where what an output says once for all of its frames first changes."""
        now = {
            "sample aspect ratio": aspect, "matrix": int(picture.colorspace),
            "range": int(picture.color_range),
        }  # fmt: skip
        before, self._labels = self._labels or now, now
        if now != before and not self.relabelled:
            names = [name for name in now if now[name] != before[name]]
            changes = ", ".join(f"{name} {before[name]} to {now[name]}" for name in names)
            self.relabelled = f"{changes} near frame {self.n_decoded}"

    def _pts_of(self, picture: Any, last: Frame | None) -> int:
        # AVI stores no pts and FFmpeg's guess is wrong for B-frames. A packet is a frame there, so
        # the n-th picture shown belongs to the n-th packet's place in the file.
        pts: int | None = self._avi_times.popleft() if self._avi_times else picture.pts
        if pts is not None and (last is None or pts > last.pts):
            return pts
        self.n_retimed += 1
        if last is None:
            return int(picture.dts or 0)
        if pts is not None and last.pts - pts > MAX_STEP_BACK_SECONDS / self.info.time_base:
            back = float((last.pts - pts) * self.info.time_base)
            raise SourceError(
                f"{self.path}: frame {self.n_decoded} is {back:.3f} s before the one before it, "
                "where another recording begins; cut the file there and restore the parts"
            )
        if pts is None:
            pts = picture.dts if picture.dts is not None else last.pts + self._interval(last)
        return max(pts, last.pts + 1)

    def _interval(self, last: Frame) -> int:
        if last.duration or not self.info.frame_rate:
            return max(last.duration, 1)
        return max(round(1 / self.info.frame_rate / self.info.time_base), 1)

    def _check_complete(self, container: Any, stream: Any, last: Frame) -> None:
        expected = declared_packets(container, stream)
        if self._start_pts is None and self._known is None and expected:
            # The index of an mp4 is exact; other containers merely hint.
            exact = "mp4" in container.format.name
            missing = expected - self.n_demuxed - self._n_empty
            if missing > (0 if exact else 2 + expected // 20):
                self._fail_truncated(f"{expected - missing} of {expected} frames")
        if "mp4" in container.format.name and self._last_packet_corrupt:
            self._fail_truncated(f"frame {self.n_decoded}, the last one is incomplete")
        end = declared_end(stream)
        if end is None:
            return
        if self._end_pts is not None:
            end = min(end, self._end_pts * self.info.time_base)
        # The muxer took the same maximum over the packets, be their durations right or wrong.
        missing_seconds = end - self._end_seen * self.info.time_base
        interval = self._interval(last) * self.info.time_base
        if missing_seconds > max(MIN_MISSING_SECONDS, 2 * interval):
            self._fail_truncated(f"{self.n_decoded} frames, {float(missing_seconds):.1f} s early")

    def _count_missing(self, stream: Any) -> None:
        """Add to `n_corrupt` the packets that gave no picture and no error either.

        A decoder with frame threads that fails while it drains: PyAV gives the pictures before the
        error without it, and what FFmpeg still holds is out of reach after that.
        """
        # In AVI every packet is a frame, and what a hidden one does not show is missing.
        hidden = stream.codec_context.name in _HIDDEN and self.container_name != "avi"
        one_each = not hidden and not self.n_interlaced
        if one_each and self._start_pts is None:
            given = self.n_corrupt + self.n_decoded + self._n_skipped
            self.n_corrupt += max(self.n_demuxed - given, 0)

    def _fail_truncated(self, after: str) -> None:
        raise SourceError(
            f"{self.path}: ends after {after}; the file is truncated, get a complete copy"
        )


def _lands_before(container: Any, stream: Any, target: int, start_pts: int) -> bool:
    """Whether seeking to `target` gives a keyframe that is shown at or before `start_pts`.

    mp4 seeks by dts: a keyframe with dts <= target may be shown later than the target.
    """
    try:
        container.seek(target, stream=stream)
        packet = next((p for p in container.demux(stream) if p.size), None)
    except av.FFmpegError:
        return False
    if packet is None or packet.pts is None:
        return False
    return bool(packet.is_keyframe and packet.pts <= start_pts)


def planes_of(picture: Any, info: StreamInfo, source: object) -> tuple[Plane, ...]:
    """Read-only copies of a decoded picture's planes, as `info` has them; `source` for messages."""
    picture = _as_planar(picture, info.pixel_format.name)
    shapes = info.pixel_format.plane_shapes(info.width, info.height)
    planes = zip(picture.planes, shapes, strict=True)
    return tuple(_copy_plane(p, s, info.pixel_format.dtype, source) for p, s in planes)


def _as_planar(picture: Any, name: str) -> Any:
    if picture.format.name.replace("yuvj", "yuv") == name:
        return picture
    if picture.format.name == "pal8":
        # Straight to gbrp swscale would go through YUV; the palette look-up is exact.
        picture = picture.reformat(format="rgb24")
    return picture.reformat(format=name)


def _copy_plane(plane: Any, shape: tuple[int, int], dtype: type[Any], source: object) -> Plane:
    if plane.line_size < 0:
        raise SourceError(f"{source}: raw video stored bottom-up; convert it with FFmpeg first")
    height, width = shape
    size = np.dtype(dtype).itemsize
    rows = np.frombuffer(plane, np.uint8)[: height * plane.line_size]
    padded = rows.reshape(height, plane.line_size)[:, : width * size]
    copy = padded.copy().view(np.dtype(dtype).newbyteorder("<"))
    copy.flags.writeable = False
    return copy
