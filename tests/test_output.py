"""A live sink as its viewers see it: real RTSP servers that die and freeze, UDP, HLS, files."""

import contextlib
import errno
import io
import multiprocessing
import os
import resource
import socket
import threading
import time
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import av
import cv2
import numpy as np
import pytest
from media import numbered_picture
from readback import indices_of, seconds_of
from streams import YUV, Feeder, RtspServer, Viewer, increasing, take_of

from pipeline import pacing, publish, publisher
from pipeline.address import Address
from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError, SinkError
from pipeline.frames import Frame, PixelFormat
from pipeline.output import STUB_SECONDS
from pipeline.pacing import ticks
from pipeline.planes import planes_of
from pipeline.publish import Request, Target, target_of
from pipeline.publisher import live_settings

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


def test_the_publisher_comes_back_when_its_server_was_restarted(rtsp_server):
    with Feeder(rtsp_server.url("out")) as feeder, Viewer(rtsp_server.url("out")) as viewer:
        viewer.wait_for(10)
        rtsp_server.restart()
        back = time.monotonic()
        viewer.wait_for(20)
        assert time.monotonic() - back < 6
    assert feeder.stats["sink_disconnects"] >= 1
    assert feeder.stats["sink_connects"] == 2
    assert feeder.stats["frames_unpublished"] > 0


def test_a_server_that_stands_still_blocks_mux_for_ever_and_the_publisher_is_killed(rtsp_server):
    # Without the kill from outside this test hangs: no option of FFmpeg bounds that write. It is
    # noticed once the socket's buffers are full, so the frames are large ones.
    big = take_of(size=(1280, 720))
    noisy = np.random.default_rng(0).integers(0, 255, (720, 1280), dtype=np.uint8)
    with Feeder(rtsp_server.url("out"), sink_timeout_seconds=1, open_timeout_seconds=4) as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] > 5)
        feeder.output.begin(big)
        feeder.take = big
        original = feeder.output.write
        feeder.output.write = lambda frame: original(
            Frame(frame.index, frame.pts, (np.roll(noisy, frame.index * 7), *frame.planes[1:]))
        )
        feeder.wait_for(lambda: feeder.stats["sink_connects"] == 2, 30)
        rtsp_server.freeze()
        feeder.wait_for(lambda: feeder.stats["sink_stalls"], 30)
        rtsp_server.thaw()
        feeder.wait_for(lambda: feeder.stats["sink_connects"] >= 3, 30)
    assert feeder.closing_seconds < 15


def test_closing_does_not_wait_for_a_server_that_stands_still(rtsp_server):
    with Feeder(rtsp_server.url("out"), sink_timeout_seconds=1) as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] > 5)
        rtsp_server.freeze()
    assert feeder.closing_seconds < 4


def test_another_size_is_announced_anew(rtsp_server):
    with Feeder(rtsp_server.url("out")) as feeder, Viewer(rtsp_server.url("out")) as viewer:
        viewer.wait_for(10)
        feeder.take = take_of(2, (96, 64))
        feeder.output.begin(feeder.take)
        feeder.wait_for(lambda: viewer.seen[-1][3] == (96, 64))
        viewer.wait_for(10)
    assert feeder.stats["sink_disconnects"] == 0


