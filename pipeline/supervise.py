"""Owns a command's life in a child process: where FFmpeg crashes, one line says so, and a code.

Knows no job. Only on Linux, where a child can be bound to its parent's life; elsewhere the command
runs by itself.
"""

import ctypes
import faulthandler
import logging
import mmap
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO

from pipeline.errors import DeviceError, SourceError

logger = logging.getLogger(__name__)

_FORWARDED = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_PLACE_BYTES = 4096

_place: mmap.mmap | None = None


def note_place(place: str) -> None:
    """Remember what is being done ("FILE, frame 12"), for the message about a crash."""
    if _place is not None:
        _place[:] = place.encode(errors="replace")[:_PLACE_BYTES].ljust(_PLACE_BYTES, b"\0")


def supervised(command: Callable[[], None]) -> None:
    """Run `command` in a child and end as it ends; if it crashes, say where on stderr.

    To be called before the process has threads: it forks. Raises SystemExit.
    """
    global _place
    if sys.platform != "linux":
        command()
        return
    _place = mmap.mmap(-1, _PLACE_BYTES)
    with tempfile.TemporaryFile("w+") as dump:
        signals = {*_FORWARDED, signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        parent = os.getpid()
        child = os.fork()
        if not child:
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # Not all threads: reading the stacks of those that still run may crash in its turn.
            faulthandler.enable(dump, all_threads=False)
            command()
            return
        status = _status_of(child, signals)
        if status >= 0:
            raise SystemExit(status)
        place = _place[:].rstrip(b"\0").decode(errors="replace") or "starting"
        message, code = _cause(signal.Signals(-status), place, dump)
    from pipeline.monitor import configure_logging  # rich is slow to import, and seldom needed here

    configure_logging("json" if "json" in sys.argv else "text", logging.ERROR)
    logger.error("%s", message)
    raise SystemExit(code)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that comes about."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _status_of(child: int, signals: set[signal.Signals]) -> int:
    """Wait for the child: its exit code, or minus the signal that ended it.

    What a process sends to this one alone is passed on; a terminal's Ctrl-C, which the kernel
    sends to both, is not, for the child would take it for two.
    """
    while True:
        info = signal.sigwaitinfo(signals)
        if info.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
        elif info.si_code <= 0:  # SI_USER and the like (man 2 sigaction)
            with suppress(ProcessLookupError):
                os.kill(child, info.si_signo)


def _cause(number: signal.Signals, place: str, dump: IO[str]) -> tuple[str, int]:
    """The line about a crash at `place`, and the exit code of its kind."""
    kept = "finished segments are kept: the same command goes on after them"
    if number == signal.SIGKILL:
        return (
            f"{place}: the process was killed (SIGKILL), most often for want of memory; take a "
            f"smaller --tile, or close other programs; {kept}"
        ), DeviceError.exit_code
    dump.seek(0)
    stack = dump.read()  # empty where the thread was one of FFmpeg's own
    if "/mtair/" in stack or "/workers/" in stack:
        return f"{place}: the network crashed ({number.name}); report it; {kept}", (
            DeviceError.exit_code
        )
    return (
        f"{place}: FFmpeg crashed ({number.name}), most often on a damaged file; repair or convert "
        f"it, or trim before that with --to; {kept}"
    ), SourceError.exit_code
