"""Decoding: what files say of themselves, time, pixels, trims and everything that can be broken."""

import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import B_FRAMES, VFR
from media import jpeg, make_clip, numbered_picture
from readback import frames_of, indices_of, seconds_of, source_error

from pipeline.decode import VideoSource
from pipeline.errors import SourceError
from pipeline.frame_decoder import MAX_CONSECUTIVE_DECODE_ERRORS
from pipeline.jobs import plan_file
from pipeline.probe import _TO_PLANAR
from pipeline.segments import hash_of
from pipeline.side_data import side_data_of

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


# pixels

PLANAR = [
    "gray", "gray10le", "gray12le", "gray16le", "yuv410p", "yuv411p", "yuv420p", "yuv422p",
    "yuv440p", "yuv444p", "yuv420p9le", "yuv420p10le", "yuv422p10le", "yuv444p10le", "yuv420p12le",
    "yuv422p12le", "yuv444p12le", "yuv420p14le", "yuv444p16le", "gbrp10le", "gbrp12le",
]  # fmt: skip


@pytest.mark.parametrize("size", [(64, 48), (35, 19), (1, 1)])
@pytest.mark.parametrize("pix_fmt", PLANAR)
def test_planes_are_exact(tmp_path, pix_fmt, size):
    path = make_clip(
        tmp_path / "a.mkv", n_frames=2, size=size, pix_fmt=pix_fmt, codec="ffv1", options={},
        noise=True,
    )  # fmt: skip
    with VideoSource(path) as source:
        frames, layout = list(source.frames()), source.info.pixel_format
    assert layout.name == pix_fmt
    assert tuple(p.shape for p in frames[0].planes) == layout.plane_shapes(*size)
    for index, frame in enumerate(frames):
        expected = planes_of(numbered_picture(index, size, pix_fmt, noise=True))
        for plane, original in zip(frame.planes, expected, strict=True):
            assert plane.dtype == layout.dtype
            assert not plane.flags.writeable
            assert np.array_equal(plane, original)


def planes_of(picture):
    """Each plane of an av.VideoFrame without its padding."""
    planes = []
    for number, plane in enumerate(picture.planes):
        bits = next(c.bits for c in picture.format.components if c.plane == number)
        dtype = np.uint8 if bits == 8 else np.uint16
        rows = np.frombuffer(plane, dtype).reshape(plane.height, -1)
        planes.append(rows[:, : plane.width])
    return planes


@pytest.mark.parametrize(("packed", "planar"), [i for i in _TO_PLANAR.items() if i[0] != "pal8"])
def test_packed_formats_become_planes_without_loss(packed, planar):
    picture = numbered_picture(3, (64, 48), planar, noise=True)
    back = picture.reformat(format=packed).reformat(format=planar)
    for plane, original in zip(planes_of(back), planes_of(picture), strict=True):
        assert np.array_equal(plane, original)


@pytest.mark.parametrize("pix_fmt", ["rgb24", "yuyv422", "nv12", "bgr0"])
def test_packed_files_are_decoded_as_planes(tmp_path, pix_fmt):
    path = make_clip(
        tmp_path / "a.nut", n_frames=3, pix_fmt=pix_fmt, codec="rawvideo", options={}, noise=True
    )
    with VideoSource(path) as source:
        assert source.info.pixel_format.name == _TO_PLANAR[pix_fmt]
        frame = next(source.frames())
    picture = numbered_picture(0, (64, 48), pix_fmt, noise=True)
    expected = planes_of(picture.reformat(format=_TO_PLANAR[pix_fmt]))
    for plane, original in zip(frame.planes, expected, strict=True):
        assert np.array_equal(plane, original)


def test_gbrp_is_green_blue_red(tmp_path):
    path = make_clip(
        tmp_path / "a.mkv", n_frames=2, pix_fmt="bgr0", codec="ffv1", options={}, noise=True
    )
    with VideoSource(path) as source:
        layout = source.info.pixel_format
        frame = next(source.frames())
    assert (layout.name, layout.matrix, layout.full_range) == ("gbrp", "rgb", True)
    rows = planes_of_bgr0(numbered_picture(0, (64, 48), "bgr0", noise=True))
    for plane, channel in zip(frame.planes, (1, 0, 2), strict=True):
        assert np.array_equal(plane, rows[:, :, channel])


def planes_of_bgr0(picture):
    plane = picture.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
    return rows[:, : plane.width * 4].reshape(plane.height, plane.width, 4)


