"""Segments: where they end, and many of them joined are one faithful stream."""

import itertools
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from commands import sha256
from media import make_clip
from readback import frames_of, indices_of, packets_of
from sample_clips import VFR

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.errors import IntegrityError, SinkError
from pipeline.frames import Frame
from pipeline.segments import hash_of, plan, read_packets, reorder_delay

B_FRAMES = {"bf": "3", "b-pyramid": "normal", "crf": "10", "g": "10", "sc_threshold": "0"}
LONG_VFR = [base + pts for base in range(0, 250_000, 50_000) for pts in VFR]
MANY = {
    "libx264": EncodeSettings(preset="fast", options={"bf": "3", "b-pyramid": "normal"}),
    "libx265": EncodeSettings("libx265", preset="fast", options={"x265-params": "bframes=4"}),
    "libsvtav1": EncodeSettings("libsvtav1", preset="10"),
    "libvpx-vp9": EncodeSettings("libvpx-vp9", options={"b": "0", "cpu-used": "5"}),
    "ffv1": EncodeSettings("ffv1"),
    "prores_ks": EncodeSettings("prores_ks"),
    "mpeg4": EncodeSettings("mpeg4", options={"bf": "2"}),
}


def frame(index, key=False):
    return Frame(index, 10 * index, (np.full((2, 2), index % 256, np.uint8),), 10, key)


def lengths(frames, length):
    """The number of frames in each segment."""
    ends = [f.index for f in plan(frames, length) if f.ends_segment]
    return [b - a for a, b in itertools.pairwise([frames[0].index - 1, *ends])]


def copy(source_path, path, settings, length):
    """Decode and encode again in segments; the writer."""
    with (
        VideoSource(source_path) as source,
        VideoWriter(path, source.info, settings, copy_from=source_path) as writer,
    ):
        for one in plan(source.frames(), length):
            writer.write(one)
    assert writer.n_written == writer.n_muxed == source.tally.n_decoded
    return writer


# where they end


@pytest.mark.parametrize(
    ("keys", "length", "expected"),
    [
        (range(0, 60, 10), 10, [10] * 6),
        (range(0, 60, 10), 15, [20, 20, 20]),
        (range(0, 60, 7), 10, [14, 14, 14, 14, 4]),
        ([0], 10, [20, 20, 20]),
        (range(60), 25, [25, 25, 10]),
        ([0, 12], 10, [12, 20, 20, 8]),
        ([0], 100, [60]),
        (range(60), 1, [1] * 60),
    ],
    ids=["gop", "two gops", "gop of 7", "no keys", "all keys", "one key", "short", "ones"],
)
def test_a_segment_ends_before_a_keyframe_or_at_twice_its_length(keys, length, expected):
    frames = [frame(i, i in keys) for i in range(60)]
    assert lengths(frames, length) == expected


@pytest.mark.parametrize("length", [1, 7, 10, 100])
def test_a_job_that_starts_at_a_boundary_cuts_where_it_would_have_cut(length):
    keys = {int(k) for k in np.random.default_rng(0).integers(0, 200, 20)}
    frames = [frame(i, i in keys) for i in range(200)]
    ends = [f.index for f in plan(frames, length) if f.ends_segment]
    for end in ends[:-1]:
        rest = [f.index for f in plan(frames[end + 1 :], length) if f.ends_segment]
        assert rest == [e for e in ends if e > end]


def test_the_plan_changes_no_frame_and_says_which_pixels_end_a_segment():
    frames = [frame(i) for i in range(7)]
    planned = list(plan(frames, 2))
    assert [replace(f, ends_segment="") for f in planned] == frames
    assert [f.ends_segment for f in planned if f.ends_segment] == [
        hash_of(frames[3]), hash_of(frames[6]),
    ]  # fmt: skip
    assert list(plan([], 2)) == []


def test_a_decoder_says_which_frames_are_keys(tmp_path):
    source = make_clip(tmp_path / "in.mkv", n_frames=30, options=B_FRAMES)
    assert [f.index for f in frames_of(source) if f.key] == [0, 10, 20]


# joined


@pytest.mark.parametrize(
    ("coded", "delay"),
    [([0, 1, 2], 0), ([0, 3, 1, 2], 1), ([0, 4, 2, 1, 3], 2), ([], 0), ([5], 0)],
)
def test_the_delay_is_how_far_a_picture_is_coded_behind_its_turn(coded, delay):
    assert reorder_delay(coded) == delay


@pytest.mark.parametrize("length", [3, 100])
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", ".mp4"), ("libx264", ".mkv"), ("libx264", ".mov"),
        ("libx265", ".mp4"), ("libx265", ".mkv"), ("libsvtav1", ".mp4"), ("libsvtav1", ".mkv"),
        ("libvpx-vp9", ".webm"), ("libvpx-vp9", ".mp4"), ("ffv1", ".mkv"), ("prores_ks", ".mov"),
        ("mpeg4", ".mp4"),
    ],
)  # fmt: skip
def test_joined_segments_are_one_stream_of_the_same_times(tmp_path, codec, suffix, length):
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg lacks {codec}")
    # Matroska and WebM hold milliseconds.
    base = Fraction(1, 1000) if suffix in (".mkv", ".webm") else Fraction(1, 12800)
    audio = "libopus" if suffix == ".webm" else "aac"
    pix_fmt = "yuv422p10le" if codec == "prores_ks" else "yuv420p"
    source = make_clip(
        tmp_path / ("in.mkv" if base.denominator == 1000 else "in.mov"), n_frames=60, pts=LONG_VFR,
        time_base=base, pix_fmt=pix_fmt, options=B_FRAMES, audio=audio,
    )  # fmt: skip
    out = tmp_path / f"out{suffix}"
    copy(source, out, MANY[codec], length)
    assert times_of(out) == times_of(source)
    assert indices_of(out) == list(range(60))
    assert_times_go_up(out)
    if audio:
        assert [h for _, h in packets_of(out, "audio")] == [
            h for _, h in packets_of(source, "audio")
        ]


