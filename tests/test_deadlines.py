"""Deadlines of batches."""

import signal
import subprocess
import sys
import time

STANDS = """
import os, threading
from concurrent.futures import Future
from workers.deadlines import Deadlines
future = Future()
Deadlines().bound(future, 2)
print("bound", flush=True)
threading.Timer(1.5, future.set_result, ["restored"]).start()
print(future.result())
"""


def test_time_for_which_the_process_stood_still_does_not_count():
    with subprocess.Popen([sys.executable, "-c", STANDS], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"bound\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == b"restored\n"
