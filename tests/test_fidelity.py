"""The matrix: what a source has is in the output, or a warning said before that it would not be."""

import json
import shutil
import subprocess
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
from fidelity import HDR10, HLG, MIRRORS, PACKED, PLANAR, all_cases, clip, identity_network, raw
from fidelity import run as run_case
from media import joined, make_clip
from readback import frames_of

from pipeline import RestoreConfig, restore_file
from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.errors import SourceError
from pipeline.probe import _TO_PLANAR
from pipeline.restore import restore_frames
from pipeline.tiles import TileGrid
from pipeline.verify import verify

CASES = all_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_the_source_has_is_kept_or_said_to_be_lost(tmp_path, case):
    if case.needs:
        pytest.skip(case.needs)
    outcome = run_case(case, tmp_path)
    lost = {name for name, kept in outcome.kept.items() if not kept}
    assert lost - ({"planes"} if not case.lossless else set()) == set(case.loses)
    said = " ".join(outcome.warnings)
    words = {"format": "does not take"}
    assert [name for name in case.loses if words.get(name, name) not in said] == []
    assert ("does not keep" in said) == bool(case.loses - {"format"})


@pytest.mark.parametrize("case", [c for c in CASES if c.group == "pixel format"], ids=str)
def test_strength_0_leaves_every_sample_of_every_format(tmp_path, case):
    assert run_case(case, tmp_path, strength=0).kept["planes"]


def test_no_planar_format_is_missing_from_the_matrix():
    # What only hardware gives is in test_probe.py, which holds every conversion into planes.
    assert set(_TO_PLANAR.values()) | set(PACKED.values()) <= set(PLANAR)


# ffprobe as an independent judge


