"""A job that was stopped at any point goes on, and ends with the bytes of one that was not."""

import random
import signal
import subprocess
import sys
import time

import pytest
from commands import ONE_THREAD, finished, names_in, sha256, wait_for
from media import make_clip
from readback import frames_of, indices_of
from resumable import clip_in
from sample_clips import SHORT_GOPS

from pipeline import RestoreConfig, restore_file
from pipeline.errors import Interrupted
from pipeline.segments import StopRequest


@pytest.fixture
def clip(tmp_path):
    return clip_in(tmp_path)


def settings(checkpoint, **more):
    return RestoreConfig.load(overrides={
        "model.model": checkpoint, "model.strength": 0.5, "pool.kind": "local",
        "segment.frames": 10, "encode.preset": "ultrafast", **more,
    })  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"temporal": 0.8, "tile.static_threshold": 30}])
def test_asked_to_stop_it_ends_the_segment_and_goes_on_from_there(
    tmp_path, clip, tiny_checkpoint, one_thread, more
):
    config = settings(tiny_checkpoint, **more)
    restore_file(clip, tmp_path / "whole.mkv", config)
    stop = StopRequest()

    def ask(done, _):
        stop.asked = stop.asked or done == 14

    output = tmp_path / "out.mkv"
    with pytest.raises(Interrupted) as caught:
        restore_file(clip, output, config, on_frame=ask, stop=stop)
    assert caught.value.exit_code == 130
    (note,) = caught.value.__notes__
    assert "2 finished segments are kept" in note
    assert not output.exists()
    report = restore_file(clip, output, config)
    assert (report.n_earlier, report.n_frames) == (20, 50)
    assert sha256(output) == sha256(tmp_path / "whole.mkv")
    assert not (tmp_path / ".out.mkv.restore").exists()


def test_asked_in_the_last_segment_it_finishes(tmp_path, clip, tiny_checkpoint, one_thread):
    stop = StopRequest()

    def ask(done, _):
        stop.asked = stop.asked or done == 44

    restore_file(clip, tmp_path / "out.mkv", settings(tiny_checkpoint), on_frame=ask, stop=stop)
    assert indices_of(tmp_path / "out.mkv")


def interrupted(source, output, config, at):
    def stop(done, _):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_file(source, output, config, on_frame=stop)


@pytest.mark.parametrize(
    ("change", "cause"),
    [({"model.strength": 0.4}, "settings"), ({"encode.crf": 20}, "settings"),
     ({"tile.size": 32, "tile.overlap": 8}, "settings"), ({"segment.frames": 12}, "settings"),
     ({"end_seconds": 1.9}, "settings"), ({"pool.window": 2}, None)],
)  # fmt: skip
def test_a_setting_that_changes_the_output_makes_another_job(
    tmp_path, clip, tiny_checkpoint, one_thread, caplog, change, cause
):
    output = tmp_path / "out.mkv"
    interrupted(clip, output, settings(tiny_checkpoint), 25)
    report = restore_file(clip, output, settings(tiny_checkpoint, **change))
    assert report.n_earlier == (0 if cause else 20)
    assert bool(cause) == (f"({cause}" in caplog.text)


def test_a_source_that_was_replaced_makes_another_job(
    tmp_path, clip, tiny_checkpoint, one_thread, caplog
):
    interrupted(clip, tmp_path / "out.mkv", settings(tiny_checkpoint), 25)
    make_clip(clip, n_frames=50, noise=True)
    report = restore_file(clip, tmp_path / "out.mkv", settings(tiny_checkpoint))
    assert report.n_earlier == 0
    assert "(source changed)" in caplog.text


@pytest.fixture
def command(tmp_path, tiny_checkpoint):
    """restore-video with small segments, slow enough to be hit."""
    (tmp_path / "small.yaml").write_text("segment: {frames: 10}\ntile: {size: 32, overlap: 8}\n")

    def arguments(source, output, *more):
        return [
            sys.executable, "-c", "from pipeline.cli import main; main()", str(source),
            "-o", str(output), "--config", str(tmp_path / "small.yaml"), "--model",
            tiny_checkpoint, "--strength", "0.5", "--pool", "local", "--preset", "ultrafast", *more,
        ]  # fmt: skip

    return arguments


def n_finished(work):
    return len(list(work.glob("*.segment")))


def survive_kills(tmp_path, command, n_kills):
    """Kill a job so often, each time after a random while; every life gets a little further."""
    rng = random.Random(0)
    n_frames = 40 * n_kills
    source = make_clip(tmp_path / "in.mkv", n_frames=n_frames, options=SHORT_GOPS, audio="aac")
    folder = tmp_path / "out"
    folder.mkdir()
    output, work = folder / "out.mkv", folder / ".out.mkv.restore"
    n_killed = 0
    while n_killed < n_kills:
        process = subprocess.Popen(
            command(source, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=ONE_THREAD,
        )  # fmt: skip
        before = n_finished(work)
        # The way to the first frame takes seconds and is hit now and then too.
        if rng.random() < 0.8:
            wait_for(process, lambda before=before: n_finished(work) > before)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()
        assert not output.exists(), "finished before it was killed often enough: a longer clip"
        n_killed += 1
    assert work.exists()
    assert "finished already" in finished(command(source, output)).stderr
    assert names_in(folder) == ["out.mkv"]
    finished(command(source, tmp_path / "whole.mkv"))
    assert sha256(output) == sha256(tmp_path / "whole.mkv")
    assert len(frames_of(output)) == n_frames


def test_a_command_killed_three_times_ends_with_the_same_bytes(tmp_path, command):
    survive_kills(tmp_path, command, 3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_command_killed_twenty_times_ends_with_the_same_bytes(tmp_path, command):
    survive_kills(tmp_path, command, 20)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_can_be_resumed(tmp_path, command, times):
    source = make_clip(tmp_path / "in.mkv", n_frames=600, options=SHORT_GOPS)
    folder = tmp_path / "out"
    folder.mkdir()
    work = folder / ".out.mkv.restore"
    process = subprocess.Popen(
        command(source, folder / "out.mkv"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=ONE_THREAD,
    )  # fmt: skip
    wait_for(process, lambda: n_finished(work) >= 1)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert "run the same command again to go on" in last
    # The segment may end before the second one comes.
    assert "stopped as asked" in last or (times == 2 and "interrupted" in last)
    assert names_in(folder) == [".out.mkv.restore"]
