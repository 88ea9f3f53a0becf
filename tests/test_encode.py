"""Encoding: every frame and pts once, and nothing half-finished left."""

import contextlib
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import av
import pytest
from media import make_clip
from readback import frames_of, indices_of, packets_of, recode, refused, seconds_of
from sample_clips import B_FRAMES, FAST, LOSSLESS, VFR

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.errors import ConfigError, IntegrityError, SinkError


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


# refusals


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
        "from pipeline.decode import VideoSource; from pipeline.encode import VideoWriter\n"
        "from pipeline.encoder import EncodeSettings\n"
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
