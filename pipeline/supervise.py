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
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from pipeline.errors import DeviceError, SourceError
from pipeline.interrupt import INTERRUPTED, SIGNALS, ignore_signals

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_PLACE_BYTES = 4096

_PACKAGES = Path(__file__).parents[1]

_place: mmap.mmap | None = None


def note_place(place: str, advice: str = "") -> None:
    """Remember what is being done ("FILE, frame 12"), for the message about a crash.

    `advice` is what can be done after one.
    """
    if _place is not None:
        text = f"{place}\n{advice}".encode(errors="replace")
        _place[:] = text[:_PLACE_BYTES].ljust(_PLACE_BYTES, b"\0")


def supervised(command: Callable[[], None]) -> None:
    """Run `command` in a child and end as it ends; if it crashes, say where on stderr.

    To be called before the process has threads: it forks. Raises SystemExit.
    """
    global _place
    if sys.platform != "linux":
        _to_the_end(command)
        return
    _place = mmap.mmap(-1, _PLACE_BYTES)
    # Names that are no text are printed as they are.
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    # In memory: there may be no folder that can be written to.
    with os.fdopen(os.memfd_create("crash"), "w+") as dump:
        signals = {*SIGNALS, signal.SIGCHLD}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        parent = os.getpid()
        child = os.fork()
        if not child:
            _die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # Not all threads: reading the stacks of those that still run may crash in its turn.
            faulthandler.enable(dump, all_threads=False)
            _to_the_end(command)
            return
        status = _status_of(child, signals)
        if status >= 0:
            raise SystemExit(status)
        text = _place[:].rstrip(b"\0").decode(errors="replace")
        place, _, advice = text.partition("\n")
        dump.seek(0)
        message, code = _cause(signal.Signals(-status), place or "starting", dump.read())
    from pipeline.monitor import configure_logging  # rich is slow to import, and seldom needed here

    asked = "--log-format=json" in sys.argv or ("--log-format", "json") in pairwise(sys.argv)
    configure_logging("json" if asked else "text", logging.ERROR)
    logger.error("%s%s", message, advice and f"; {advice}")
    raise SystemExit(code)


def _to_the_end(command: Callable[[], None]) -> None:
    try:
        command()
    finally:
        ignore_signals()


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that comes about."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _status_of(child: int, signals: set[signal.Signals]) -> int:
    """Wait for the child: its exit code, or minus the signal that ended it.

    What a process sends is passed on; a terminal's Ctrl-C, which the kernel sends to both, is not,
    for the child would take it for two.
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


def _cause(number: signal.Signals, place: str, stack: str) -> tuple[str, int]:
    """What ended the command at `place`, and the exit code of its kind.

    `stack` is the Python stack of the thread that crashed; empty where that was one of FFmpeg's.
    """
    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        return f"{place}: interrupted", INTERRUPTED
    if number == signal.SIGKILL:
        return (
            f"{place}: the process was killed (SIGKILL), most often for want of memory; take a "
            "smaller --tile, or close other programs"
        ), DeviceError.exit_code
    if any(f'"{_PACKAGES}/{place}' in stack for place in ("mtair/", "workers/worker.py")):
        return f"{place}: the network crashed ({number.name}); report it", DeviceError.exit_code
    return (
        f"{place}: FFmpeg crashed ({number.name}), most often on a damaged file; repair or convert "
        "it, or trim before that with --to"
    ), SourceError.exit_code
