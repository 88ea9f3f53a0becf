"""Files from strangers: bounded in pixels and time, without a request, never a wrong success."""

import http.server
import json
import queue
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import pytest
from fuzz import damaged
from media import jpeg, make_clip
from readback import frames_of

from pipeline.decode import VideoSource
from pipeline.errors import SourceError
from pipeline.watch import WatchedThread

VARIANTS = 100
DEADLINE_SECONDS = 30
"""For one damaged variant on a busy machine; each takes some 0.1 s."""
CLIPS = {
    ".mp4": {"audio": "aac", "options": {"bf": "2", "g": "6"}},
    ".mkv": {"audio": "libopus", "codec": "ffv1", "options": {"g": "1"},
             "subtitles": [(0.1, 0.3, "one")]},
    ".ts": {"codec": "mpeg2video", "options": {"g": "6"}, "time_base": Fraction(1, 25)},
    ".avi": {"codec": "mpeg4", "options": {"g": "6"}, "time_base": Fraction(1, 25)},
    ".webm": {"codec": "libvpx-vp9", "audio": "libopus",
              "options": {"cpu-used": "8", "b": "0", "crf": "30"}},
}  # fmt: skip


def source_error(path, **settings):
    """The one line with which a file is refused, when opened or when decoded."""
    with pytest.raises(SourceError) as caught, VideoSource(path, **settings) as source:
        list(source.frames())
    assert "\n" not in str(caught.value)
    return str(caught.value)


# damaged files


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("suffix", CLIPS)
def test_damaged_variants_neither_crash_nor_hang_nor_lie(tmp_path, suffix):
    clip = make_clip(tmp_path / f"clip{suffix}", n_frames=12, **CLIPS[suffix])
    folder = tmp_path / "work"
    folder.mkdir()
    outcomes = list(outcomes_of(clip, folder))
    assert [o["seed"] for o in outcomes] == list(range(VARIANTS))
    for outcome in outcomes:
        assert outcome["files"] == [f"variant{suffix}"]  # neither an output nor a part of one
        if outcome["code"] == 0:
            assert outcome["reported"] == outcome["written"] > 0
            # Less than FFmpeg can decode is written only where damage was counted and said.
            assert outcome["written"] == outcome["decodable"] or outcome["warned"]
        else:
            assert outcome["code"] in (3, 4)
            assert not outcome["left"]
            assert "\n" not in outcome["message"]
    assert {0, 3} <= {o["code"] for o in outcomes}  # the damage is neither too little nor too much


