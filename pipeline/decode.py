"""Owns one video file as a source of Frames: opening, trim, seeks, and whether it was all there.

Every av rational becomes a Fraction here; every pts stays an integer in the stream's time_base.
"""

import contextlib
import math
from collections.abc import Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import av

from pipeline.completeness import exact, file_start, missing_bytes, whole_until
from pipeline.demux import FilePackets, truncated
from pipeline.errors import SourceError
from pipeline.frame_decoder import (
    Coded,
    Deinterlace,
    FrameDecoder,
    PictureDecoder,
    coded_of,
    interval,
    labels_of,
    timed,
)
from pipeline.frames import Frame, StreamInfo
from pipeline.irregular import Progress, Tally
from pipeline.opening import MAX_PIXELS, STALL_SECONDS, open_container
from pipeline.probe import read_stream_info
from pipeline.segments import Place, hash_of

HwAccel = Literal["none", "auto"]

SEEK_BACK_SECONDS = (1, 10, 60)
"""How far before a trim start a keyframe is looked for; then decoding starts at the beginning."""


class VideoSource:
    """One local video file. Opening it reads the first frame; `frames()` decodes from the start.

    `start_seconds` and `end_seconds` count from the file's own start; a frame is kept when
    `start <= pts < end`. Raises SourceError, always naming the file; at once for one that is
    truncated by its own account, unless an end was chosen.

    Interlaced frames are made whole (`auto`), left as they are (`off`) or raise SourceError. A
    picture of more than `max_pixels` is refused before it is decoded; `stall_seconds` bounds one
    read. With `hwaccel="auto"` the first device that decodes the first frame decodes all, else
    the processor.

    `tally` counts what `frames()` or `packets()` reads, from 0 each time; before that it has what
    the first picture carries. Packets and frames need not be equal in number: a field pair is two
    packets and one frame. `coded` is what each of the decoder's pictures must be.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        threads: int = 0,
        deinterlace: Deinterlace = "auto",
        hwaccel: HwAccel = "none",
        max_pixels: int = MAX_PIXELS,
        stall_seconds: float = STALL_SECONDS,
        progress: Progress | None = None,
    ) -> None:
        self.path = Path(path)
        self.tally = Tally(progress=progress or Progress())
        self.abandoned = False
        """Set when a thread hangs in the decoder: nothing is closed then."""
        self._threads = threads
        self._deinterlace = deinterlace
        self._hwaccel: str | None = None
        self._max_pixels = max_pixels
        self._stall_seconds = stall_seconds
        self._container: Any = None
        self._packets: Any = None
        self._decoder: Any = None
        self._known: Frame | None = None
        self._start_pts: int | None = None
        self._end_pts: int | None = None
        if hwaccel == "auto":
            self._hwaccel = self._find_hardware()
        with self._open() as container:
            packets = FilePackets(self.path, container, self.tally)
            self._duration = container.duration
            self.container_name = packets.container_name
            self.info, self.coded = self._probe(packets)
            missing = missing_bytes(self.path, container)
            in_index = missing and "mp4" in self.container_name
            there = whole_until(self.path, container) if in_index else None
            base = file_start(container)
        self._count_anew()
        self._start_pts = self._to_pts(base, start_seconds)
        self._end_pts = self._to_pts(base, end_seconds)
        self._check_trim(start_seconds, end_seconds)
        if missing:
            after = f"{self.path.stat().st_size} bytes, {missing} too early"
            self._check_whole(after, there, end_seconds)
        # In AVI frames are told by their number in the file: it would be decoded from its start.
        if self._start_pts is not None and self.container_name != "avi":
            self._look_at_start(self._start_pts)

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
            # With the container goes the decoder: its threads, and tens of megabytes of pictures.
            self._container = self._packets = self._decoder = None

    def frames(self, after: Place | None = None) -> Iterator[Frame]:
        """Yield every frame in presentation order, index 0, 1, 2 …, pts strictly increasing.

        With `after` only those that follow that frame, the same to the bit, and none is no error;
        the tally counts as if all had been yielded.

        A duration is the time to the next frame: what containers say of it is in coded order.
        A pts that is absent becomes the packet's dts or the previous pts plus one frame; one that
        does not increase becomes the previous plus one tick. Both are counted in `n_retimed`.
        Raises SourceError when the file breaks off, changes its format, starts its clock over or
        yields no frame.
        """
        try:
            kept = self._open_at_start() if after is None else self._open_after(after)
            last = yield from timed(kept, self._known, self._last_duration)
            if last is None:
                raise SourceError(f"{self.path}: no frame in the chosen range; check start and end")
            if not self._decoder.ended_early:
                self._check_complete(last)
                if self._start_pts is None and not self._packets.has_reached(self._end_pts):
                    self._packets.count_missing()
        finally:
            self.close()

    @property
    def range_pts(self) -> tuple[int | None, int | None]:
        """Where the chosen range starts and ends (exclusive); None where nothing was chosen."""
        return self._start_pts, self._end_pts

    def packets(self) -> Generator[Any]:
        """Yield the stream's packets in coded order, whatever the chosen range; decodes nothing.

        Counts and checks as `frames` does. Raises SourceError when the file breaks off.
        """
        try:
            self._reopen()
            last = Frame(0, 0, ())
            for packet in self._packets:
                if not packet.size:
                    break
                last = replace(last, duration=packet.duration or 0)
                yield packet
            if self._end_pts is None or self._packets.end_seen <= self._end_pts:
                self._check_complete(last)
        finally:
            self.close()

    def _check_whole(self, after: str, there: Fraction | None, end_seconds: float | None) -> None:
        """For a file that lacks bytes: raises SourceError where it lacks what was asked for.

        `there` are its seconds, where that is known; else it is read through, decoding nothing.
        """
        if there is not None:
            if end_seconds is None or exact(end_seconds) > there:
                raise truncated(self.path, after, there)
            return
        with contextlib.closing(self.packets()) as packets:
            for _ in packets:
                read = self._packets
                if read.has_reached(self._end_pts):
                    break
            else:
                # An AVI's header may be wrong: its frames have been counted.
                if self.container_name != "avi":
                    raise read.truncated(after)
        self._count_anew()

    def _look_at_start(self, start_pts: int) -> None:
        """Take size, format and tags from where the range starts, if they have changed by then."""
        next(self._openings(start_pts))
        context = self._packets.stream.codec_context
        for picture in self._pictures(self._packets, None).pictures():
            if picture.pts is None or picture.pts >= start_pts:
                labels = labels_of(picture, context)
                if (coded_of(picture), labels) != (self.coded, self._labels):
                    stream = self._packets.stream
                    info = read_stream_info(self._container, stream, picture, self.path)
                    sar = labels["sample aspect ratio"]
                    if sar != self._labels["sample aspect ratio"]:  # else it may be the container's
                        info = replace(info, sample_aspect_ratio=Fraction(sar or 0) or None)
                    self.info = replace(info, start_pts=self.info.start_pts)
                    self.coded = coded_of(picture)
                break
        self.close()
        self._count_anew()

    def _check_complete(self, last: Frame) -> None:
        seconds = interval(last, self.info) * self.info.time_base
        from_start = self._start_pts is None and self._known is None
        self._packets.check_complete(seconds, self._end_pts, from_start=from_start)

    def _last_duration(self, last: Frame) -> int:
        # mp4 knows no duration of a frame, only the time to the next packet in coded order.
        stream = self._packets.stream
        if "mp4" in self.container_name and stream.duration and not self._decoder.ended_early:
            left = int((stream.start_time or 0) + stream.duration) - last.pts
            if left > 0:
                return left
        return last.duration

    def _probe(self, packets: FilePackets) -> tuple[StreamInfo, Coded]:
        picture = next(self._pictures(packets, None).pictures(), None)
        if picture is None:
            raise SourceError(f"{self.path}: not one frame could be decoded; is the file complete?")
        info = read_stream_info(packets.container, packets.stream, picture, self.path)
        self._labels = labels_of(picture, packets.stream.codec_context)
        return info, coded_of(picture)

    def _to_pts(self, base: Fraction, seconds: float | None) -> int | None:
        if seconds is None:
            return None
        return math.ceil((base + exact(seconds)) / self.info.time_base)

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

    def _pictures(self, packets: FilePackets, coded: Coded | None) -> PictureDecoder:
        context = packets.stream.codec_context
        packets.stream.thread_type = "AUTO"
        context.thread_count = self._threads
        chosen = (None, None) if self.container_name == "avi" else self.range_pts
        return PictureDecoder(
            self.path, packets, context, packets.tally, coded, packets.shown_at, chosen
        )

    def _kept(self, start_pts: int | None) -> Iterator[Frame]:
        """The frames from `start_pts` to the chosen end, from where the file is open at."""
        pictures = self._pictures(self._packets, self.coded)
        self._decoder = decoder = FrameDecoder(pictures, self.info, self._deinterlace)
        return decoder.frames(start_pts, self._end_pts)

    def _open_at_start(self) -> Iterator[Frame]:
        """The frames inside the trim."""
        next(self._openings(self._start_pts))
        return self._kept(self._start_pts)

    def _open_after(self, place: Place) -> Iterator[Frame]:
        """Likewise from the frame at `place`, which becomes `_known`.

        What a seek gives is not trusted: leading pictures of an open GOP, gradual refresh and
        missing times all change what is decoded. The frame must come out as it did, else
        decoding starts further back and at last where it started the first time.
        """
        as_before = islice(self._openings(self._start_pts), 1)
        for _ in chain(self._openings(place.pts), as_before):
            kept = self._kept(place.pts)
            with contextlib.suppress(SourceError):
                frame = next(kept, None)
                if frame is not None and (frame.pts, hash_of(frame)) == (place.pts, place.planes):
                    self._known = replace(frame, index=place.index)
                    self.tally.n_decoded = place.index + 1
                    # What was counted since the seek had been counted before the interruption.
                    self.tally.counts = place.counts
                    return chain([self._known], kept)
        raise SourceError(
            f"{self.path}: frame {place.index} is not decoded as it was before the interruption; "
            "start over with --no-resume"
        )

    def _openings(self, pts: int | None) -> Iterator[None]:
        """Open the file at a keyframe before `pts`, then at earlier ones, at last at its start."""
        for seconds in SEEK_BACK_SECONDS:
            # In AVI frames are told by their number in the file: see FilePackets.
            if pts is None or self.container_name == "avi":
                break
            self._reopen()
            stream = self._packets.stream
            target = pts - math.ceil(seconds / self.info.time_base)
            if _lands_before(self._container, stream, target, pts):
                self._container.seek(target, stream=stream)
                yield
        self._reopen()
        yield

    def _reopen(self) -> None:
        self.close()
        self._count_anew()
        self._container = self._open()
        self._packets = FilePackets(self.path, self._container, self.tally, self._end_pts)

    def _count_anew(self) -> None:
        self._known = None
        # What the first picture carries is known, though decoding may begin after it.
        self.tally = Tally(unkept=self.tally.unkept, progress=self.tally.progress)

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
                packets = FilePackets(self.path, container, Tally())
                if next(self._pictures(packets, None).pictures(), None) is not None:
                    return str(device)
        return None


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
