"""Owns the stream plan: what becomes of each stream of a source, before a frame is restored.

Reads headers only, and knows from containers.py alone what a format holds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import av

from pipeline.containers import (
    codec_of,
    disposition_for,
    has_no_rate,
    holds,
    kind_of,
    language_for,
    tags_left_out,
)
from pipeline.frames import StreamInfo
from pipeline.timecode import takes_timecode, timecodes

Fate = Literal["restored", "copied", "transcoded", "rewritten", "lost"]

# What text is turned into where a container refuses the source's own subtitles.
_SUBTITLES = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}
# The encoders for lossy and for lossless audio where a container refuses the source's own.
_AUDIO = {"webm": ("libopus", "libopus"), "matroska": ("flac", "flac")}
_AUDIO_ELSEWHERE = ("aac", "alac")
_EXTENSIONS = {"matroska": ".mkv", "mov": ".mov", "mp4": ".mp4"}
"""Containers that are offered where another one loses something, the best first."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What becomes of one stream of the source."""

    index: int | None
    """Its number in the source; None for chapters and tags, which are no stream."""
    kind: str
    """video, audio, subtitle, data, attachment, cover, chapters, tags or timecode."""
    codec: str
    fate: Fate
    language: str = ""
    target: str = ""
    """The encoder, where the stream is encoded."""
    why: str = ""
    loses_label: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the output holds it as the source does, its language and disposition too."""
        return self.fate in ("restored", "copied") and not self.loses_label

    @property
    def name(self) -> str:
        """For messages: `subtitle stream 2 (subrip)`."""
        if self.index is None:
            return f"{self.codec} {self.kind}"
        return f"{self.kind} stream {self.index} ({self.codec})"

    @property
    def outcome(self) -> str:
        """What becomes of it, in words."""
        target = f" to {self.target}" if self.target else ""
        return self.fate + target + (f": {self.why}" if self.why else "")


def plan_streams(
    container: Any, video: Any, name: str, info: StreamInfo, encoding: str
) -> list[StreamPlan]:
    """The plan for all streams of `container`, of which `video` is restored, and its chapters.

    `name` is FFmpeg's of the format they go to; `encoding` says how the video is encoded.
    """
    plans = []
    for stream in container.streams:
        if stream.index == video.index:
            plans.append(_plan(stream, "restored", encoding))
        elif not _holds_chapters(stream, container):
            plans.append(_with_kept_labels(_plan_other(stream, name, info), stream, name))
    return plans + _plan_tags(plans, container, name, info) + _plan_chapters(container, name)


def _plan_tags(
    streams: list[StreamPlan], container: Any, name: str, info: StreamInfo
) -> list[StreamPlan]:
    """What is not kept of the file's tags; a timecode track has said that of its own already."""
    plans = []
    starts = [] if any(plan.codec == "tmcd" for plan in streams) else timecodes(container)
    if starts and not takes_timecode(name, starts[0], info.frame_rate):
        why = _why_no_timecode(name, starts[0])
        plans.append(StreamPlan(None, "timecode", starts[0], "lost", why=why))
    if lost := tags_left_out(container, name):
        why = f"{name} keeps the usual ones alone; .mkv keeps all"
        plans.append(StreamPlan(None, "tags", ", ".join(lost), "lost", why=why))
    return plans


def _plan_chapters(container: Any, name: str) -> list[StreamPlan]:
    n = len(container.chapters())
    if not n:
        return []
    if name == "webm":
        why = "webm cannot hold them; .mkv can"
        return [StreamPlan(None, "chapters", str(n), "lost", why=why)]
    return [StreamPlan(None, "chapters", str(n), "copied")]


def table(plans: Iterable[StreamPlan]) -> list[str]:
    """The plan as lines of aligned columns under a heading."""
    rows = [("stream", "kind", "codec", "language", "what becomes of it")]
    for plan in plans:
        number = "-" if plan.index is None else str(plan.index)
        rows.append((number, plan.kind, plan.codec, plan.language or "-", plan.outcome))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]


def _with_kept_labels(plan: StreamPlan, stream: Any, name: str) -> StreamPlan:
    if plan.fate not in ("copied", "transcoded"):
        return plan
    lost = []
    if plan.language and not language_for(name, plan.language):
        lost.append(f"{name} keeps no language {plan.language}; .mkv does")
    if flags := stream.disposition & ~disposition_for(name, plan.kind, stream.disposition):
        lost.append(f"{name} keeps no disposition {'+'.join(flag.name for flag in flags)}")
    return replace(plan, why="; ".join(filter(None, [plan.why, *lost])), loses_label=bool(lost))


def _holds_chapters(stream: Any, container: Any) -> bool:
    """Whether this is the text track in which mp4 keeps the titles of its chapters.

    FFmpeg's demuxer discards it once it has made chapters of it, and its muxer makes a new one.
    """
    chapters = container.chapters() and "mov" in container.format.name
    return bool(chapters and stream.type == "data" and stream.discard == av.stream.Discard.all)


def _plan_other(stream: Any, name: str, info: StreamInfo) -> StreamPlan:
    if stream.type == "data" and "timecode" in stream.metadata:
        return _plan_timecode(stream, name, info)
    if kind_of(stream) == "cover" and name == "matroska":
        # As a stream it would become a second video there.
        if stream.codec_context.name in ("mjpeg", "png"):
            return _plan(stream, "copied", why="as an attachment, as Matroska keeps cover art")
        return _plan(stream, "lost", why="Matroska keeps JPEG and PNG alone; .mp4 may hold it")
    if has_no_rate(stream):
        return _plan(stream, "lost", why="no sound was found in it")
    if holds(name, stream):
        second = kind_of(stream) == "video"
        return _plan(stream, "copied", why="one video alone is restored" if second else "")
    offer = next((e for f, e in _EXTENSIONS.items() if f != name and holds(f, stream)), "")
    why = f"{name} cannot hold it" + (f"; {offer} can" if offer else "")
    encoder = _encoder_for(stream, name)
    if not encoder:
        return _plan(stream, "lost", why=why)
    return _plan(stream, "transcoded", encoder, why)


def _plan(stream: Any, fate: Fate, target: str = "", why: str = "") -> StreamPlan:
    language = stream.metadata.get("language", "")
    language = "" if language == "und" else language
    return StreamPlan(stream.index, kind_of(stream), codec_of(stream), fate, language, target, why)


def _plan_timecode(stream: Any, name: str, info: StreamInfo) -> StreamPlan:
    # The muxer makes a track of its own from the tag; a tmcd track cannot be copied.
    start = stream.metadata["timecode"]
    if name not in ("mp4", "mov"):
        return _plan(stream, "rewritten", why=f"as the tag timecode={start}")
    if takes_timecode(name, start, info.frame_rate):
        return _plan(stream, "rewritten", why=f"from its start value {start}")
    return _plan(stream, "lost", why=_why_no_timecode(name, start))


def _why_no_timecode(name: str, start: str) -> str:
    return f"{name} holds it at standard frame rates only; .mkv keeps its start {start} as a tag"


def _encoder_for(stream: Any, name: str) -> str:
    """The encoder that makes of the stream what the container holds; empty if there is none."""
    if stream.codec_context is None:
        return ""
    codec = stream.codec_context.codec
    if stream.type == "audio":
        lossy, lossless = _AUDIO.get(name, _AUDIO_ELSEWHERE)
        return lossless if codec.lossless else lossy
    if stream.type == "subtitle" and codec.text_sub:
        return _SUBTITLES.get(name, "")
    return ""
