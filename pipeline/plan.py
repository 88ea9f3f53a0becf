"""Owns the stream plan: what becomes of each stream of a source, before a frame is restored.

Reads headers only. What a container holds is found out by writing a header into memory: tables of
that age with every FFmpeg.
"""

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import av

from pipeline.frames import StreamInfo
from pipeline.timecode import takes_timecode, timecodes

COVER = av.stream.Disposition.attached_pic

Fate = Literal["restored", "copied", "transcoded", "rewritten", "lost"]

# Facts about the source's own file that would be wrong in the new one.
_STALE = re.compile(
    r"duration|encoder|number_of_(frames|bytes)|bps|_statistics_.*|source_id|vendor_id"
    r"|major_brand|minor_version|compatible_brands|rotate"
)
# What text is turned into where a container refuses the source's own subtitles.
_SUBTITLES = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}
# The encoders for lossy and for lossless audio where a container refuses the source's own.
_AUDIO = {"webm": ("libopus", "libopus"), "matroska": ("flac", "flac")}
_AUDIO_ELSEWHERE = ("aac", "alac")
# ISO 639-2 has two codes for these languages.
_TWO_CODES = [
    ("bod", "tib"), ("ces", "cze"), ("cym", "wel"), ("deu", "ger"), ("ell", "gre"),
    ("eus", "baq"), ("fas", "per"), ("fra", "fre"), ("hye", "arm"), ("isl", "ice"),
    ("kat", "geo"), ("mkd", "mac"), ("mri", "mao"), ("msa", "may"), ("mya", "bur"),
    ("nld", "dut"), ("ron", "rum"), ("slk", "slo"), ("sqi", "alb"), ("zho", "chi"),
]  # fmt: skip
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
    if lost := _lost_tags(container, name):
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


def content_tags(metadata: dict[str, str]) -> dict[str, str]:
    """The tags that are still true in another file."""
    return {k: v for k, v in metadata.items() if not _STALE.fullmatch(k.split("-")[0].lower())}


def tag_options(container: Any, name: str) -> dict[str, str]:
    """The muxer's options with which the container's tags are kept as the source has them.

    Telephones name place and device in keys such as com.apple.quicktime.make, which mp4 and mov
    hold in a list of keys and FFmpeg leaves out unless it makes such a list, of all tags.
    """
    long_keys = any(key.lower().startswith("com.") for key in container.metadata)
    use = long_keys and name in ("mp4", "mov")
    return {"movflags": "use_metadata_tags"} if use else {}


def _lost_tags(container: Any, name: str) -> list[str]:
    tags = content_tags(container.metadata)
    tags = {key: value for key, value in tags.items() if key.lower() != "timecode"}
    if name not in ("mp4", "mov") or not tags:
        return []
    file = io.BytesIO()
    options = tag_options(container, name)
    with av.open(file, "w", format=name, container_options=options) as trial:
        trial.add_mux_stream("mov_text")
        trial.metadata.update(tags)
        trial.start_encoding()
    file.seek(0)
    with av.open(file) as written:
        kept = {key.lower() for key in written.metadata}
    return [key for key in tags if key.lower() not in kept]


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


def language_for(name: str, language: str) -> str:
    """The code under which a container of this format keeps a language; empty if it does not.

    FFmpeg's mov muxer has a table of its own, half of ISO 639-2's bibliographic codes and half of
    its terminological ones, and leaves out what is not in it.
    """
    if name != "mov" or not language:
        return language
    names = [language, *(pair[1 - pair.index(language)] for pair in _TWO_CODES if language in pair)]
    return next((code for code in names if _mov_keeps(code)), "")


@cache
def _mov_keeps(language: str) -> bool:
    file = io.BytesIO()
    with av.open(file, "w", format="mov") as trial:
        stream = trial.add_mux_stream("pcm_s16le", rate=48_000, layout="mono")
        stream.metadata["language"] = language
        trial.start_encoding()
        packet = av.Packet(b"\0\0")
        packet.stream, packet.pts, packet.dts, packet.duration = stream, 0, 0, 1
        trial.mux(packet)
    file.seek(0)
    with av.open(file) as written:
        return bool(written.streams[0].metadata.get("language") == language)


# Streams of each kind that these containers take as they are.
_STAND_INS = {
    "audio": {"webm": "opus", "": "pcm_s16le"}, "video": {"webm": "vp8", "": "mjpeg"},
    "subtitle": {"webm": "webvtt", "matroska": "subrip", "": "mov_text"},
}  # fmt: skip


@cache
def disposition_for(name: str, kind: str, disposition: Any) -> Any:
    """What of a stream's disposition a container of this format keeps.

    mp4 adds captions to hearing_impaired, and descriptions to visual_impaired.
    """
    if kind not in _STAND_INS or not disposition:
        return disposition
    codec = _STAND_INS[kind].get(name) or _STAND_INS[kind][""]
    shapes: dict[str, dict[str, Any]] = {
        "audio": {"rate": 48_000, "layout": "mono"}, "video": {"width": 16, "height": 16},
        "subtitle": {},
    }  # fmt: skip
    file = io.BytesIO()
    with av.open(file, "w", format=name) as trial:
        # The first of a kind is made the default one where there is none.
        streams = [trial.add_mux_stream(codec, **shapes[kind]) for _ in range(2)]
        streams[0].disposition, streams[1].disposition = av.stream.Disposition.default, disposition
        trial.start_encoding()
        for stream in streams:
            packet = av.Packet(b"\0\2ab")
            packet.stream, packet.pts, packet.dts, packet.duration = stream, 0, 0, 1
            trial.mux(packet)
    file.seek(0)
    with av.open(file) as written:
        return written.streams[1].disposition


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


def has_no_rate(stream: Any) -> bool:
    """Whether this is sound of which FFmpeg has seen nothing: MPEG-TS names all tracks of a
    programme, also those in which nothing is sent."""
    known = stream.type == "audio" and stream.codec_context is not None
    return known and not stream.codec_context.sample_rate


def kind_of(stream: Any) -> str:
    """A stream's type, with cover art told from video."""
    if stream.type == "video" and stream.disposition & COVER:
        return "cover"
    return str(stream.type)


def codec_of(stream: Any) -> str:
    """FFmpeg's name of the codec, not of a decoder for it; the type where there is none."""
    if stream.codec_context is not None:
        return str(stream.codec_context.codec.canonical_name)
    if "timecode" in stream.metadata:
        return "tmcd"
    return str(stream.metadata.get("mimetype") or getattr(stream, "name", "") or "unknown")


def holds(format_name: str, stream: Any) -> bool:
    """Whether a container of this format keeps the stream, found out by writing a header."""
    if format_name == "webm" and stream.type == "attachment":
        return False  # FFmpeg's muxer takes them and leaves them out, as mov's does with covers
    if format_name == "mov" and kind_of(stream) == "cover":
        return False
    try:
        with av.open(io.BytesIO(), "w", format=format_name) as trial:
            copy = trial.add_stream_from_template(stream, opaque=True)
            copy.disposition = stream.disposition
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True
