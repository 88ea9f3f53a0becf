"""Decoding: time, captions, trims, names."""

from fractions import Fraction

import av
import numpy as np
import pytest
from media import copied, joined, make_clip
from readback import frames_of, indices_of, seconds_of, source_error
from sample_clips import B_FRAMES, VFR

from pipeline.decode import VideoSource
from pipeline.jobs import plan_file
from pipeline.segments import hash_of

# time


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_frames_come_in_order_with_their_own_pts(tmp_path, suffix):
    path = make_clip(tmp_path / f"a{suffix}", options=B_FRAMES)
    with VideoSource(path) as source:
        frames = list(source.frames())
        seconds = [frame.pts * source.info.time_base for frame in frames]
        tally = source.tally
        assert (tally.n_demuxed, tally.n_decoded, tally.n_corrupt, tally.n_retimed) == (
            20, 20, 0, 0,
        )  # fmt: skip
    assert [frame.index for frame in frames] == list(range(20))
    assert indices_of(path) == list(range(20))
    assert seconds == [Fraction(i, 25) for i in range(20)]


def test_variable_frame_rate_and_b_frames_keep_pts_and_true_durations(tmp_path):
    path = make_clip(
        tmp_path / "a.mp4", n_frames=12, pts=VFR, time_base=Fraction(1, 12800), options=B_FRAMES
    )
    frames = frames_of(path)
    assert [frame.pts for frame in frames] == VFR
    assert [frame.duration for frame in frames[:-1]] == list(np.diff(VFR))
    assert frames[-1].duration == 512


def test_a_start_that_is_not_zero_is_kept(tmp_path):
    path = make_clip(tmp_path / "a.mkv", start_seconds=Fraction(5), options=B_FRAMES)
    assert seconds_of(path)[0] == 5


@pytest.mark.parametrize(("codec", "bf"), [("mpeg4", "0"), ("mpeg4", "2"), ("libx264", "3")])
def test_avi_holds_no_pts_yet_frames_are_evenly_spaced(tmp_path, codec, bf):
    path = make_clip(tmp_path / "a.avi", codec=codec, options={"bf": bf}, time_base=Fraction(1, 25))
    with VideoSource(path) as source:
        assert [frame.pts for frame in source.frames()] == list(range(20))
        assert source.tally.n_retimed == 0
    assert indices_of(path) == list(range(20))
    assert indices_of(path, start_seconds=0.4) == list(range(10, 20))


def test_a_seek_in_an_avi_does_not_shift_the_times(tmp_path):
    """Frames are told by their number there: leading pictures of an open GOP, which give none
    after a seek, would shift all that follow."""
    path = make_clip(
        tmp_path / "a.avi", codec="mpeg4", n_frames=100, options={"bf": "2", "g": "12"},
        time_base=Fraction(1, 25),
    )  # fmt: skip
    whole = {frame.pts: hash_of(frame) for frame in frames_of(path)}
    later = frames_of(path, start_seconds=2)
    assert [frame.pts for frame in later] == list(range(50, 100))
    assert [hash_of(frame) for frame in later] == [whole[pts] for pts in range(50, 100)]


def test_gaps_in_an_avi_are_no_truncation(tmp_path):
    """FFmpeg's muxer writes an empty chunk for each frame that was dropped."""
    pts = [n for n in range(120) if n % 3 == 0]
    path = make_clip(
        tmp_path / "a.avi", codec="mjpeg", pix_fmt="yuvj420p", n_frames=len(pts), pts=pts,
        time_base=Fraction(1, 25), options={},
    )  # fmt: skip
    assert [frame.pts for frame in frames_of(path)] == pts


# Registered user data of ATSC (A/53 part 4): one pair of bytes of captions.
CAPTIONS = b"\x06\x04\x0e\xb5\x00\x31GA94\x03\x41\xff\xfc\x94\x2c\xff\x80"


