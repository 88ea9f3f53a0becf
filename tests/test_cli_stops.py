"""The command when the disk is full and when it is asked to stop: its code, and what is left."""

import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from commands import names_in, restore_video
from media import make_clip

from pipeline import jobs


@pytest.fixture
def run(tiny_checkpoint):
    return partial(restore_video, tiny_checkpoint)


def _limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def _command(source, *options):
    return [sys.executable, "-c", "from pipeline.cli import main; main()", str(source), *options]


def test_a_full_disk_is_code_4_and_leaves_nothing(tmp_path, tiny_checkpoint):
    source = make_clip(tmp_path / "in.mkv", n_frames=30, size=(320, 240), noise=True)
    out = tmp_path / "out"
    out.mkdir()
    options = ["-o", str(out / "x.mkv"), "--model", tiny_checkpoint, "--strength", "0"]
    done = subprocess.run(
        _command(source, *options), capture_output=True, text=True, preexec_fn=_limit_file_size,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list(out.iterdir())


@pytest.mark.parametrize("ask", [[signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_stopped_at_once_is_code_130_and_leaves_no_output(tmp_path, tiny_checkpoint, ask):
    # One Ctrl-C alone waits for the end of the segment: tests/test_resume.py.
    source = make_clip(tmp_path / "in.mkv", n_frames=400, size=(320, 240))
    options = ["--model", tiny_checkpoint, "--tile", "64", "-o", str(tmp_path / "out.mkv")]
    said = []
    with subprocess.Popen(
        _command(source, *options), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / ".out.mkv.part").exists():
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.5)
            process.send_signal(ask[0])
            for number in ask[1:]:
                # Two that come while kernels are compiled, which holds the GIL, count as one.
                said.append(process.stderr.readline())
                assert "Ctrl-C again stops at once" in said[0]
                process.send_signal(number)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_swallows_stops_the_job_all_the_same(
    run, tmp_path, monkeypatch, number
):
    real = jobs.describe_weights

    def as_while_libraries_are_imported(model):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        return real(model)

    monkeypatch.setattr(jobs, "describe_weights", as_while_libraries_are_imported)
    source = make_clip(tmp_path / "in.mkv", n_frames=30)
    handler = signal.getsignal(number)
    result = run(source)
    assert result.exit_code == 130
    assert "interrupted; no output was written" in result.stderr
    assert names_in(tmp_path) == ["in.mkv"]
    assert signal.getsignal(number) is handler
