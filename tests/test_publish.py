"""What is published: recordings, HLS, UDP, RTMP."""

import io
import multiprocessing
import socket
import threading

import av
import pytest
from media import numbered_picture
from readback import indices_of
from streams import YUV, Feeder, Viewer, increasing, take_of

from pipeline import publish
from pipeline.address import Address
from pipeline.config import EncodeConfig
from pipeline.errors import ConfigError
from pipeline.frames import Frame
from pipeline.pacing import ticks
from pipeline.planes import planes_of
from pipeline.publish import Request, Target, target_of
from pipeline.publisher import live_settings


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