def test_a_server_that_closes_without_an_answer_is_tried_again():
    """As a proxy does whose server is being restarted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted = []

        def refuse():
            with contextlib.suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0].close())

        threading.Thread(target=refuse, daemon=True).start()
        with Feeder(f"rtsp://127.0.0.1:{listener.getsockname()[1]}/out") as feeder:
            feeder.wait_for(lambda: len(accepted) >= 3 or feeder.failure())
            assert feeder.failure() is None


def test_a_process_that_cannot_be_started_is_tried_again(rtsp_server, monkeypatch):
    real, tried = publisher.Child, []

    def child(module):
        tried.append(module)
        if len(tried) <= 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(module)

    monkeypatch.setattr(publisher, "Child", child)
    with Feeder(rtsp_server.url("out")) as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 5)
        assert feeder.failure() is None


@pytest.mark.parametrize("sound", [False, True])
def test_a_disk_that_is_full_is_not_filled_with_the_beginnings_of_recordings(tmp_path, sound):
    """Where not one byte can be written, each attempt leaves nothing; with sound the first frame
    counts as written, which waits for it, and yet no attempt counts as a success."""
    with Feeder(tmp_path / "out.mkv") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 2)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # the children have it too
        try:
            feeder.take = take_of(
                2, size=(128, 96), audio=described("pcm_s16le") if sound else None
            )
            feeder.output.begin(feeder.take)
            feeder.wait_for(lambda: feeder.stats["sink_disconnects"] >= 5)
            parts = list(tmp_path.glob(".*.part"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(parts) <= 1  # that of the attempt which is under way


def described(codec="pcm_alaw", rate=8000):
    """A stream of sound as capture.py describes it."""
    description = io.BytesIO()
    with av.open(description, "w", format="nut") as container:
        stream = container.add_stream(codec, rate=rate)
        container.start_encoding()
        packet = av.Packet(bytes(64))
        packet.stream, packet.time_base = stream, Fraction(1, rate)
        packet.pts = packet.dts = 0
        container.mux(packet)
    return description.getvalue()


@pytest.mark.parametrize("sink", ["live/", "out.ts"])
def test_sound_that_mpeg_ts_cannot_hold_is_left_out_and_said(tmp_path, caplog, sink):
    target = f"{tmp_path}/{sink}"
    with Feeder(target, take_of(audio=described())) as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 30)
    assert "the sound is pcm_alaw, which MPEG-TS cannot hold: it is left out" in caplog.text
    (written, *_) = sorted(p for p in tmp_path.rglob("*.ts"))
    with av.open(str(written)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_keyframes_come_by_the_clock_where_the_frame_rate_is_not_what_it_says(tmp_path):
    """25 a second are stated, 5 come: a viewer does not wait for 10 s."""
    with Feeder(tmp_path / "out.mkv") as feeder:
        feeder.rate = 5
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 40, timeout=30)
    with av.open(str(tmp_path / "out.mkv")) as container:
        keys = [float(f.time) for f in container.decode(video=0) if f.key_frame]
    assert all(b - a <= 2.5 for a, b in pairwise(keys))
    assert len(keys) >= 3


def test_a_wrong_password_is_final_and_masked():
    with RtspServer(0, "me", "right", "digest") as server:
        url = server.url("out", "me:p@ss:w/rd#1@")
        with Feeder(url) as feeder:
            feeder.wait_for(lambda: feeder.failure() is not None)
    with pytest.raises(SinkError, match="password is wrong") as caught:
        feeder.output.check()
    assert "p@ss" not in str(caught.value)


def test_what_has_worked_before_is_tried_again_even_where_it_is_refused(tmp_path, monkeypatch):
    """An encoder or a login that is refused for a while ends no stream of weeks."""
    monkeypatch.setattr(pacing, "REFUSED_SECONDS", 0.2)
    with Feeder(tmp_path / "out.mkv") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 2)
        info = replace(feeder.take.info, width=1, height=1)  # no encoder takes that as 4:2:0
        feeder.output.begin(replace(feeder.take, info=info, number=2))
        feeder.wait_for(lambda: feeder.stats["sink_disconnects"] >= 2)
        assert feeder.failure() is None
        feeder.output.begin(replace(feeder.take, number=3))
        n = feeder.stats["frames_published"]
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= n + 5)


def test_rtmp_is_opened_anew_before_its_times_begin_anew(tmp_path):
    """FLV counts milliseconds in 31 bits; 20 days of them are played here by the frames' times."""
    target = Target(Address.parse("rtmp://h/x"), str(tmp_path / "a.flv"), "flv", {})
    info = take_of().info
    ours, theirs = multiprocessing.Pipe()
    ours.send(Request(target, info, live_settings(EncodeConfig(), info), None, 0))
    planes = planes_of(numbered_picture(0, (160, 120), YUV.name), info, "")
    for number, days in enumerate([0, 21]):
        ours.send(Frame(number, ticks(days * 86400), planes))
    publish.main(theirs)
    said = []
    while ours.poll():
        said.append(type(ours.recv()).__name__)
    assert said == ["Started", "Ready", "Published", "Closed"]


