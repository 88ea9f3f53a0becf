"""Owns one connection to a live source: opens it, decodes, sends. Runs in a process of its own
(child.py) and knows neither what was before nor who consumes: live.py does.
"""

import errno
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from multiprocessing.connection import Connection
from typing import Any

import av

from pipeline.address import Address
from pipeline.errors import SourceError
from pipeline.frames import Planes, StreamInfo
from pipeline.opening import cause_of, pick_video_stream
from pipeline.pacing import TIME_BASE, Pace
from pipeline.planes import planes_of
from pipeline.probe import read_stream_info

FALLBACK_RATE = Fraction(25)
"""Where a source names no frame rate, or none that a camera has."""
INTERLACED = "interlaced: its frames are restored as they are; have it send progressive ones"
WAIT_SECONDS = 0.002
"""A read that takes so long has waited: what is there already is had at once."""
KEY_SECONDS = 10.0
"""So long a keyframe is waited for: with gradual refresh none comes, and pictures mend."""
# A stream is described by its first half second: more would be a longer outage each time.
_OPTIONS = {"fflags": "nobuffer", "flags": "low_delay", "analyzeduration": "500000"}
# What FFmpeg gives these, that carry none, are the times of 25 frames a second.
_TIMELESS = {"mpjpeg", "mjpeg", "h264", "hevc"}
_FINAL = (
    av.HTTPUnauthorizedError, av.HTTPForbiddenError, av.ProtocolNotFoundError,
    av.DemuxerNotFoundError, av.DecoderNotFoundError, av.OptionNotFoundError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """What to open."""

    address: Address
    transport: str
    audio: bool
    open_timeout_seconds: float
    read_timeout_seconds: float
    behind_seconds: float | None = None
    """Frames are left out once none had to be waited for, for so long; None: never."""


@dataclass(frozen=True, slots=True)
class Opened:
    """The connection stands, or its format has changed: what follows is of this kind."""

    info: StreamInfo
    audio: bytes | None
    """A NUT file that describes the audio stream: how its parameters travel."""
    video_codec: str
    warning: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """One decoded frame; `seconds` is its pts on the connection's own clock."""

    seconds: Fraction | None
    planes: Planes = field(repr=False)
    key: bool
    captured_seconds: float


@dataclass(frozen=True, slots=True)
class Sound:
    """One audio packet, as it came."""

    seconds: Fraction | None
    data: bytes = field(repr=False)
    duration_seconds: Fraction


@dataclass(frozen=True, slots=True)
class Damaged:
    """A packet of a frame that cannot be decoded."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A frame that was not sent, for what waits to be read is older by the second."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The connection has ended; `final` where trying again is no use."""

    cause: str
    final: bool = False
    stalled: bool = False
    asks_again: bool = False
    """Nothing was opened: the process waits for the next Request."""


def main(connection: Connection) -> None:
    """Serve Requests until one can be opened, then that: Opened, Picture and Sound, at last Lost.

    A camera that is away for a week would else cost a new process, a third of a core, every second.
    """
    while True:
        request: Request = connection.recv()
        try:
            container = _open(request)
        except av.FFmpegError as error:
            connection.send(replace(_lost(error, request), asks_again=True))
            continue
        with container:
            # Told before it is closed: that may wait for a server's last word.
            connection.send(_serve(connection, container, request))
        return


def _serve(connection: Connection, container: Any, request: Request) -> Lost:
    try:
        for message in _messages(container, request):
            connection.send(message)
    except av.FFmpegError as error:
        return _lost(error, request)
    except SourceError as error:
        # A camera that has just started may announce its sound alone, or a server its publisher's.
        final = any(stream.type == "video" for stream in container.streams)
        return Lost(str(error).removeprefix(f"{request.address}: "), final=final)
    # PyAV sees a server that closes, or a publisher that leaves, as a clean end.
    return Lost("the source closed the connection")


def _open(request: Request) -> Any:
    options = dict(_OPTIONS)
    if request.address.scheme == "rtsp":
        options["rtsp_transport"] = request.transport
        if request.transport == "tcp":  # nothing can come out of order
            options |= {"reorder_queue_size": "0", "max_delay": "0"}
    device = request.address.secret.startswith("/dev/")
    timeout = request.open_timeout_seconds, request.read_timeout_seconds
    return av.open(
        request.address.secret, "r", format="v4l2" if device else None, options=options,
        timeout=timeout, metadata_errors="replace",
    )  # fmt: skip


def _messages(
    container: Any, request: Request
) -> Iterator[Opened | Picture | Sound | Damaged | LeftOut]:
    video = pick_video_stream(container, request.address)
    video.thread_type = "SLICE"  # a thread per frame would hold back as many frames
    audio = container.streams.audio[0] if request.audio and container.streams.audio else None
    description, warning = _description(audio)
    streams = [video] if description is None else [video, audio]
    layout = info = None
    pace = Pace() if container.format.name == "hls" else None
    # HLS is read by the segment, and held back here.
    backlog = _Backlog(None if pace else request.behind_seconds, video.codec_context)
    demuxed = container.demux(streams)
    for packet, waited, captured in _packets(demuxed, request.read_timeout_seconds):
        backlog.read(waited, captured)
        if not packet.size:
            continue
        if packet.stream.index != video.index:
            yield _sound(packet)
            continue
        try:
            pictures = video.codec_context.decode(packet)
        except av.FFmpegError:
            if info is not None:  # else it has begun between keyframes
                yield Damaged()
            continue
        for picture in pictures:
            if backlog.leaves_out(picture):
                yield LeftOut()
                continue
            if layout != (picture.width, picture.height, picture.format.name):
                layout = picture.width, picture.height, picture.format.name
                info = _info(container, video, picture, request)
                both = (warning, INTERLACED if picture.interlaced_frame else "")
                said = "; ".join(filter(None, both))
                yield Opened(info, description, video.codec_context.name, said)
            assert info is not None
            if pace is not None and picture.pts is not None:
                time.sleep(pace.until_due(float(picture.pts * video.time_base), time.monotonic()))
                captured = time.monotonic()
            seconds = None if picture.pts is None else picture.pts * Fraction(video.time_base)
            if container.format.name in _TIMELESS:
                seconds = Fraction(captured)
            planes = planes_of(picture, info, request.address)
            yield Picture(seconds, planes, bool(picture.key_frame), captured)


class _Backlog:
    """Whether packets wait to be read: in FFmpeg, the kernel, the camera, where nobody counts them.

    A read that had to wait proves that none do. As long as none has for `limit_seconds`, frames are
    decoded and left out; after twice that keyframes alone are decoded.
    """

    def __init__(self, limit_seconds: float | None, decoder: Any) -> None:
        self._limit, self._decoder = limit_seconds, decoder
        self._behind, self._caught_up = 0.0, time.monotonic()
        self._key_by: float | None = None
        """Until a keyframe, or then, pictures refer to some that were not decoded."""

    def read(self, waited: float, now: float) -> None:
        """A packet came at `now`, for which the reader had `waited` seconds."""
        if self._limit is None:
            return
        if waited >= WAIT_SECONDS:
            self._caught_up = now
        self._behind = now - self._caught_up
        keys_alone = self._behind > 2 * self._limit
        if keys_alone:
            self._key_by = now + KEY_SECONDS
        elif self._key_by is not None and now > self._key_by:
            self._key_by = None
        self._decoder.skip_frame = "NONKEY" if keys_alone else "DEFAULT"

    def leaves_out(self, picture: Any) -> bool:
        if picture.key_frame:
            self._key_by = None
        late = self._limit is not None and self._behind > self._limit
        return late or self._key_by is not None


def _packets(demuxed: Iterator[Any], timeout_seconds: float) -> Iterator[tuple[Any, float, float]]:
    """Each packet, how long it was waited for and when it was read; what is done with one in
    between is not counted as a wait.

    A read that its deadline ends gives what the parser still held, the next one the error: the
    stall would be noticed after twice the time.
    """
    while True:
        before = time.monotonic()
        packet = next(demuxed, None)
        captured = time.monotonic()
        if packet is None:
            return
        if captured - before >= timeout_seconds:
            raise av.TimeoutError(errno.ETIMEDOUT, "no packet")
        yield packet, captured - before, captured


def _info(container: Any, video: Any, picture: Any, request: Request) -> StreamInfo:
    info = read_stream_info(container, video, picture, request.address)
    rate = info.frame_rate
    if rate is None or not 1 <= rate <= 240:
        rate = FALLBACK_RATE
    return replace(
        info, time_base=TIME_BASE, frame_rate=rate, n_frames=None, duration_seconds=None,
        metadata={},
    )  # fmt: skip


def _sound(packet: Any) -> Sound:
    base = Fraction(packet.time_base)
    pts = packet.pts if packet.pts is not None else packet.dts
    seconds = None if pts is None else pts * base
    return Sound(seconds, bytes(packet), (packet.duration or 0) * base)


def _description(audio: Any) -> tuple[bytes | None, str]:
    """A NUT file of the stream with one packet of nothing: FFmpeg opens none without a packet.

    NUT also holds the G.711 of cameras, which Matroska refuses. Without one, and with a warning,
    where there is nothing to describe: MPEG-TS names a sound of which no packet has come, as from
    a camera whose microphone is off, or FFmpeg does not know the codec.
    """
    if audio is None:
        return None, ""
    buffer = io.BytesIO()
    try:
        options = {"fflags": "+bitexact"}  # equal for equal streams: live.py compares
        with av.open(buffer, "w", format="nut", container_options=options) as output:
            stream = output.add_stream_from_template(audio, opaque=True)
            output.start_encoding()
            packet = av.Packet(bytes(64))
            packet.stream, packet.time_base = stream, audio.time_base
            packet.pts, packet.dts, packet.is_keyframe = 0, 0, True
            output.mux(packet)
    except (av.FFmpegError, ValueError):
        return None, "its sound is silent or unknown and left out until the next connection"
    return buffer.getvalue(), ""


def _lost(error: av.FFmpegError, request: Request) -> Lost:
    if isinstance(error, av.HTTPUnauthorizedError | av.HTTPForbiddenError):
        return Lost("user or password is wrong; check them", final=True)
    # The first is PyAV's own deadline, the second FFmpeg's.
    if isinstance(error, av.ExitError | av.TimeoutError):
        return Lost("nothing came in time", stalled=True)
    local = not request.address.scheme and isinstance(error, av.FileNotFoundError)
    return Lost(cause_of(error), final=local or isinstance(error, _FINAL))
