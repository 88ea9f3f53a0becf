"""Owns the way from Frames and copied streams to one finished file. Knows no model and no queue."""

import contextlib
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av

from pipeline.containers import container_of, muxer_options
from pipeline.encoder import EncodeSettings, Encoding, add_video, cannot_hold, plan_format
from pipeline.errors import ConfigError, IntegrityError, RestoreError, SinkError
from pipeline.frames import Frame, StreamInfo
from pipeline.ledger import Ledger
from pipeline.matroska import MATROSKA, fill_room, make_room
from pipeline.output_file import OutputFile
from pipeline.passthrough import Passthrough
from pipeline.plan import StreamPlan
from pipeline.segments import Place, Segment, SegmentWriter, joined, write_secured
from pipeline.trial import lost_tags

logger = logging.getLogger(__name__)


class VideoWriter:
    """Encodes Frames into segments, joins them beside the final name, and gives that when complete.

    `copy_from` is the source file whose other streams, chapters and metadata are copied without
    re-encoding; `start_seconds` and `end_seconds` cut them as VideoSource cuts the video, and a
    start moves all timestamps so that the output begins near 0. Otherwise every pts is kept.

    The constructor writes the header, so that all that can be known to fail fails before the first
    frame is restored: ConfigError for a wrong setting or an existing target, SinkError for a place
    that cannot be written and for audio that would be lost. `warnings` says what will not be kept.

    `job` is the key under which finished segments outlive a failure (ledger.py): a writer of the
    same key takes them up and wants the frames after `place` alone. None: nothing outlives it.
    With `out_of_order` segments come finished, in any order, by `add`, and no frame is written.

    With `dry_run` the header goes to memory and nothing to the disk: `plan` and `warnings` are what
    they would be, and no frame can be written.
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
        job: Mapping[str, str] | None = None,
        dry_run: bool = False,
        out_of_order: bool = False,
    ) -> None:
        self.path = Path(path)
        self.warnings: list[str] = []
        self.n_written = self.n_muxed = 0
        self._info = info
        self._settings = settings
        self._ledger: Ledger | None = None
        self._segment: SegmentWriter | None = None
        self._output: Any = None
        self._passthrough: Passthrough | None = None
        self._container = container_of(self.path)
        self._file = OutputFile(self.path, copy_from, overwrite)
        self._format = plan_format(settings, info.pixel_format, self.warnings)
        try:
            if copy_from is not None:
                self._passthrough = Passthrough(
                    copy_from, start_seconds, end_seconds, info.start_pts * info.time_base
                )
            self._open_output(dry_run)
            self._stream = add_video(self._output, self.path, settings, info, self._format)
            if self._passthrough is not None:
                encoding = f"{settings.codec} {self._format.name}"
                self._passthrough.add_streams(self._output, self._stream, info, encoding)
                self.warnings += self._passthrough.warnings
            if self._container in MATROSKA:
                make_room(self._stream, info)
            self._write_header()
            self.encoding = self._describe_encoding()
            self._warn_of_rounding()
            self.warnings += lost_tags(self.path, self._container, settings, info, self._format)
            if not dry_run:
                self._open_ledger(job, out_of_order)
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
            self._give_up(error)

    @property
    def plan(self) -> list[StreamPlan]:
        """What becomes of each stream of the source."""
        return self._passthrough.plan if self._passthrough else []

    @property
    def place(self) -> Place | None:
        """The last source frame of the segments that were found finished; None at the start."""
        return self._ledger.place if self._ledger else None

    def write(self, frame: Frame) -> None:
        """Encode one frame; frames come in the order of their pts. Raises SinkError."""
        assert self._ledger is not None
        with self._sink_errors(f"frame {frame.index}"):
            if self._segment is None:
                path = self._ledger.path(len(self._ledger.finished))
                self._segment = SegmentWriter(path, self.encoding.open())
            self._segment.encode(frame, self.encoding.picture(frame))
            self.n_written += 1
            if frame.ends_segment:
                self._finish_segment()

    @property
    def finished(self) -> tuple[Segment, ...]:
        """The segments that are secured, by index."""
        return tuple(self._ledger.finished) if self._ledger else ()

    def add(self, segment: Segment, data: bytes) -> None:
        """Secure a segment that was encoded elsewhere as `encoding` says; `data` is its file."""
        assert self._ledger is not None
        with self._sink_errors(f"segment {segment.index}"):
            write_secured(self._ledger.path(segment.index), data)
            self._ledger.add(segment)
        self.n_written += segment.n_frames

    def forget(self) -> None:
        """Do away with every finished segment: they are not to be trusted."""
        assert self._ledger is not None
        self._ledger.forget()
        self.n_written = 0

    def close(self, announce: Callable[[Path], None] | None = None) -> None:
        """Finish the last segment, join all with what is copied, and give the file its name.

        `announce` is called with the complete file just before that: its size and times stay.
        Raises IntegrityError when the packets written are not as many as the frames given.
        """
        if self._output is None or self._ledger is None:
            return
        try:
            with self._sink_errors():
                self._finish_segment()
                self._join()
            self._check_counts()
            with self._sink_errors():
                self._output.close()
                if self._container in MATROSKA:
                    with self._file.part.open("r+b") as file:
                        fill_room(file, self._info)
            self._file.publish(announce)
        except BaseException as error:
            self._give_up(error)
            raise
        try:
            self._ledger.discard()
        except KeyboardInterrupt:  # the output is there: what is left is to tidy up
            self._ledger.discard()
        finally:
            self.abort()

    def _give_up(self, error: BaseException) -> None:
        """Abort, and note at the error what a later run can go on from."""
        if isinstance(error, IntegrityError) and self._ledger is not None:
            self._ledger.discard()  # not to be trusted
        self.abort()
        if self._ledger is not None and self._ledger.finished:
            n = len(self._ledger.finished)
            error.add_note(f"{n} finished segments are kept: run the same command again to go on")

    def abort(self) -> None:
        """Give up: close everything and remove the temporary file. Harmless after `close`.

        Segments that a later run can go on from stay.
        """
        if self._passthrough is not None:
            self._passthrough.close()
        if self._segment is not None:
            self._segment.abort()
            self._segment = None
        if self._ledger is not None:
            self._ledger.close()
        output, self._output = self._output, None
        if output is not None:
            with contextlib.suppress(av.FFmpegError, OSError, ValueError):
                output.close()
        self._file.release()

    def _open_output(self, in_memory: bool) -> None:
        if in_memory:
            self._file.check_folder()
        else:
            self._file.claim()
        # "file:" keeps a colon in the name from being read as a protocol.
        file = io.BytesIO() if in_memory else f"file:{self._file.part}"
        rates = self._passthrough.sample_rates if self._passthrough else []
        options = muxer_options(self._container, self._info.time_base, rates)
        if self._passthrough is not None:
            options |= self._passthrough.muxer_options(self._container)
        with self._sink_errors():
            self._output = av.open(file, "w", format=self._container, container_options=options)

    def _write_header(self) -> None:
        with self._sink_errors():
            try:
                self._output.start_encoding()
            except (av.ArgumentError, av.InvalidDataError, av.PatchWelcomeError) as error:
                # Every other stream was tried on its own: it is the video that does not fit.
                refusal = cannot_hold(self.path, self._settings.codec)
                raise ConfigError(f"{self.path}: {refusal} ({error.strerror})") from error

    def _open_ledger(self, job: Mapping[str, str] | None, out_of_order: bool) -> None:
        if job is not None:
            job = {**job, "encoder": hashlib.sha256(self.encoding.extradata).hexdigest()}
        try:
            self._ledger = Ledger(self.path, job, out_of_order)
        except OSError as error:
            raise SinkError(
                f"{self.path}: no folder for its segments beside it ({error.strerror}); choose "
                "another folder or name"
            ) from error
        self.n_written = self._ledger.n_frames

    def _describe_encoding(self) -> Encoding:
        time_base = self._info.time_base
        return Encoding(
            self.path, self._container, self._settings, self._info,
            self._format.name, self._passthrough.trim.shift(time_base) if self._passthrough else 0,
            bytes(self._stream.codec_context.extradata or b""),
        )  # fmt: skip

    def _finish_segment(self) -> None:
        if self._segment is not None and self._ledger is not None:
            finished = self._segment.finish(len(self._ledger.finished))
            self._segment = None
            self._ledger.add(finished)

    def _join(self) -> None:
        assert self._ledger is not None
        segments = self._ledger.finished
        parts = [self._ledger.path(segment.index) for segment in segments]
        delay = max((segment.delay for segment in segments), default=0)
        logger.info("%s: joining %d segments", self.path, len(parts))
        for packet in joined(parts, delay, self._info.time_base, self._stream):
            if self._passthrough is not None:
                due = packet.dts * self._info.time_base
                self._passthrough.mux_until(due)
            self._output.mux(packet)
            self.n_muxed += 1
        if self._passthrough is not None:
            self._passthrough.mux_until(None)

    def _check_counts(self) -> None:
        if self.n_written != self.n_muxed or not self.n_written:
            raise IntegrityError(
                f"{self.path}: {self.n_written} frames given, {self.n_muxed} packets encoded; "
                "nothing was kept, report this with the source"
            )

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
