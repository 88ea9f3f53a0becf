"""Owns how a container is opened and its packets are taken. Knows no format and decodes nothing."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
from av.codec.hwaccel import HWAccel

from pipeline.errors import SourceError

MAX_PIXELS = 1 << 27
"""Of one picture, unless the user says otherwise: 16K is a little less."""
STALL_SECONDS = 60.0
"""How long a read may take, unless the user says otherwise."""
# Formats whose files name other files. FFmpeg opens those by itself, so that restoring one file
# would read others; the network is out of reach of all in any case.
_LISTS = {"hls", "concat", "dash", "sdp", "rtsp", "imf"}
_LOCAL_ONLY = {"protocol_whitelist": "file"}
_THOROUGH = {"analyzeduration": str(60 * av.time_base), "probesize": str(200 << 20)}


def open_container(
    path: Path,
    stall_seconds: float = STALL_SECONDS,
    max_pixels: int | None = None,
    hwaccel: str | None = None,
    thorough: bool = False,
) -> Any:
    """Open a local regular file for demuxing, without network access. Raises SourceError.

    Pictures of more than `max_pixels` are refused; None is for a file that has passed already.
    `thorough` looks for streams in the first minute instead of the first seconds.
    """
    try:
        # A FIFO or a device would block for ever or never end.
        if not path.is_file():
            if path.exists() and not path.is_dir():
                raise SourceError(f"{path}: is a pipe or device; save what it gives to a file")
            cause = "is a directory" if path.is_dir() else "no such file"
            raise SourceError(f"{path}: {cause}; name a video file")
        if path.stat().st_size == 0:
            raise SourceError(f"{path}: the file is empty; get a complete copy")
        # "file:" keeps a colon in the name from being read as a protocol, and the whitelist keeps
        # a playlist named .mp4 from opening connections.
        url = f"file:{path}"
        container = av.open(
            url, "r", metadata_errors="replace",
            container_options=_LOCAL_ONLY | (_THOROUGH if thorough else {}),
            options={"max_pixels": str(max_pixels)} if max_pixels else {},
            timeout=(stall_seconds, stall_seconds),
            hwaccel=HWAccel(hwaccel, allow_software_fallback=False) if hwaccel else None,
        )  # fmt: skip
    except av.FFmpegError as error:
        raise SourceError(f"{path}: {_open_cause(path, error)}") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; check its permissions") from error
    if refusal := _refusal(container, max_pixels):
        container.close()
        raise SourceError(f"{path}: {refusal}")
    return container


def _refusal(container: Any, max_pixels: int | None) -> str:
    """Why a file that FFmpeg has opened is not read all the same; empty where it is."""
    if _LISTS & set(container.format.name.split(",")):
        return "is a list of other files; name the video file itself"
    known = [s for s in container.streams.video if s.codec_context is not None]
    too_large = next((s for s in known if s.width * s.height > (max_pixels or sys.maxsize)), None)
    if too_large is not None:
        size = f"{too_large.width}x{too_large.height}"
        return (
            f"its pictures are {size}, more than {max_pixels} pixels; allow it with "
            "--max-pixels if the file is to be trusted"
        )
    if container.format.name == "tty":
        return "is a text file; name a video file"
    return ""


def _open_cause(path: Path, error: av.FFmpegError) -> str:
    if isinstance(error, av.PermissionError) and os.access(path, os.R_OK):
        return "refers to other files or to the network; name the video file itself"
    if not isinstance(error, av.InvalidDataError):
        return f"{cause_of(error)}; check the file and its permissions"
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] in (b"ftyp", b"mdat", b"wide", b"free"):
        return "its index (moov) is missing, the recording was interrupted; get a complete copy"
    return "is not a video file that FFmpeg can read; check what it is"


def cause_of(error: av.FFmpegError) -> str:
    """FFmpeg's reason in one line."""
    if isinstance(error, av.error.ExitError):
        return "no data in time"
    return str(error.strerror or error).splitlines()[0]


def pick_video_stream(container: Any, path: object) -> Any:
    """The stream that is restored: the default one, else the largest; never cover art."""
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        container.close()
        raise SourceError(f"{path}: holds no video stream; name a file with video")
    usable = [s for s in streams if s.codec_context is not None]
    if not usable:
        container.close()
        raise SourceError(f"{path}: no decoder for its video; convert it with FFmpeg first")
    default = av.stream.Disposition.default
    return max(usable, key=lambda s: (bool(s.disposition & default), s.width * s.height, -s.index))


def every_packet(
    container: Any, streams: Any, on_late: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """The packets of `streams`, then an empty one of each.

    Those of a stream that begins within the file are not among them: `on_late` says that there is
    one. PyAV 18.1 knows the streams that there were at opening, and flushes as many as FFmpeg knows
    by the end: an IndexError, after all that there was (av/container/input.py, demux).
    """
    try:
        yield from container.demux(streams)
    except IndexError:
        on_late()


def is_cut_out(packet: Any, heard: set[int]) -> bool:
    """Whether it is sound between two edits, or after the last, which no player plays.

    `heard` are the streams of which some has been played. What lies before that, the priming of a
    codec, is decoded and skipped.
    """
    if packet.stream.type != "audio":
        return False
    if not packet.is_discard:
        heard.add(packet.stream.index)
        return False
    return packet.stream.index in heard
