"""Owns what is copied beside the restored video: streams, chapters, metadata. Knows no pixels.

It reads the source a second time, on its own, so that nothing has to be buffered between threads.
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.completeness import exact, file_start
from pipeline.containers import COVER, content_tags, has_no_rate, language_for, tag_options
from pipeline.errors import SinkError, SourceError
from pipeline.frames import StreamInfo
from pipeline.muxing import Muxing
from pipeline.opening import every_packet, is_cut_out, open_container, pick_video_stream
from pipeline.plan import StreamPlan, plan_streams
from pipeline.timecode import later, timecodes
from pipeline.transcode import AudioTranscoder, SubtitleTranscoder

logger = logging.getLogger(__name__)

SUBTITLE_REACH_SECONDS = 10
"""Subtitles that began so long before a trim start are still shown after it."""

_COVER_TYPES = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}


@dataclass(frozen=True, slots=True)
class Trim:
    """The part of the source that is kept, in seconds on the source's own clock."""

    start: Fraction | None
    end: Fraction | None
    origin: Fraction
    """What becomes 0 in the output."""

    @classmethod
    def of(
        cls, container: Any, start_seconds: float | None, end_seconds: float | None,
        first: Fraction,
    ) -> "Trim":  # fmt: skip
        """From seconds counted from the file's start; `first` is the time of its first frame.

        MPEG-TS that runs over the end of its clock has frames before 0. No file to be written can:
        mp4 would cut them off and Matroska shift them.
        """
        base = file_start(container)
        start = None if start_seconds is None else base + exact(start_seconds)
        end = None if end_seconds is None else base + exact(end_seconds)
        return cls(start, end, min(first, Fraction(0)) if start is None else start)

    def shift(self, time_base: Fraction) -> int:
        """Ticks of `time_base` that are taken off every timestamp."""
        return math.floor(self.origin / time_base)


