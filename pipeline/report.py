"""Owns what a batch leaves in writing: the report, and the journal by which a later run skips what
is finished. Knows no stage."""

import json
import os
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import SinkError
from pipeline.inputs import BatchItem

JOURNAL = ".restore-batch.jsonl"

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of one file."""

    source: Path
    output: Path
    status: Status
    n_frames: int = 0
    n_segments: int = 0
    n_retries: int = 0
    """Segments that were done again because a worker was lost or failed."""
    seconds: float = 0
    """From its planning to its end; other files were in work meanwhile."""
    warnings: tuple[str, ...] = ()
    error: str = ""
    """The cause, where it failed."""
    exit_code: int = 0
    """What `restore-video` would have returned."""


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What became of all of them."""

    files: tuple[FileReport, ...]
    seconds: float

    @property
    def succeeded(self) -> bool:
        """Whether no file failed."""
        return all(file.status != "failed" for file in self.files)

    def write(self, path: Path) -> None:
        """As JSON; appears whole. Raises SinkError."""
        counts = Counter(file.status for file in self.files)
        report = {"seconds": round(self.seconds, 3), "counts": counts,
                  "files": [asdict(file) for file in self.files]}  # fmt: skip
        temporary = path.with_name(f".{path.name}.part")
        try:
            temporary.write_text(json.dumps(report, indent=1, default=str, ensure_ascii=False))
            temporary.replace(path)
        except OSError as error:
            raise SinkError(f"{path}: no report can be written ({error.strerror})") from error


class Journal:
    """The finished outputs in `folder`, one JSON object a line, each synced before the next.

    Raises SinkError where it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # files are joined side by side
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / JOURNAL).open("a+")
        except OSError as error:
            raise SinkError(f"{folder}: cannot be written ({error.strerror})") from error
        self._file.seek(0)
        for line in self._file:
            with suppress(ValueError, KeyError, TypeError):  # cut off when the machine went down
                entry = json.loads(line)
                self._entries[entry["job"]["output"]] = entry

    def finished(self, item: BatchItem, weights_sha256: str) -> int | None:
        """The frames of an output that an earlier run finished for the same job; else None."""
        entry = self._entries.get(str(item.output.absolute()))
        try:
            if entry is None or entry["job"] != _identity(item, weights_sha256, item.output.stat()):
                return None
        except OSError:
            return None
        return int(entry["n_frames"])

    def add(
        self, item: BatchItem, weights_sha256: str, n_frames: int, written: os.stat_result
    ) -> None:
        """Record an output that is complete and gets its name next: in that order, so that no
        moment of being killed leaves one that is not known. Raises SinkError."""
        try:
            entry = {"job": _identity(item, weights_sha256, written), "n_frames": n_frames}
            with self._lock:
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise SinkError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Again does nothing."""
        self._file.close()


def _identity(item: BatchItem, weights_sha256: str, written: os.stat_result) -> dict[str, Any]:
    """What a finished output is known by. Cheap: thousands are asked for at the start."""
    no_matter: dict[str, Any] = {
        "overwrite": True, "resume": True, "pool": True, "model": {"model"},
    }  # fmt: skip
    source = item.source.stat()
    return {
        "source": [str(item.source.absolute()), source.st_size, source.st_mtime_ns],
        "output": str(item.output.absolute()),
        "written": [written.st_size, written.st_mtime_ns],
        "weights": weights_sha256,
        "settings": item.config.model_dump(mode="json", exclude=no_matter),
    }
