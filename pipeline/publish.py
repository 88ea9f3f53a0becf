"""Owns one connection to a live sink: opens it, encodes, muxes, tells when. Runs in a process of
its own (child.py), for `mux` to an RTSP server that stands still never returns; publisher.py ends
it.
"""

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av

from pipeline.address import Address
from pipeline.containers import holds
from pipeline.encoder import EncodeSettings, add_video, plan_format
from pipeline.errors import ConfigError, SinkError
from pipeline.frames import Frame, StreamInfo
from pipeline.pacing import TIME_BASE
from pipeline.pictures import to_picture

FILES = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".ts": "mpegts"}
"""What may be recorded into, by the name's end."""

_STREAMS: dict[str, tuple[str, dict[str, str]]] = {
    "rtsp": ("rtsp", {"rtsp_transport": "tcp"}),
    "rtmp": ("flv", {"flvflags": "no_duration_filesize"}),
    "rtmps": ("flv", {"flvflags": "no_duration_filesize"}),
    "udp": ("mpegts", {}),
    "srt": ("mpegts", {}),
    "tcp": ("mpegts", {}),
}
LONGEST_SECONDS = {"flv": 20 * 86400}
"""By muxer, the longest that a connection lasts: the times of FLV begin anew after 2^31 ms."""
# The index of a whole mp4 grows in memory with every packet, and a killed recording has none.
_FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
_HLS = {
    "hls_time": "2", "hls_list_size": "10",
    # A sink opened anew goes on with the playlist that is there.
    "hls_flags": "delete_segments+append_list+omit_endlist+temp_file",
}  # fmt: skip
# Packets wait for those of the other stream by default up to 10 s: output.py has ordered them.
_OPTIONS = {"max_interleave_delta": "1", "flush_packets": "1"}
_FINAL = (
    av.HTTPUnauthorizedError, av.HTTPForbiddenError, av.ProtocolNotFoundError,
    av.MuxerNotFoundError, av.EncoderNotFoundError, av.OptionNotFoundError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A sink as FFmpeg opens it."""

    address: Address
    url: str = field(repr=False)
    muxer: str
    options: dict[str, str]
    file: Path | None = None
    """The name that a recording gets when it is complete; until then it is a hidden `.part`."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to open, and what will come. pts count from `start_pts`, in TIME_BASE."""

    target: Target
    info: StreamInfo
    settings: EncodeSettings
    audio: bytes | None
    """A NUT file that describes the audio stream, or None."""
    start_pts: int
    keyframe_seconds: float | None = None
    """A keyframe at least so often, at whatever frame rate; None: as the encoder does."""


@dataclass(frozen=True, slots=True)
class Sent:
    """An audio packet with its pts in TIME_BASE."""

    pts: int
    data: bytes = field(repr=False)
    duration_seconds: Fraction


@dataclass(frozen=True, slots=True)
class Started:
    """The process is there and opens the sink now."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The sink stands."""

    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Published:
    """A frame was given to the sink: when it had been captured, and when it left."""

    captured_seconds: float
    published_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The connection has ended; `final` where trying again is no use."""

    cause: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class Closed:
    """All that was sent has been written."""


def target_of(address: Address) -> Target:
    """How FFmpeg opens a sink. Raises ConfigError for one that is not known."""
    if address.scheme in _STREAMS:
        muxer, options = _STREAMS[address.scheme]
        return Target(address, address.secret, muxer, dict(options))
    path = Path(address.secret)
    if address.scheme == "" and (address.secret.endswith(("/", ".m3u8")) or path.is_dir()):
        playlist = path if path.suffix == ".m3u8" else path / "index.m3u8"
        return Target(address, str(playlist), "hls", dict(_HLS))
    if address.scheme == "" and path.suffix.lower() in FILES:
        muxer = FILES[path.suffix.lower()]
        options = dict(_FRAGMENTED) if muxer in ("mp4", "mov") else {}
        return Target(address, "", muxer, options, path)
    known = " ".join(f"{scheme}://" for scheme in _STREAMS)
    raise ConfigError(
        f"{address}: not a sink; use {known}, a folder/ for HLS, or a file ending in "
        + " ".join(FILES)
    )


def part_of(file: Path) -> Path:
    """Where a recording is until it is complete."""
    return file.with_name(f".{file.name}.part")


def main(connection: Connection) -> None:
    """Serve one Request: Started, Ready, then Published for each Frame; Closed after None or where
    a new connection is due, else Failed."""
    request: Request = connection.recv()
    connection.send(Started())
    longest = LONGEST_SECONDS.get(request.target.muxer)
    ready = False
    try:
        with _sink(request) as sink:
            connection.send(Ready(tuple(sink.warnings)))
            ready = True
            for message in _messages(connection):
                if isinstance(message, Frame):
                    if longest and (message.pts - request.start_pts) * TIME_BASE > longest:
                        break
                    sink.write(message)
                    now = time.monotonic()
                    connection.send(Published(message.captured_seconds, now))
                else:
                    sink.write_audio(message)
    except (av.FFmpegError, OSError, ValueError, SinkError) as error:
        connection.send(_failed(error, ready))
    except ConfigError as error:
        connection.send(Failed(str(error).removeprefix(f"{request.target.address}: "), final=True))
    else:
        connection.send(Closed())


def _messages(connection: Connection) -> Iterator[Any]:
    """Until None, or until the parent is gone: then, too, what was written is closed in order."""
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message is None:
            return
        yield message


class _Sink:
    def __init__(self, request: Request, output: Any, template: Any) -> None:
        self.warnings: list[str] = []
        self._info, self._start = request.info, request.start_pts
        self._output = output
        self._format = plan_format(request.settings, request.info.pixel_format, self.warnings)
        self._video = add_video(
            output, request.target.address, request.settings, request.info, self._format
        )
        self._audio = None
        self.n_written = 0
        every = request.keyframe_seconds
        self._key_ticks = None if every is None else round(every / TIME_BASE)
        self._last_key: int | None = None
        if template is not None and not _takes(request.target.muxer, template.streams[0]):
            codec = template.streams[0].codec_context.name
            self.warnings.append(
                f"the sound is {codec}, which this sink cannot hold: it is left out; have the "
                "camera send AAC, or take an RTSP or .mov sink"
            )
            template = None
        if template is not None:
            self._audio = output.add_stream_from_template(template.streams[0], opaque=True)
        output.start_encoding()

    def write(self, frame: Frame) -> None:
        picture = to_picture(frame, self._info, self._format)
        picture.pts, picture.time_base = frame.pts - self._start, TIME_BASE
        picture.pict_type = int(self._is_key(picture.pts))  # 1 is I; 0, NONE: the encoder chooses
        self._output.mux(self._video.encode(picture))
        self.n_written += 1

    def _is_key(self, pts: int) -> bool:
        if self._key_ticks is None:
            return False
        if self._last_key is not None and pts - self._last_key < self._key_ticks:
            return False
        self._last_key = pts
        return True

    def write_audio(self, sound: Sent) -> None:
        if self._audio is None or sound.pts < self._start:
            return
        packet = av.Packet(sound.data)
        packet.stream, packet.time_base = self._audio, TIME_BASE
        packet.pts = packet.dts = sound.pts - self._start
        packet.duration = round(sound.duration_seconds / TIME_BASE)
        packet.is_keyframe = True
        self._output.mux(packet)

    def flush(self) -> None:
        self._output.mux(self._video.encode(None))


def _takes(muxer: str, sound: Any) -> bool:
    if muxer in ("mpegts", "hls"):
        # FFmpeg would mux it as data that no player takes for sound.
        return not sound.codec_context.name.startswith("pcm_")
    return muxer not in FILES.values() or holds(muxer, sound)


@contextmanager
def _sink(request: Request) -> Iterator[_Sink]:
    target = request.target
    template = None if request.audio is None else av.open(io.BytesIO(request.audio))
    url = target.url
    if target.muxer == "hls" or target.file is not None:
        (target.file or Path(url)).parent.mkdir(parents=True, exist_ok=True)
    part = None
    if target.file is not None:
        part = part_of(target.file)
        url = f"file:{part}"
    options = {**_OPTIONS, **target.options}
    sink = None
    try:
        with av.open(url, "w", format=target.muxer, container_options=options) as output:
            sink = _Sink(request, output, template)
            yield sink
            sink.flush()
    except BaseException:
        # A full disk would get a new one at every attempt: a frame may count as written that waits
        # for the first sound.
        if part is not None and (sink is None or not sink.n_written or not _size(part)):
            part.unlink(missing_ok=True)
        raise
    if part is not None and target.file is not None:
        part.rename(target.file)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _failed(error: Exception, ready: bool) -> Failed:
    if isinstance(error, av.HTTPUnauthorizedError | av.HTTPForbiddenError):
        return Failed("user or password is wrong; check them", final=True)
    cause = str(getattr(error, "strerror", None) or error)
    # A server that closes without an answer is av.InvalidDataError, a ValueError as well.
    refused = isinstance(error, ValueError) and not isinstance(error, av.InvalidDataError)
    if refused and not ready:
        # EINVAL at the header: the muxer refuses a stream; trying again changes nothing.
        return Failed(f"does not take these streams ({cause}); try --no-audio", final=True)
    return Failed(cause, final=isinstance(error, _FINAL))
