"""Encoding: every frame and pts once, everything else copied, and nothing half-finished left."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import B_FRAMES, FAST, LOSSLESS, VFR
from media import make_clip
from readback import (
    assert_same_planes,
    frames_of,
    indices_of,
    packets_of,
    recode,
    refused,
    seconds_of,
)

from pipeline.decode import VideoSource
from pipeline.encode import EncodeSettings, VideoWriter, default_settings
from pipeline.errors import ConfigError, IntegrityError, SinkError
from pipeline.frames import Frame


@pytest.fixture
def clip(tmp_path):
    """A plain clip without sound."""
    return make_clip(tmp_path / "in.mkv")


# time


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "ffv1"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_frame_rate_is_kept_exactly(tmp_path, codec, suffix):
    base = Fraction(1, 12800) if suffix == ".mp4" else Fraction(1, 1000)
    pts = VFR if suffix == ".mp4" else sorted({p // 10 for p in VFR})
    source = make_clip(
        tmp_path / f"in{suffix}", n_frames=12, pts=pts, time_base=base, options=B_FRAMES
    )
    settings = EncodeSettings(codec, preset="10" if codec == "libsvtav1" else None)
    recode(source, tmp_path / f"out{suffix}", settings)
    before, after = frames_of(source), frames_of(tmp_path / f"out{suffix}")
    assert [(f.pts, f.duration) for f in after] == [(f.pts, f.duration) for f in before]
    assert indices_of(tmp_path / f"out{suffix}") == list(range(len(pts)))


@pytest.mark.parametrize(
    ("before", "after"), [(".mp4", ".mp4"), (".mkv", ".mkv"), (".mkv", ".mp4"), (".mp4", ".mkv")]
)
def test_a_start_at_five_seconds_stays_there(tmp_path, before, after):
    source = make_clip(
        tmp_path / f"in{before}", start_seconds=Fraction(5), options=B_FRAMES, audio="aac"
    )
    recode(source, tmp_path / f"out{after}")
    assert seconds_of(tmp_path / f"out{after}") == [5 + Fraction(i, 25) for i in range(20)]
    times = [round(float(t), 3) for t, _ in packets_of(tmp_path / f"out{after}", "audio")]
    assert times == [round(float(t), 3) for t, _ in packets_of(source, "audio")]


def test_rounding_to_milliseconds_is_said(tmp_path):
    source = make_clip(tmp_path / "in.mp4", time_base=Fraction(1, 12800))
    (warning,) = recode(source, tmp_path / "out.mkv").warnings
    assert "rounded to 1/1000" in warning


def test_webm_takes_vp9_and_opus(tmp_path):
    source = make_clip(tmp_path / "in.mkv", audio="libopus", n_frames=10)
    with VideoSource(source) as opened:
        settings = default_settings("out.WEBM", opened.info)
    assert settings.codec == "libvpx-vp9"
    recode(source, tmp_path / "out.webm")
    assert indices_of(tmp_path / "out.webm") == list(range(10))
    assert packets_of(tmp_path / "out.webm", "audio") == packets_of(source, "audio")


# pixels and tags


@pytest.mark.parametrize("size", [(64, 48), (35, 19), (1, 1)])
@pytest.mark.parametrize(
    "pix_fmt",
    ["yuv420p", "yuv422p", "yuv444p", "yuv411p", "gray", "gray10le", "yuv420p10le", "yuv422p10le",
     "yuv444p12le", "gbrp10le", "bgr0"],
)  # fmt: skip
def test_ffv1_round_trip_is_exact(tmp_path, pix_fmt, size):
    options = {"size": size, "pix_fmt": pix_fmt, "codec": "ffv1", "options": {}, "noise": True}
    source = make_clip(tmp_path / "in.mkv", n_frames=3, **options)
    warnings = recode(source, tmp_path / "out.mkv", LOSSLESS).warnings
    assert warnings == ([] if pix_fmt != "bgr0" else warnings)
    assert_same_planes(source, tmp_path / "out.mkv")


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le", "yuv422p10le", "yuv444p"])
def test_x264_without_loss_is_exact(tmp_path, pix_fmt):
    source = make_clip(
        tmp_path / "in.mkv", n_frames=4, pix_fmt=pix_fmt, codec="ffv1", options={}, noise=True
    )
    settings = EncodeSettings(crf=None, preset="ultrafast", options={"qp": "0"})
    assert recode(source, tmp_path / "out.mkv", settings).warnings == []
    assert_same_planes(source, tmp_path / "out.mkv")


def test_gbrp_is_exact_in_x265(tmp_path):
    source = make_clip(
        tmp_path / "in.mkv", n_frames=2, pix_fmt="bgr0", codec="ffv1", options={}, noise=True
    )
    settings = EncodeSettings("libx265", options={"x265-params": "lossless=1"})
    assert recode(source, tmp_path / "out.mkv", settings).warnings == []
    assert_same_planes(source, tmp_path / "out.mkv")


def test_a_format_the_encoder_lacks_becomes_the_nearest(tmp_path):
    source = make_clip(tmp_path / "in.mkv", pix_fmt="yuv411p", codec="ffv1", options={}, n_frames=9)
    (warning,) = recode(source, tmp_path / "out.mkv", FAST).warnings
    assert "yuv411p" in warning
    assert "yuv422p without loss" in warning
    assert indices_of(tmp_path / "out.mkv") == list(range(9))


def test_a_chosen_pixel_format_is_converted_to(tmp_path, clip):
    assert recode(clip, tmp_path / "out.mkv", replace(FAST, pix_fmt="yuv444p10le")).warnings == []
    with VideoSource(tmp_path / "out.mkv") as source:
        assert source.info.pixel_format.name == "yuv444p10le"
    assert indices_of(tmp_path / "out.mkv") == list(range(20))


def test_what_a_chosen_pixel_format_loses_is_said(tmp_path):
    source = make_clip(
        tmp_path / "in.mkv", pix_fmt="yuv444p10le", codec="ffv1", options={}, n_frames=2
    )
    (warning,) = recode(source, tmp_path / "out.mkv", replace(FAST, pix_fmt="yuv420p")).warnings
    assert "yuv444p10le loses RESOLUTION|DEPTH" in warning


def test_rgb_becomes_tagged_yuv_of_the_same_colours(tmp_path):
    source = make_clip(tmp_path / "in.mkv", pix_fmt="bgr0", codec="ffv1", options={}, n_frames=2)
    (warning,) = recode(source, tmp_path / "out.mkv", replace(FAST, crf=1)).warnings
    assert "losing COLORSPACE" in warning
    with VideoSource(tmp_path / "out.mkv") as again:
        assert (again.info.pixel_format.matrix, again.info.color_range) == ("bt709", 1)
    with av.open(str(source)) as one, av.open(str(tmp_path / "out.mkv")) as two:
        before, after = (next(c.decode(video=0)).to_ndarray(format="rgb24") for c in (one, two))
    assert np.abs(before.astype(int) - after).mean() < 3


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("out.webm", "libvpx-vp9", {"lossless": "1"}), ("out.mkv", "libx264", {"qp": "0"})],
)
def test_gray_is_exact_as_luma_of_full_range(tmp_path, name, codec, options):
    source = make_clip(
        tmp_path / "in.mkv", pix_fmt="gray", codec="ffv1", options={}, n_frames=2, noise=True
    )
    recode(source, tmp_path / name, EncodeSettings(codec, crf=None, options=options))
    for before, after in zip(frames_of(source), frames_of(tmp_path / name), strict=True):
        assert np.array_equal(before.planes[0], after.planes[0])
        assert all((plane == 128).all() for plane in after.planes[1:])
    with VideoSource(tmp_path / name) as again:
        assert again.info.pixel_format.full_range


@pytest.mark.parametrize("codec", ["libvpx", "mjpeg"])
@pytest.mark.parametrize(("color", "said"), [((1, 1, 1, 2), 1), ((6, 6, 6, 2), 0)])
def test_a_matrix_that_an_encoder_cannot_say_is_one_line(tmp_path, codec, color, said):
    source = make_clip(tmp_path / "in.mkv", color=color, n_frames=2)
    warnings = recode(source, tmp_path / "out.mkv", EncodeSettings(codec)).warnings
    assert sum("matrix" in warning for warning in warnings) == said, warnings


def test_deep_gray_is_luma_of_the_same_depth(tmp_path):
    source = make_clip(
        tmp_path / "in.mkv", pix_fmt="gray10le", codec="ffv1", options={}, n_frames=3
    )
    warnings = recode(source, tmp_path / "out.webm").warnings
    assert "libsvtav1 does not take gray10le: encoding yuv420p10le without loss" in warnings
    for before, after in zip(frames_of(source), frames_of(tmp_path / "out.webm"), strict=True):
        assert np.abs(before.planes[0].astype(int) - after.planes[0]).max() < 16
        assert all((np.abs(plane.astype(int) - 512) < 4).all() for plane in after.planes[1:])
    with VideoSource(tmp_path / "out.webm") as again:
        assert again.info.pixel_format.full_range


@pytest.mark.parametrize(
    ("pix_fmt", "codec"),
    [("yuv420p", "libx264"), ("yuv422p10le", "libx264"), ("yuv420p12le", "libx265")],
)
def test_default_settings_lose_no_depth(tmp_path, pix_fmt, codec):
    source = make_clip(tmp_path / "in.mkv", pix_fmt=pix_fmt, codec="ffv1", options={}, n_frames=1)
    with VideoSource(source) as opened:
        assert default_settings("out.mkv", opened.info).codec == codec


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".webm"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv420p10le"])
def test_an_odd_size_gets_an_encoder_that_takes_it(tmp_path, suffix, pix_fmt):
    """x264 and x265 take none where chroma is halved."""
    source = make_clip(
        tmp_path / "in.mkv", pix_fmt=pix_fmt, codec="ffv1", options={}, n_frames=3, size=(85, 71)
    )
    recode(source, tmp_path / f"out{suffix}")
    with VideoSource(tmp_path / f"out{suffix}") as out:
        assert (out.info.width, out.info.height) == (85, 71)
        assert out.info.pixel_format.bit_depth == (10 if "10" in pix_fmt else 8)
        assert len(list(out.frames())) == 3


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_an_encoder_that_takes_no_odd_size_says_so(tmp_path, codec):
    source = make_clip(
        tmp_path / "in.mkv", codec="ffv1", options={}, n_frames=3, size=(85, 71)
    )  # fmt: skip
    message = refused(ConfigError, tmp_path / "out.mkv", source, EncodeSettings(codec))
    assert "takes no 85x71 pictures in yuv420p; use libvpx-vp9" in message


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libsvtav1", "ffv1"])
def test_the_header_does_not_tell_the_machine(tmp_path, codec):
    """Segments of one file come from machines of any number of cores, to go under one header."""
    source = make_clip(tmp_path / "in.mkv", n_frames=3, size=(320, 192))
    headers = set()
    for threads in (1, 4):
        with VideoSource(source) as video:
            settings = EncodeSettings(codec, threads=threads)
            path = tmp_path / f"{threads}.mkv"
            with VideoWriter(path, video.info, settings, copy_from=None, dry_run=True) as writer:
                headers.add(writer.encoding.extradata)
    assert len(headers) == 1
    assert b"cpuid" not in headers.pop()


KEPT = [
    "width", "height", "rotation", "sample_aspect_ratio", "color_primaries", "color_trc",
    "colorspace", "color_range", "pixel_format", "frame_rate",
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_tags_shape_and_rotation_are_kept(tmp_path, suffix, rotation):
    source = make_clip(
        tmp_path / f"in{suffix}", rotation=rotation, sample_aspect_ratio=Fraction(4, 3),
        color=(9, 16, 9, 1), pix_fmt="yuv420p10le", n_frames=3,
        options={"chroma_sample_location": "topleft"},
    )  # fmt: skip
    recode(source, tmp_path / f"out{suffix}")
    with VideoSource(source) as one, VideoSource(tmp_path / f"out{suffix}") as two:
        assert one.info.rotation % 360 == rotation % 360
        for name in KEPT:
            assert getattr(two.info, name) == getattr(one.info, name), name


def test_jpeg_full_range_is_kept(tmp_path):
    source = make_clip(tmp_path / "in.mkv", pix_fmt="yuvj420p", codec="mjpeg", options={})
    recode(source, tmp_path / "out.mkv", EncodeSettings(crf=None, options={"qp": "0"}))
    with VideoSource(tmp_path / "out.mkv") as source_again:
        assert source_again.info.pixel_format.full_range
        assert source_again.info.pixel_format.chroma_location == "center"
    assert_same_planes(source, tmp_path / "out.mkv")


# what is copied


@pytest.mark.parametrize(
    ("suffix", "audio"),
    [(".mp4", "aac"), (".mkv", "aac"), (".mkv", "libopus"), (".mkv", "pcm_s16le"), (".mov", "aac")],
)
def test_audio_packets_are_copied_bit_for_bit(tmp_path, suffix, audio):
    source = make_clip(
        tmp_path / f"in{suffix}", audio=audio, audio_seconds=1.5, options=B_FRAMES,
        time_base=Fraction(1, 12800),
    )  # fmt: skip
    recode(source, tmp_path / f"out{suffix}")
    assert packets_of(tmp_path / f"out{suffix}", "audio") == packets_of(source, "audio")
    assert seconds_of(tmp_path / f"out{suffix}") == seconds_of(source)


def test_audio_goes_from_mp4_to_matroska(tmp_path):
    source = make_clip(tmp_path / "in.mp4", audio="aac", time_base=Fraction(1, 1000))
    recode(source, tmp_path / "out.mkv")
    before, after = packets_of(source, "audio"), packets_of(tmp_path / "out.mkv", "audio")
    assert [h for _, h in after] == [h for _, h in before]
    assert all(
        abs(a - b) <= Fraction(1, 1000) for (a, _), (b, _) in zip(after, before, strict=True)
    )
    assert seconds_of(tmp_path / "out.mkv") == seconds_of(source)


RICH = {
    "audio": "aac",
    "subtitles": [(0.1, 0.3, "eins"), (0.4, 0.6, "zwei")],
    "attachment": ("font.ttf", "application/x-truetype-font", b"glyphs" * 9),
    "chapters": [(0, 0.4, "one"), (0.4, 0.8, "two")],
    "metadata": {"title": "A title"},
}


def test_matroska_keeps_everything(tmp_path):
    source = make_clip(tmp_path / "in.mkv", **RICH)
    assert recode(source, tmp_path / "out.mkv").warnings == []
    for kind in ("audio", "subtitle"):
        assert packets_of(tmp_path / "out.mkv", kind) == packets_of(source, kind)
    with av.open(str(source)) as one, av.open(str(tmp_path / "out.mkv")) as two:
        assert [s.type for s in two.streams] == [s.type for s in one.streams]
        assert two.chapters() == one.chapters()
        assert two.metadata["title"] == "A title"
        assert two.streams.video[0].metadata["title"] == "the video"
        assert two.streams.subtitles[0].metadata["language"] == "deu"
        assert [s.disposition for s in two.streams] == [s.disposition for s in one.streams]
        attachment = next(s for s in two.streams if s.type == "attachment")
        assert (attachment.data, attachment.mimetype) == (b"glyphs" * 9, RICH["attachment"][1])


def test_webm_keeps_chapters_or_says_that_it_does_not(tmp_path):
    source = make_clip(tmp_path / "in.mkv", n_frames=3, chapters=[(0, 0.1, "one")])
    warnings = recode(source, tmp_path / "out.webm").warnings
    with av.open(str(tmp_path / "out.webm")) as out:
        assert bool(out.chapters()) != bool(warnings)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_cover_art_is_kept(tmp_path, suffix):
    source = make_clip(tmp_path / "in.mp4", cover=True)
    recode(source, tmp_path / f"out{suffix}")
    with av.open(str(source)) as one, av.open(str(tmp_path / f"out{suffix}")) as two:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in two.streams if s.disposition & cover]
        assert len(streams) == 1
        data = [bytes(next(c.demux(next(s for s in c.streams if s.disposition & cover))))
                for c in (one, two)]  # fmt: skip
        assert data[0] == data[1]
    assert indices_of(tmp_path / f"out{suffix}") == list(range(20))
    recode(tmp_path / f"out{suffix}", tmp_path / "again.mkv")
    with av.open(str(tmp_path / "again.mkv")) as out:
        assert sum(bool(s.disposition & cover) for s in out.streams) == 1


def test_a_timecode_is_carried(tmp_path):
    source = make_clip(tmp_path / "in.mov", metadata={"timecode": "01:02:03:04"})
    with av.open(str(source)) as opened:
        assert any(s.type == "data" for s in opened.streams)
    (warning,) = recode(source, tmp_path / "out.mov").warnings
    assert "01:02:03:04" in warning
    with av.open(str(tmp_path / "out.mov")) as out:
        assert any(s.metadata.get("timecode") == "01:02:03:04" for s in out.streams)


def test_streams_are_interleaved(tmp_path):
    source = make_clip(tmp_path / "in.mkv", audio="pcm_s16le", n_frames=100)
    recode(source, tmp_path / "out.mkv", FAST)
    with av.open(str(tmp_path / "out.mkv")) as out:
        kinds = [p.stream.type for p in out.demux() if p.size]
    middle = kinds[len(kinds) // 3 : 2 * len(kinds) // 3]
    assert {"video", "audio"} == set(middle)


# trims


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_trim_moves_everything_to_zero(tmp_path, suffix):
    source = make_clip(
        tmp_path / f"in{suffix}", n_frames=50, options=B_FRAMES, audio="aac",
        start_seconds=Fraction(5), chapters=[(5, 6, "one"), (6, 7, "two")],
        subtitles=RICH["subtitles"] if suffix == ".mkv" else [],
    )  # fmt: skip
    out = tmp_path / f"out{suffix}"
    recode(source, out, start_seconds=0.8, end_seconds=1.6)
    assert indices_of(out) == list(range(20, 40))
    # In mp4 the file starts with the priming of AAC, 22 ms before the first frame.
    lead = seconds_of(out)[0]
    assert 0 <= lead <= Fraction(22, 1000)
    assert seconds_of(out) == [lead + Fraction(i, 25) for i in range(20)]
    before = {h: t for t, h in packets_of(source, "audio")}
    sound = packets_of(out, "audio")
    assert 0 <= sound[0][0] < Fraction(22, 1000)
    assert Fraction(75, 100) < sound[-1][0] < Fraction(8, 10)
    for time, digest in sound:
        assert abs(before[digest] - time - (Fraction(58, 10) - lead)) <= Fraction(1, 1000)
    with av.open(str(out)) as opened:
        titles = [
            (c["metadata"]["title"], float(c["start"] * c["time_base"])) for c in opened.chapters()
        ]
    assert titles == [("one", 0), ("two", pytest.approx(0.2 + float(lead)))]


def test_a_subtitle_on_screen_at_the_start_is_kept(tmp_path):
    source = make_clip(tmp_path / "in.mkv", subtitles=[(0.1, 0.5, "eins"), (0.6, 0.7, "zwei")])
    recode(source, tmp_path / "out.mkv", start_seconds=0.4)
    with av.open(str(tmp_path / "out.mkv")) as out:
        shown = [(p.pts, p.duration) for p in out.demux(subtitles=0) if p.size]
    assert shown == [(0, 100), (200, 100)]


# refusals


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


@pytest.mark.parametrize(
    ("name", "settings", "cause"),
    [
        ("out.xyz", FAST, "unknown extension"),
        ("out", FAST, "unknown extension"),
        ("out.mkv", EncodeSettings("libx999"), "codec 'libx999' is unknown"),
        ("out.mkv", EncodeSettings("aac"), "is for audio"),
        ("out.mp4", EncodeSettings("libvpx"), "cannot hold libvpx"),
        ("out.webm", EncodeSettings("libx264"), "cannot hold libx264"),
        ("out.mkv", EncodeSettings(pix_fmt="yuv999p"), "pixel format 'yuv999p'"),
        ("out.mkv", EncodeSettings(pix_fmt="gbrp"), "pixel format 'gbrp'"),
        ("out.mkv", EncodeSettings(preset="warp"), "preset=warp"),
        ("out.mkv", EncodeSettings("ffv1", preset="slow"), "no option preset"),
        ("out.mkv", EncodeSettings(crf=99), "crf 99 is outside 0 to 51"),
        ("out.mkv", EncodeSettings(options={"warp": "1"}), "no option warp"),
    ],
)
def test_wrong_settings_fail_before_the_first_frame(tmp_path, clip, name, settings, cause):
    assert cause in refused(ConfigError, tmp_path / name, clip, settings)


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


def test_a_hardware_encoder_without_hardware_is_a_config_error(tmp_path, clip):
    if "h264_nvenc" not in av.codecs_available:
        pytest.skip("not compiled in")
    try:
        refused(ConfigError, tmp_path / "out.mkv", clip, EncodeSettings("h264_nvenc"))
    except pytest.fail.Exception:
        pytest.skip("this machine has the hardware")


# nothing half-finished


def test_an_exception_leaves_nothing(tmp_path, clip):
    path = tmp_path / "out.mkv"
    with VideoSource(clip) as source:
        writer = VideoWriter(path, source.info, FAST, copy_from=clip)
        assert (tmp_path / ".out.mkv.part").exists()
        with contextlib.suppress(RuntimeError), writer:
            writer.write(next(source.frames()))
            raise RuntimeError
    assert sorted(tmp_path.iterdir()) == [clip]


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


def test_no_frame_at_all_is_an_error(tmp_path, clip):
    with VideoSource(clip) as source, pytest.raises(IntegrityError, match="0 frames"):
        VideoWriter(tmp_path / "out.mkv", source.info, FAST, copy_from=clip).close()
    assert sorted(tmp_path.iterdir()) == [clip]


def test_a_lost_packet_is_an_integrity_error(tmp_path, clip):
    with VideoSource(clip) as source:
        writer = VideoWriter(tmp_path / "out.mkv", source.info, FAST, copy_from=clip)
        for frame in source.frames():
            writer.write(frame)
        writer.n_muxed -= 1
        with pytest.raises(IntegrityError, match="20 frames given, 19 packets"):
            writer.close()
    assert sorted(tmp_path.iterdir()) == [clip]


def test_a_frame_out_of_order_is_a_sink_error(tmp_path, clip):
    with VideoSource(clip) as source:
        frame = next(source.frames())
        writer = VideoWriter(tmp_path / "out.mkv", source.info, LOSSLESS, copy_from=clip)
        writer.write(replace(frame, pts=500))
        with pytest.raises(SinkError):
            writer.write(replace(frame, pts=100))
        writer.abort()
    assert sorted(tmp_path.iterdir()) == [clip]


def test_a_full_disk_is_a_sink_error(tmp_path):
    clip = make_clip(tmp_path / "in.mkv", size=(320, 240), noise=True)
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from pipeline.decode import VideoSource; from pipeline.encode import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)\n"
        "source = VideoSource(sys.argv[1])\n"
        "try:\n"
        "  with VideoWriter(sys.argv[2], source.info, EncodeSettings('ffv1'),"
        " copy_from=Path(sys.argv[1])) as writer:\n"
        "    for frame in source.frames(): writer.write(frame)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    for limit in (0, 100, 200_000, 1_000_000):
        done = subprocess.run(
            [sys.executable, "-c", code, str(clip), str(tmp_path / "out.mkv"), str(limit)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout.startswith(f"SinkError {tmp_path / 'out.mkv'}: cannot be written")
        assert "File too large" in done.stdout
        assert sorted(tmp_path.iterdir()) == [clip]


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


def test_x264_gives_the_same_bytes_whatever_lies_in_memory(tmp_path):
    """Its AVX-512 code reads what nothing wrote: at this size most files differed."""
    clip = make_clip(tmp_path / "in.mkv", n_frames=1, size=(320, 192))
    rng = np.random.default_rng(0)
    slope, gray = np.arange(320) // 2 + 40, np.full((96, 160), 128, np.uint8)
    lumas = [np.roll(slope, 5 * n) + rng.normal(0, 20, (192, 320)) for n in range(12)]
    frames = [
        Frame(n, 40 * n, (luma.clip(0, 255).astype(np.uint8), gray, gray))
        for n, luma in enumerate(lumas)
    ]
    settings = EncodeSettings("libx264", crf=28, threads=1, options={"b-pyramid": "none"})
    found, out = set(), tmp_path / "out.mkv"
    for _ in range(8):
        with VideoSource(clip) as source, VideoWriter(
            out, source.info, settings, copy_from=None, overwrite=True
        ) as writer:  # fmt: skip
            for frame in frames:
                writer.write(frame)
        found.add(out.read_bytes())
    assert len(found) == 1
