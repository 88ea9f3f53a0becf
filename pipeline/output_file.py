"""Owns the name of an output: free or not, locked while written, given when it is complete."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError, SinkError
from pipeline.file_lock import FileLock
from pipeline.segments import sync_folder


class OutputFile:
    """A file that has its name only when it is complete; `part` is it until then, beside it.

    Raises ConfigError for a name that may not be used and SinkError for one that cannot be.
    """

    def __init__(self, path: Path, copy_from: Path | None, overwrite: bool) -> None:
        _check(path, copy_from, overwrite)
        self.path = path
        self.part = path.with_name(f".{path.name}.part")
        self._overwrite = overwrite
        self._owns_part = False
        # Held while the part is written: two jobs would mix in it. Not of the part itself: on a
        # CIFS share nothing but the descriptor that holds the lock could then write it
        # (https://man7.org/linux/man-pages/man2/flock.2.html).
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def claim(self) -> None:
        """Make the part, for this job alone. Raises SinkError."""
        try:
            # Made here because FFmpeg opens it only with the header: a bad place fails first.
            self._lock.acquire()
            self.part.open("ab").close()
            self._owns_part = True
        except BlockingIOError as error:
            raise SinkError(f"{self.path}: another job is writing it; wait for that") from error
        except OSError as error:
            raise SinkError(
                f"{self.path}: cannot be written ({error.strerror}); choose another folder or name"
            ) from error

    def check_folder(self) -> None:
        """Whether a part could be made, without making one. Raises SinkError."""
        folder = self.path.parent
        if not os.access(folder, os.W_OK):
            cause = "is not writable" if folder.is_dir() else "is no folder"
            raise SinkError(f"{self.path}: {folder} {cause}; choose another folder or name")

    def publish(self, announce: Callable[[Path], None] | None) -> None:
        """Give the part its name, once `announce` has had it. Raises SinkError."""
        try:
            with self.part.open("rb") as file:
                os.fsync(file.fileno())
            if announce is not None:
                announce(self.part)
            if not self._overwrite and self.path.exists():
                raise SinkError(f"{self.path}: appeared while it was written; move it away")
            os.replace(self.part, self.path)
            self._owns_part = False
            sync_folder(self.path.parent)  # the segments go next: the name must not be lost
        except OSError as error:
            raise SinkError(f"{self.path}: cannot be completed ({error.strerror})") from error

    def release(self) -> None:
        """Remove a part that has not got its name, and unlock. Again does nothing."""
        if self._owns_part:
            self._owns_part = False
            with contextlib.suppress(OSError):
                self.part.unlink(missing_ok=True)
        self._lock.release()


def _check(path: Path, copy_from: Path | None, overwrite: bool) -> None:
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise SinkError(
            f"{path}: cannot be written ({error.strerror}); choose another folder or name"
        ) from error
    if is_folder:
        raise ConfigError(f"{path}: is a directory; name a file in it")
    if not exists:
        return
    if copy_from is not None and copy_from.exists() and path.samefile(copy_from):
        raise ConfigError(f"{path}: is the source itself; choose another name")
    if not overwrite:
        raise ConfigError(f"{path}: exists already; choose another name or allow overwriting")
