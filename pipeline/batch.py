"""Many files on a Ray cluster: owns which segments are sent out, and what comes of each file.

A file's segments are those of a local job, cut out of it as compressed packets (cut.py), restored
wherever there is a worker (part_job.py), secured beside the output as they come back in any order
(ledger.py) and joined as a local job joins them. Knows no Ray and no pixels.
"""

import logging
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from copy import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.cut import NotCut, Span
from pipeline.errors import ConfigError, DeviceError, Interrupted, RestoreError
from pipeline.in_work import FileInWork
from pipeline.inputs import BatchItem
from pipeline.part_job import PartJob, part_workers, weights_of
from pipeline.parts import Part
from pipeline.remote import Place, place
from pipeline.report import BatchReport, FileReport, Journal
from pipeline.stages import ahead, as_they_come
from pipeline.supervise import note_place

logger = logging.getLogger(__name__)

FILES_AHEAD, PARTS_AHEAD = 2, 4
"""Files that are fetched, opened and planned, and parts that are read, before a worker has room."""
PATIENCE_SECONDS = 0.2
"""How long what comes back waits while a part is fetched or cut."""
JOINERS, JOINS_WAITING = 2, 8
"""Finished files that are joined at the same time, and that may wait for that, held open."""
ASKING = 16
"""Threads that ask at the start what is there: a store answers each question in some 50 ms."""


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Where a batch is."""

    file: str
    """The one that got further."""
    n_frames: int
    n_expected: int
    """0: not known."""
    in_work: bool
    """Whether there is more to do for it."""
    share: float
    """Of all the files' bytes; 1 at the end."""
    share_given: float
    """Of `share`, what took no work of this call: found finished, or failed."""
    n_done: int
    """Files that are finished, with those that were found so."""
    n_failed: int
    n_files: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the work is done."""

    address: str | None = None
    """None: a private Ray on this machine; `auto` or HOST:PORT: the cluster there."""
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    """0: the workers restore on CPUs; less than 1: several share a GPU."""
    n_workers: int | None = None
    """None: as many as there is room for, at any time."""

    @property
    def device(self) -> str:
        """As a worker sees it: Ray shows each its own GPUs, counted from 0."""
        return "cuda:0" if self.gpus_per_worker else "cpu"

    @property
    def threads(self) -> int:
        """Of a worker's network and decoder."""
        return max(1, int(self.cpus_per_worker))