def ffprobe(path, what):
    """What FFmpeg's own tool says of the first frame or of the stream."""
    done = subprocess.run(
        ["ffprobe", "-v", "error", "-of", "json", "-select_streams", "v:0", "-read_intervals",
         "%+#1", f"-show_{what}", str(path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)[what][0]


def identity(**overrides):
    """Settings of a job in this process."""
    return RestoreConfig.load(overrides={"pool.kind": "local", "resume": False, **overrides})


judged = pytest.mark.skipif(
    not shutil.which("ffprobe"), reason="Debian's ffmpeg is not installed: make judges"
)


@judged
# FFmpeg 5.1, Debian's, does not read what H.264 says of the mastering display.
@pytest.mark.parametrize("codec", ["libx265", "libsvtav1"])
def test_ffprobe_reads_the_same_hdr10(tmp_path, codec):
    source = clip(**HDR10)(tmp_path)
    with identity_network():
        restore_file(source, tmp_path / "out.mkv", identity(**{"encode.codec": codec}))
    before, after = (hdr_of(ffprobe(tmp_path / n, "frames")) for n in ("in.mkv", "out.mkv"))
    assert len(before) == 12
    assert {k: pytest.approx(v, abs=0.01 if "max_l" in k else 2e-5) for k, v in before.items()} == (
        after
    )


@judged
def test_ffprobe_reads_hdr10_in_the_header_of_a_master(tmp_path):
    source = clip(**HDR10)(tmp_path)
    with identity_network():
        restore_file(source, tmp_path / "out.mkv", identity(**{"encode.codec": "ffv1"}))
    before = hdr_of(ffprobe(source, "frames"))
    after = hdr_of(ffprobe(tmp_path / "out.mkv", "streams"))
    assert len(after) == 12
    assert after == {name: pytest.approx(value, abs=1e-6) for name, value in before.items()}


def hdr_of(frame):
    """Mastering display and light level as numbers."""
    return {
        key: float(Fraction(value))
        for data in frame["side_data_list"]
        if data["side_data_type"] in ("Mastering display metadata", "Content light level metadata")
        for key, value in data.items()
        if key != "side_data_type"
    }


@judged
@pytest.mark.parametrize("name", MIRRORS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_ffprobe_reads_the_same_mirroring(tmp_path, suffix, name):
    source = make_clip(tmp_path / f"in{suffix}", n_frames=2, display_matrix=MIRRORS[name])
    with identity_network():
        report = restore_file(source, tmp_path / f"out{suffix}", identity())
    before, after = (ffprobe(p, "streams") for p in (source, report.output))
    assert (
        after["side_data_list"][0]["displaymatrix"]
        == (before["side_data_list"][0]["displaymatrix"])
    )


@judged
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_ffprobe_sees_no_difference_in_a_file_with_everything(tmp_path, suffix):
    source = make_clip(
        tmp_path / f"in{suffix}", n_frames=30, audio="aac", start_seconds=5, rotation=90,
        sample_aspect_ratio=Fraction(16, 15), color=(1, 1, 1, 1), options={"bf": "3"},
        chapters=[(5, 5.5, "one"), (5.5, 6.2, "two")], metadata={"title": "A"},
        subtitles=[(5.1, 5.4, "eins")],
        subtitle_codec="subrip" if suffix == ".mkv" else "mov_text",
    )  # fmt: skip
    with identity_network():
        report = restore_file(source, tmp_path / f"out{suffix}", identity())
    assert report.warnings == ()
    before, after = map(everything, (source, report.output))
    assert before["frames"] == 30
    assert after == before


def everything(path):
    """What ffprobe says of a file, but for sizes, rates and who wrote it."""
    done = subprocess.run(
        ["ffprobe", "-v", "error", "-of", "json", "-count_frames", "-show_streams",
         "-show_chapters", "-show_format", str(path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    names = (
        "codec_type", "codec_name", "width", "height", "pix_fmt", "sample_aspect_ratio",
        "color_range", "color_space", "color_transfer", "color_primaries", "chroma_location",
        "field_order", "start_time", "sample_rate", "channel_layout", "disposition",
    )  # fmt: skip
    return {
        "frames": int(next(s["nb_read_frames"] for s in found["streams"] if "width" in s)),
        "streams": [
            [s.get(name) for name in names] + [s.get("tags", {}).get(t) for t in TAGS]
            + [data.get("displaymatrix") for data in s.get("side_data_list", [])]
            for s in found["streams"] if s["codec_type"] != "data"  # mp4's titles of chapters
        ],
        "chapters": [(c["start_time"], c["end_time"], c["tags"]) for c in found["chapters"]],
        "title": found["format"]["tags"]["title"],
    }  # fmt: skip


TAGS = ("language", "title", "handler_name")


# pixels


class _Redder(torch.nn.Module):
    def forward(self, rgb):
        out = rgb.clone()
        out[:, 0] += 0.1
        return out


@pytest.mark.parametrize(
    ("pix_fmt", "depth"), [("gbrp", 8), ("rgb24", 8), ("gbrp10le", 10), ("gbrp16le", 16)]
)
def test_a_correction_of_red_comes_back_in_the_red_plane_alone(tmp_path, pix_fmt, depth):
    source = raw(pix_fmt)(tmp_path)
    with patch("workers.worker.TileWorker._load", lambda *_: _Redder()):
        restore_file(source, tmp_path / "out.mkv", identity(**{"encode.codec": "ffv1"}))
    top = (1 << depth) - 1
    for before, after in zip(frames_of(source), frames_of(tmp_path / "out.mkv"), strict=True):
        for plane, restored in zip(before.planes[:2], after.planes[:2], strict=True):
            assert np.array_equal(plane, restored)
        expected = np.clip(np.rint(before.planes[2] + 0.1 * top), 0, top)
        assert np.abs(after.planes[2] - expected).max() <= (depth == 16)  # float32's last bit


@pytest.mark.parametrize("pix_fmt", ["rgba", "yuva420p", "gbrap", "ya8"])
def test_transparency_is_refused_before_anything_is_written(tmp_path, pix_fmt):
    codec = "png" if pix_fmt in ("rgba", "ya8") else "ffv1"
    codec = "rawvideo" if pix_fmt == "gbrap" else codec
    source = make_clip(tmp_path / "in.nut", n_frames=1, pix_fmt=pix_fmt, codec=codec, options={})
    with pytest.raises(SourceError, match="transparency, which is not kept; flatten it first"):
        restore_file(source, tmp_path / "out.mkv", identity())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.nut"]


def with_alpha(path, pix_fmt, codec, see_through_at=None):
    """Six frames of noise whose alpha lets nothing through, but at one frame."""
    rng = np.random.default_rng(5)
    dtype, top = (np.uint16, 1023) if "10" in pix_fmt else (np.uint8, 255)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for index in range(6):
            picture = av.VideoFrame(64, 48, pix_fmt)
            for number, plane in enumerate(picture.planes):
                n = plane.buffer_size // dtype().itemsize
                data = rng.integers(0, top + 1, n).astype(dtype)
                alpha = (
                    data[3::4] if len(picture.planes) == 1 else data if number == 3 else data[:0]
                )
                alpha[:] = top // 2 if index == see_through_at else top
                plane.update(data.tobytes())
            picture.pts, picture.time_base = index, Fraction(1, 25)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return path


def planes_but_alpha(picture):
    if len(picture.planes) == 1:
        rgba = picture.to_ndarray(format="rgba")
        return [rgba[..., channel] for channel in (1, 2, 0)]
    dtype = np.uint16 if "10" in picture.format.name else np.uint8
    rows = [np.frombuffer(p, np.uint8).reshape(-1, p.line_size) for p in picture.planes[:3]]
    return [
        row[: p.height].view(dtype)[:, : p.width]
        for row, p in zip(rows, picture.planes[:3], strict=True)
    ]


@pytest.mark.parametrize(
    ("pix_fmt", "codec"),
    [("rgba", "png"), ("bgra", "ffv1"), ("yuva420p", "ffv1"), ("yuva444p10le", "ffv1")],
)
def test_an_alpha_channel_without_transparency_is_left_out_and_said(tmp_path, pix_fmt, codec):
    """As editors and screen recorders write it: ProRes 4444, PNG, GIF."""
    source = with_alpha(tmp_path / "in.nut", pix_fmt, codec)
    report = restore_file(source, tmp_path / "out.mkv", identity())
    assert any("an alpha channel without transparency" in line for line in report.warnings)
    assert report.n_frames == 6
    with av.open(str(source)) as container:
        for picture, frame in zip(container.decode(video=0), frames_of(source), strict=True):
            for one, other in zip(planes_but_alpha(picture), frame.planes, strict=True):
                assert np.array_equal(one, other)


def test_transparency_that_begins_later_is_refused_with_its_frame(tmp_path):
    with_alpha(tmp_path / "in.nut", "rgba", "png", see_through_at=4)
    with pytest.raises(SourceError, match="rgba of frame 4 has transparency"):
        restore_file(tmp_path / "in.nut", tmp_path / "out.mkv", identity())


def test_an_animated_gif_is_restored(tmp_path):
    source = make_clip(tmp_path / "in.gif", n_frames=8, pix_fmt="rgb8", codec="gif", options={})
    report = restore_file(source, tmp_path / "out.mp4", identity())
    assert report.n_frames == 8


def test_transparency_that_only_the_container_tells_of_is_refused_too(tmp_path):
    """VP9 keeps it beside its pictures, where FFmpeg's own decoder does not look."""
    source = make_clip(
        tmp_path / "in.webm", n_frames=2, pix_fmt="yuva420p", codec="libvpx-vp9",
        options={"cpu-used": "8"},
    )  # fmt: skip
    with pytest.raises(SourceError, match="transparency, which is not kept; flatten it first"):
        VideoSource(source)


def test_8k_goes_through_tiles(tmp_path):
    source = make_clip(tmp_path / "in.mp4", n_frames=2, size=(7680, 4320),
                       options={"preset": "ultrafast", "crf": "0"})  # fmt: skip
    out, batches = Path(tmp_path / "out.mp4"), []

    def submit(batch):
        batches.append(batch[0].shape)
        future = Future()
        future.set_result(batch)
        return future

    with VideoSource(source) as video:
        grid = TileGrid.plan(7680, 4320, log2_chroma_w=1, log2_chroma_h=1, n_planes=3,
                             tile=(768, 768), overlap=32, batch_size=1, align=8)  # fmt: skip
        settings = EncodeSettings("libx264", crf=0, preset="ultrafast")
        with VideoWriter(out, video.info, settings, copy_from=source) as writer:
            for frame in restore_frames(video.frames(), grid, submit, 1):
                writer.write(frame)
    assert len(batches) == 2 * grid.n_tiles == 2 * 66
    with VideoSource(source) as one, VideoSource(out) as two:
        for before, after in zip(one.frames(), two.frames(), strict=True):
            assert before.pts == after.pts
            assert all(map(np.array_equal, before.planes, after.planes))


# the network that ships

REAL = {
    "a telephone's": (".mp4", ".mp4", {
        "n_frames": 11, "pts": [0, 512, 1024, 4000, 4100, 9000, 9512, 10000, 12000, 40000, 40300],
        "time_base": Fraction(1, 12800), "options": {"bf": "3", "crf": "10"}, "rotation": 90,
        "start_seconds": Fraction(1, 4), "color": (1, 1, 1, 1), "audio": "aac",
    }),
    "a camera's": (".mkv", ".mov", {
        "n_frames": 8, "pix_fmt": "yuv422p10le", "codec": "ffv1", "options": {}, "color": HLG,
        "size": (94, 61), "audio": "pcm_s24le", "sample_aspect_ratio": Fraction(4, 3),
        "chapters": [(0, 0.2, "one")],
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_clip_through_the_real_network_is_changed_in_its_pixels_alone(tmp_path, name):
    before, after, what = REAL[name]
    source = make_clip(tmp_path / f"in{before}", noise=True, **what)
    options = {"encode.codec": "libx264", "encode.options": {"qp": "0"}, "segment.frames": 4}
    report = restore_file(source, tmp_path / f"out{after}", identity(**options))
    assert report.n_frames == what["n_frames"]
    assert verify(source, report.output).differences == []
    for one, two in zip(frames_of(source), frames_of(report.output), strict=True):
        assert not np.array_equal(one.planes[0], two.planes[0])


# a stream that changes


@pytest.mark.parametrize(
    ("change", "said"),
    [({"size": (96, 64)}, "frame 12 is 96x64 yuv420p, the first one 64x48 yuv420p"),
     ({"pix_fmt": "yuv422p"}, "frame 12 is 64x48 yuv422p, the first one 64x48 yuv420p"),
     ({"pix_fmt": "yuv420p10le"}, "frame 12 is 64x48 yuv420p10le")],
    ids=["size", "chroma", "depth"],
)  # fmt: skip
def test_a_stream_that_changes_is_an_error_that_names_the_frame(tmp_path, change, said):
    one = make_clip(tmp_path / "one.ts", n_frames=12)
    two = make_clip(tmp_path / "two.ts", n_frames=12, **change)
    path = joined(tmp_path, one, two)
    with identity_network(), pytest.raises(SourceError) as caught:
        restore_file(path, tmp_path / "out.mkv", identity())
    assert f"{path}: {said}" in str(caught.value)
    assert not (tmp_path / "out.mkv").exists()
