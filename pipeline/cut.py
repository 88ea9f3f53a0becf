"""Owns how a file is cut for workers that do not see it: which packets a segment's decoder needs.

The segments are those that a local job makes (segments.plan), found by the packets' times alone.
Whoever decodes a part checks that: the frames must be as many and at the times that were planned,
and the frame before the first one must come out as the segment before had it. Where packets do not
tell enough, or told wrong, the whole file is one part. Knows no model, no output and no Ray.
"""

import contextlib
import math
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av

from pipeline.decode import SEEK_BACK_SECONDS, VideoSource
from pipeline.errors import IntegrityError, SourceError
from pipeline.frame_decoder import (
    Coded,
    Deinterlace,
    FormatChanged,
    FrameDecoder,
    PictureDecoder,
    timed,
)
from pipeline.frames import Frame, StreamInfo
from pipeline.irregular import Tally
from pipeline.opening import every_packet, open_container, pick_video_stream
from pipeline.segments import Segment, hash_of, plan

MAX_WHOLE_BYTES = 2 << 30
"""A file that cannot be cut is held in memory by the driver, the object store and its worker."""

MAX_TIMES_SENT = 4
"""Every part begins with a keyframe: with few of them all parts together are many times the file,
which is then rather one part."""

# What changes how later packets decode, and does not stand in the packets themselves.
_SIDE_DATA = ("new_extradata", "palette", "param_change")


class NotCut(IntegrityError):  # noqa: N818 - the whole file is tried next
    """A part does not decode as it was planned: the file has to be restored as one part."""


@dataclass(frozen=True, slots=True)
class Span:
    """One segment as planned, and which of the stream's packets its decoder needs."""

    index: int
    first_frame: int
    n_frames: int
    start_pts: int
    next_pts: int | None
    """The first pts of the next segment; None for the last one."""
    before_pts: int | None
    """The last pts of the segment before; None for the first one."""
    first_packet: tuple[int | None, int]
    """(dts, pts) of the first packet in coded order: where to seek, and what it is known by."""
    n_packets: int


class _Time(NamedTuple):
    pts: int
    dts: int | None
    """None where the container does not say, as Matroska at the start."""
    is_keyframe: bool


class CutPacket(NamedTuple):
    """A compressed picture as the demuxer gave it; times in the stream's time_base."""

    pts: int
    dts: int | None
    duration: int
    is_keyframe: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a container tells a decoder before the first packet."""

    name: str
    tag: str
    extradata: bytes | None
    width: int
    height: int
    pix_fmt: str | None
    bits_per_coded_sample: int
    color_range: int
    """H.264 without VUI makes its pixel format of this one and the next."""
    colorspace: int

    @classmethod
    def of(cls, stream: Any) -> "Decoder":
        """That of a demuxed stream."""
        context = stream.codec_context
        return cls(
            context.codec.name, context.codec_tag, context.extradata, context.width,
            context.height, context.pix_fmt, context.bits_per_coded_sample,
            int(context.color_range), int(context.colorspace),
        )  # fmt: skip

    def open(self) -> Any:
        """A decoder as the demuxer would have made it."""
        context: Any = av.CodecContext.create(self.name, "r")
        context.codec_tag, context.extradata = self.tag, self.extradata
        context.width, context.height = self.width, self.height
        context.bits_per_coded_sample = self.bits_per_coded_sample
        context.color_range, context.colorspace = self.color_range, self.colorspace
        if self.pix_fmt is not None:
            context.pix_fmt = self.pix_fmt
        return context


@dataclass(frozen=True, slots=True)
class Cut:
    """One segment's packets, with those before it that its first frame depends on."""

    span: Span
    info: StreamInfo
    coded: Coded
    """What each of the decoder's pictures must be."""
    decoder: Decoder
    packets: tuple[CutPacket, ...]
    stop_pts: int | None
    """Where the chosen range ends, or None."""
    end_pts: int | None
    """Where the container says that the last frame ends, or None."""


@dataclass(frozen=True, slots=True)
class WholeFile:
    """A file that cannot be cut."""

    n_packets: int
    data: bytes


