"""Owns what is copied beside the restored video: streams, chapters, metadata. Knows no pixels.

It reads the source a second time, on its own, so that nothing has to be buffered between threads.
"""

import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.errors import SinkError, SourceError
from pipeline.frames import StreamInfo
from pipeline.probe import file_start, open_container, pick_video_stream

SUBTITLE_REACH_SECONDS = 10
"""Subtitles that began so long before a trim start are still shown after it."""

# Facts about the source's own file that would be wrong in the new one.
_STALE = re.compile(
    r"duration|encoder|number_of_(frames|bytes)|bps|_statistics_.*|source_id|vendor_id"
    r"|major_brand|minor_version|compatible_brands|rotate"
)
# The only rates for which FFmpeg's mov muxer accepts a timecode.
_TIMECODE_RATES = (24, 25, 30, 48, 50, 60, 100, 120, 150)
_COVER = av.stream.Disposition.attached_pic
_COVER_TYPES = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png")}


@dataclass(frozen=True, slots=True)
class Trim:
    """The part of the source that is kept, in seconds on the source's own clock."""

    start: Fraction | None
    end: Fraction | None

    @classmethod
    def of(cls, container: Any, start_seconds: float | None, end_seconds: float | None) -> "Trim":
        """From seconds counted from the file's start."""
        base = file_start(container)

        def absolute(seconds: float | None) -> Fraction | None:
            if seconds is None:
                return None
            return base + Fraction(round(seconds * av.time_base), av.time_base)

        return cls(absolute(start_seconds), absolute(end_seconds))

    def shift(self, time_base: Fraction) -> int:
        """Ticks of `time_base` that are taken off every timestamp."""
        return math.floor((self.start or 0) / time_base)


