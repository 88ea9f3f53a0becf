"""Owns helper processes: whatever may block for ever in FFmpeg runs in one, for it can be killed.

No option of FFmpeg bounds an RTSP `mux` to a server that stands still, nor every read of every
protocol. A process that is killed also leaves no socket, thread or memory behind.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

ORPHAN_SECONDS = 5
"""How long a child may take to finish after its parent has died."""
MESSAGE_SECONDS = 10
"""A message of a child that has begun must go on; `recv` raises BlockingIOError, an OSError."""


class Child:
    """A Python process that runs `MODULE.main(connection)`; both ends send and receive objects.

    It is started here and told by messages what to do: nothing secret is on its command line.
    Raises OSError where none can be started. Not multiprocessing, which would run the caller's own
    main module in the child again.
    """

    def __init__(self, module: str) -> None:
        ours, theirs = socket.socketpair()
        # A child that stands still in mid-message (a frozen cgroup, a disk that hangs) would hold
        # whoever reads it for ever; Connection knows no deadline but this one of the socket.
        ours.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", MESSAGE_SECONDS, 0)
        )
        code = f"import {module} as m, pipeline.child as c; c.serve({theirs.fileno()}, m.main)"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the parent, which then ends it in order
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.connection = Connection(ours.detach())

    def kill(self) -> None:
        """End it at once: whoever is sending to it gets an OSError."""
        self._process.kill()
        self._process.wait()

    def end(self, grace_seconds: float = 0.0) -> None:
        """Close the connection, wait so long for the child to end of itself, then kill it.

        Not while another thread sends: it would write into whatever gets the same descriptor.
        """
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if grace_seconds:
                self._process.wait(grace_seconds)
        self.kill()


def serve(file_descriptor: int, main: Callable[[Connection], None]) -> None:
    """Run in the child: `main` until it returns or the parent is gone."""
    # systemd sends SIGTERM to every process of a service; the parent drains, and needs its ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, EOFError):
        main(Connection(file_descriptor))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)
