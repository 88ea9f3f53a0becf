"""A process that is stopped and continued, as by Ctrl-Z and an fg much later."""

import signal
import subprocess
import sys
import time


def said_by_a_stopped_process(code, seconds=4):
    """The lines that Python prints, stopped for so long after the first."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        return (first + process.stdout.read()).decode().splitlines()