class Passthrough:
    """The streams of `path` other than the restored one, on their way into `output`.

    `add_streams` decides everything before rendering; what the container cannot hold is dropped
    with a line in `warnings`. Raises SinkError when audio would be lost.
    """

    def __init__(
        self, path: Path, start_seconds: float | None = None, end_seconds: float | None = None
    ) -> None:
        self.path = path
        self.warnings: list[str] = []
        self._container = open_container(path)
        self._video = pick_video_stream(self._container, path)
        self.trim = Trim.of(self._container, start_seconds, end_seconds)
        self._targets: dict[int, Any] = {}
        self._packets: Iterator[Any] = iter(())
        self._next: Any = None

    def close(self) -> None:
        """Close the source."""
        self._packets = iter(())
        self._container.close()

    def add_streams(self, output: Any, video_out: Any, info: StreamInfo) -> None:
        """Copy metadata, chapters and every stream that `output` can hold."""
        output.metadata.update(_content_tags(self._container.metadata))
        video_out.metadata.update(_content_tags(self._video.metadata))
        video_out.disposition = self._video.disposition
        for stream in self._container.streams:
            if stream.index != self._video.index:
                self._add(stream, output)
        self._carry_timecode(output, video_out, info)
        self._copy_chapters(output)
        self._packets = self._demux()
        self._next = next(self._packets, None)

    def mux_until(self, output: Any, seconds: Fraction | None) -> None:
        """Mux every packet due at or before `seconds`; all that remain when None."""
        while self._next is not None:
            packet, due = self._next
            if seconds is not None and due is not None and due > seconds:
                return
            packet.stream = self._targets[packet.stream.index]
            output.mux(packet)
            self._next = next(self._packets, None)

    def _add(self, stream: Any, output: Any) -> None:
        if stream.type == "data" and "timecode" in stream.metadata:
            return  # the muxer makes its own from the tag
        is_cover = stream.type == "video" and bool(stream.disposition & _COVER)
        if is_cover and output.format.name == "matroska":
            self._attach_cover(stream, output)
        elif _holds(output.format.name, stream):
            target = output.add_stream_from_template(stream, opaque=True)
            target.metadata.update(_content_tags(stream.metadata))
            target.disposition = stream.disposition
            if stream.type != "attachment":
                self._targets[stream.index] = target
        elif stream.type == "audio":
            raise SinkError(
                f"{self.path}: its audio stream {_label(stream)} does not fit unchanged into "
                f"{output.format.name}; choose an output name ending in .mkv"
            )
        else:
            self.warnings.append(
                f"{stream.type} stream {_label(stream)} dropped: "
                f"{output.format.name} cannot hold it"
            )

    def _attach_cover(self, stream: Any, output: Any) -> None:
        # Matroska keeps cover art as an attachment; as a stream it would become a second video.
        name, mime = _COVER_TYPES.get(stream.codec_context.name, ("", ""))
        with open_container(self.path) as container:
            packets = container.demux(container.streams[stream.index])
            data = next((bytes(p) for p in packets if p.size), b"")
        if not name or not data:
            self.warnings.append(f"cover art {_label(stream)} dropped: neither JPEG nor PNG")
            return
        attachment = output.add_attachment(stream.metadata.get("filename", name), mime, data)
        attachment.metadata.update(filename=stream.metadata.get("filename", name), mimetype=mime)

    def _carry_timecode(self, output: Any, video_out: Any, info: StreamInfo) -> None:
        tags = [s.metadata["timecode"] for s in self._container.streams if "timecode" in s.metadata]
        if not tags:
            return
        if output.format.name == "matroska" or round(info.frame_rate or 0) in _TIMECODE_RATES:
            video_out.metadata["timecode"] = tags[0]
            self.warnings.append(f"timecode track rewritten from its start value {tags[0]}")
        else:
            video_out.metadata.pop("timecode", None)
            self.warnings.append(f"timecode {tags[0]} dropped: no standard frame rate")

    def _copy_chapters(self, output: Any) -> None:
        chapters = self._container.chapters()
        if not chapters:
            return
        if output.format.name == "webm":
            self.warnings.append("chapters dropped: webm cannot hold them")
            return
        kept = [c for chapter in chapters if (c := self._shifted_chapter(chapter)) is not None]
        output.set_chapters(kept)

    def _shifted_chapter(self, chapter: Any) -> Any:
        base = Fraction(chapter["time_base"])
        start, end = chapter["start"], chapter["end"]
        if self.trim.start is not None:
            start, end = max(start, math.floor(self.trim.start / base)), end
        if self.trim.end is not None:
            end = min(end, math.ceil(self.trim.end / base))
        if start >= end and self.trim != Trim(None, None):
            return None
        shift = self.trim.shift(base)
        return {**chapter, "start": start - shift, "end": end - shift}

    def _demux(self) -> Iterator[Any]:
        """Every kept packet with the time at which it is due, in seconds or None."""
        streams = [self._container.streams[index] for index in self._targets]
        if not streams:
            return
        self._video.discard = av.stream.Discard.all
        try:
            self._seek()
            for packet in self._container.demux(streams):
                if packet.size and self._fit(packet):
                    due = packet.dts if packet.dts is not None else packet.pts
                    yield packet, None if due is None else due * Fraction(packet.time_base)
                elif self._is_past_end(packet):
                    return
        except av.FFmpegError as error:
            raise SourceError(
                f"{self.path}: reading its other streams stops ({error.strerror}); "
                "the file is damaged or truncated, get a complete copy"
            ) from error

    def _seek(self) -> None:
        if self.trim.start is not None:
            early = self.trim.start - SUBTITLE_REACH_SECONDS
            self._container.seek(max(math.floor(early * av.time_base), 0))

    def _fit(self, packet: Any) -> bool:
        """Shift the packet by the trim; False when it lies outside."""
        if self.trim == Trim(None, None) or packet.pts is None:
            return True
        base = Fraction(packet.time_base)
        if packet.stream.disposition & _COVER:
            return True
        if self.trim.end is not None and packet.pts * base >= self.trim.end:
            return False
        shift = self.trim.shift(base)
        before = shift - packet.pts
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


def _holds(format_name: str, stream: Any) -> bool:
    """Whether a container of this format accepts the stream, found out by writing a header."""
    try:
        with av.open(io.BytesIO(), "w", format=format_name) as trial:
            copy = trial.add_stream_from_template(stream, opaque=True)
            copy.disposition = stream.disposition
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


def _content_tags(metadata: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in metadata.items() if not _STALE.fullmatch(k.split("-")[0].lower())}


def _label(stream: Any) -> str:
    codec = stream.codec_context.name if stream.codec_context is not None else stream.type
    return f"{stream.index} ({codec})"
