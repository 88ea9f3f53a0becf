"""A live source as its consumer sees it: real RTSP, real UDP, a server that dies, freezes, asks."""

import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import av
import numpy as np
import pytest
from commands import free_port
from media import jpeg, make_clip, read_index, with_silent_track
from streams import Camera, RtspServer

from pipeline import live, pacing, stats
from pipeline.address import Address
from pipeline.capture import Request
from pipeline.child import Child
from pipeline.config import LiveConfig
from pipeline.errors import SourceError, StreamLost
from pipeline.live import LiveSource
from pipeline.pacing import TIME_BASE
from pipeline.stats import StreamStats

FAST = {"backoff_most_seconds": 0.5}


class Consumer:
    """Takes frames in a thread; `frames` are (take, frame) in their order."""

    def __init__(self, url, **settings):
        self.stats, self.stop = StreamStats(), threading.Event()
        self.frames, self.sounds, self.error = [], [], None
        config = LiveConfig(**{**FAST, **settings})
        self.source = LiveSource(Address.parse(url), config, self.stats, self._hear, self.stop)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _hear(self, take, pts, sound):
        self.sounds.append((take, pts, sound))

    def _run(self):
        try:
            for take, frames in self.source.takes():
                self.frames += ((take, frame) for frame in frames if frame is not None)
        except SourceError as error:
            self.error = error

    def __enter__(self):
        self.source.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self._thread.join(10)
        self.source.__exit__(None, None, None)
        assert not self._thread.is_alive()

    def wait_for(self, n, timeout=20):
        until, target = time.monotonic() + timeout, len(self.frames) + n
        while len(self.frames) < target:
            assert time.monotonic() < until, (len(self.frames), target, self.error)
            assert self._thread.is_alive(), self.error
            time.sleep(0.01)

    def wait_until(self, condition, timeout=15):
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until
            time.sleep(0.01)
        return time.monotonic()

    def check_order(self):
        frames = [frame for _, frame in self.frames]
        assert [frame.index for frame in frames] == list(range(len(frames)))
        assert all(a.pts < b.pts for a, b in pairwise(frames))
        return frames


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_frames_of_an_rtsp_camera_come_in_order_with_its_timing(rtsp_server, transport):
    with (
        Camera(rtsp_server.url("cam"), "160x120", 25, "aac"),
        Consumer(rtsp_server.url("cam"), transport=transport) as consumer,
    ):
        consumer.wait_for(50)
        take, _ = consumer.frames[-1]
    frames = consumer.check_order()
    numbers = [read_index(frame.planes) for frame in frames[10:50]]
    assert numbers == [(numbers[0] + i) % 256 for i in range(40)]
    steps = [b.pts - a.pts for a, b in pairwise(frames[10:50])]
    assert steps == [3600] * 39
    assert (take.info.width, take.info.height, take.info.frame_rate) == (160, 120, 25)
    assert take.info.pixel_format.name == "yuv420p"
    assert take.audio is not None
    times = [pts for _, pts, _ in consumer.sounds]
    assert all(a < b for a, b in pairwise(times))
    assert 0.9 < len(times) * 1920 / (frames[-1].pts - frames[0].pts) < 1.6


def test_mpeg_ts_over_udp_is_a_source_too():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"udp://127.0.0.1:{port}"
    with Camera(f"{url}?pkt_size=1316"), Consumer(url, stall_timeout_seconds=2) as consumer:
        consumer.wait_for(30)
    consumer.check_order()


