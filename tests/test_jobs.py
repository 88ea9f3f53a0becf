"""restore_file as a user calls it: real codecs, real pools, a network of random weights or none."""

import re
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from media import make_clip
from readback import frames_of, indices_of, packets_of

from pipeline import RestoreConfig, restore_file, stages
from pipeline import jobs as jobs_module
from pipeline.derived import restored_name
from pipeline.errors import ConfigError, DeviceError, IntegrityError, RestoreError
from pipeline.static import StaticTiles

FFV1 = {"codec": "ffv1", "options": {}}
LOSSLESS = {"encode.codec": "ffv1"}


def config(**overrides):
    return RestoreConfig.load(overrides={"model.strength": 0, "pool.kind": "local", **overrides})


@pytest.fixture
def identity(tiny_checkpoint):
    """Settings under which every pixel must come out as it went in."""
    return config(**{"model.model": tiny_checkpoint, **LOSSLESS})


def planes_equal(a, b):
    return all(
        np.array_equal(p, q) for f, g in zip(a, b, strict=True)
        for p, q in zip(f.planes, g.planes, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        {"options": {"bf": "3", "crf": "10"}, "n_frames": 40},
        {"pts": [0, 40, 45, 200, 201, 500], "n_frames": 6},
        {"size": (33, 17), "codec": "ffv1", "options": {}},
        {"size": (1, 1), "codec": "ffv1", "options": {}},
        {"n_frames": 1},
        {"pix_fmt": "yuv420p10le", "codec": "ffv1", "options": {}, "noise": True},
        {"pix_fmt": "yuv444p", "codec": "ffv1", "options": {}, "noise": True},
        {"pix_fmt": "gray", "codec": "ffv1", "options": {}, "noise": True},
        {"start_seconds": Fraction(5)},
    ],
    ids=["b-frames", "vfr", "odd", "1x1", "one frame", "10 bit", "444", "gray", "from 5 s"],
)
def test_every_frame_comes_out_once_in_order_with_its_pts(tmp_path, identity, what):
    source = make_clip(tmp_path / "in.mkv", **what)
    report = restore_file(source, tmp_path / "out.mkv", identity)
    before, after = frames_of(source), frames_of(report.output)
    assert [f.pts for f in after] == [f.pts for f in before]
    assert report.n_frames == len(before)
    assert planes_equal(before, after)


def test_the_network_changes_pixels_and_keeps_order_pts_and_audio(tmp_path, tiny_checkpoint):
    source = make_clip(tmp_path / "in.mp4", audio="aac", n_frames=24, size=(96, 64))
    settings = config(**{
        "model.model": tiny_checkpoint, "model.strength": 0.05, "tile.size": "48x32",
        "tile.overlap": 8, "encode.crf": 1,
    })  # fmt: skip
    report = restore_file(source, None, settings)
    assert report.output == tmp_path / "in_restored.mp4"
    assert indices_of(report.output) == list(range(24))
    assert [f.pts for f in frames_of(report.output)] == [f.pts for f in frames_of(source)]
    assert packets_of(report.output, "audio") == packets_of(source, "audio")
    assert not planes_equal(frames_of(source), frames_of(report.output))


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_ray_and_local_give_the_same_file(tmp_path, tiny_checkpoint, ray_of_two_cpus):
    source = make_clip(tmp_path / "in.mkv", n_frames=12, size=(96, 64))
    outputs = []
    for kind in ("local", "ray"):
        settings = config(**{
            "model.model": tiny_checkpoint, "model.strength": 0.5, "pool.kind": kind,
            "tile.size": "48x32", "tile.overlap": 8, "model.precision": "fp32", **LOSSLESS,
        })  # fmt: skip
        outputs.append(restore_file(source, tmp_path / f"{kind}.mkv", settings).output)
    local, ray = map(frames_of, outputs)
    assert [f.pts for f in local] == [f.pts for f in ray]
    for a, b in zip(local, ray, strict=True):
        for p, q in zip(a.planes, b.planes, strict=True):
            # One thread or two sum floats in another order: the last bit may round otherwise.
            assert np.abs(p.astype(int) - q).max() <= 1


def test_a_span_is_cut_to_the_frame(tmp_path, identity):
    source = make_clip(tmp_path / "in.mkv", n_frames=50, audio="aac")
    span = identity.model_copy(update={"start_seconds": 0.4, "end_seconds": 1.2})
    report = restore_file(source, tmp_path / "out.mkv", span)
    assert indices_of(report.output) == list(range(10, 30))
    assert frames_of(report.output)[0].pts == 0


