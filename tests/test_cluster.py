"""Devices, and the Ray that a session starts or joins."""

import os
import socket
import subprocess
import sys

import pytest

from workers import WorkerError
from workers.cluster import available_devices, pick_device


def test_a_device_is_picked():
    assert pick_device() == available_devices()[0]
    assert pick_device("cpu") == "cpu"
    with pytest.raises(WorkerError, match="cuda:99"):
        pick_device("cuda:99")


@pytest.mark.parametrize(
    "address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "no.such.host.invalid:1"]
)
def test_a_cluster_where_nothing_answers_is_an_error_at_once(address):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = address.format(free.getsockname()[1])
    # This process has a Ray already.
    code = "import sys; from workers import ray_session\nwith ray_session(sys.argv[1]): pass"
    done = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60
    )
    assert f"{address}: nothing answers there (" in done.stderr.splitlines()[-1]


INTERRUPTED = """
import psutil, signal, threading, os
from workers import ray_session
for number in (signal.SIGINT, signal.SIGTERM):  # a background job inherits the first one ignored
    signal.signal(number, signal.default_int_handler)
def processes(): return psutil.Process().children(recursive=True)
for number in (signal.SIGINT, signal.SIGTERM):
    try:
        with ray_session(num_cpus=1):
            assert processes()
            os.kill(os.getpid(), number)
            threading.Event().wait(10)
    except KeyboardInterrupt:
        print("interrupted", len(processes()))
"""


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_signal_with_a_handler_ends_the_session_and_the_next_one_starts(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["interrupted 0"] * 2, done.stderr
    assert not (tmp_path / ".ray").exists(), "the token is in the environment, not in a file"
