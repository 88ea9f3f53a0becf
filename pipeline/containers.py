"""Owns what a container holds and keeps: of streams, labels and tags. Knows no plan and no file.

It is found out by writing one into memory: tables of that age with every FFmpeg.
"""

import io
import math
import re
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av

from pipeline.errors import ConfigError

CONTAINERS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm",
}  # fmt: skip
"""FFmpeg's muxer by the extension of the output's name.

Not NUT, whose muxer loses the durations of subtitles and refuses times below zero, nor MPEG-TS,
whose muxer takes every stream and keeps no name for half of them.
"""
_SAMPLES = 48_000
COVER = av.stream.Disposition.attached_pic
# Facts about the source's own file that would be wrong in the new one.
_STALE = re.compile(
    r"duration|encoder|number_of_(frames|bytes)|bps|_statistics_.*|source_id|vendor_id"
    r"|major_brand|minor_version|compatible_brands|rotate"
)
# ISO 639-2 has two codes for these languages.
_TWO_CODES = [
    ("bod", "tib"), ("ces", "cze"), ("cym", "wel"), ("deu", "ger"), ("ell", "gre"),
    ("eus", "baq"), ("fas", "per"), ("fra", "fre"), ("hye", "arm"), ("isl", "ice"),
    ("kat", "geo"), ("mkd", "mac"), ("mri", "mao"), ("msa", "may"), ("mya", "bur"),
    ("nld", "dut"), ("ron", "rum"), ("slk", "slo"), ("sqi", "alb"), ("zho", "chi"),
]  # fmt: skip
# Of ISO 639-1, which mp4 does not know, those that subtitles come in most.
_LETTERS = (
    "ar:ara bg:bul bn:ben bs:bos ca:cat cs:ces cy:cym da:dan de:deu el:ell en:eng es:spa et:est "
    "eu:eus fa:fas fi:fin fr:fra ga:gle gl:glg gu:guj he:heb hi:hin hr:hrv hu:hun hy:hye id:ind "
    "is:isl it:ita ja:jpn ka:kat kk:kaz km:khm kn:kan ko:kor lo:lao lt:lit lv:lav mk:mkd ml:mal "
    "mn:mon mr:mar ms:msa my:mya nb:nob ne:nep nl:nld nn:nno no:nor pa:pan pl:pol ps:pus pt:por "
    "ro:ron ru:rus si:sin sk:slk sl:slv sq:sqi sr:srp sv:swe sw:swa ta:tam te:tel th:tha tl:tgl "
    "tr:tur uk:ukr ur:urd uz:uzb vi:vie zh:zho zu:zul"
)
_TWO_LETTERS = dict(pair.split(":") for pair in _LETTERS.split())
# Streams of each kind that these containers take as they are.
_STAND_INS = {
    "audio": {"webm": "opus", "": "pcm_s16le"}, "video": {"webm": "vp8", "": "mjpeg"},
    "subtitle": {"webm": "webvtt", "matroska": "subrip", "": "mov_text"},
}  # fmt: skip


def container_of(path: Path) -> str:
    """FFmpeg's muxer for an output of that name. Raises ConfigError where there is none."""
    if path.suffix.lower() not in CONTAINERS:
        known = " ".join(CONTAINERS)
        raise ConfigError(f"{path}: unknown extension {path.suffix!r}; use one of {known}")
    return CONTAINERS[path.suffix.lower()]


def muxer_options(container: str, time_base: Fraction, rates: list[int]) -> dict[str, str]:
    """How a muxer is to keep times: the video's of `time_base` and sound's of these `rates`."""
    # FFmpeg would move the whole file so that the priming of AAC does not start below zero. Without
    # bitexact its Matroska muxer draws random ids: no two runs would give the same file.
    options = {"avoid_negative_ts": "disabled", "fflags": "+bitexact"}
    if container in ("mp4", "mov"):
        # The unit of edit lists, with which a stream that starts late is put in its place: FFmpeg's
        # milliseconds would move video and audio, each by up to one.
        exact = math.lcm(time_base.denominator, *rates)
        multiple = -(-_SAMPLES // time_base.denominator)
        fine = time_base.denominator * multiple  # to a sample, where no unit suits all
        options["movie_timescale"] = str(exact if fine <= exact < 1 << 31 else fine)
    return options


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


def has_no_rate(stream: Any) -> bool:
    """Whether this is sound of which FFmpeg has seen nothing: MPEG-TS names all tracks of a
    programme, also those in which nothing is sent."""
    known = stream.type == "audio" and stream.codec_context is not None
    return known and not stream.codec_context.sample_rate


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


def language_for(name: str, language: str) -> str:
    """The code under which a container of this format keeps a language; empty if it does not.

    FFmpeg's mov muxer has a table of its own, half of ISO 639-2's bibliographic codes and half of
    its terminological ones, and leaves out what is not in it.
    """
    if name not in ("mp4", "mov") or not language:
        return language
    language = _TWO_LETTERS.get(language, language)
    names = [language, *(pair[1 - pair.index(language)] for pair in _TWO_CODES if language in pair)]
    return next((code for code in names if _keeps_language(name, code)), "")


@cache
def _keeps_language(name: str, language: str) -> bool:
    file = io.BytesIO()
    with av.open(file, "w", format=name) as trial:
        stream = trial.add_mux_stream("pcm_s16le", rate=48_000, layout="mono")
        stream.metadata["language"] = language
        trial.start_encoding()
        packet = av.Packet(b"\0\0")
        packet.stream, packet.pts, packet.dts, packet.duration = stream, 0, 0, 1
        trial.mux(packet)
    file.seek(0)
    with av.open(file) as written:
        return bool(written.streams[0].metadata.get("language") == language)


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


def tags_left_out(container: Any, name: str) -> list[str]:
    """The container's tags that one of this format does not keep."""
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