@contextmanager
def web_server(folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.1])
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_hls_over_http_comes_at_the_pace_of_its_timing_not_in_bursts(tmp_path):
    playlist = tmp_path / "live.m3u8"
    with Camera(f"hls:{playlist}", "160x120", 25), web_server(tmp_path) as web:
        until = time.monotonic() + 20
        while len(list(tmp_path.glob("*.ts"))) < 3:
            assert time.monotonic() < until
            time.sleep(0.1)
        with Consumer(f"{web}/live.m3u8", stall_timeout_seconds=5) as consumer:
            consumer.wait_for(100)
    frames = consumer.check_order()[:100]
    numbers = [read_index(frame.planes) for frame in frames]
    assert numbers == [(numbers[0] + i) % 256 for i in range(100)], "none is dropped"
    gaps = [b.captured_seconds - a.captured_seconds for a, b in pairwise(frames)]
    assert max(gaps) < 0.5
    assert 3 < frames[-1].captured_seconds - frames[0].captured_seconds < 6


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="no ffmpeg here to serve RTMP")
def test_an_rtmp_server_is_a_source_too():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"rtmp://127.0.0.1:{port}/live/key"
    server = subprocess.Popen(  # PyAV cannot serve RTMP to a player, the command can
        ["ffmpeg", "-v", "error", "-re", "-f", "lavfi", "-i", "testsrc=s=160x120:r=25",
         "-f", "lavfi", "-i", "sine", "-c:v", "libx264", "-preset", "ultrafast", "-tune",
         "zerolatency", "-pix_fmt", "yuv420p", "-c:a", "aac", "-f", "flv", "-listen", "1", url],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        with Consumer(url, open_timeout_seconds=10) as consumer:
            consumer.wait_for(50)
            assert consumer.frames[-1][0].audio is not None
            assert len(consumer.sounds) > 20
            assert str(consumer.source.address).endswith("/live/***")
    finally:
        server.kill()
        server.wait()
    consumer.check_order()


def test_a_camera_that_goes_away_and_comes_back_goes_on_in_the_same_session(rtsp_server):
    with Consumer(rtsp_server.url("cam")) as consumer:
        with Camera(rtsp_server.url("cam")):
            consumer.wait_for(10)
        consumer.wait_until(lambda: consumer.stats["source_disconnects"] >= 2)
        before = consumer.frames[-1][1]
        with Camera(rtsp_server.url("cam")):
            consumer.wait_for(20)
    frames = consumer.check_order()
    gap = frames[before.index + 1]
    away = gap.captured_seconds - before.captured_seconds
    assert (gap.pts - before.pts) / 90000 == pytest.approx(away, abs=0.05)
    assert consumer.stats["source_stalls"] == 0
    assert consumer.frames[0][0] is consumer.frames[-1][0], "the same format, the same take"


def test_a_frozen_server_is_a_stall_noticed_in_time(rtsp_server):
    with Camera(rtsp_server.url("cam")), Consumer(
        rtsp_server.url("cam"), stall_timeout_seconds=1.5, open_timeout_seconds=1.5
    ) as consumer:  # fmt: skip
        consumer.wait_for(10)
        before = consumer.stats["source_disconnects"]  # the camera needs a moment to begin
        rtsp_server.freeze()
        frozen = time.monotonic()
        noticed = consumer.wait_until(lambda: consumer.stats["source_stalls"])
        assert 1.0 < noticed - frozen < 2.5
        assert consumer.stats["source_disconnects"] == before
        assert consumer.source.away()
        rtsp_server.thaw()
        consumer.wait_for(20)
    consumer.check_order()


def test_a_reader_that_ffmpeg_does_not_bound_is_killed_from_outside(rtsp_server, monkeypatch):
    # FFmpeg is told to wait for an hour: only the process that watches can end the wait.
    monkeypatch.setattr(live, "Request", lambda *args: Request(*args[:-2], 3600.0, 3600.0))
    with Camera(rtsp_server.url("cam")), Consumer(
        rtsp_server.url("cam"), stall_timeout_seconds=1.0
    ) as consumer:  # fmt: skip
        consumer.wait_for(10)
        rtsp_server.freeze()
        frozen = time.monotonic()
        noticed = consumer.wait_until(lambda: consumer.stats["source_stalls"])
        assert noticed - frozen < 2.0
        rtsp_server.thaw()
        consumer.wait_for(20)


def test_another_size_and_codec_after_a_reconnect_is_a_new_take(rtsp_server):
    with Consumer(rtsp_server.url("cam")) as consumer:
        with Camera(rtsp_server.url("cam"), "160x120"):
            consumer.wait_for(10)
        with Camera(rtsp_server.url("cam"), "96x64", 15, "", "libx265"):
            consumer.wait_until(lambda: consumer.frames[-1][0].number == 2)
            consumer.wait_for(10)
    consumer.check_order()
    take, frame = consumer.frames[-1]
    assert (take.info.width, take.info.height, take.video_codec) == (96, 64, "hevc")
    assert frame.planes[0].shape == (64, 96)
    sizes = {frame.planes[0].shape for taken, frame in consumer.frames if taken.number == 1}
    assert sizes == {(120, 160)}


@pytest.mark.parametrize("kind", ["basic", "digest"])
def test_any_password_works_and_a_wrong_one_is_final(kind):
    password = "p@ss:w/rd#1"
    with RtspServer(0, "me", password, kind) as server:
        login = f"me:{password}@"
        encoded = "me:p%40ss%3Aw%2Frd%231@"
        with Camera(server.url("cam", encoded)), Consumer(server.url("cam", login)) as consumer:
            consumer.wait_for(5)
        with Consumer(server.url("cam", f"me:{password}x@")) as consumer:
            consumer.wait_until(lambda: consumer.error is not None)
    assert type(consumer.error) is SourceError
    assert "password is wrong" in str(consumer.error)
    assert "p@ss" not in str(consumer.error)
    assert "rd#1" not in str(consumer.error)


def test_bounded_reconnects_end_as_a_lost_stream(rtsp_server):
    with Consumer(rtsp_server.url("nothing"), reconnects=2, backoff_first_seconds=0.05) as consumer:
        consumer.wait_until(lambda: consumer.error is not None)
    assert type(consumer.error) is StreamLost
    assert "404" in str(consumer.error)
    assert "2 attempts" in str(consumer.error)


@pytest.mark.parametrize("url", ["srt://127.0.0.1:9000", "/no/such/device"])
def test_what_can_never_work_is_final(url):
    with Consumer(url) as consumer:
        consumer.wait_until(lambda: consumer.error is not None)
    assert type(consumer.error) is SourceError


def test_a_source_that_has_no_video_yet_is_asked_again(tmp_path):
    path = tmp_path / "sound.ts"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=48000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 48000), np.float32), "fltp", "mono")
        sound.sample_rate = 48000
        out.mux(stream.encode(sound))
        out.mux(stream.encode(None))
    with Consumer(str(path), reconnects=2, backoff_first_seconds=0.05) as consumer:
        consumer.wait_until(lambda: consumer.error is not None)
    assert type(consumer.error) is StreamLost
    assert "2 attempts" in str(consumer.error)


