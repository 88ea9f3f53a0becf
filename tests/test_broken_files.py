"""Files that are cut, damaged or no videos at all: one line each, before the first frame."""

import os
import re
import subprocess
import sys
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from media import copied, jpeg, make_clip
from readback import frames_of, seconds_of, source_error
from sample_clips import B_FRAMES

from pipeline.decode import VideoSource
from pipeline.errors import SourceError
from pipeline.frame_decoder import MAX_CONSECUTIVE_DECODE_ERRORS
from pipeline.irregular import Progress


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.fixture
def mp4(tmp_path):
    """An mp4 whose index comes first, with room to cut."""
    return make_clip(
        tmp_path / "whole.mp4", n_frames=30, size=(320, 240), noise=True,
        container_options={"movflags": "faststart"},
    )  # fmt: skip


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path):
    for path, cause in [
        (tmp_path / "none.mp4", "no such file"),
        (tmp_path, "is a directory"),
        (write(tmp_path / "empty.mp4", b""), "is empty"),
        (write(tmp_path / "text.mp4", b"hello there\n" * 100), "not a video file"),
        (write(tmp_path / "text.txt", b"hello there\n" * 100), "text file"),
    ]:
        assert cause in source_error(path)


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    assert "is a pipe or device" in source_error(tmp_path / "a.mp4")


def test_a_missing_index_is_named(tmp_path, mp4):
    data = mp4.read_bytes()
    start, end = data.index(b"moov") - 4, data.index(b"mdat") - 4
    assert "(moov) is missing" in source_error(write(tmp_path / "a.mp4", data[:start] + data[end:]))


def test_audio_alone_is_no_video(tmp_path):
    path = tmp_path / "a.m4a"
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 48000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert "no video stream" in source_error(path)


def test_a_playlist_opens_nothing_else(tmp_path):
    text = b"ffconcat version 1.0\nfile http://127.0.0.1:9/x.ts\n"
    assert "refers to other files" in source_error(write(tmp_path / "a.mp4", text))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up")
def test_permission_denied_is_said(tmp_path):
    make_clip(tmp_path / "a.mp4", n_frames=1).chmod(0)
    tmp_path.chmod(0o755)
    code = (
        "import os, sys; from pipeline.decode import VideoSource\n"
        "os.chdir(sys.argv[1]); os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: VideoSource('a.mp4')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("SourceError a.mp4: ")
    assert "permission" in done.stdout.lower()


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.999])
def test_a_cut_mp4_fails_before_its_first_frame(mp4, tmp_path, kept):
    data = mp4.read_bytes()
    path = write(tmp_path / "cut.mp4", data[: int(len(data) * kept)])
    with pytest.raises(SourceError, match="truncated"):
        VideoSource(path)
    assert len(frames_of(path, end_seconds=0.2)) == 5  # what is there can be had


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.99])
def test_a_cut_matroska_fails_before_its_first_frame(tmp_path, kept):
    whole = make_clip(tmp_path / "a.mkv", n_frames=30, noise=True)
    data = whole.read_bytes()
    path = write(tmp_path / "cut.mkv", data[: int(len(data) * kept)])
    with pytest.raises(SourceError, match="truncated"):
        VideoSource(path)
    assert len(frames_of(path, end_seconds=0.4)) == 10


@pytest.mark.parametrize("kept", [0.3, 0.55, 0.8])
def test_a_cut_avi_fails_before_its_first_frame_and_says_what_is_there(tmp_path, kept):
    whole = make_clip(tmp_path / "a.avi", n_frames=100, noise=True)
    data = whole.read_bytes()
    path = write(tmp_path / "cut.avi", data[: int(len(data) * kept)])
    with pytest.raises(SourceError, match="truncated, get a complete copy") as caught:
        VideoSource(path)
    end = float(re.search(r"with --to (\d+\.\d+)", str(caught.value))[1])
    assert 100 * kept - 2 < len(frames_of(path, end_seconds=end)) < 100 * kept + 10  # its index


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj422p", "options": {}}),
        ("a.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("a.avi", {"codec": "libx264", "options": {"bf": "2"}}),
        ("a.mp4", {"container_options": {"movflags": "faststart"}, "options": B_FRAMES}),
        ("a.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("a.mkv", {"options": B_FRAMES}),
    ],
)
def test_what_a_cut_file_says_is_there_can_be_had(tmp_path, name, options):
    whole = make_clip(
        tmp_path / name, n_frames=300, noise=True, time_base=Fraction(1, 25), **options
    )
    data = whole.read_bytes()
    path = write(tmp_path / f"cut{whole.suffix}", data[: int(len(data) * 0.6)])
    text = source_error(path)
    end = float(re.search(r"with --to (\d+(\.\d+)?)$", text)[1])
    seconds = seconds_of(path, end_seconds=end)
    assert seconds == seconds_of(whole, end_seconds=end)
    assert abs(seconds[-1] + Fraction(1, 25) - Fraction(end)) < Fraction(1, 100)
    with VideoSource(path, end_seconds=end) as source:
        assert len(list(source.frames())) == len(seconds)
        assert source.tally.n_corrupt == 0
    assert "truncated" in source_error(path, end_seconds=end + 1)


