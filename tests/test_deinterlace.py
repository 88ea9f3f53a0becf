"""Interlaced sources: one whole frame for each, in time, and the same after an interruption."""

import hashlib
import itertools

import numpy as np
import pytest
from fidelity import identity_network
from media import joined, make_clip
from readback import frames_of

from pipeline import RestoreConfig, restore_file
from pipeline.decode import VideoSource
from pipeline.errors import Interrupted, SourceError
from pipeline.segments import Place, StopRequest, hash_of

FIELDS = {"fields": "tff", "options": {"flags": "+ildct+ilme", "g": "10", "bf": "2"}}
INTERLACED = {"n_frames": 45, "noise": True, **FIELDS}


@pytest.mark.parametrize("what", [
    {}, {"pix_fmt": "yuv422p10le"}, {"fields": "bff"}, {"n_frames": 1}, {"n_frames": 2},
    {"pts": [0, 40, 45, 200, 201, 500, 540], "n_frames": 7},
], ids=["tff", "422", "bff", "one frame", "two frames", "vfr"])  # fmt: skip
def test_every_frame_is_made_whole_in_its_time(tmp_path, what):
    path = make_clip(tmp_path / "in.mkv", **{**INTERLACED, **what})
    with VideoSource(path) as source:
        whole = list(source.frames())
        assert source.tally.n_interlaced == source.tally.n_decoded == len(whole)
    woven = frames_of(path, deinterlace="off")
    assert [(f.pts, f.duration, f.key) for f in whole] == [
        (f.pts, f.duration, f.key) for f in woven
    ]
    kept = slice(0, None, 2) if what.get("fields") != "bff" else slice(1, None, 2)
    for a, b in zip(whole, woven, strict=True):
        for p, q in zip(a.planes, b.planes, strict=True):
            assert np.array_equal(p[kept], q[kept])  # the first field is as it was
            # A lone picture is taken for a still one, whose fields belong together.
            assert np.array_equal(p, q) == (len(whole) == 1)


def test_progressive_frames_are_not_touched(tmp_path):
    path = make_clip(tmp_path / "in.mkv", n_frames=20, noise=True)
    with VideoSource(path) as source:
        frames = list(source.frames())
        assert source.tally.n_interlaced == 0
    for a, b in zip(frames, frames_of(path, deinterlace="off"), strict=True):
        assert all(np.array_equal(p, q) for p, q in zip(a.planes, b.planes, strict=True))


def mixed(folder):
    """25 progressive frames, 20 interlaced ones, 15 progressive ones."""
    parts = [
        make_clip(folder / f"{i}.ts", n_frames=n, noise=True, **what)
        for i, (n, what) in enumerate([
            (25, {"options": {"g": "10"}}), (20, FIELDS), (15, {"options": {"g": "10"}})
        ])
    ]  # fmt: skip
    return joined(folder, *parts)


def test_in_a_mixed_stream_only_interlaced_frames_change(tmp_path):
    path = mixed(tmp_path)
    with VideoSource(path) as source:
        whole = list(source.frames())
        assert source.tally.n_interlaced == 20
    woven = frames_of(path, deinterlace="off")
    changed = [
        a.index for a, b in zip(whole, woven, strict=True)
        if not np.array_equal(a.planes[0], b.planes[0])
    ]  # fmt: skip
    assert changed == list(range(25, 45))
    assert [f.pts for f in whole] == [f.pts for f in woven]


@pytest.mark.parametrize("make", [
    lambda folder: make_clip(folder / "in.mkv", **INTERLACED),
    lambda folder: make_clip(folder / "in.mkv", **INTERLACED, codec="ffv1"),
    mixed,
], ids=["gop of 10", "all keys", "mixed"])  # fmt: skip
def test_decoding_goes_on_exactly_after_any_frame(tmp_path, make):
    path = make(tmp_path)
    whole = frames_of(path)
    for frame in whole:
        with VideoSource(path) as source:
            place = Place(frame.index, frame.pts, hash_of(frame))
            rest = list(source.frames(place))
        assert [(f.index, f.pts, hash_of(f)) for f in rest] == [
            (f.index, f.pts, hash_of(f)) for f in whole[frame.index + 1 :]
        ]


def test_an_interrupted_job_ends_with_the_same_file(tmp_path):
    source = make_clip(tmp_path / "in.mkv", **INTERLACED)
    settings = RestoreConfig.load(overrides={
        "pool.kind": "local", "encode.codec": "ffv1", "segment.frames": 10,
    })  # fmt: skip
    with identity_network():
        restore_file(source, tmp_path / "whole.mkv", settings)
        for _ in itertools.count():
            stop = StopRequest(asked=True)
            try:
                restore_file(source, tmp_path / "parts.mkv", settings, stop=stop)
                break
            except Interrupted:
                continue
    one, two = (hashlib.sha256((tmp_path / n).read_bytes()).digest() for n in
                ("whole.mkv", "parts.mkv"))  # fmt: skip
    assert one == two


def test_error_names_the_frame_and_off_leaves_it(tmp_path):
    path = mixed(tmp_path)
    with VideoSource(path, deinterlace="error") as source, pytest.raises(SourceError) as caught:
        list(source.frames())
    assert "frame 25 is interlaced; --deinterlace off" in str(caught.value)
    with VideoSource(path, deinterlace="off") as source:
        assert len(list(source.frames())) == 60
        assert source.tally.n_interlaced == 20


def test_a_format_that_cannot_be_made_whole_is_said(tmp_path):
    path = make_clip(tmp_path / "in.mkv", pix_fmt="gray10le", codec="ffv1", fields="tff",
                     options={"flags": "+ildct"}, n_frames=3)  # fmt: skip
    with VideoSource(path) as source, pytest.raises(SourceError, match="gray10le cannot"):
        list(source.frames())