def times_of(path):
    """When every frame starts and for how long it is shown, in seconds."""
    with VideoSource(path) as source:
        base = source.info.time_base
        return [(frame.pts * base, frame.duration * base) for frame in source.frames()]


def assert_times_go_up(path):
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    assert packets[0].is_keyframe
    dts = [p.dts for p in packets if p.dts is not None]
    assert len(dts) >= len(packets) - 4  # Matroska stores none: the demuxer's guess has gaps
    assert all(a < b for a, b in itertools.pairwise(dts))
    assert all(p.dts <= p.pts for p in packets if p.dts is not None)


def test_every_segment_starts_with_a_keyframe(tmp_path):
    source = make_clip(tmp_path / "in.mkv", n_frames=40, options=B_FRAMES)
    settings = EncodeSettings(options={"sc_threshold": "0"})
    copy(source, tmp_path / "out.mkv", settings, 10)
    with av.open(str(tmp_path / "out.mkv")) as container:
        keys = [p.pts for p in container.demux(video=0) if p.size and p.is_keyframe]
    assert keys == [0, 400, 800, 1200]


@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_without_loss_segments_are_exact(tmp_path, codec):
    source = make_clip(tmp_path / "in.mkv", n_frames=20, noise=True)
    settings = EncodeSettings(codec, crf=None, options={"qp": "0"} if codec == "libx264" else {})
    copy(source, tmp_path / "out.mkv", settings, 3)
    for a, b in zip(frames_of(source), frames_of(tmp_path / "out.mkv"), strict=True):
        assert all(np.array_equal(p, q) for p, q in zip(a.planes, b.planes, strict=True))


@pytest.mark.parametrize("n_frames", [1, 2, 3, 5])
def test_a_clip_shorter_than_the_reordering(tmp_path, n_frames):
    source = make_clip(tmp_path / "in.mp4", n_frames=n_frames, time_base=Fraction(1, 12800))
    copy(source, tmp_path / "out.mp4", MANY["libx264"], 1)
    assert indices_of(tmp_path / "out.mp4") == list(range(n_frames))
    assert_times_go_up(tmp_path / "out.mp4")


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [("libx264", ".mkv"), ("libx264", ".mp4"), ("libx265", ".mov"), ("libsvtav1", ".mkv"),
     ("libvpx-vp9", ".webm")],
)  # fmt: skip
def test_two_runs_give_the_same_bytes(tmp_path, codec, suffix):
    source = make_clip(
        tmp_path / "in.mkv", n_frames=40, size=(192, 108), noise=True, options=B_FRAMES,
        audio="libopus" if suffix == ".webm" else "aac",
        chapters=[(0, 1, "one")], attachment=("font.ttf", "font/ttf", b"glyphs"),
    )  # fmt: skip
    hashes = set()
    for run in range(2):
        copy(source, tmp_path / f"{run}{suffix}", MANY[codec], 10)
        hashes.add(sha256(tmp_path / f"{run}{suffix}"))
    assert len(hashes) == 1


# what goes wrong


def test_an_encoder_that_changes_its_header_is_refused(tmp_path):
    source = make_clip(tmp_path / "in.mkv")
    with VideoSource(source) as opened:
        writer = VideoWriter(tmp_path / "out.mkv", opened.info, MANY["libx264"], copy_from=source)
        writer.encoding = replace(writer.encoding, extradata=b"another")
        with pytest.raises(SinkError, match=r"out\.mkv.*another header"), writer:
            writer.write(next(opened.frames()))
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_packet_lost_between_segment_and_output_is_an_integrity_error(tmp_path):
    source = make_clip(tmp_path / "in.mkv")
    with VideoSource(source) as opened:
        writer = VideoWriter(tmp_path / "out.mkv", opened.info, MANY["ffv1"], copy_from=source)
        for one in plan(opened.frames(), 5):
            writer.write(one)
    (first, *_) = sorted((tmp_path / ".out.mkv.restore").glob("*.segment"))
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="damaged"):
        writer.close()
    assert sorted(tmp_path.iterdir()) == [source]


def test_a_segment_that_breaks_off_is_not_read_as_a_shorter_one(tmp_path):
    source = make_clip(tmp_path / "in.mkv")
    with VideoSource(source) as opened:
        writer = VideoWriter(tmp_path / "out.mkv", opened.info, MANY["ffv1"], copy_from=source)
        for one in plan(opened.frames(), 100):
            writer.write(one)
        (path,) = (tmp_path / ".out.mkv.restore").glob("*.segment")
        data = path.read_bytes()
        writer.abort()
    cut = tmp_path / "cut"
    for size in (10, 25, 100, len(data) - 1):
        cut.write_bytes(data[:size])
        with pytest.raises(IntegrityError, match="damaged"):
            list(read_packets(cut))