def test_progress_counts_every_frame(tmp_path, identity):
    source = make_clip(tmp_path / "in.mkv", n_frames=12)
    seen = []
    restore_file(source, tmp_path / "out.mkv", identity, on_frame=lambda *p: seen.append(p))
    assert [done for done, _ in seen] == list(range(1, 13))
    assert seen[-1][1] == 12


def test_an_existing_output_is_refused_unless_asked(tmp_path, identity):
    source = make_clip(tmp_path / "in.mkv")
    target = tmp_path / "out.mkv"
    target.write_text("mine")
    with pytest.raises(ConfigError, match=r"out\.mkv"):
        restore_file(source, target, identity)
    assert target.read_text() == "mine"
    restore_file(source, target, identity.model_copy(update={"overwrite": True}))
    assert len(frames_of(target)) == 20


@pytest.mark.parametrize("stage", ["restore", "encode"])
def test_a_frame_lost_on_the_way_is_an_integrity_error(tmp_path, identity, monkeypatch, stage):
    source = make_clip(tmp_path / "in.mkv", n_frames=10)
    if stage == "restore":
        honest = stages.restore_frames
        monkeypatch.setattr(
            stages, "restore_frames",
            lambda *a: (f for f in honest(*a) if f.index != 4),
        )  # fmt: skip
    else:
        monkeypatch.setattr(
            jobs_module.VideoWriter, "write",
            lambda self, frame: None,
        )  # fmt: skip
    with pytest.raises(IntegrityError, match=re.escape(str(source))):
        restore_file(source, tmp_path / "out.mkv", identity)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv"]


def test_a_worker_that_fails_stops_the_job_with_file_and_frame(
    tmp_path, tiny_checkpoint, monkeypatch
):
    from workers import worker

    calls = []

    def fail_on_the_third(self, tiles, *_):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the card fell off the bus")
        return tiles

    monkeypatch.setattr(worker.TileWorker, "__call__", fail_on_the_third)
    source = make_clip(tmp_path / "in.mkv")
    with pytest.raises(DeviceError, match=r"in\.mkv.*fell off the bus.*frame 2"):
        restore_file(source, tmp_path / "out.mkv", config(**{"model.model": tiny_checkpoint}))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv"]


