"""Owns what a batch leaves in writing: the report, and the journal by which a later run skips what
is finished. Knows no stage."""

import hashlib
import json
import os
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline.config import NO_MATTER
from pipeline.errors import SinkError
from pipeline.inputs import BatchItem
from pipeline.remote import Place, Remote

JOURNAL, REMOTE_JOURNAL = ".restore-batch.jsonl", ".restore-batch"

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True, slots=True)
class FileReport:
    """What became of one file."""

    source: Place
    output: Place
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

    def write(self, path: Place) -> None:
        """As JSON; appears whole. Raises SinkError."""
        counts = Counter(file.status for file in self.files)
        # By their names: whatever else a URL holds stays out of it.
        files = [{**asdict(f), "source": str(f.source), "output": str(f.output)}
                 for f in self.files]  # fmt: skip
        report = {"seconds": round(self.seconds, 3), "counts": counts, "files": files}
        text = json.dumps(report, indent=1)  # in ASCII: a name may be no text in any encoding
        try:
            if isinstance(path, Remote):
                path.write(text.encode())
                return
            temporary = path.with_name(f".{path.name}.part")
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as error:
            raise SinkError(f"{path}: no report can be written ({error.strerror})") from error


def state_of(file: Place) -> list[Any]:
    """What a version of a file is known by: its size and when, or as what, it was written."""
    if isinstance(file, Remote):
        return file.state()
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


class Journal:
    """The finished outputs in `folder`: a later call finds there what it need not do.

    On a disk one file, with a JSON object a line, each synced before the next. At a URL one small
    object for each output, for nothing can be added to one. Raises SinkError where it cannot be
    written.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self._entries: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()  # files are joined side by side
        self._file: Any = None
        self._starts_with = ""  # a new line, where the last one was cut off
        try:
            if isinstance(folder, Remote):
                (folder / REMOTE_JOURNAL / "README").write(_README)
                return
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / JOURNAL).open("a+")
        except OSError as error:
            raise SinkError(f"{folder}: cannot be written ({error.strerror})") from error
        self._file.seek(0)
        for line in self._file:
            with suppress(ValueError, KeyError, TypeError):  # cut off when the machine went down
                entry = json.loads(line)
                self._entries[entry["job"]["output"]] = entry
            self._starts_with = "" if line.endswith("\n") else "\n"

    def finished(self, item: BatchItem, weights_sha256: str) -> int | None:
        """The frames of an output that an earlier run finished for the same job; else None."""
        try:
            if not (entry := self._entry(item)):
                return None
            now = _identity(item, weights_sha256, state_of(item.source), state_of(item.output))
            return int(entry["n_frames"]) if entry["job"] == now else None
        except OSError:  # something is not there, or cannot be reached: said when it is opened
            return None

    def began(self, item: BatchItem) -> bool:
        """Whether a run was stopped while it sent this output away: what is there is no other's."""
        entry = self._entry(item)
        return entry is not None and entry["job"]["written"] is None

    def add(
        self, item: BatchItem, weights_sha256: str, n_frames: int, source: list[Any],
        written: list[Any] | None,
    ) -> None:  # fmt: skip
        """Record an output that is complete and gets its name next: in that order, so that no
        moment of being killed leaves one that is not known. `source` and `written` are the states
        of both files; None for one that is sent away next. Raises SinkError."""
        job = _identity(item, weights_sha256, source, written)
        entry = {"job": job, "n_frames": n_frames}
        try:
            if isinstance(self.folder, Remote):
                _remote_entry(self.folder, item).write(json.dumps(entry).encode())
                return
            with self._lock:
                self._entries[job["output"]] = entry
                self._file.write(f"{self._starts_with}{json.dumps(entry)}\n")
                self._starts_with = ""
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise SinkError(f"{self.folder}: cannot be written ({error.strerror})") from error

    def close(self) -> None:
        """Again does nothing."""
        if self._file is not None:
            self._file.close()

    def _entry(self, item: BatchItem) -> dict[str, Any] | None:
        if not isinstance(self.folder, Remote):
            return self._entries.get(_name(item.output))
        try:
            entry = json.loads(_remote_entry(self.folder, item).read())
            return entry if {"job", "n_frames"} <= set(entry) else None
        except (FileNotFoundError, ValueError, TypeError):
            return None


_README = b"What restore-batch has finished here: by it a later run skips.\n"


def _remote_entry(folder: Remote, item: BatchItem) -> Remote:
    number = hashlib.sha256(os.fsencode(_name(item.output))).hexdigest()[:12]
    return folder / REMOTE_JOURNAL / f"{item.output.name}.{number}.json"


def _name(file: Place) -> str:
    return str(file) if isinstance(file, Remote) else str(file.absolute())


def _identity(
    item: BatchItem, weights_sha256: str, source: list[Any], written: list[Any] | None
) -> dict[str, Any]:
    """What a finished output is known by. Cheap: thousands are asked for at the start."""
    # Without the defaults, for a later version has more of them.
    asked = item.config.model_dump(
        mode="json", exclude=NO_MATTER | {"pool": True}, exclude_defaults=True
    )
    return {
        "source": [_name(item.source), *source],
        "output": _name(item.output),
        "written": written,
        "weights": weights_sha256,
        "settings": {name: value for name, value in asked.items() if value != {}},
    }