def outcomes_of(clip, folder):
    """What `fuzz.py` prints of each variant; fails when it says nothing for too long."""
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, script, clip, folder, "0", str(VARIANTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        errors: list[bytes] = []
        readers = [
            threading.Thread(target=_forward, args=(child.stdout, lines)),
            threading.Thread(target=lambda: errors.append(child.stderr.read())),
        ]
        for reader in readers:
            reader.start()
        last = None
        try:
            while line := lines.get(timeout=DEADLINE_SECONDS):
                last = json.loads(line)
                if "seed" in last:
                    yield last
        except queue.Empty:
            pytest.fail(f"hangs in {last}")
        finally:
            child.kill()
            for reader in readers:
                reader.join()
    if child.returncode not in (0, -9):
        pytest.fail(f"died in {last}: {errors}")


def _forward(stream, lines):
    for line in stream:
        lines.put(line)
    lines.put(b"")


def test_packets_that_silently_gave_no_picture_are_counted(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", n_frames=12, **CLIPS[".mp4"])
    path = tmp_path / "damaged.mp4"
    path.write_bytes(damaged(clip.read_bytes(), 40))
    for threads in (1, 2, 4):
        with VideoSource(path, threads=threads) as source:
            n_frames = len(list(source.frames()))
            assert n_frames + source.tally.n_corrupt == 12 == source.tally.n_demuxed


# requests


@pytest.fixture
def server():
    """A server on the loopback address, and the list of what it was asked for."""
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            hits.append(self.rfile.readline())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running.server_port}", hits
        running.shutdown()
        thread.join()


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n{key}#EXTINF:1,\n{first}\n#EXT-X-ENDLIST\n"
LISTS = {
    "a.m3u8": HLS.format(key="", first="http://{host}/a.ts"),
    "a.mp4": HLS.format(key="", first="http://{host}/a.ts"),
    "key.m3u8": HLS.format(
        key='#EXT-X-KEY:METHOD=AES-128,URI="http://{host}/key"\n', first="in.ts"
    ),
    "local.m3u8": HLS.format(key="", first="in.ts"),
    "nested.m3u8": HLS.format(key="", first="a.m3u8"),
    "concat.mkv": "ffconcat version 1.0\nfile http://{host}/a.ts\n",
    "concat.ffconcat": "ffconcat version 1.0\nfile in.ts\n",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 {host}\nt=0 0\n"
             "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "a.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
             'mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:'
             '2011"><BaseURL>http://{host}/</BaseURL><Period><AdaptationSet mimeType="video/mp4">'
             '<Representation id="1" bandwidth="1"><BaseURL>a.mp4</BaseURL></Representation>'
             "</AdaptationSet></Period></MPD>",
    "a.mov": '<?xml version="1.0"?><?quicktime type="application/x-quicktime-media-link"?>'
             '<embed src="http://{host}/a.mp4"/>',
    "a.pls": "[playlist]\nFile1=http://{host}/a.mp4\n",
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_other_files_is_refused_without_a_request(tmp_path, server, name):
    host, hits = server
    make_clip(tmp_path / "in.ts", n_frames=5)
    for other, text in LISTS.items():
        (tmp_path / other).write_text(text.replace("{host}", host))
    message = source_error(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}: ")
    assert hits == []


# bounds


def test_pictures_beyond_the_bound_are_refused_before_they_are_decoded(tmp_path):
    path = make_clip(tmp_path / "in.mkv", n_frames=2)
    assert len(frames_of(path, max_pixels=64 * 48)) == 2
    assert "64x48, more than 3071 pixels" in source_error(path, max_pixels=64 * 48 - 1)


def test_a_header_that_understates_the_size_does_not_help(tmp_path):
    path = tmp_path / "in.nut"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for index in range(12):
            packet = av.Packet(jpeg(index, (64, 48) if index < 2 else (640, 480)))
            packet.pts = packet.dts = index
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            out.mux(packet)
    assert "frame 2" in source_error(path, max_pixels=64 * 48)


STALLED = """
import sys, time
from pipeline import cli, decode, frame_decoder
where = sys.argv.pop(1)
home = frame_decoder if where == "planes_of" else decode.VideoSource
honest, calls = getattr(home, where), []
def hangs(*args):
    calls.append(args)
    if where == "_probe" or len(calls) == 3:
        time.sleep(600)
    return honest(*args)
setattr(home, where, hangs)
cli.main()
"""


@pytest.mark.parametrize("where", ["_probe", "planes_of"])
def test_a_decoder_that_hangs_ends_the_job_and_the_process(tmp_path, tiny_checkpoint, where):
    path = make_clip(tmp_path / "in.mkv", n_frames=10)
    done = subprocess.run(
        [sys.executable, "-c", STALLED, where, str(path), "--stall-timeout", "2", "--pool",
         "local", "--model", tiny_checkpoint, "--strength", "0"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert f"{path}: no progress in decoding for 2 s" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv"]


def test_waiting_for_a_slow_consumer_is_no_stall(tmp_path):
    thread = WatchedThread("in.mkv", stall_seconds=0.2)
    first = thread.submit(lambda: threading.Event().wait(0.1))
    assert thread.wait(first, lambda: 0) is False
    threading.Event().wait(0.4)  # the consumer's own time
    assert thread.wait(thread.submit(lambda: "frame"), lambda: 0) == "frame"
    thread.close()
    assert not thread.stalled


STANDS = """
import threading
from pipeline.watch import WatchedThread
thread = WatchedThread("in.mkv", stall_seconds=2)
frame = thread.submit(lambda: print("begun", flush=True) or threading.Event().wait(1.5))
thread.wait(frame, lambda: 0)
print("frame")
"""


@pytest.mark.parametrize("seconds", [0.0, 1.2])
def test_a_job_that_was_stopped_and_continued_is_no_stall(seconds):
    """Ctrl-Z, and fg an hour later."""
    with subprocess.Popen([sys.executable, "-c", STANDS], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == b"frame\n"


def test_closing_ends_the_thread_and_cancels_what_waits():
    thread = WatchedThread("in.mkv", stall_seconds=5)
    begun, release = threading.Event(), threading.Event()
    running = thread.submit(lambda: begun.set() or release.wait())
    waiting = thread.submit(lambda: "never")
    assert begun.wait(20)
    threading.Timer(0.2, release.set).start()
    thread.close()
    assert running.result(0)
    assert waiting.cancelled()
    assert not thread.stalled


# hardware


def test_hardware_that_is_not_there_leaves_the_processor_to_decode(tmp_path):
    path = make_clip(tmp_path / "in.mp4", n_frames=10, noise=True)
    before, after = frames_of(path), frames_of(path, hwaccel="auto")
    assert [f.pts for f in after] == [f.pts for f in before]
    for one, two in zip(before, after, strict=True):
        assert all((p == q).all() for p, q in zip(one.planes, two.planes, strict=True))