def default_work_folder() -> Path:
    """Where files from and for URLs are held, unless another folder is named."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "restore-batch"


def restore_batch(
    items: Sequence[BatchItem], folder: str | Place, cluster: Cluster | None = None, *,
    work: Path | None = None, on_progress: Callable[[BatchProgress], None] | None = None,
) -> BatchReport:  # fmt: skip
    """Restore many files; one that fails stops no other, and is named with its cause.

    `folder`, a path or a URL, holds the journal by which a later call skips what is finished.
    `work` holds the files from and for URLs while they are in work. An interrupted call keeps the
    finished segments of the files in work. Raises ConfigError before anything is started, SinkError
    where the journal cannot be written.
    """
    cluster, work = cluster or Cluster(), work or default_work_folder()
    return _Batch(items, place(folder), work, cluster, on_progress).run()


class _Batch:
    def __init__(
        self, items: Sequence[BatchItem], folder: Place, work: Path, cluster: Cluster,
        on_progress: Callable[[BatchProgress], None] | None,
    ) -> None:  # fmt: skip
        self._cluster, self._on_progress = cluster, on_progress
        for item in items:
            _check_device(item, cluster)
        models = {item.config.model.model for item in items}
        self._weights = {model: weights_of(model) for model in models}
        self._journal = Journal(folder)
        self._stop = threading.Event()
        with ThreadPoolExecutor(ASKING, "ask") as threads:
            files = threads.map(lambda item: FileInWork(item, work, self._stop), items)
        # The largest first: at the end, when workers run out of work, little is left of each.
        self._files = sorted(files, key=lambda file: -file.n_bytes)
        self._out: dict[int, tuple[FileInWork, int, Span | None]] = {}
        self._n_given = 0
        self._again: deque[FileInWork] = deque()
        """Files whose parts were none, to be done as one; with all that they hold, meanwhile."""
        self._failed: deque[tuple[FileInWork, RestoreError]] = deque()
        """Found by the threads that read ahead; it is for this one to close a file."""
        self._joining: deque[tuple[FileInWork, Future[FileReport]]] = deque()
        self._joiners = ThreadPoolExecutor(JOINERS, "join")
        self._bytes_done = self._bytes_given = 0.0
        self._n_bytes = sum(file.n_bytes for file in self._files)
        self._counts = {"done": 0, "skipped": 0, "failed": 0}

    def run(self) -> BatchReport:
        began = time.monotonic()
        _allow_many_files()
        self._skip_finished()
        try:
            if todo := self._open_files():
                self._restore(todo)
        except Exception as error:  # of all of them: no Ray, no worker left
            for file in self._open_files():
                own = copy(_of_file(file, error))
                own.__dict__.pop("__notes__", None)  # else each would note its own at all of them
                self._fail(file, own)
        except BaseException:
            for _, joined in self._joining:
                joined.cancel()  # those that have begun may come to their end
            raise
        finally:
            self._on_progress = None
            self._collect(wait=True)
            self._joiners.shutdown()
            for file in self._open_files():
                file.fail(Interrupted(f"{file.item.source}: interrupted"))
            self._journal.close()
        reports = tuple(file.report for file in self._files if file.report)
        return BatchReport(reports, round(time.monotonic() - began, 3))

    def _restore(self, todo: list[FileInWork]) -> None:
        sent = {name: data for name, (_, data) in self._weights.items() if data is not None}
        cluster = self._cluster
        job = PartJob(sent, cluster.device, cluster.threads)
        with part_workers(
            job, address=cluster.address, cpus=cluster.cpus_per_worker,
            gpus=cluster.gpus_per_worker, n_workers=cluster.n_workers,
        ) as do, closing(ahead(self._opened(todo), FILES_AHEAD)) as opened:  # fmt: skip
            self._do(do, opened)
            while self._again:
                self._do(do, ())

    def _do(
        self, do: Callable[[Iterable[Part | None]], Iterator[Any]], files: Iterable[FileInWork]
    ) -> None:
        self._out, self._n_given = {}, 0
        coming = as_they_come(self._parts(files), PARTS_AHEAD, PATIENCE_SECONDS)
        with closing(coming) as parts:
            try:
                for outcome in do(parts):
                    self._take(outcome)
                    self._collect(wait=False)
            except BaseException:  # closing waits for what is being fetched
                self._stop.set()
                raise
        self._collect(wait=True)

    def _opened(self, files: list[FileInWork]) -> Iterator[FileInWork]:
        """Files whose parts can be sent out; runs in a thread of its own, ahead of them."""
        for file in files:
            note_place(f"{file.item.source} or a file before it")
            try:
                weights = self._weights[file.item.config.model.model][0]
                file.open(
                    self._cluster.device, self._cluster.threads, weights.sha256, weights.stride,
                    self._journal,
                )  # fmt: skip
            except Exception as error:
                self._failed.append((file, _of_file(file, error)))
            else:
                yield file

    def _parts(self, files: Iterable[FileInWork]) -> Iterator[Part]:
        """Likewise the parts: `_out` says of each, by its number, whose it is."""
        for file in self._again_first(files):
            version = file.version
            if not file.n_waiting:  # an earlier run was stopped while it joined them
                self._join(file)
                continue
            try:
                with closing(file.parts()) as parts:
                    for span, part in parts:
                        if file.report is not None or file.version != version:
                            break
                        self._out[self._n_given] = file, version, span
                        self._n_given += 1
                        yield part
            except Exception as error:
                self._failed.append((file, _of_file(file, error)))

    def _again_first(self, files: Iterable[FileInWork]) -> Iterator[FileInWork]:
        for file in chain(files, [None]):
            while self._again:
                yield self._again.popleft()
            if file is not None:
                yield file

    def _take(self, outcome: Any) -> None:
        file, version, span = self._out.pop(outcome.number)
        if file.report is not None or file.version != version:
            return
        file.n_retries += outcome.tries - 1
        try:
            if outcome.error is not None:
                raise DeviceError(f"{file.item.source}: {_named(span)}: {outcome.error}")
            if isinstance(outcome.result, RestoreError):
                raise outcome.result
            if file.take(outcome.result):
                self._join(file)
        except Exception as error:
            self._fail(file, _of_file(file, error))
        else:
            self._show(file)

    def _join(self, file: FileInWork) -> None:
        self._joining.append((file, self._joiners.submit(file.finish, self._journal)))

    def _collect(self, *, wait: bool) -> None:
        """What the other threads have come to: files that failed, files that were joined."""
        while self._failed:
            self._fail(*self._failed.popleft())
        for _ in range(len(self._joining)):
            file, joined = self._joining.popleft()
            if not wait and not joined.done() and len(self._joining) < JOINS_WAITING:
                self._joining.append((file, joined))
                continue
            try:
                report = joined.result()
            except CancelledError:
                continue  # interrupted
            except Exception as error:
                self._fail(file, _of_file(file, error))
            else:
                self._close(file, report)
                logger.info("%s: %d frames", report.output, report.n_frames)

    def _fail(self, file: FileInWork, error: RestoreError) -> None:
        if file.report is not None:
            return
        if isinstance(error, NotCut) and not file.is_whole:
            logger.warning("%s; the file is done again as one part", file.named(str(error)))
            file.start_over_whole()
            self._again.append(file)
            return
        file.fail(error)
        assert file.report is not None
        logger.error("%s", file.report.error)
        self._close(file, file.report)

    def _close(self, file: FileInWork, report: FileReport) -> None:
        file.close(report)
        self._counts[report.status] += 1
        self._show(file)

    def _open_files(self) -> list[FileInWork]:
        return [file for file in self._files if file.report is None]

    def _skip_finished(self) -> None:
        def asked(file: FileInWork) -> int | None:
            sha256 = self._weights[file.item.config.model.model][0].sha256
            return self._journal.finished(file.item, sha256)

        with ThreadPoolExecutor(ASKING, "ask") as threads:
            found = list(threads.map(asked, self._files))
        for file, n_frames in zip(self._files, found, strict=True):
            if n_frames is not None:
                item = file.item
                self._close(file, FileReport(item.source, item.output, "skipped", n_frames))

    def _show(self, file: FileInWork) -> None:
        n_frames, n_expected = file.n_frames, file.n_expected
        share = 1 if file.report else n_frames / n_expected if n_expected else 0
        gained = (share - file.share_shown) * file.n_bytes
        self._bytes_done += gained
        file.share_shown = share
        if file.report and file.report.status != "done":
            self._bytes_given += gained
        elif n_expected:
            self._bytes_given += file.n_bytes * file.n_found / n_expected
            file.n_found = 0
        if self._on_progress is not None:
            total, counts = self._n_bytes or 1, self._counts
            self._on_progress(
                BatchProgress(
                    str(file.item.source), n_frames, n_expected, file.report is None,
                    self._bytes_done / total if self._n_bytes else 1.0, self._bytes_given / total,
                    counts["done"] + counts["skipped"], counts["failed"], len(self._files),
                )
            )  # fmt: skip


def _of_file(file: FileInWork, error: Exception) -> RestoreError:
    """Whatever one file does to this program, the others go on."""
    if isinstance(error, RestoreError):
        return error
    logger.debug("%s", file.item.source, exc_info=error)
    cause = " ".join(str(error).split())
    return RestoreError(f"{file.item.source}: {type(error).__name__}: {cause}; report this")


def _check_device(item: BatchItem, cluster: Cluster) -> None:
    device = item.config.model.device
    if device != "auto" and device.partition(":")[0] != cluster.device.partition(":")[0]:
        raise ConfigError(
            f"{item.source}: device {device!r} is not what the workers have; leave it at auto and "
            "choose with --gpus-per-worker"
        )


def _named(span: Span | None) -> str:
    if span is None:
        return "the whole file"
    last = span.first_frame + span.n_frames - 1
    return f"segment {span.index} (frames {span.first_frame} to {last})"


def _allow_many_files() -> None:
    """Every file in work holds some descriptors: take as many as this process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