def test_palette_is_looked_up_exactly(tmp_path):
    picture = (
        av.VideoFrame.from_ndarray(
            np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), format="rgb24"
        )
        .reformat(format="rgb8")
        .reformat(format="rgb24")
    )
    indices = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    palette = np.random.default_rng(1).integers(0, 256, (256, 4), np.uint8)
    palette[:, 0] = 255
    indices = np.arange(48 * 64, dtype=np.uint8).reshape(48, 64)
    palette = np.random.default_rng(1).integers(0, 256, (256, 4), np.uint8)
    palette[:, 0] = 255
    picture = av.VideoFrame.from_ndarray((indices, palette), format="pal8")
    path = tmp_path / "a.nut"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
        picture.pts, picture.time_base = 0, Fraction(1, 25)
        out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    (frame,) = frames_of(path)
    for plane, channel in zip(frame.planes, (2, 3, 1), strict=True):
        assert np.array_equal(plane, palette[indices, channel])


@pytest.mark.parametrize(("pix_fmt", "codec"), [("rgba", "png"), ("yuva420p", "ffv1")])
def test_transparency_is_refused(tmp_path, pix_fmt, codec):
    path = make_clip(tmp_path / "a.nut", n_frames=2, pix_fmt=pix_fmt, codec=codec, options={})
    assert "has transparency" in source_error(path)


# what is known of the stream


def test_info_carries_tags_rotation_and_shape(tmp_path):
    path = make_clip(
        tmp_path / "a.mp4", rotation=90, sample_aspect_ratio=Fraction(4, 3), color=(9, 16, 9, 1),
        time_base=Fraction(1, 12800),
    )  # fmt: skip
    with VideoSource(path) as source:
        info = source.info
    assert (info.width, info.height, info.rotation) == (64, 48, 90)
    assert (info.sample_aspect_ratio, info.frame_rate) == (Fraction(4, 3), Fraction(25))
    assert (info.time_base, info.n_frames) == (Fraction(1, 12800), 20)
    assert info.duration_seconds == pytest.approx(0.8)
    tags = (info.color_primaries, info.color_trc, info.colorspace, info.color_range)
    assert tags == (9, 16, 9, 1)
    assert (info.pixel_format.matrix, info.pixel_format.full_range) == ("bt2020", False)


@pytest.mark.parametrize(("height", "matrix"), [(576, "bt601"), (578, "bt709")])
def test_an_untagged_matrix_is_guessed_by_size(tmp_path, height, matrix):
    path = make_clip(tmp_path / "a.mkv", n_frames=1, size=(64, height))
    with VideoSource(path) as source:
        assert source.info.pixel_format.matrix == matrix


def test_jpeg_video_is_full_range_and_centred(tmp_path):
    path = make_clip(tmp_path / "a.mkv", pix_fmt="yuvj420p", codec="mjpeg", options={})
    with VideoSource(path) as source:
        layout = source.info.pixel_format
        assert (layout.name, layout.full_range, source.info.color_range) == ("yuv420p", True, 2)
        assert layout.chroma_location == "center"


@pytest.mark.parametrize("site", ["topleft", "center", "left"])
def test_chroma_location_is_read(tmp_path, site):
    path = make_clip(tmp_path / "a.mp4", n_frames=2, options={"chroma_sample_location": site})
    with VideoSource(path) as source:
        assert source.info.pixel_format.chroma_location == site


def test_side_data_that_pyav_has_no_name_for_hides_none_of_the_rest(tmp_path):
    """TIFF's pictures carry EXIF, which came to FFmpeg after PyAV's list of kinds."""
    path = make_clip(tmp_path / "a.mov", codec="tiff", pix_fmt="rgb24", rotation=90)
    with av.open(str(path)) as container:
        (exif,) = {kind.name for kind in side_data_of(next(container.decode(video=0)))} - {
            "DISPLAYMATRIX"
        }
        assert exif.startswith("UNKNOWN_")
    with VideoSource(path) as source:
        assert len(list(source.frames())) == 20
        assert source.info.rotation == 90
        assert source.info.display_matrix


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg here to write raw DV")
def test_a_raw_dv_tape_has_its_own_frame_rate(tmp_path):
    path = tmp_path / "a.dv"
    source = ["-f", "lavfi", "-i", "testsrc=size=720x576:rate=25:duration=0.4"]
    subprocess.run(["ffmpeg", "-v", "error", *source, "-target", "pal-dv", str(path)], check=True)
    with VideoSource(path) as video:
        assert video.info.frame_rate == 25


def test_cover_art_is_not_the_video(tmp_path):
    path = make_clip(tmp_path / "a.mp4", cover=True, n_frames=5, audio="aac")
    assert indices_of(path) == list(range(5))


# names


@pytest.mark.parametrize(
    "name", ["-i.mp4", ":a.mp4", "http:b.mp4", "ü ñ 'q'.mp4", "%03d.mp4", '"$(x)`.mp4']
)
def test_odd_names_are_just_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    make_clip(name, n_frames=2)
    assert len(frames_of(name)) == 2


# broken files


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
    path = tmp_path / "a.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    assert len(frames_of(path)) == 8


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
