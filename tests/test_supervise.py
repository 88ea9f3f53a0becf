"""A command whose process dies says so in one line, with the exit code of the cause."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from media import make_clip

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="no child is bound to its parent")


@pytest.fixture
def job(tmp_path, tiny_checkpoint):
    """A job at work: its process, and the child that does it."""
    source = make_clip(tmp_path / "in.mkv", n_frames=2000, size=(160, 120))
    started = []

    def start(*options):
        command = [sys.executable, "-c", "from pipeline.cli import main; main()", str(source)]
        command += ["--model", tiny_checkpoint, "--strength", "0", "-o", str(tmp_path / "out.mkv")]
        process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            # The tests may run under nohup, which has it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )  # fmt: skip
        started.append(process)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out.mkv.restore/*")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (child,) = psutil.Process(process.pid).children()
        return process, child

    yield start
    for process in started:
        process.kill()
        process.communicate()


@linux_only
@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGSEGV, 3, "FFmpeg crashed (SIGSEGV)"),
        (signal.SIGKILL, 5, "most often for want of memory"),
    ],
)
def test_a_crash_is_one_line_and_the_code_of_its_cause(job, tmp_path, number, code, says):
    process, child = job()
    child.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert says in stderr
    assert re.search(r"in\.mkv(, frame \d+)?: ", stderr)
    assert ("the same command goes on" in stderr) == (", frame" in stderr)
    assert not (tmp_path / "out.mkv").exists()


@linux_only
@pytest.mark.parametrize("option", [["--log-format", "json"], ["--log-format=json"]])
def test_a_crash_is_json_where_that_was_asked_for(job, option):
    process, child = job(*option)
    child.send_signal(signal.SIGSEGV)
    _, stderr = process.communicate(timeout=30)
    assert "SIGSEGV" in json.loads(stderr.splitlines()[-1])["message"]


@linux_only
def test_the_child_dies_with_its_parent(job):
    process, child = job()
    process.kill()
    child.wait(timeout=10)


@linux_only
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_to_the_process_or_its_group_counts_once(job, send):
    process, _ = job()
    send(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped as asked" in stderr  # two would have interrupted


@linux_only
def test_a_terminal_that_is_closed_ends_the_job_in_order(job, tmp_path):
    process, child = job()
    process.send_signal(signal.SIGHUP)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in stderr
    assert not psutil.pid_exists(child.pid)
    assert not list(tmp_path.glob(".*.part"))


@linux_only
def test_nohup_goes_on_without_its_terminal():
    code = (
        "import time; from pipeline.supervise import supervised;"
        "supervised(lambda: (time.sleep(2), print('done')))"
    )
    with subprocess.Popen(
        ["nohup", sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        while not psutil.Process(process.pid).children():
            time.sleep(0.01)
        process.send_signal(signal.SIGHUP)
        stdout, _ = process.communicate(timeout=30)
    assert (process.returncode, stdout) == (0, "done\n")


@linux_only
def test_sigterm_before_the_job_has_begun_is_no_crash():
    code = (
        "import time; from pipeline.supervise import supervised; supervised(lambda: time.sleep(60))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True
    ) as process:
        while not psutil.Process(process.pid).children():
            time.sleep(0.01)
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.endswith("interrupted\n")