class Passthrough:
    """The streams of `path` other than the restored one, on their way into `output`.

    `add_streams` decides everything before rendering: `plan` says what becomes of each stream, and
    `warnings` what is not kept as it is. Raises SinkError when all audio would be lost.
    """

    def __init__(
        self, path: Path, start_seconds: float | None = None, end_seconds: float | None = None,
        first: Fraction = Fraction(0),
    ) -> None:  # fmt: skip
        self.path = path
        self.plan: list[StreamPlan] = []
        self._container = open_container(path)
        if any(has_no_rate(stream) for stream in self._container.streams.audio):
            self._container.close()  # sound that begins late, or never
            self._container = open_container(path, thorough=True)
        self._video = pick_video_stream(self._container, path)
        self.trim = Trim.of(self._container, start_seconds, end_seconds, first)
        self._targets: dict[int, Any] = {}
        self._transcoders: dict[int, AudioTranscoder | SubtitleTranscoder] = {}
        self._last_data: dict[int, int] = {}
        self._latest = Fraction(0)
        """The time of the packets that came last, in seconds of the output."""
        self._packets: Iterator[Any] = iter(())
        self._next: Any = None

    def close(self) -> None:
        """Close the source."""
        self._packets = iter(())
        self._container.close()

    def muxer_options(self, format_name: str) -> dict[str, str]:
        """What a muxer of this format must be told for what is to be copied."""
        return tag_options(self._container, format_name)

    @property
    def sample_rates(self) -> list[int]:
        """Of all sound that can be decoded."""
        known = (s.codec_context for s in self._container.streams.audio)
        return [c.sample_rate for c in known if c is not None and c.sample_rate]

    @property
    def warnings(self) -> list[str]:
        """A line for everything that the output does not hold as the source does."""
        lines = [f"{plan.name} {plan.outcome}" for plan in self.plan if not plan.is_whole]
        if self.trim.origin < 0:
            seconds = float(-self.trim.origin)
            lines.append(f"the source starts {seconds:.3f} s before 0: all of it is moved there")
        return lines

    def add_streams(self, output: Any, video_out: Any, info: StreamInfo, encoding: str) -> None:
        """Give `output` the metadata, the chapters and every stream that it can hold.

        `encoding` says in the plan how the video is encoded.
        """
        output.metadata.update(content_tags(self._container.metadata))
        _describe(video_out, self._video, output)
        name = output.format.name
        self.plan = plan_streams(self._container, self._video, name, info, encoding)
        for plan in self.plan:
            if plan.index is not None and plan.index != self._video.index:
                self._add(plan, self._container.streams[plan.index], output)
        self._tag_timecode(output, video_out, info)
        if any(plan.kind == "chapters" and plan.fate == "copied" for plan in self.plan):
            self._copy_chapters(output)
        self._packets, self._muxing = self._demux(), Muxing(output)
        self._next = next(self._packets, None)

    def mux_until(self, seconds: Fraction | None) -> None:
        """Mux every packet due at or before `seconds`; all that remain when None."""
        while self._next is not None:
            packet, due = self._next
            if seconds is not None and due is not None and due > seconds:
                return
            self._muxing.mux(packet)
            self._next = next(self._packets, None)
        if seconds is None:
            for warning in self._muxing.warnings():
                logger.warning("%s: the output's %s", self.path, warning)

    def _add(self, plan: StreamPlan, stream: Any, output: Any) -> None:
        if plan.kind == "cover" and plan.fate == "copied" and output.format.name == "matroska":
            self._attach_cover(stream, output)
        elif plan.fate == "copied":
            target = output.add_stream_from_template(stream, opaque=True)
            _describe(target, stream, output)
            if stream.type != "attachment":
                self._targets[stream.index] = target
        elif plan.fate == "transcoded":
            self._transcoders[stream.index] = self._transcoder(plan, stream, output)
        elif plan.kind == "audio" and not has_no_rate(stream) and not self._keeps_sound():
            raise SinkError(
                f"{self.path}: its {plan.name} can be neither copied nor decoded for "
                f"{output.format.name}; choose an output name ending in .mkv"
            )

    def _keeps_sound(self) -> bool:
        """Whether there is a track that is kept; one beside it that nothing knows is then lost, as
        telephones add of spatial sound."""
        return any(plan.kind == "audio" and plan.fate != "lost" for plan in self.plan)

    def _transcoder(
        self, plan: StreamPlan, stream: Any, output: Any
    ) -> AudioTranscoder | SubtitleTranscoder:
        kind = AudioTranscoder if plan.kind == "audio" else SubtitleTranscoder
        try:
            transcoder = kind(stream, output, plan.target)
        except (av.FFmpegError, ValueError) as error:
            raise SinkError(
                f"{self.path}: its {plan.name} cannot be encoded to {plan.target} "
                f"({getattr(error, 'strerror', error)}); choose an output name ending in .mkv"
            ) from error
        _describe(transcoder.stream, stream, output)
        return transcoder

    def _attach_cover(self, stream: Any, output: Any) -> None:
        # Matroska keeps cover art as an attachment; as a stream it would become a second video.
        name, mime = _COVER_TYPES.get(stream.codec_context.name, ("", ""))
        with open_container(self.path) as container:
            packets = container.demux(container.streams[stream.index])
            data = next((bytes(p) for p in packets if p.size), None)
        if data is None:
            logger.warning("%s: stream %d is cover art without a picture", self.path, stream.index)
            return
        attachment = output.add_attachment(stream.metadata.get("filename", name), mime, data)
        attachment.metadata.update(filename=stream.metadata.get("filename", name), mimetype=mime)

    def _tag_timecode(self, output: Any, video_out: Any, info: StreamInfo) -> None:
        """The muxer makes a timecode track of this tag, or fails with its header."""
        starts = timecodes(self._container)
        lost = any(
            p.fate == "lost" and (p.codec == "tmcd" or p.kind == "timecode") for p in self.plan
        )
        for one in (output, video_out):
            for name in [n for n in one.metadata if n.lower() == "timecode"]:
                del one.metadata[name]
        if starts and not lost:
            first = info.start_pts * info.time_base
            skipped = max((self.trim.start or first) - first, Fraction(0))
            video_out.metadata["timecode"] = later(starts[0], skipped, info.frame_rate)

    def _copy_chapters(self, output: Any) -> None:
        chapters = self._container.chapters()
        kept = [c for chapter in chapters if (c := self._shifted_chapter(chapter)) is not None]
        if output.format.name in ("mp4", "mov") and kept:
            kept = _chapters_for_mp4(kept)
        output.set_chapters(kept)

    def _shifted_chapter(self, chapter: Any) -> Any:
        base = Fraction(chapter["time_base"])
        start, end = chapter["start"], chapter["end"]
        if self.trim.start is not None:
            start, end = max(start, math.floor(self.trim.start / base)), end
        if self.trim.end is not None:
            end = min(end, math.ceil(self.trim.end / base))
        if start >= end and (self.trim.start is not None or self.trim.end is not None):
            return None
        shift = self.trim.shift(base)
        return {**chapter, "start": start - shift, "end": end - shift}

    def _demux(self) -> Iterator[Any]:
        """Every packet for the output with the time at which it is due, in seconds or None."""
        kept = sorted([*self._targets, *self._transcoders])
        if not kept:
            return
        self._video.discard = av.stream.Discard.all
        heard: set[int] = set()
        try:
            self._seek()
            for packet in every_packet(self._container, [self._container.streams[i] for i in kept]):
                if is_cut_out(packet, heard):
                    continue
                if packet.size and self._fit(packet):
                    if packet.dts is not None:
                        self._latest = max(self._latest, packet.dts * packet.time_base)
                    yield from self._for_output(packet)
                elif self._is_past_end(packet):
                    break
        except av.FFmpegError as error:
            raise SourceError(
                f"{self.path}: reading its other streams stops ({error.strerror}); "
                "the file is damaged or truncated, get a complete copy"
            ) from error
        for index, transcoder in self._transcoders.items():
            yield from map(_with_due, transcoder.packets(None))
            if transcoder.n_corrupt:
                logger.warning(
                    "%s: stream %d: %d packets could not be decoded and are left out",
                    self.path, index, transcoder.n_corrupt,
                )  # fmt: skip
            if isinstance(transcoder, SubtitleTranscoder) and transcoder.n_shortened:
                logger.warning(
                    "%s: stream %d: %d subtitles end where the next begins, for the output shows "
                    "one at a time", self.path, index, transcoder.n_shortened,
                )  # fmt: skip

    def _for_output(self, packet: Any) -> Iterator[Any]:
        transcoder = self._transcoders.get(packet.stream.index)
        if transcoder is not None:
            yield from map(_with_due, transcoder.packets(packet))
            return
        if packet.stream.type == "data" and packet.pts is None:
            # Asynchronous KLV of a drone has no times: it is of when it comes.
            packet.pts = packet.dts = math.floor(self._latest / packet.time_base)
        if packet.stream.type == "data" and not packet.duration:
            # mov ends a track with its last packet's start then, and that packet is not read.
            last = self._last_data.get(packet.stream.index, packet.pts - 1)
            self._last_data[packet.stream.index] = packet.pts
            packet.duration = max(packet.pts - last, 1)
        packet.stream = self._targets[packet.stream.index]
        yield _with_due(packet)

    def _seek(self) -> None:
        if self.trim.start is not None:
            early = self.trim.start - SUBTITLE_REACH_SECONDS
            # Below 0 where a clock runs over, which FFmpeg then counts from there.
            first = min(self._container.start_time or 0, 0)
            self._container.seek(max(math.floor(early * av.time_base), first))

    def _fit(self, packet: Any) -> bool:
        """Shift the packet by the trim; False when it lies outside."""
        if self.trim == Trim(None, None, Fraction(0)) or packet.pts is None:
            return True
        base = Fraction(packet.time_base)
        if packet.stream.disposition & COVER:
            return True
        if self.trim.end is not None and packet.pts * base >= self.trim.end:
            return False
        shift = self.trim.shift(base)
        before = shift - packet.pts if self.trim.start is not None else 0
        if before > 0 and packet.stream.type == "subtitle" and (packet.duration or 0) > before:
            packet.pts, packet.duration = shift, packet.duration - before
            packet.dts = shift
        elif before > 0:
            return False
        packet.pts -= shift
        packet.dts = None if packet.dts is None else packet.dts - shift
        return True

    def _is_past_end(self, packet: Any) -> bool:
        # Streams need not be in step in the file: read on for a while after the first packet out.
        if self.trim.end is None or packet.dts is None:
            return False
        return bool(packet.dts * packet.time_base > self.trim.end + SUBTITLE_REACH_SECONDS)


def _chapters_for_mp4(chapters: list[Any]) -> list[Any]:
    """FFmpeg's muxer begins the first at 0 whatever it says, and mixes up those without a title."""
    titled = [{**c, "metadata": {"title": "", **c["metadata"]}} for c in chapters]
    first = titled[0]
    if first["start"] > 0:
        lead = {"id": 0, "start": 0, "end": first["start"], "metadata": {"title": ""}}
        titled.insert(0, {**first, **lead})
    return titled


def _describe(target: Any, source: Any, output: Any) -> None:
    """Give a stream the source's tags, language and disposition."""
    tags = content_tags(source.metadata)
    # FFmpeg reads a track's title from mp4 as its name, and writes there what is called title.
    if "name" in tags:
        tags.setdefault("title", tags.pop("name"))
    if "language" in tags:
        tags["language"] = language_for(output.format.name, tags["language"])
    target.metadata.update(tags)
    target.disposition = source.disposition


def _with_due(packet: Any) -> tuple[Any, Fraction | None]:
    due = packet.dts if packet.dts is not None else packet.pts
    return packet, None if due is None else due * Fraction(packet.time_base)