def test_an_mp4_that_lacks_only_sound_is_cut_too(tmp_path):
    options = {"container_options": {"movflags": "faststart"}, "audio": "aac"}
    whole = make_clip(tmp_path / "a.mp4", n_frames=50, audio_seconds=30, **options)
    data = whole.read_bytes()
    path = write(tmp_path / "cut.mp4", data[: int(len(data) * 0.7)])
    with pytest.raises(SourceError, match="truncated"):
        VideoSource(path)


def test_reading_a_large_file_through_is_progress(tmp_path):
    """Before the first frame, where its header claims more than is there; for a minute or more."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        picture = jpeg(0, (64, 48))
        for index in range(30_000):
            packet = av.Packet(picture)
            packet.pts = packet.dts = index
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            out.mux(packet)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])
    progress, stamps = Progress(), set()
    thread = threading.Thread(target=lambda: source_error(path, progress=progress))
    thread.start()
    while thread.is_alive():
        stamps.add(progress.at)
        thread.join(0.02)
    assert len(stamps) > 5


def test_an_avi_whose_header_only_claims_more_is_whole(tmp_path):
    data = bytearray(make_clip(tmp_path / "a.avi", n_frames=30).read_bytes())
    data[4:8] = (2 * len(data)).to_bytes(4, "little")
    assert len(frames_of(write(tmp_path / "b.avi", data))) == 30


def test_a_recording_that_was_never_finished_is_read_to_its_end(tmp_path):
    """Its length is unknown by its own account: there is nothing that could be missing."""
    what = {"n_frames": 30, "noise": True}
    path = make_clip(tmp_path / "a.mkv", **what, container_options={"live": "1"})
    assert len(frames_of(path)) == 30


def test_wrong_durations_in_matroska_are_no_truncation(tmp_path):
    # Copied from an mp4 with B-frames, each packet carries the gap to the next one in coded order.
    pts = [0, 40, 80, 9000, 9040, 9080, 30000, 30040]
    whole = make_clip(tmp_path / "a.mp4", n_frames=8, pts=pts, options=B_FRAMES)
    assert len(frames_of(copied(whole, tmp_path / "a.mkv"))) == 8


def test_few_corrupt_packets_are_counted_and_many_are_an_error(tmp_path):
    for n_bad in (3, MAX_CONSECUTIVE_DECODE_ERRORS + 4):
        path = tmp_path / f"bad{n_bad}.nut"
        whole = make_clip(tmp_path / "whole.nut", codec="png", pix_fmt="rgb24", options={})
        with av.open(str(whole)) as source, av.open(str(path), "w") as out:
            stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
            for number, packet in enumerate(p for p in source.demux(video=0) if p.size):
                bad = av.Packet(b"no picture") if 4 <= number < 4 + n_bad else packet
                bad.pts, bad.dts, bad.time_base = packet.pts, packet.dts, packet.time_base
                bad.stream = stream
                out.mux(bad)
        with VideoSource(path, threads=1) as source:
            if n_bad > MAX_CONSECUTIVE_DECODE_ERRORS:
                with pytest.raises(SourceError, match="at frame 4"):
                    list(source.frames())
            else:
                assert len(list(source.frames())) == source.tally.n_decoded == 17
                assert (source.tally.n_demuxed, source.tally.n_corrupt) == (20, 3)


def test_a_change_of_size_is_an_error_that_names_the_frame(tmp_path):
    path = tmp_path / "a.nut"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for index, size in enumerate([(64, 48)] * 3 + [(32, 16)] * 3):
            packet = av.Packet(jpeg(index, size))
            packet.pts = packet.dts = index
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            out.mux(packet)
    assert "frame 3 is 32x16" in source_error(path)