# FFmpeg throws away what it looks at first: enough bytes, and keyframes, for something to be left.
LIVE = {"noise": True, "size": (160, 120), "options": {"tune": "zerolatency", "g": "5"}}


def test_a_camera_whose_microphone_is_off_is_shown_without_sound(tmp_path, caplog):
    clip = make_clip(tmp_path / "a.ts", **LIVE)
    path = with_silent_track(clip, tmp_path / "mute.ts")
    with Consumer(str(path), reconnects=1, backoff_first_seconds=0.05) as consumer:
        consumer.wait_until(lambda: consumer.error is not None)
    assert {take.audio for take, _ in consumer.frames} == {None}
    assert "its sound is silent or unknown and left out" in caplog.text


def test_a_source_that_ends_soon_each_time_uses_its_reconnects_up(tmp_path):
    path = make_clip(tmp_path / "a.ts", **LIVE)
    with Consumer(str(path), reconnects=2, backoff_first_seconds=0.05) as consumer:
        consumer.wait_until(lambda: consumer.error is not None)
    assert type(consumer.error) is StreamLost
    assert consumer.stats["source_connects"] == 3


def test_what_has_given_frames_is_asked_again_even_where_it_is_gone(tmp_path, monkeypatch):
    """A device whose node goes and comes, a server that refuses a login for a while."""
    monkeypatch.setattr(pacing, "REFUSED_SECONDS", 0.2)
    path = make_clip(tmp_path / "a.ts", **LIVE)
    with Consumer(str(path)) as consumer:
        consumer.wait_for(10)
        path.unlink()
        n = consumer.stats["source_disconnects"]
        consumer.wait_until(lambda: consumer.stats["source_disconnects"] >= n + 3)
        assert consumer.error is None
        make_clip(path, **LIVE)
        consumer.wait_for(10)
        consumer.check_order()