@pytest.mark.parametrize("name", ["none", "broken.safetensors", "other.txt"])
def test_wrong_weights_are_one_line_and_nothing_is_written(tmp_path, name):
    source = make_clip(tmp_path / "in.mkv")
    if "." in name:
        (tmp_path / name).write_bytes(b"not weights at all")
        name = str(tmp_path / name)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        restore_file(source, tmp_path / "out.mkv", config(**{"model.model": name}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_memory_is_bounded_by_the_window(tmp_path, tiny_checkpoint, monkeypatch):
    """A slow network: the decoder must never be more than the bounds ahead of the encoder."""
    from workers import worker

    monkeypatch.setattr(worker.TileWorker, "__call__", lambda self, tiles, *_: tiles)
    source = make_clip(tmp_path / "in.mkv", n_frames=60)
    ahead, decoded, written = [], [], []
    honest = jobs_module.VideoSource.frames

    def counted(self, after=None):
        for frame in honest(self, after):
            decoded.append(frame.index)
            ahead.append(len(decoded) - len(written))
            yield frame

    write = jobs_module.VideoWriter.write

    def slow_write(self, frame):
        write(self, frame)
        written.append(frame.index)

    monkeypatch.setattr(jobs_module.VideoSource, "frames", counted)
    monkeypatch.setattr(jobs_module.VideoWriter, "write", slow_write)
    settings = config(**{"model.model": tiny_checkpoint, "model.strength": 1, "pool.window": 3})
    restore_file(source, tmp_path / "out.mkv", settings)
    bound = stages.DECODE_AHEAD + 3 + stages.ENCODE_BEHIND + 2
    assert len(written) == 60
    assert max(ahead) <= bound


def test_what_stands_still_is_restored_once_and_the_file_is_the_same(
    tmp_path, tiny_checkpoint, caplog, monkeypatch
):
    source = make_clip(tmp_path / "in.mkv", n_frames=6, size=(96, 64), **FFV1)
    settings = config(**{
        "model.model": tiny_checkpoint, "model.strength": 1, "tile.size": "48x32",
        "tile.overlap": 8, "tile.batch": 4, **LOSSLESS,
    })  # fmt: skip
    with caplog.at_level("INFO", "pipeline.jobs"):
        reused = restore_file(source, tmp_path / "a.mkv", settings).output
    line = next(r for r in caplog.records if "stood still" in r.message)
    # Of the bars of the frame's number only the right half stands still.
    assert 0 < line.values["tiles_reused"] < line.values["tiles"] == 6 * 9
    monkeypatch.setattr(StaticTiles, "_reusable", lambda *_: None)
    assert planes_equal(
        frames_of(restore_file(source, tmp_path / "b.mkv", settings).output), frames_of(reused)
    )


def test_batches_are_measured_once_and_the_file_is_the_same_every_time(
    tmp_path, tiny_checkpoint, caplog
):
    source = make_clip(tmp_path / "in.mkv", n_frames=3, size=(96, 64), noise=True, **FFV1)
    settings = config(**{
        "model.model": tiny_checkpoint, "model.strength": 1, "tile.size": "48x32",
        "tile.overlap": 8, "tile.batch": 5, **LOSSLESS,
    })  # fmt: skip
    with caplog.at_level("INFO", "workers.batching"):
        first, again = (
            frames_of(restore_file(source, tmp_path / name, settings).output)
            for name in ("a.mkv", "b.mkv")
        )
    assert planes_equal(first, again)
    said = [r.getMessage() for r in caplog.records if "tiles at a time" in r.message]
    assert len(said) == 2
    assert said[0] == said[1], "measured again"


def test_temporal_changes_pixels_only_and_is_the_same_every_time(
    tmp_path, tiny_checkpoint, monkeypatch
):
    from workers import worker

    def denoise(self, tiles, *_):
        return tuple(np.stack([cv2.blur(tile, (31, 31)) for tile in plane]) for plane in tiles)

    monkeypatch.setattr(worker.TileWorker, "__call__", denoise)
    source = make_clip(tmp_path / "in.mkv", n_frames=6, size=(96, 64), noise=True, **FFV1)
    outputs = []
    for name, temporal in [("off", 0), ("a", 0.6), ("b", 0.6)]:
        settings = config(**{
            "model.model": tiny_checkpoint, "model.strength": 1, "temporal": temporal, **LOSSLESS
        })  # fmt: skip
        outputs.append(frames_of(restore_file(source, tmp_path / f"{name}.mkv", settings).output))
    off, once, again = outputs
    assert [f.pts for f in once] == [f.pts for f in off]
    assert planes_equal(once, again)
    assert not planes_equal(once, off)
    assert planes_equal(once[:1], off[:1])


def test_temporal_leaves_everything_as_it_is_at_strength_0(tmp_path, identity):
    source = make_clip(tmp_path / "in.mkv", noise=True, n_frames=5, **FFV1)
    settings = identity.model_copy(update={"temporal": 1.0})
    report = restore_file(source, tmp_path / "out.mkv", settings)
    assert planes_equal(frames_of(source), frames_of(report.output))


@pytest.mark.parametrize(
    ("source", "output"),
    [("clip.v2.mp4", "clip.v2_restored.mp4"), ("CLIP.MOV", "CLIP_restored.MOV"),
     ("old.avi", "old_restored.mkv"), ("noext", "noext_restored.mkv")],
)  # fmt: skip
def test_the_default_name(source, output):
    assert restored_name(Path("a") / source) == Path("a") / output


def test_all_errors_have_a_code_of_their_own_kind():
    kinds = [RestoreError, *RestoreError.__subclasses__()]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)


def test_a_change_of_the_aspect_ratio_is_said(tmp_path, identity, caplog):
    parts = [
        make_clip(
            tmp_path / f"{n}.ts", n_frames=20, codec="mpeg2video", time_base=Fraction(1, 25),
            sample_aspect_ratio=aspect,
        )
        for n, aspect in enumerate([Fraction(1), Fraction(4, 3)])
    ]  # fmt: skip
    source = tmp_path / "in.ts"
    source.write_bytes(b"".join(part.read_bytes() for part in parts))
    restore_file(source, tmp_path / "out.mkv", identity)
    assert "sample aspect ratio 1 to 4/3 near frame" in caplog.text
