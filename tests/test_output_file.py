"""The file that is written: its name, its place, its lock."""

import errno
import fcntl
import os

import pytest
from media import make_clip
from readback import frames_of, recode, refused
from sample_clips import FAST

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.errors import ConfigError, SinkError


@pytest.fixture
def clip(tmp_path):
    """A plain clip without sound."""
    return make_clip(tmp_path / "in.mkv")


def test_an_existing_file_is_not_overwritten(tmp_path, clip):
    path = tmp_path / "out.mkv"
    path.write_bytes(b"precious")
    assert "exists already" in refused(ConfigError, path, clip)
    assert path.read_bytes() == b"precious"
    recode(clip, path, FAST, overwrite=True)
    assert len(frames_of(path)) == 20


def test_the_source_is_never_the_target(tmp_path, clip):
    os.link(clip, tmp_path / "link.mkv")
    for path in (clip, tmp_path / "link.mkv"):
        assert "is the source" in refused(ConfigError, path, clip, overwrite=True)


def test_places_that_cannot_be_written(tmp_path, clip):
    assert "No such file" in refused(SinkError, tmp_path / "none" / "out.mkv", clip)
    assert "Not a directory" in refused(SinkError, clip / "out.mkv", clip)
    assert "is a directory" in refused(ConfigError, make_folder(tmp_path / "d.mkv"), clip)
    assert "too long" in refused(SinkError, tmp_path / ("n" * 249 + ".mkv"), clip)
    assert "too long" in refused(SinkError, tmp_path / ("n" * 300 + ".mkv"), clip)
    with VideoSource(clip) as source, pytest.raises(SinkError):
        VideoWriter("/proc/out.mkv", source.info, FAST, copy_from=clip)


def make_folder(path):
    path.mkdir()
    return path


def test_the_file_that_is_written_is_not_the_one_that_is_locked(tmp_path, clip):
    """On a CIFS share a locked file can be written through one descriptor alone."""
    path = tmp_path / "out.mkv"
    with (
        VideoSource(clip) as source,
        VideoWriter(path, source.info, FAST, copy_from=clip) as writer,
    ):
        with (tmp_path / ".out.mkv.part").open("ab") as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        writer.abort()
    (tmp_path / ".out.mkv.lock").write_bytes(b"")  # of a job that was killed
    recode(clip, path, FAST)
    assert sorted(tmp_path.iterdir()) == [clip, path]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_share_without_locks_is_written_to(tmp_path, clip, monkeypatch, number):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    recode(clip, tmp_path / "out.mkv", FAST)
    assert len(frames_of(tmp_path / "out.mkv")) == 20


def test_two_jobs_do_not_write_the_same_file(tmp_path, clip):
    path = tmp_path / "out.mkv"
    with VideoSource(clip) as source:
        with VideoWriter(path, source.info, FAST, copy_from=clip) as writer:
            assert "another job" in refused(SinkError, path, clip)
            for frame in source.frames():
                writer.write(frame)
        assert len(frames_of(path)) == 20
        (tmp_path / ".out.mkv.part").write_bytes(b"left by a job that was killed")
        recode(clip, path, FAST, overwrite=True)


@pytest.mark.parametrize("name", ["-y.mkv", ":a.mkv", "http:b.mkv", "ü ñ.mkv", "%03d.mkv"])
def test_odd_names_are_just_names(tmp_path, monkeypatch, clip, name):
    monkeypatch.chdir(tmp_path)
    recode(clip, tmp_path / name, FAST)
    with VideoSource(clip) as source, VideoWriter(
        name, source.info, FAST, copy_from=clip, overwrite=True
    ) as writer:  # fmt: skip
        for frame in source.frames():
            writer.write(frame)
    assert len(frames_of(tmp_path / name)) == 20
