"""Owns that one process alone works on something: a lock on a file, which no crash leaves held."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import Any


class FileLock:
    """A file that is locked while it is there; it holds nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None

    @property
    def is_held(self) -> bool:
        """Whether it is this one that holds it."""
        return self._file is not None

    def acquire(self) -> None:
        """Raises BlockingIOError where another process has it, OSError where there is no place."""
        while self._file is None:
            file = self._path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
                    self._file = file  # on a share that knows no locks
                    return
                file.close()
                raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    self._file = file
                    return
            file.close()  # whoever had it has removed it just now

    def release(self) -> None:
        """Unlock, and remove the file. Again does nothing."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)  # while it is held: the next one takes anew
            self._file.close()
            self._file = None
