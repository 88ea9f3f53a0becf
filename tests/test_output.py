"""A live sink as its viewers see it: its pace, what is repeated, the stub."""

import time
from dataclasses import replace
from itertools import pairwise

import av
import cv2
import numpy as np
import pytest
from readback import seconds_of
from streams import YUV, Feeder, Viewer, increasing, take_of

from pipeline.errors import ConfigError
from pipeline.frames import PixelFormat
from pipeline.output import STUB_SECONDS

FULL_BT709 = PixelFormat("yuv444p", 3, 0, 0, 8, "bt709", True, "left")
GRAY = PixelFormat("gray", 1, 0, 0, 8, "bt709", True, "left")


def test_published_frames_arrive_in_order_with_their_timing(rtsp_server):
    with Feeder(rtsp_server.url("out")) as feeder, Viewer(rtsp_server.url("out")) as viewer:
        viewer.wait_for(10)
        seen = viewer.wait_for(40)
    steps = [(b[2] - a[2]) % 256 for a, b in pairwise(seen)]
    assert sum(step == 1 for step in steps) > 30, "a busy machine may lose some"
    assert [round(b[1] - a[1], 3) for a, b in pairwise(seen)] == [0.04 * n for n in steps]
    assert feeder.stats["frames_published"] == feeder.stats["frames_sent"]
    assert feeder.closing_seconds < 2


def test_while_the_source_is_away_its_last_frame_is_repeated_at_the_frame_rate(rtsp_server):
    with Feeder(rtsp_server.url("out")) as feeder, Viewer(rtsp_server.url("out")) as viewer:
        viewer.wait_for(10)
        feeder.silent.set()
        time.sleep(0.3)
        start = time.monotonic()
        repeats = viewer.wait_for(50)
        seconds = time.monotonic() - start
        feeder.silent.clear()
        viewer.wait_for(20)
        fresh = viewer.seen[-1][2]
    assert 1.5 < seconds < 3
    assert len({number for _, _, number, _ in repeats}) == 1
    assert fresh != repeats[0][2]
    assert increasing(viewer.seen)
    assert max(b[0] - a[0] for a, b in pairwise(viewer.seen[5:])) < 1
    assert feeder.stats["frames_repeated"] >= 40
    assert feeder.stats["frames_late"] <= 2


def test_a_model_that_stands_still_leaves_no_viewer_without_a_sign_of_life(tmp_path):
    """The source sends all the while: servers drop a publisher from which nothing comes."""
    with Feeder(tmp_path / "out.mkv") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 10)
        feeder.output.repeat_while(lambda: False)
        feeder.silent.set()
        feeder.wait_for(lambda: feeder.stats["frames_repeated"] >= 2)
        feeder.silent.clear()
        n = feeder.stats["frames_published"]
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= n + 10)
    times = [float(seconds) for seconds in seconds_of(tmp_path / "out.mkv")]
    gaps = [b - a for a, b in pairwise(times)]
    assert sum(0.9 < gap < 1.5 for gap in gaps) >= 2
    assert max(gaps) < 1.5
    assert min(gaps) > 0


def save_png(path, colour, size):
    cv2.imwrite(str(path), np.full((size[1], size[0], 3), colour[::-1], np.uint8))


@pytest.mark.parametrize("pixel_format", [YUV, FULL_BT709, GRAY], ids=lambda f: f.name)
def test_a_source_that_stays_away_is_replaced_by_the_stub(tmp_path, pixel_format):
    orange = (230, 120, 20)
    save_png(tmp_path / "stub.png", orange, (64, 64))
    take = replace(take_of(), info=replace(take_of().info, pixel_format=pixel_format))
    sink = tmp_path / "out.mkv"
    with Feeder(sink, take, stub=tmp_path / "stub.png") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 10)
        feeder.silent.set()
        feeder.wait_for(lambda: feeder.stats["frames_repeated"] >= 100, 20)
        feeder.silent.clear()
        sent = feeder.stats["frames_sent"]
        feeder.wait_for(lambda: feeder.stats["frames_sent"] > sent + 5)
    with av.open(str(sink)) as container:
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    assert {picture.shape for _, picture in frames} == {(120, 160, 3)}
    colour = np.full(3, 143) if pixel_format is GRAY else np.array(orange)
    stubs = [np.abs(picture.astype(int) - colour).max() < 12 for _, picture in frames]
    first, last = stubs.index(True), len(stubs) - stubs[::-1].index(True)
    assert all(stubs[first:last])
    assert last < len(stubs), "frames are shown again"
    assert frames[first][0] - frames[0][0] > STUB_SECONDS


@pytest.mark.parametrize("content", [None, b"no picture"])
def test_a_stub_that_is_no_picture_is_said_at_once(tmp_path, content):
    if content:
        (tmp_path / "stub.png").write_bytes(content)
    with pytest.raises(ConfigError, match=r"--stub .*stub\.png: .*; give a PNG"):
        Feeder(tmp_path / "out.mkv", stub=tmp_path / "stub.png")
