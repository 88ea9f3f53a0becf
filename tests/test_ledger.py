"""What a job is known by; a writer killed at any of its steps, and segments that do not fit."""

import gc
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import av
import psutil
import pytest
from commands import names_in, sha256
from media import make_clip
from readback import frames_of, indices_of
from resumable import JOB, X264, clip_in, killed, run

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.errors import SinkError
from pipeline.ledger import BLOCK_BYTES, SAMPLED_BLOCKS, Ledger, identify, job_key

# what a job is known by


def test_a_source_is_known_by_its_content_size_and_time(tmp_path):
    path = tmp_path / "source"
    size = (SAMPLED_BLOCKS + 10) * BLOCK_BYTES
    with path.open("wb") as file:
        file.truncate(size)
    os.utime(path, ns=(1, 1))
    first = identify(path)
    assert identify(path) == first
    seen = {first}
    for offset in (0, (size - BLOCK_BYTES) * 32 // (SAMPLED_BLOCKS - 1), size - 1):
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        os.utime(path, ns=(1, 1))
        seen.add(identify(path))
    os.utime(path, ns=(2, 2))
    seen.add(identify(path))
    with path.open("r+b") as file:
        file.truncate(size - 1)
    os.utime(path, ns=(2, 2))
    seen.add(identify(path))
    assert len(seen) == 6


def test_every_cause_has_its_own_part_of_the_key(tmp_path):
    path = make_clip(tmp_path / "in.mkv")
    first = job_key(path, "abc", {"crf": 18})
    assert job_key(path, "abc", {"crf": 18}) == first
    other = job_key(path, "abc", {"crf": 19})
    assert [k for k in first if first[k] != other[k]] == ["settings"]
    assert job_key(path, "abd", {"crf": 18})["weights"] != first["weights"]


# a writer killed at any of its steps


@pytest.fixture
def clip(tmp_path):
    return clip_in(tmp_path)


@pytest.fixture
def uninterrupted(tmp_path, clip):
    folder = tmp_path / "whole"
    folder.mkdir()
    run(clip, folder / "out.mkv")
    return sha256(folder / "out.mkv")


@pytest.mark.parametrize(
    ("kind", "count"),
    [("frames", 25), ("write", 1), ("write", 33), ("fsync", 4), ("fsync", 9), ("replace", 3),
     ("replace", 6), ("replace", 11), ("read", 30), ("unlink", 1), ("rmdir", 1)],
)  # fmt: skip
def test_killed_at_a_step_it_goes_on_to_the_same_bytes(tmp_path, clip, uninterrupted, kind, count):
    folder = tmp_path / "out"
    folder.mkdir()
    output = folder / "out.mkv"
    assert killed(clip, output, kind, count) == -signal.SIGKILL
    if kind in ("unlink", "rmdir"):  # after the output got its name
        assert names_in(folder) == [".out.mkv.lock", ".out.mkv.restore", "out.mkv"]
        assert sha256(output) == uninterrupted
        return
    assert not output.exists()
    run(clip, output)
    assert sha256(output) == uninterrupted
    assert names_in(folder) == ["out.mkv"]


def test_whatever_moment_a_power_cut_picks(tmp_path, clip, uninterrupted, monkeypatch):
    """The folder is copied around every rename; what was not synced is cut in the copy."""
    copies, synced = [], set()
    folder = tmp_path / "out"
    work = folder / ".out.mkv.restore"
    folder.mkdir()
    fsync, rename = os.fsync, os.replace

    def noted(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def cut_power():
        copies.append(tmp_path / f"copy{len(copies)}" / work.name)
        shutil.copytree(work, copies[-1])
        for path in work.iterdir():
            if path.stat().st_ino not in synced:
                os.truncate(copies[-1] / path.name, path.stat().st_size // 2)

    def watched(old, new):
        cut_power()
        rename(old, new)
        if Path(new).parent == work:
            cut_power()

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", watched)
    run(clip, folder / "out.mkv")
    monkeypatch.undo()
    assert len(copies) == 21
    earlier = set()
    for copy in copies:
        earlier.add(run(clip, copy.parent / "out.mkv"))
        assert sha256(copy.parent / "out.mkv") == uninterrupted
    assert earlier == {0, 10, 20, 30, 40, 50}


def stopped(source, output, at, job=JOB):
    """A run that fails at frame `at`."""

    def fail(index):
        if index == at:
            raise SinkError("the disk fell off the bus")

    with pytest.raises(SinkError) as caught:
        run(source, output, job, on_frame=fail)
    return " ".join(getattr(caught.value, "__notes__", ()))


def test_a_failure_keeps_the_finished_segments_and_says_so(tmp_path, clip, uninterrupted, caplog):
    output = tmp_path / "out.mkv"
    assert "3 finished segments are kept" in stopped(clip, output, 35)
    assert names_in(tmp_path / ".out.mkv.restore") == [
        "000000.segment", "000001.segment", "000002.segment", "ledger.json",
    ]  # fmt: skip
    assert not (tmp_path / ".out.mkv.part").exists()
    assert run(clip, output) == 30
    assert "30 frames" in caplog.text
    assert sha256(output) == uninterrupted


def test_the_ledger_says_what_each_segment_holds(tmp_path, clip):
    stopped(clip, tmp_path / "out.mkv", 25)
    work = tmp_path / ".out.mkv.restore"
    ledger = json.loads((work / "ledger.json").read_text())
    assert [(s["start_pts"], s["end_pts"], s["n_frames"]) for s in ledger["segments"]] == [
        (0, 400, 10), (400, 800, 10),
    ]  # fmt: skip
    for segment in ledger["segments"]:
        assert sha256(work / f"{segment['index']:06d}.segment") == segment["sha256"]


def test_before_a_segment_is_finished_nothing_is_left(tmp_path, clip):
    before = names_in(tmp_path)
    assert stopped(clip, tmp_path / "out.mkv", 9) == ""
    assert names_in(tmp_path) == before


def test_without_a_job_nothing_is_left_and_nothing_taken_up(tmp_path, clip, uninterrupted):
    before = names_in(tmp_path)
    assert stopped(clip, tmp_path / "out.mkv", 35, job=None) == ""
    assert names_in(tmp_path) == before
    stopped(clip, tmp_path / "out.mkv", 35)
    assert run(clip, tmp_path / "out.mkv", job=None) == 0
    assert sha256(tmp_path / "out.mkv") == uninterrupted


@pytest.mark.parametrize("part", ["source", "weights"])
def test_segments_of_another_job_are_done_again_and_that_is_said(
    tmp_path, clip, uninterrupted, caplog, part
):
    stopped(clip, tmp_path / "out.mkv", 35, job={**JOB, part: "other"})
    assert run(clip, tmp_path / "out.mkv") == 0
    lines = [r.message for r in caplog.records if "another job" in r.message]
    assert len(lines) == 1
    assert f"({part} changed)" in lines[0]
    assert sha256(tmp_path / "out.mkv") == uninterrupted


def test_a_wrong_option_costs_nothing_until_a_segment_is_finished(tmp_path, clip, uninterrupted):
    output = tmp_path / "out.mkv"
    stopped(clip, output, 35)
    for _ in range(2):
        stopped(clip, output, 9, job={**JOB, "settings": "a typing error"})
    assert run(clip, output) == 30
    assert sha256(output) == uninterrupted


def test_once_a_segment_is_finished_those_of_another_job_are_gone(tmp_path, clip, uninterrupted):
    output = tmp_path / "out.mkv"
    stopped(clip, output, 35)
    stopped(clip, output, 15, job={**JOB, "settings": "meant"})
    assert names_in(tmp_path / ".out.mkv.restore") == ["000000.segment", "ledger.json"]
    assert run(clip, output) == 0
    assert sha256(output) == uninterrupted


def test_a_signal_after_the_output_has_its_name_changes_nothing(tmp_path, clip, monkeypatch):
    """Thousands of segments take a while to remove."""
    whole, signals = Ledger.discard, [KeyboardInterrupt()]

    def discard(self):
        if signals:
            raise signals.pop()
        whole(self)

    monkeypatch.setattr(Ledger, "discard", discard)
    run(clip, tmp_path / "out.mkv")
    assert names_in(tmp_path) == ["in.mkv", "out.mkv"]


def test_other_encoder_settings_make_another_job(tmp_path, clip):
    stopped(clip, tmp_path / "out.mkv", 35)
    with (
        VideoSource(clip) as source,
        VideoWriter(
            tmp_path / "out.mkv", source.info, EncodeSettings("ffv1"), copy_from=clip, job=JOB
        ) as writer,
    ):
        assert writer.place is None
        for frame in source.frames():
            writer.write(frame)


@pytest.mark.parametrize(
    ("name", "damage", "left"),
    [
        ("000001.segment", "missing", 10), ("000001.segment", "flipped", 10),
        ("000000.segment", "cut", 0), ("ledger.json", "cut", 0), ("ledger.json", "missing", 0),
    ],
)  # fmt: skip
def test_a_damaged_segment_and_all_after_it_are_done_again(
    tmp_path, clip, uninterrupted, name, damage, left
):
    stopped(clip, tmp_path / "out.mkv", 35)
    path = tmp_path / ".out.mkv.restore" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    assert run(clip, tmp_path / "out.mkv") == left
    assert sha256(tmp_path / "out.mkv") == uninterrupted


def test_a_file_of_the_users_in_the_work_folder_stays(tmp_path, clip):
    work = tmp_path / ".out.mkv.restore"
    work.mkdir()
    (work / "diary.txt").write_text("mine")
    with pytest.raises(AssertionError):
        run(clip, tmp_path / "out.mkv")  # its check that nothing hidden is left
    assert names_in(work) == ["diary.txt"]
    assert indices_of(tmp_path / "out.mkv") == list(range(50))


def test_a_place_for_segments_that_cannot_be_made_fails_before_the_first_frame(tmp_path, clip):
    (tmp_path / ".out.mkv.restore").write_text("in the way")
    before = names_in(tmp_path)
    with VideoSource(clip) as source, pytest.raises(SinkError, match="segments"):
        VideoWriter(tmp_path / "out.mkv", source.info, X264, copy_from=clip)
    assert names_in(tmp_path) == before


def test_no_encoder_outlives_its_segment(tmp_path):
    # Each takes some 15 MB at this size: those of a long job would fill the memory. The collector
    # counts Python's objects, of which there are few.
    clip = make_clip(tmp_path / "a.mkv", size=(640, 360), n_frames=60, noise=True)
    process, sizes = psutil.Process(), []
    with VideoSource(clip) as source:
        frames = [replace(frame, ends_segment=True) for frame in source.frames()]
        gc.disable()
        try:
            with VideoWriter(
                tmp_path / "b.mkv", source.info, EncodeSettings("libx264"), copy_from=clip
            ) as writer:
                for frame in frames:
                    writer.write(frame)
                    sizes.append(process.memory_info().rss / 2**20)
        finally:
            gc.enable()
    assert sizes[-1] - sizes[19] < 60


def test_segments_end_where_the_output_does_not_show_it(tmp_path, clip):
    run(clip, tmp_path / "many.mkv", length=5)
    assert indices_of(tmp_path / "many.mkv") == list(range(50))
    assert [f.pts for f in frames_of(tmp_path / "many.mkv")] == [f.pts for f in frames_of(clip)]
    with av.open(str(tmp_path / "many.mkv")) as out:
        assert len(out.chapters()) == 1