def test_a_reader_that_stands_still_in_mid_message_is_a_stall(monkeypatch):
    monkeypatch.setattr("pipeline.child.MESSAGE_SECONDS", 1)
    monkeypatch.setattr(live, "_started", lambda: Child("halting"))
    with Consumer("rtsp://127.0.0.1:9/cam") as consumer:
        consumer.wait_until(lambda: consumer.stats["source_stalls"] >= 1)


def test_frames_that_cannot_be_decoded_are_counted(tmp_path):
    whole, path = make_clip(tmp_path / "whole.mkv", n_frames=60, **LIVE), tmp_path / "a.mkv"
    with av.open(str(whole)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is None:
                continue
            if number in (41, 42):
                times = packet.pts, packet.dts, packet.time_base
                packet = av.Packet(b"\xff" * 64)
                packet.pts, packet.dts, packet.time_base = times
            packet.stream = stream
            out.mux(packet)
    with Consumer(str(path), reconnects=0) as consumer:
        consumer.wait_until(lambda: consumer.error is not None)
    assert consumer.stats["frames_damaged"] == 2


class MotionJpeg(BaseHTTPRequestHandler):
    """Ten pictures a second, as cameras have sent them since before there was RTSP."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=b")
        self.end_headers()
        picture = jpeg(size=(64, 64))
        head = f"--b\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
        with suppress(OSError):
            while True:
                self.wfile.write(head.encode() + picture + b"\r\n")
                time.sleep(0.1)

    def log_message(self, *_):
        pass


def test_motion_jpeg_which_carries_no_times_goes_by_the_clock():
    with ThreadingHTTPServer(("127.0.0.1", 0), MotionJpeg) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}/video.mjpg"
        with Consumer(url) as consumer:
            consumer.wait_for(20)
        http.shutdown()
    frames = consumer.check_order()
    seconds = frames[-1].captured_seconds - frames[0].captured_seconds
    assert float((frames[-1].pts - frames[0].pts) * TIME_BASE) == pytest.approx(seconds, abs=0.1)


def test_a_slow_consumer_gets_the_newest_frames_and_every_loss_is_counted(rtsp_server):
    with Camera(rtsp_server.url("cam")), Consumer(rtsp_server.url("cam")) as consumer:
        original = consumer.source._frames
        consumer.source._frames = slowly_of(original)
        consumer.wait_for(30)
        ages = [time.monotonic() - consumer.frames[-1][1].captured_seconds]
    stats = consumer.stats
    assert ages[0] < 0.5
    assert stats["frames_dropped"] > 20
    left = stats["frames_in"] - stats["frames_dropped"] - stats["frames_restored"]
    assert left == stats["frames_passed"]
    assert stats["decisions_drop"] >= 1


def slowly_of(original):
    def slowly(take):
        for frame in original(take):
            yield frame
            if frame is not None:
                time.sleep(0.1)

    return slowly


@contextmanager
def _streaming(*clips):
    """A server that streams the first clip to who connects first, and so on; gives its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with suppress(OSError):
                for clip in clips:
                    connection, _ = listener.accept()
                    with connection, suppress(OSError):
                        data = clip.read_bytes()
                        step = len(data) // 500 // 188 * 188
                        for start in range(0, len(data), step):
                            connection.sendall(data[start : start + step])
                            time.sleep(0.02)

        threading.Thread(target=serve, daemon=True).start()
        yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_a_source_that_goes_on_with_what_cannot_be_decoded_is_opened_again(tmp_path):
    """A camera that is set from H.264 to HEVC, on the same PID: it would be frozen for ever."""
    options = {"g": "10", "tune": "zerolatency"}
    first = make_clip(tmp_path / "a.ts", n_frames=50, size=(160, 120), codec="libx264",
                      options=options, time_base=Fraction(1, 25))  # fmt: skip
    second = make_clip(tmp_path / "b.ts", n_frames=250, size=(160, 120), codec="libx265",
                       options={"x265-params": "log-level=none:bframes=0:keyint=10"},
                       time_base=Fraction(1, 25))  # fmt: skip
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    with _streaming(both, second) as url, Consumer(url, stall_timeout_seconds=1) as consumer:
        consumer.wait_until(lambda: consumer.stats["source_stalls"] == 1, timeout=40)
        assert consumer.stats["frames_damaged"] > 10
        consumer.wait_until(lambda: consumer.frames[-1][0].video_codec == "hevc", timeout=40)


def test_a_source_that_is_away_for_long_costs_no_process_for_each_attempt(monkeypatch):
    started = []
    monkeypatch.setattr(live, "_started", lambda: started.append(1) or Child("pipeline.capture"))
    with Consumer(f"rtsp://127.0.0.1:{free_port()}/cam", backoff_most_seconds=0.1) as consumer:
        consumer.wait_until(lambda: consumer.stats["source_disconnects"] >= 10, timeout=60)
    assert len(started) == 1


SLOW_TO_COPY = """
import time
from pipeline import capture
planes_of = capture.planes_of
capture.planes_of = lambda *given: time.sleep(0.08) or planes_of(*given)
main = capture.main
"""


def test_a_reader_too_slow_for_its_camera_leaves_frames_out_and_stays_near_it(
    rtsp_server, tmp_path, monkeypatch
):
    """Packets would queue in the kernel, where no one counts them, all later by the second."""
    (tmp_path / "slow_to_copy.py").write_text(SLOW_TO_COPY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(live, "_started", lambda: Child("slow_to_copy"))
    with (
        Camera(rtsp_server.url("cam"), "160x120", 25),
        Consumer(rtsp_server.url("cam")) as consumer,
    ):
        consumer.wait_for(20)
        began, first = time.monotonic(), consumer.frames[-1][1].pts
        consumer.wait_for(80, 40)
        lag = time.monotonic() - began - float((consumer.frames[-1][1].pts - first) * TIME_BASE)
    assert lag < 1.5  # 80 frames that take 0.08 s each, of 0.04: else 3.2
    assert consumer.stats["frames_dropped"] > 20


def test_a_reader_that_stands_still_makes_the_stream_unhealthy(rtsp_server, monkeypatch):
    """As where a camera's device hangs in the kernel, and the process that reads it with it."""
    monkeypatch.setattr(stats, "STUCK_SECONDS", 1)
    gate = threading.Event()
    end = Child.end
    monkeypatch.setattr(Child, "end", lambda *given: gate.wait(60) and end(*given))
    with Camera(rtsp_server.url("cam")) as camera, Consumer(rtsp_server.url("cam")) as consumer:
        consumer.wait_for(5)
        camera.kill()
        consumer.wait_until(lambda: consumer.stats.stuck() == ["capture"], timeout=30)
        gate.set()
        consumer.wait_until(lambda: not consumer.stats.stuck())
