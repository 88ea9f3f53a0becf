"""The publisher: servers that die, freeze and refuse, and what it does then."""

import contextlib
import errno
import io
import os
import resource
import socket
import threading
import time
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from media import numbered_picture
from streams import YUV, Feeder, RtspServer, Viewer, take_of

from pipeline import pacing, publisher
from pipeline.address import Address
from pipeline.config import EncodeConfig
from pipeline.encoder import add_video, plan_format
from pipeline.errors import SinkError
from pipeline.frames import Frame
from pipeline.pacing import TIME_BASE
from pipeline.pictures import to_picture
from pipeline.planes import planes_of
from pipeline.publisher import live_settings


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
    assert "the sound is pcm_alaw, which this sink cannot hold: it is left out" in caplog.text
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


@pytest.mark.parametrize("name", ["out.mkv", "out.mp4"])
def test_sound_that_a_recording_cannot_hold_costs_no_picture(tmp_path, name, caplog):
    """A microphone that is switched on would end a recording that has run for weeks."""
    with Feeder(tmp_path / name, take_of(audio=described("pcm_mulaw"))) as feeder:
        feeder.wait_for(lambda: feeder.stats["frames_published"] >= 10)
    assert "the sound is pcm_mulaw, which this sink cannot hold: it is left out" in caplog.text
    with av.open(str(tmp_path / name)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {}), ("libx265", {}), ("libvpx-vp9", {}), ("libsvtav1", {}),
        ("libsvtav1", {"svtav1-params": "film-grain=4"}),
    ],
)  # fmt: skip
def test_no_encoder_holds_a_live_frame_back(codec, options):
    settings = live_settings(EncodeConfig(codec=codec, options=options), take_of().info)
    assert all(value in settings.options.get("svtav1-params", "") for value in options.values())
    with av.open(io.BytesIO(), "w", format="matroska") as container:
        info = take_of().info
        form = plan_format(settings, info.pixel_format, [])
        video = add_video(container, Address.parse("out.mkv"), settings, info, form)
        frame = Frame(0, 0, planes_of(numbered_picture(0, (160, 120), YUV.name), info, ""))
        picture = to_picture(frame, info, form)
        picture.pts, picture.time_base = 0, TIME_BASE
        assert video.encode(picture)
