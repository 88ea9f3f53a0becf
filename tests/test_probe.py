"""What files say of themselves, and the planes that their pixels become."""

import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest
from media import make_clip, numbered_picture
from readback import frames_of, indices_of, source_error

from pipeline.decode import VideoSource
from pipeline.probe import _TO_PLANAR
from pipeline.side_data import side_data_of

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
