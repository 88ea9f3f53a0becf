"""The exceptions a caller of this package may see, and the exit code of each.

    RestoreError                1   anything else that stopped the job
    ├── ConfigError             2   an option, a preset or a weights file is wrong
    ├── SourceError             3   the input cannot be opened or decoded
    │   └── StreamLost          7   a live source went away and did not come back
    ├── SinkError               4   the output cannot be encoded, muxed or written
    ├── DeviceError             5   the device, its memory or a worker failed
    ├── IntegrityError          6   frames were counted and the numbers differ
    └── Interrupted           130   stopped when asked to, at the end of a segment

Every message is one line: the file (or URL without its password), the cause, what to do.
"""

from typing import ClassVar


class RestoreError(Exception):
    """A job stopped. `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 1


class ConfigError(RestoreError):
    """An option, a preset or a weights file is wrong; nothing was started."""

    exit_code = 2


class SourceError(RestoreError):
    """The input cannot be opened, or breaks off while it is decoded."""

    exit_code = 3


class StreamLost(SourceError):  # noqa: N818 - the architecture's name
    """A live source ended or stalled beyond its reconnect budget."""

    exit_code = 7


class SinkError(RestoreError):
    """The output cannot be opened, encoded, muxed or written."""

    exit_code = 4


class DeviceError(RestoreError):
    """A device or a worker failed beyond its retries."""

    exit_code = 5


class IntegrityError(RestoreError):
    """The frames counted at two stages differ: the output would not be faithful."""

    exit_code = 6


class Interrupted(RestoreError):  # noqa: N818 - nothing went wrong
    """The job was asked to stop and did, after a finished segment; the next run goes on there."""

    exit_code = 130


def notes_of(error: BaseException) -> str:
    """What was noted at an error on its way, for the end of its line."""
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
