"""What a user sees of a running job: a bar, or log lines as text or JSON. Knows no stage."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)

LogFormat = Literal["text", "json"]
OnFrame = Callable[[int, int | None], None]

PROGRESS_SECONDS = 10.0
"""How often a job that shows no bar logs where it is."""


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object a line."""
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "values", {}),
        }
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(log_format: LogFormat, level: int) -> None:
    """Send this package's log to stderr, as text or as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(levelname)s %(message)s")
    handler.setFormatter(_JsonFormatter() if log_format == "json" else text)
    root = logging.getLogger("pipeline")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f} fps" if task.speed else "… fps")


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
def reporting(name: str, values: Callable[[], dict[str, float]]) -> Iterator[None]:
    """Log the figures of a running stream every PROGRESS_SECONDS, and at its end."""
    ended = threading.Event()

    def report() -> None:
        last = False
        while not last:
            last = ended.wait(PROGRESS_SECONDS)
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