class CutPlan:
    """The segments of a file, and the packets of each when they are wanted.

    `spans` is empty where the packets' times do not tell the segments. Raises SourceError where
    the file breaks off.
    """

    def __init__(self, source: VideoSource, length: int) -> None:
        self.path = source.path
        self._info, self._coded = source.info, source.coded
        self._start_pts, self._stop_pts = source.range_pts
        times = _read_times(source)
        self.n_packets = source.tally.n_demuxed
        self.spans = tuple(self._spans(times, length)) if times else ()
        n_sent = sum(span.n_packets for span in self.spans)
        if n_sent > MAX_TIMES_SENT * self.n_packets and self._size() <= MAX_WHOLE_BYTES:
            self.spans = ()
        self._ends_early = self._stop_pts is not None and any(
            time.pts >= self._stop_pts for time in times
        )

    def cuts(self, spans: Iterable[Span]) -> Generator[Cut]:
        """Read the packets of segments, each when it is asked for; the file stays open meanwhile.

        Raises SourceError where it has changed.
        """
        with open_container(self.path) as container:
            stream = pick_video_stream(container, self.path)
            decoder, end_pts = Decoder.of(stream), None
            # As VideoSource: mp4 knows no duration of a frame.
            if "mp4" in container.format.name and stream.duration and not self._ends_early:
                end_pts = int((stream.start_time or 0) + stream.duration)
            for span in spans:
                dts, pts = span.first_packet
                with contextlib.suppress(av.FFmpegError):
                    container.seek(pts if dts is None else dts, stream=stream)
                packets = tuple(_read(container, stream, span))
                if len(packets) < span.n_packets:  # the seek went too far, or nowhere
                    packets = self._from_the_start(span)
                yield Cut(span, self._info, self._coded, decoder, packets, self._stop_pts, end_pts)

    def _from_the_start(self, span: Span) -> tuple[CutPacket, ...]:
        with open_container(self.path) as container:
            packets = tuple(_read(container, pick_video_stream(container, self.path), span))
        if len(packets) < span.n_packets:
            raise SourceError(f"{self.path}: has changed since it was planned; run again")
        return packets

    def whole(self) -> WholeFile:
        """The file itself. Raises SourceError for one that is too large to be sent."""
        size = self._size()
        if size > MAX_WHOLE_BYTES:
            raise SourceError(
                f"{self.path}: cannot be cut into segments, and {size / 2**30:.1f} GiB are too "
                "much to send at once; restore it with restore-video"
            )
        return WholeFile(self.n_packets, self.path.read_bytes())

    def _size(self) -> int:
        return self.path.stat().st_size

    def _spans(self, times: list[_Time], length: int) -> Iterator[Span]:
        start, stop = self._start_pts, self._stop_pts
        shown = sorted(
            (time.pts, time.is_keyframe)
            for time in times
            if (start is None or time.pts >= start) and (stop is None or time.pts < stop)
        )
        keys = sorted((time.pts, at) for at, time in enumerate(times) if time.is_keyframe)
        # The lowest pts from each packet on: where it passes a time, all before is decoded.
        lowest = list(accumulate((time.pts for time in reversed(times)), min))[::-1]
        frames = (Frame(i, pts, (), 0, key) for i, (pts, key) in enumerate(shown))
        first = 0
        for index, last in enumerate(f for f in plan(frames, length) if f.ends_segment):
            following = last.index + 1
            next_pts = shown[following][0] if following < len(shown) else None
            before_pts = shown[first - 1][0] if first else self._trim_reach()
            at = bisect_right(keys, (before_pts, len(times))) - 1 if before_pts is not None else 0
            begin = keys[at][1] if at > 0 else 0
            end = bisect_right(lowest, last.pts if next_pts is None else next_pts)
            yield Span(
                index, first, following - first, shown[first][0], next_pts,
                before_pts if first else None, (times[begin].dts, times[begin].pts), end - begin,
            )  # fmt: skip
            first = following

    def _trim_reach(self) -> int | None:
        """How far back of a chosen start decoding begins: as VideoSource, and unchecked as there"""
        if self._start_pts is None:
            return None
        return self._start_pts - math.ceil(SEEK_BACK_SECONDS[0] / self._info.time_base)


