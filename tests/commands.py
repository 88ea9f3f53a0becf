"""Commands as processes and as a user reads them; what they wrote, and the ports they serve on."""

import hashlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from typer.testing import CliRunner

from pipeline.cli import app

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""More slow a network of a test's size a hundredfold on a busy machine."""


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def one_line(result):
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def finished(command):
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=200, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr
    return done


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(*arguments, **environment):
    code = "import pipeline.cli_stream as c; c.main()"
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root, **environment},
    )  # fmt: skip


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def restore_video(checkpoint, *args):
    """Run the command in this process; the weights are those of the test, the network is off."""
    options = ["--model", checkpoint, "--strength", "0", "--pool", "local"]
    return CliRunner().invoke(app, [*map(str, args), *options])
