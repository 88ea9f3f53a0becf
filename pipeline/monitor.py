"""What a user sees of a running job: a bar, or log lines as text or JSON. Knows no stage."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from pipeline.batch import BatchProgress

logger = logging.getLogger(__name__)

LogFormat = Literal["text", "json"]
OnFrame = Callable[[int, int | None], None]
OnBatch = Callable[["BatchProgress"], None]

PROGRESS_SECONDS = 10.0
"""How often a job that shows no bar logs where it is."""
STREAM_SECONDS = 60.0
"""How often a live stream does, after the first time: sixteen of them run for months."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object a line."""
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "values", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def log_level(log_format: LogFormat, *, quiet: bool, verbose: bool) -> int:
    """What of the log is shown; who reads JSON gets the lines that others see as a bar."""
    if quiet:
        return logging.ERROR
    return logging.INFO if verbose or log_format == "json" else logging.WARNING


def shows_bar(log_format: LogFormat, *, quiet: bool) -> bool:
    """Whether a bar is shown: on a terminal alone."""
    return not (quiet or log_format == "json") and sys.stderr.isatty()


def configure_logging(log_format: LogFormat, level: int) -> None:
    """Send the log of this package and of the workers to stderr, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(levelname)s %(message)s")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else text)
    for package in ("pipeline", "workers"):
        root = logging.getLogger(package)
        root.handlers[:] = [handler]
        root.setLevel(level)
        root.propagate = False


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} fps" if task.speed else "… fps")


class _Remaining(TimeRemainingColumn):
    """As its task says, where it does."""

    def render(self, task: Task) -> Text:
        if "eta" not in task.fields:
            return super().render(task)
        eta = task.fields["eta"]
        return Text("-:--:--" if eta is None else str(timedelta(seconds=eta)))


@contextmanager
def progress(name: str, *, bar: bool) -> Iterator[OnFrame]:
    """Show how far a job is: a bar on a terminal, else a log line every PROGRESS_SECONDS."""
    if not bar:
        yield _log_progress(name)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(),
        TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(name, total=None)
        yield lambda done, expected: shown.update(
            task, completed=done, total=max(done, expected) if expected else None
        )


def _log_progress(name: str) -> OnFrame:
    start = last = time.monotonic()
    earlier: int | None = None

    def on_frame(done: int, expected: int | None) -> None:
        nonlocal last, earlier
        now = time.monotonic()
        if earlier is None:
            earlier = done - 1  # a resumed job does not start at 1
        if now - last < PROGRESS_SECONDS:
            return
        last = now
        rate = (done - earlier) / (now - start)
        eta = (expected - done) / rate if expected and expected > done else None
        values = {"frames": done, "expected": expected, "fps": round(rate, 2),
                  "eta_seconds": None if eta is None else round(eta)}  # fmt: skip
        logger.info(
            "%s: %d of %s frames, %.1f fps", name, done, expected or "?", rate,
            extra={"values": values},
        )  # fmt: skip

    return on_frame


@contextmanager
def batch_progress(*, bar: bool) -> Iterator[OnBatch]:
    """Show how far a batch is: a bar for each file in work and one for all, else log lines."""
    if not bar:
        yield _log_batch()
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("ETA"), _Remaining(),
    )  # fmt: skip
    # Segments come back once in minutes, of which rich looks at the last half by default.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, speed_estimate_period=3600
    ) as shown:
        start = time.monotonic()
        whole = shown.add_task("all files", total=1.0, eta=None)
        files: dict[str, TaskID] = {}

        def on_batch(now: "BatchProgress") -> None:
            text = f"{now.n_done} of {now.n_files} files, {now.n_failed} failed"
            eta = _seconds_left(now, time.monotonic() - start)
            shown.update(whole, completed=now.share, description=text, eta=eta)
            if now.in_work:
                task = files.setdefault(now.file, TaskID(-1))
                if task == -1:
                    task = files[now.file] = shown.add_task(Path(now.file).name, total=None)
                shown.update(task, completed=now.n_frames, total=now.n_expected or None)
            elif now.file in files:
                shown.remove_task(files.pop(now.file))

        yield on_batch


def _seconds_left(now: "BatchProgress", seconds: float) -> int | None:
    """At the pace of all that this call has done in so many; None before there is any."""
    done = now.share - now.share_given
    return round((1 - now.share) / done * seconds) if done > 0 else None


def _log_batch() -> OnBatch:
    start = last = time.monotonic()

    def on_batch(now: "BatchProgress") -> None:
        nonlocal last
        seconds = time.monotonic()
        if seconds - last < PROGRESS_SECONDS:
            return
        last = seconds
        eta = _seconds_left(now, seconds - start)
        values = {"files": now.n_files, "done": now.n_done, "failed": now.n_failed,
                  "share": round(now.share, 4), "eta_seconds": eta, "file": now.file,
                  "frames": now.n_frames, "expected": now.n_expected}  # fmt: skip
        logger.info(
            "%d of %d files, %d failed, %.1f %% of the bytes; %s: %d of %s frames", now.n_done,
            now.n_files, now.n_failed, 100 * now.share, now.file, now.n_frames,
            now.n_expected or "?", extra={"values": values},
        )  # fmt: skip

    return on_batch


@contextmanager
def reporting(name: str, values: Callable[[], dict[str, float]]) -> Iterator[None]:
    """Log the figures of a stream after PROGRESS_SECONDS, every STREAM_SECONDS, and at its end."""
    ended = threading.Event()

    def report() -> None:
        last, seconds = False, PROGRESS_SECONDS
        while not last:
            last, seconds = ended.wait(seconds), STREAM_SECONDS
            now = values()
            text = ", ".join(f"{key} {value:g}" for key, value in now.items() if value)
            logger.info("%s: %s", name, text, extra={"values": now})

    thread = threading.Thread(target=report, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
