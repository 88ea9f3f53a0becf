"""Owns the way from Frames and copied streams to one finished file. Knows no model and no queue."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av

from pipeline.encoder import (
    EncodeSettings,
    default_settings,
    encoder_options,
    plan_format,
    tag_encoder,
    to_picture,
)
from pipeline.errors import ConfigError, IntegrityError, RestoreError, SinkError
from pipeline.frames import Frame, StreamInfo
from pipeline.passthrough import Passthrough

__all__ = ["CONTAINERS", "EncodeSettings", "VideoWriter", "default_settings"]

CONTAINERS = {
    ".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm", ".nut": "nut",
}  # fmt: skip
"""FFmpeg's muxer by the extension of the output's name."""


# FFmpeg would move the whole file so that the priming of AAC does not start below zero.
_MUXER_OPTIONS = {"avoid_negative_ts": "disabled"}


class VideoWriter:
    """Encodes Frames into a file beside its final name, and gives it that name when complete.

    `copy_from` is the source file whose other streams, chapters and metadata are copied without
    re-encoding; `start_seconds` and `end_seconds` cut them as VideoSource cuts the video, and a
    start moves all timestamps so that the output begins near 0. Otherwise every pts is kept.

    The constructor writes the header, so that all that can be known to fail fails before the first
    frame is restored: ConfigError for a wrong setting or an existing target, SinkError for a place
    that cannot be written and for audio that would be lost. `warnings` says what will not be kept.
    """

    def __init__(
        self,
        path: str | Path,
        info: StreamInfo,
        settings: EncodeSettings,
        *,
        copy_from: Path | None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        overwrite: bool = False,
        threads: int = 0,
    ) -> None:
        self.path = Path(path)
        self.warnings: list[str] = []
        self.n_written = self.n_muxed = 0
        self._info = info
        self._durations: dict[int, int] = {}
        self._overwrite = overwrite
        self._part = self.path.with_name(f".{self.path.name}.part")
        self._owns_part = False
        self._lock: Any = None  # held on the temporary file: two jobs would mix in it
        self._output: Any = None
        self._passthrough: Passthrough | None = None
        _check_target(self.path, copy_from, overwrite)
        self._format = plan_format(settings, info.pixel_format, self.warnings)
        try:
            self._open_part()
            self._stream = self._add_video(settings, threads)
            if copy_from is not None:
                self._passthrough = Passthrough(copy_from, start_seconds, end_seconds)
                self._passthrough.add_streams(self._output, self._stream, info)
                self.warnings += self._passthrough.warnings
            self._shift = self._passthrough.trim.shift(info.time_base) if self._passthrough else 0
            self._write_header()
            self._warn_of_rounding()
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abort()

    def write(self, frame: Frame) -> None:
        """Encode one frame; frames come in the order of their pts. Raises SinkError."""
        picture = self._picture(frame)
        with self._sink_errors(f"frame {frame.index}"):
            packets = self._stream.encode(picture)
        self.n_written += 1
        self._mux(packets)

    def close(self) -> None:
        """Drain the encoder, copy what remains, and give the file its name.

        Raises IntegrityError when the packets written are not as many as the frames given.
        """
        if self._output is None:
            return
        try:
            with self._sink_errors():
                packets = self._stream.encode(None) if self.n_written else []
            self._mux(packets)
            if self._passthrough is not None:
                with self._sink_errors():
                    self._passthrough.mux_until(self._output, None)
            self._check_counts()
            with self._sink_errors():
                self._output.close()
            self._publish()
        finally:
            self.abort()

    def abort(self) -> None:
        """Give up: close everything and remove the temporary file. Harmless after `close`."""
        if self._passthrough is not None:
            self._passthrough.close()
        output, self._output = self._output, None
        if output is not None:
            with contextlib.suppress(av.FFmpegError, OSError, ValueError):
                output.close()
        if self._owns_part:
            self._owns_part = False
            with contextlib.suppress(OSError):
                self._part.unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()

    def _open_part(self) -> None:
        try:
            # Opened here because FFmpeg opens it only with the header: a bad place fails first.
            self._lock = self._part.open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._owns_part = True
        except BlockingIOError as error:
            raise SinkError(f"{self.path}: another job is writing it; wait for that") from error
        except OSError as error:
            raise SinkError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder or name"
            ) from error
        # "file:" keeps a colon in the name from being read as a protocol.
        container = CONTAINERS[self.path.suffix.lower()]
        url = f"file:{self._part}"
        with self._sink_errors():
            self._output = av.open(url, "w", format=container, container_options=_MUXER_OPTIONS)

    def _add_video(self, settings: EncodeSettings, threads: int) -> Any:
        info = self._info
        try:
            stream = self._output.add_stream(settings.codec, rate=info.frame_rate)
        except ValueError as error:
            raise ConfigError(
                f"{self.path}: {self.path.suffix} cannot hold {settings.codec}; use .mkv or "
                "another codec"
            ) from error
        context = stream.codec_context
        stream.width, stream.height = info.width, info.height
        # Both, or the muxer resamples the pts to the frame rate.
        stream.time_base = context.time_base = info.time_base
        context.thread_count = threads
        tag_encoder(context, info, self._format)
        if info.rotation:
            stream.set_display_rotation(info.rotation)
        context.options = encoder_options(settings, info, self._format)
        self._open_encoder(context, settings)
        return stream

    def _open_encoder(self, context: Any, settings: EncodeSettings) -> None:
        try:
            context.open()
        except (av.FFmpegError, ValueError) as error:
            raise ConfigError(
                f"{self.path}: {settings.codec} does not open with preset {settings.preset}, "
                f"crf {settings.crf}, {self._format.name}, options {settings.options} "
                f"({getattr(error, 'strerror', error)}); check them"
            ) from error
        if context.options:
            raise ConfigError(
                f"{self.path}: {settings.codec} has no option {' '.join(context.options)}; "
                "remove it"
            )

    def _write_header(self) -> None:
        with self._sink_errors():
            self._output.start_encoding()

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            if packet.pts not in self._durations:
                raise IntegrityError(f"{self.path}: the encoder gave a packet for no frame")
            # Encoders that reorder lose or invent it, and a muxer ends the last frame by it.
            packet.duration = self._durations.pop(packet.pts)
            due = (packet.pts if packet.dts is None else packet.dts) * Fraction(packet.time_base)
            with self._sink_errors():
                if self._passthrough is not None:
                    self._passthrough.mux_until(self._output, due)
                self._output.mux(packet)
            self.n_muxed += 1

    def _picture(self, frame: Frame) -> Any:
        picture = to_picture(frame, self._info, self._format)
        picture.pts = frame.pts - self._shift
        picture.time_base = self._info.time_base
        picture.duration = self._durations[picture.pts] = frame.duration
        picture.pict_type = 0  # NONE: the encoder chooses
        return picture

    def _check_counts(self) -> None:
        if self.n_written != self.n_muxed or not self.n_written:
            raise IntegrityError(
                f"{self.path}: {self.n_written} frames given, {self.n_muxed} packets encoded; "
                "nothing was kept, report this with the source"
            )

    def _publish(self) -> None:
        try:
            with self._part.open("rb") as file:
                os.fsync(file.fileno())
            if not self._overwrite and self.path.exists():
                raise SinkError(f"{self.path}: appeared while it was written; move it away")
            os.replace(self._part, self.path)
            self._owns_part = False
        except OSError as error:
            raise SinkError(f"{self.path}: cannot be completed ({error.strerror})") from error

    def _warn_of_rounding(self) -> None:
        ticks = self._info.time_base / Fraction(self._stream.time_base)
        if ticks.denominator != 1:
            self.warnings.append(
                f"timestamps in units of {self._info.time_base} s are rounded to "
                f"{self._stream.time_base} s: {self.path.suffix} holds no finer ones"
            )

    @contextlib.contextmanager
    def _sink_errors(self, place: str = "") -> Iterator[None]:
        try:
            yield
        except RestoreError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or str(error)
            where = f" at {place}" if place else ""
            raise SinkError(
                f"{self.path}: cannot be written{where} ({cause}); check the space left and the "
                "container"
            ) from error


def _check_target(path: Path, copy_from: Path | None, overwrite: bool) -> None:
    if path.suffix.lower() not in CONTAINERS:
        known = " ".join(CONTAINERS)
        raise ConfigError(f"{path}: unknown extension {path.suffix!r}; use one of {known}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name a file in it")
    if not path.exists():
        return
    if copy_from is not None and copy_from.exists() and path.samefile(copy_from):
        raise ConfigError(f"{path}: is the source itself; choose another name")
    if not overwrite:
        raise ConfigError(f"{path}: exists already; choose another name or allow overwriting")