def captioned(source, path, first):
    """The clip with closed captions in its pictures from packet `first` on."""
    with av.open(str(source)) as one, av.open(str(path), "w") as two:
        stream = two.add_stream_from_template(one.streams.video[0])
        for number, packet in enumerate(p for p in one.demux(video=0) if p.size):
            captions = len(CAPTIONS).to_bytes(4, "big") + CAPTIONS if number >= first else b""
            copy = av.Packet(captions + bytes(packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.duration, copy.is_keyframe, copy.stream = (
                packet.duration,
                packet.is_keyframe,
                stream,
            )
            two.mux(copy)
    return path


@pytest.mark.parametrize(("first", "known_at_once"), [(0, True), (12, False)])
def test_captions_in_the_pictures_are_lost_and_said(tmp_path, first, known_at_once):
    path = captioned(make_clip(tmp_path / "a.mkv", options={"bf": "0"}), tmp_path / "in.mkv", first)
    said = {"closed captions"}
    with VideoSource(path) as source:
        assert source.tally.irregular.unkept == (said if known_at_once else set())
        assert len(list(source.frames())) == 20
        assert source.tally.irregular.unkept == said
    plan = plan_file(path, tmp_path / "out.mkv")
    assert any("closed captions" in line for line in plan.warnings) == known_at_once
    with VideoSource(make_clip(tmp_path / "b.mkv")) as plain:
        assert len(list(plain.frames())) == 20
        assert not plain.tally.irregular.unkept


def test_pts_that_do_not_increase_are_moved_by_a_tick_and_counted(tmp_path):
    # Matroska rounds both to the same millisecond.
    path = make_clip(
        tmp_path / "a.mkv", n_frames=3, pts=[0, 20000, 20001], time_base=Fraction(1, 12800)
    )
    with VideoSource(path) as source:
        assert [frame.pts for frame in source.frames()] == [0, 1563, 1564]
        assert source.tally.n_retimed == 1


def test_a_clock_that_starts_over_is_an_error_that_names_the_frame(tmp_path):
    """Two recordings in one file: all of the second would be a tick long each."""
    parts = [make_clip(tmp_path / f"{n}.ts", n_frames=40, noise=bool(n)) for n in range(2)]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    message = source_error(path)
    assert "frame 40 is 1.560 s before the one before it" in message
    assert "cut the file there" in message


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_what_an_edit_list_skips_is_not_damage(tmp_path, suffix):
    path = make_clip(
        tmp_path / f"a{suffix}", options={**B_FRAMES, "g": "10"}, start_seconds=Fraction(-1, 5),
        container_options={"avoid_negative_ts": "disabled"},
    )  # fmt: skip
    with VideoSource(path) as source:
        assert [f.pts * source.info.time_base for f in source.frames()][::14] == [
            0, Fraction(14, 25),
        ]  # fmt: skip
        assert (source.tally.n_demuxed, source.tally.n_decoded, source.tally.n_corrupt) == (
            20,
            15,
            0,
        )


def test_frames_can_be_read_twice(tmp_path):
    with VideoSource(make_clip(tmp_path / "a.mkv", n_frames=3)) as source:
        assert len(list(source.frames())) == len(list(source.frames())) == source.tally.n_decoded


# trims


@pytest.mark.parametrize("start", [Fraction(0), Fraction(5)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_trims_are_exact_to_the_frame(tmp_path, suffix, start):
    path = make_clip(
        tmp_path / f"a{suffix}", n_frames=60, options=B_FRAMES | {"g": "12"}, start_seconds=start
    )
    for trim, expected in [
        ({"start_seconds": 1.2}, range(30, 60)),
        ({"end_seconds": 0.4}, range(10)),
        ({"start_seconds": 1.53, "end_seconds": 2.0}, range(39, 50)),
        ({"start_seconds": 2.36}, [59]),
    ]:
        frames = frames_of(path, **trim)
        assert indices_of(path, **trim) == list(expected)
        assert [frame.index for frame in frames] == list(range(len(frames)))


def test_long_clip_is_entered_at_a_keyframe(tmp_path):
    path = make_clip(tmp_path / "a.mp4", n_frames=200, options=B_FRAMES | {"g": "10"})
    with VideoSource(path, start_seconds=7.5) as source:
        assert len(list(source.frames())) == 200 - 188
        assert source.tally.n_demuxed < 60


@pytest.mark.parametrize(
    ("trim", "cause"),
    [
        ({"start_seconds": 9}, "beyond the end at 0.800 s"),
        ({"start_seconds": 0.79}, "no frame in the chosen range"),
        ({"start_seconds": 0.5, "end_seconds": 0.5}, "enclose nothing"),
        ({"start_seconds": -1}, "enclose nothing"),
    ],
)
def test_trims_that_keep_nothing_are_errors(tmp_path, trim, cause):
    assert cause in source_error(make_clip(tmp_path / "a.mkv"), **trim)


# names


@pytest.mark.parametrize(
    "name", ["-i.mp4", ":a.mp4", "http:b.mp4", "ü ñ 'q'.mp4", "%03d.mp4", '"$(x)`.mp4']
)
def test_odd_names_are_just_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_clip(name, n_frames=2)
    assert len(frames_of(name)) == 2


@pytest.mark.parametrize("late", range(9))
def test_a_trim_counts_from_the_first_frame_whatever_its_clock_begins_with(tmp_path, late):
    """FFmpeg has the start of a file in microseconds; MPEG-TS counts 90,000 a second."""
    pts = [900_000 + late + 3600 * i for i in range(20)]
    path = make_clip(tmp_path / "a.ts", pts=pts, time_base=Fraction(1, 90_000))
    assert indices_of(path, start_seconds=0) == list(range(20))
    assert indices_of(path, start_seconds=0.2, end_seconds=0.4) == list(range(5, 10))


class TestWhatChangesBeforeTheChosenRange:
    """A recording that begins with another programme's end: what is chosen is told as it is."""

    @pytest.fixture(params=[".ts", ".mkv"])
    def programmes(self, request, tmp_path):
        """Three of four seconds each: the second has another shape and matrix, the third a size."""

        def part(name, size, sar, matrix):
            return make_clip(
                tmp_path / name, n_frames=100, size=size, time_base=Fraction(1, 25),
                sample_aspect_ratio=sar, color=(matrix, matrix, matrix, 1), options={"g": "12"},
            )  # fmt: skip

        path = joined(
            tmp_path, part("a.ts", (96, 64), Fraction(16, 15), 5),
            part("b.ts", (96, 64), Fraction(64, 45), 1),
            part("c.ts", (128, 64), Fraction(64, 45), 1),
        )  # fmt: skip
        if request.param == ".ts":
            return path
        return copied(path, tmp_path / "joined.mkv")

    @pytest.mark.parametrize(
        ("start", "size", "sar", "matrix"),
        [
            (1, (96, 64), Fraction(16, 15), "bt601"), (5, (96, 64), Fraction(64, 45), "bt709"),
            (7, (96, 64), Fraction(64, 45), "bt709"), (9, (128, 64), Fraction(64, 45), "bt709"),
        ],
    )  # fmt: skip
    def test_it_has_its_own_size_shape_and_matrix(self, programmes, start, size, sar, matrix):
        with VideoSource(programmes, start_seconds=start, end_seconds=start + 1) as source:
            frames = list(source.frames())
            info, irregular = source.info, source.tally.irregular
        assert len(frames) == 25
        assert frames[0].planes[0].shape == size[::-1]
        assert (info.width, info.height) == size
        assert info.sample_aspect_ratio == sar
        assert info.pixel_format.matrix == matrix
        assert not irregular.relabelled