def test_a_recording_gets_its_name_when_it_is_complete_and_none_is_overwritten(tmp_path):
    (tmp_path / "out.mkv").write_bytes(b"precious")
    (tmp_path / ".out.1.mkv.part").write_bytes(b"of a process that was killed")
    with Feeder(tmp_path / "out.mkv") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 30)
        assert (tmp_path / ".out.2.mkv.part").exists()
        assert not (tmp_path / "out.2.mkv").exists()
    assert (tmp_path / "out.mkv").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.1.mkv.part", "out.2.mkv", "out.mkv"]
    numbers = indices_of(tmp_path / "out.2.mkv")
    assert len(numbers) == feeder.stats["frames_published"]
    assert numbers == sorted(set(numbers))


def test_a_recording_that_cannot_be_completed_is_an_error_at_the_end(tmp_path):
    with Feeder(tmp_path / "out.mkv") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 5)
        # Its name becomes a folder's: what is written cannot get it.
        (tmp_path / "out.mkv" / "full").mkdir(parents=True)
    assert "out.mkv" in str(feeder.failure())


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_recording_that_is_killed_still_plays(tmp_path, suffix):
    with Feeder(tmp_path / "new" / "folder" / f"out{suffix}") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 80)  # a keyframe every 50
        killed = (tmp_path / "new" / "folder" / f".out{suffix}.part").read_bytes()
    (tmp_path / f"killed{suffix}").write_bytes(killed)
    numbers = indices_of(tmp_path / f"killed{suffix}")
    assert len(numbers) >= 49
    assert numbers == sorted(set(numbers))
    whole = indices_of(tmp_path / "new" / "folder" / f"out{suffix}")
    assert len(whole) == feeder.stats["frames_published"]


def test_hls_in_a_folder_plays(tmp_path):
    with Feeder(f"{tmp_path}/live/") as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 120)
    # Not through the playlist: it has no end, so that players wait for what comes next.
    lines = (tmp_path / "live/index.m3u8").read_text().splitlines()
    names = [line for line in lines if line.endswith(".ts")]
    whole = b"".join((tmp_path / "live" / name).read_bytes() for name in names)
    with av.open(io.BytesIO(whole)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    assert len(names) > 1
    assert lines[0] == "#EXTM3U"
    assert frames == feeder.stats["frames_published"]


def test_mpeg_ts_over_udp_arrives():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sink = f"udp://127.0.0.1:{port}?pkt_size=1316"
    with Feeder(sink), Viewer(f"udp://127.0.0.1:{port}") as viewer:
        viewer.wait_for(30)
    assert increasing(viewer.seen)


def test_rtmp_arrives():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"rtmp://127.0.0.1:{port}/live/key"
    numbers = []

    def listen():  # FFmpeg's own server, which takes one publisher
        with av.open(url, options={"listen": "1"}, timeout=(15, 5)) as container:
            for frame in container.decode(video=0):
                numbers.append(frame.pts)
                if len(numbers) == 20:
                    return

    server = threading.Thread(target=listen, daemon=True)
    server.start()
    with Feeder(url) as feeder:
        feeder.wait_for(lambda: len(numbers) == 20)
    server.join(5)
    assert numbers == sorted(set(numbers))


def test_what_is_no_sink_is_said_at_once():
    with pytest.raises(ConfigError, match="not a sink"):
        target_of(Address.parse("out.xyz"))