class CutVideo:
    """The frames of one Cut, with the indices, times and durations that they have in the file.

    `tally` counts what `frames` decodes. `path` is for messages.
    """

    def __init__(
        self, cut: Cut, path: Path, threads: int = 0, deinterlace: Deinterlace = "auto"
    ) -> None:
        self.tally = Tally(n_decoded=cut.span.first_frame - (cut.span.before_pts is not None))
        self.before = ""
        """The hash of the frame before the first one, once `frames` has begun."""
        self._cut, self._path = cut, path
        context = cut.decoder.open()
        context.thread_count = threads
        pictures = PictureDecoder(path, _again(cut), context, self.tally, cut.coded)
        self._decoder = FrameDecoder(pictures, cut.info, deinterlace)

    def frames(self) -> Iterator[Frame]:
        """Yield the frames, once. Raises NotCut where they are not those that were planned, and
        SourceError where they cannot be decoded."""
        try:
            yield from self._frames()
        except FormatChanged as error:  # as a whole the file tells where, if it is so there
            raise NotCut(str(error)) from error

    def _frames(self) -> Iterator[Frame]:
        span, stop_pts = self._cut.span, self._cut.stop_pts
        known: Frame | None = None
        if span.before_pts is None:
            kept = self._decoder.frames(span.start_pts, stop_pts)
        else:
            kept = self._decoder.frames(span.before_pts, stop_pts)
            known = self._begin_after(next(kept, None))
            kept = chain([known], kept)
        last = yield from timed(kept, known, self._last_duration)
        if last is known:
            raise NotCut(f"{self._path}: no frame of segment {span.index} is decoded")

    def _begin_after(self, before: Frame | None) -> Frame:
        """The frame before the first one, if it is that. Raises NotCut."""
        span = self._cut.span
        if before is None or before.pts != span.before_pts:
            raise NotCut(f"{self._path}: no frame at {span.before_pts} before segment {span.index}")
        self.before = hash_of(before)
        self.tally.n_retimed = self.tally.n_interlaced = 0  # those before belong to another part
        return before

    def _last_duration(self, last: Frame) -> int:
        end_pts = self._cut.end_pts
        return end_pts - last.pts if end_pts is not None and end_pts > last.pts else last.duration

    def checked(self, segment: Segment) -> Segment:
        """The restored segment as it is in the whole; raises NotCut unless it is as planned."""
        span = self._cut.span
        found = (segment.start_pts, segment.n_frames)
        if found != (span.start_pts, span.n_frames) or (
            span.next_pts is not None and segment.end_pts != span.next_pts
        ):
            raise NotCut(
                f"{self._path}: segment {span.index} was planned as {span.n_frames} frames from "
                f"{span.start_pts} to {span.next_pts} and has {segment.n_frames} from "
                f"{segment.start_pts} to {segment.end_pts}"
            )
        return replace(segment, index=span.index, before=self.before)


def _again(cut: Cut) -> Iterator[Any]:
    """Its packets as a demuxer gives them, then empty ones that drain a decoder."""
    for pts, dts, duration, is_keyframe, data in cut.packets:
        packet = av.Packet(data)
        packet.time_base = cut.info.time_base
        packet.pts, packet.dts, packet.duration = pts, dts, duration
        packet.is_keyframe = is_keyframe
        yield packet
    while True:
        yield av.Packet()


def check_joints(path: Path, segments: Sequence[Segment]) -> None:
    """Raises NotCut unless each segment was decoded from where the one before it really ended."""
    for earlier, later in pairwise(segments):
        if later.before and later.before != earlier.last_planes:
            raise NotCut(
                f"{path}: frames of segment {later.index} do not decode without those before"
            )


def _read_times(source: VideoSource) -> list[_Time]:
    """Of every packet; empty where they do not tell which frames there will be, and when."""
    times = []
    usable = True
    for packet in source.packets():
        usable = usable and not (
            packet.pts is None or packet.is_corrupt or packet.is_discard
            or any(packet.has_sidedata(kind) for kind in _SIDE_DATA)
        )  # fmt: skip
        if usable:
            times.append(_Time(packet.pts, packet.dts, bool(packet.is_keyframe)))
    # AVI holds no pts: what its packets have is made of their order and wrong for B-frames.
    distinct = {time.pts for time in times}
    told = usable and source.container_name != "avi" and len(distinct) == len(times)
    return times if told else []


def _read(container: Any, stream: Any, span: Span) -> Iterator[CutPacket]:
    n_left = span.n_packets
    for packet in every_packet(container, stream):
        if n_left == span.n_packets and packet.pts != span.first_packet[1]:
            continue
        if not packet.size or n_left == 0:
            return
        n_left -= 1
        yield CutPacket(
            packet.pts, packet.dts, packet.duration or 0, bool(packet.is_keyframe), bytes(packet)
        )
