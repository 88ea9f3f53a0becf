"""One file of a batch: owns what is here of it, from its fetching to its finished output.

A file from a URL is fetched before it is planned, an output for one is sent when it is complete,
and both are removed when it is done. Knows no Ray and no other file.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from pipeline.cut import CutPlan, Span, check_joints
from pipeline.derived import encode_settings, open_source, plan_grid, resume_key
from pipeline.encode import VideoWriter
from pipeline.errors import ConfigError, SinkError, SourceError
from pipeline.file_lock import FileLock
from pipeline.inputs import BatchItem
from pipeline.irregular import Irregular, irregular_before, unkept_warning
from pipeline.parts import Part, RestoredPart
from pipeline.remote import Place, Remote
from pipeline.report import FileReport, Journal, state_of

logger = logging.getLogger(__name__)


class FileInWork:
    """One file in work: its plan and its writer, from `open` to `finish` or `fail`."""

    def __init__(self, item: BatchItem, work: Path, stop: threading.Event) -> None:
        """Once `stop` is set no source is fetched to its end."""
        self.item, self._stop = item, stop
        self.n_bytes = _size(item.source)
        source, output = item.source, item.output
        number = hashlib.sha256(os.fsencode(f"{source}\n{output}")).hexdigest()[:16]
        self._held = work / number
        """Where a source from a URL and an output for one are meanwhile, for this process alone."""
        self._lock = FileLock(work / f"{number}.lock")
        self._source = self._here(source, "source")
        self._output = self._here(output, "output")
        self.report: FileReport | None = None
        self.n_retries = 0
        self.n_waiting = 0
        """Parts that are not back yet."""
        self.version = 0
        """Goes up when its parts are planned anew; what is still out is of no use then."""
        self.share_shown = 0.0
        self.n_found = 0
        """Frames that an earlier run finished."""
        self._began = time.monotonic()
        self._writer: VideoWriter | None = None
        self._irregular = Irregular()
        """Of the parts that are back."""

    def open(
        self, device: str, threads: int, weights_sha256: str, stride: int, journal: Journal
    ) -> None:  # fmt: skip
        """Fetch and plan it and begin its output; `device` and `threads` are those of a worker.

        Raises RestoreError.
        """
        source, output, config = self._source, self._output, self.item.config
        self._began, self._sha256 = time.monotonic(), weights_sha256
        start, end = config.start_seconds, config.end_seconds
        if any(isinstance(file, Remote) for file in (self.item.source, self.item.output)):
            self._hold()
        overwrite = self._may_replace(journal)
        self._state = self._fetched()
        # Parts are decoded in software, whose pictures may be of another format than a device's.
        with open_source(source, config, hwaccel="none") as video:
            self._grid = plan_grid(video.info, config, device, stride)
            settings = encode_settings(output, video.info, config)
            self._plan = CutPlan(video, config.segment.frames)
            devices = ["cluster", device, threads]
            job = resume_key(source, output, config, weights_sha256, devices, self._grid, settings)
            try:
                output.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise SinkError(f"{output}: no folder for it ({error.strerror})") from error
            self._writer = VideoWriter(
                output, video.info, settings, copy_from=source, start_seconds=start,
                end_seconds=end, overwrite=overwrite, job=job, out_of_order=True,
            )  # fmt: skip
            self._unkept = frozenset(video.tally.unkept)
        self._warnings = (*self._writer.warnings, *unkept_warning(self._unkept))
        for warning in self._warnings:
            logger.warning("%s: %s", self.item.source, warning)
        self._forget_others()
        self._irregular = self._found_before()
        self.n_found = self._writer.n_written
        self.n_waiting = len(self._missing()) if self._plan.spans else 1

    @property
    def is_whole(self) -> bool:
        """Whether all of it is one part."""
        return not self._plan.spans

    @property
    def n_frames(self) -> int:
        """Frames that are secured."""
        return (
            self.report.n_frames if self.report else self._writer.n_written if self._writer else 0
        )

    @property
    def n_expected(self) -> int:
        """Frames that the output will have; 0 where that is not known."""
        if self.report is not None or self._writer is None:
            return self.n_frames
        return sum(span.n_frames for span in self._plan.spans)

    def start_over_whole(self) -> None:
        """Its parts were not what was planned: all of it is one part."""
        assert self._writer is not None
        self._writer.forget()
        self._plan.spans, self._irregular = (), Irregular()
        self.version += 1
        self.n_waiting = 1

    def parts(self) -> Generator[tuple[Span | None, Part]]:
        """What is not finished yet, read as it is asked for. Raises SourceError."""
        if self.is_whole:
            yield None, self._part(self._plan.whole())
            return
        with closing(self._plan.cuts(self._missing())) as cuts:
            for cut in cuts:
                yield cut.span, self._part(cut)

    def take(self, restored: RestoredPart) -> bool:
        """Secure finished segments; whether they are all there. Raises NotCut, SinkError."""
        assert self._writer is not None
        for segment, data in restored.segments:
            self._writer.add(segment, data)
        self._irregular += restored.irregular
        self.n_waiting -= 1
        return not self.n_waiting

    def finish(self, journal: Journal) -> FileReport:
        """Join the segments and give the output its name. Raises RestoreError."""
        assert self._writer is not None
        segments, n_frames = self._writer.finished, self._writer.n_written
        check_joints(self._source, segments)
        self._writer.close(lambda file: self._record(journal, n_frames, file))
        deinterlace = self.item.config.decode.deinterlace
        irregular = tuple(self._irregular.warnings(deinterlace, said=self._unkept))
        for warning in irregular:
            logger.warning("%s: %s", self.item.source, warning)
        return FileReport(
            self.item.source, self.item.output, "done", n_frames, len(segments),
            self.n_retries, self._seconds(), (*self._warnings, *irregular),
        )  # fmt: skip

    def close(self, report: FileReport) -> None:
        """Note what became of it and let go of the rest."""
        if self._writer is not None:
            self._plan.spans = ()  # hundreds of bytes a segment, of thousands of files
        self.report, self._writer = report, None
        if not self._lock.is_held:
            return
        for file in (self._source, self._output):
            if file.parent == self._held:
                with suppress(OSError):
                    file.unlink(missing_ok=True)
        with suppress(OSError):  # finished segments may be there for a later run
            self._held.rmdir()
        self._lock.release()

    def fail(self, error: BaseException) -> None:
        """Close it without an output; a later run goes on from its finished segments."""
        if self._writer is not None:
            self._writer.__exit__(type(error), error, None)
        notes = "".join(f" ({note})" for note in dict.fromkeys(getattr(error, "__notes__", ())))
        self.close(
            FileReport(
                self.item.source, self.item.output, "failed", error=self.named(f"{error}{notes}"),
                exit_code=getattr(error, "exit_code", 1), n_retries=self.n_retries,
                seconds=self._seconds(),
            )
        )  # fmt: skip

    def _here(self, file: Place, name: str) -> Path:
        return file if isinstance(file, Path) else self._held / f"{name}{file.suffix}"

    def named(self, text: str) -> str:
        """A message with the user's names for the files that are held here meanwhile."""
        for here, there in ((self._source, self.item.source), (self._output, self.item.output)):
            text = text.replace(str(here), str(there))
        return text

    def _may_replace(self, journal: Journal) -> bool:
        """Whether the writer may overwrite; a file at a URL is looked for before all the work."""
        output, allowed = self.item.output, self.item.config.overwrite
        if isinstance(output, Remote):
            try:
                if not allowed and not journal.began(self.item) and output.exists():
                    raise ConfigError(
                        f"{output}: exists already; choose another name or allow overwriting"
                    )
            except OSError as error:
                raise SinkError(f"{output}: cannot be written ({error.strerror})") from error
            return True
        return allowed

    def _hold(self) -> None:
        """Two runs of the same command would fetch to the same file, and remove it."""
        try:
            self._held.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except BlockingIOError as error:
            raise SinkError(f"{self.item.output}: another job has it in work; wait") from error
        except OSError as error:
            raise SinkError(
                f"{self._held}: cannot hold {self.item.source} ({error.strerror}); choose a "
                "--work-dir"
            ) from error

    def _fetched(self) -> list[Any]:
        """The state of the source, which is on this machine then."""
        source = self.item.source
        try:
            if not isinstance(source, Remote):
                return state_of(source)
            return source.fetch(self._source, self._stop)
        except OSError as error:
            raise SourceError(f"{source}: cannot be read ({error.strerror}); check it") from error

    def _record(self, journal: Journal, n_frames: int, file: Path) -> None:
        """The complete output is about to get its name: send it away first, if it is to be sent."""
        output, state = self.item.output, None
        if isinstance(output, Remote):
            journal.add(self.item, self._sha256, n_frames, self._state, None)
            try:
                state = output.store(file)
            except OSError as error:
                raise SinkError(f"{output}: cannot be written ({error.strerror})") from error
        journal.add(self.item, self._sha256, n_frames, self._state, state or state_of(file))

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 3)

    def _part(self, piece: Any) -> Part:
        assert self._writer is not None
        return Part(
            self._source, piece, self._grid, self._writer.encoding, self.item.config,
            self._sha256,
        )  # fmt: skip

    def _missing(self) -> list[Span]:
        assert self._writer is not None
        finished = {segment.index for segment in self._writer.finished}
        return [span for span in self._plan.spans if span.index not in finished]

    def _found_before(self) -> Irregular:
        """What the segments that an earlier run finished had."""
        assert self._writer is not None
        # Each part counts from 0; the segments of a whole file count on from one to the next.
        finished = self._writer.finished[-1:] if self.is_whole else self._writer.finished
        return sum((irregular_before(segment.counts) for segment in finished), Irregular())

    def _forget_others(self) -> None:
        """Segments of an earlier run that are not as planned: it did the file as a whole."""
        assert self._writer is not None
        planned = {(span.index, span.start_pts, span.n_frames) for span in self._plan.spans}
        if not {(s.index, s.start_pts, s.n_frames) for s in self._writer.finished} <= planned:
            self._writer.forget()


def _size(path: Place) -> int:
    try:
        size: int = state_of(path)[0]
        return size
    except OSError:
        return 0  # fails when it is opened, with its cause
