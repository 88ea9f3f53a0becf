"""What encoders take and give: pixels, tags, sizes, the same bytes each time."""

from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from media import make_clip
from readback import assert_same_planes, frames_of, indices_of, packets_of, recode, refused
from sample_clips import FAST, LOSSLESS

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings, default_settings
from pipeline.errors import ConfigError
from pipeline.frames import Frame


@pytest.fixture
def clip(tmp_path):
    """A plain clip without sound."""
    return make_clip(tmp_path / "in.mkv")


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
