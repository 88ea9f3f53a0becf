"""Decoding goes on at a frame, with what it would have given and counted from the start."""

from fractions import Fraction

import av
import pytest
from media import make_clip
from readback import frames_of
from sample_clips import SHORT_GOPS, SOURCES, assert_same

from pipeline.decode import VideoSource
from pipeline.errors import SourceError
from pipeline.segments import Place, hash_of


def place_of(frame):
    return Place(frame.index, frame.pts, hash_of(frame))


@pytest.mark.parametrize("name", SOURCES)
def test_decoding_goes_on_exactly_after_any_frame(tmp_path, name):
    suffix, what = SOURCES[name]
    clip = {"n_frames": 90, "time_base": Fraction(1, 12800), "noise": True, **what}
    path = make_clip(tmp_path / f"in{suffix}", **clip)
    whole = frames_of(path)
    assert len(whole) >= 88  # a decoder may give less of an open GOP without an end
    for frame in [*whole[::11], whole[-2], whole[-1]]:
        with VideoSource(path) as source:
            assert_same(list(source.frames(place_of(frame))), whole[frame.index + 1 :])
            assert source.tally.n_decoded == len(whole)


@pytest.mark.parametrize("name", ["x264 closed", "x264 open", "x265 open"])
def test_decoding_does_not_start_over(tmp_path, name):
    suffix, what = SOURCES[name]
    path = make_clip(tmp_path / f"in{suffix}", n_frames=200, **{
        "time_base": Fraction(1, 12800), **what})  # fmt: skip
    whole = frames_of(path)
    with VideoSource(path) as source:
        list(source.frames(place_of(whole[180])))
        assert source.tally.n_demuxed < 100


def test_a_span_goes_on_too(tmp_path):
    path = make_clip(tmp_path / "in.mkv", n_frames=90, options=SHORT_GOPS)
    whole = frames_of(path, start_seconds=0.4, end_seconds=3)
    for frame in whole[::7]:
        with VideoSource(path, start_seconds=0.4, end_seconds=3) as source:
            assert_same(list(source.frames(place_of(frame))), whole[frame.index + 1 :])


def test_times_that_were_made_up_are_made_up_alike(tmp_path):
    pts = [i * 512 + (i % 5 == 4) for i in range(60)]
    for i in range(3, 60, 7):
        pts[i] = pts[i - 1] + 1  # the same millisecond in Matroska
    path = make_clip(
        tmp_path / "in.mkv", n_frames=60, pts=pts, time_base=Fraction(1, 12800),
        options={"g": "10", "bf": "0"},
    )  # fmt: skip
    whole = frames_of(path)
    for frame in whole[::9]:
        with VideoSource(path) as source:
            assert_same(list(source.frames(place_of(frame))), whole[frame.index + 1 :])


def test_a_source_that_decodes_otherwise_is_refused(tmp_path):
    path = make_clip(tmp_path / "in.mkv")
    with VideoSource(path) as source, pytest.raises(SourceError, match=r"in\.mkv.*--no-resume"):
        list(source.frames(Place(5, 200, "another picture")))


def test_frames_lost_before_the_interruption_are_counted_after_it(tmp_path):
    clip = make_clip(tmp_path / "in.mp4", n_frames=100, options={"bf": "2", "g": "12"})
    data = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        for packet in (packets[i] for i in (20, 40, 90)):
            data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    clip.write_bytes(data)
    for threads in (1, 3):
        with VideoSource(clip, threads=threads) as source:
            frames = list(source.frames())
        assert source.tally.n_corrupt >= 3
        for n in (10, 50, 80):
            place = Place(n, frames[n].pts, hash_of(frames[n]), frames[n].counts)
            with VideoSource(clip, threads=threads) as resumed:
                assert len(list(resumed.frames(place))) == len(frames) - 1 - n
            counted = resumed.tally.n_corrupt, resumed.tally.n_decoded
            assert counted == (source.tally.n_corrupt, len(frames)), (threads, n)
