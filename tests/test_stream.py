"""restore_stream and its command as a user runs them: camera, server, network, metrics, signals."""

import json
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from commands import command, free_port, get
from prometheus_client.parser import text_string_to_metric_families
from streams import ENCODED, PASSWORD, Camera, RtspServer, Viewer, slow
from typer.testing import CliRunner

from pipeline import RestoreConfig, restore_stream
from pipeline.address import Address
from pipeline.cli_stream import app
from pipeline.config import EncodeConfig, LiveConfig
from pipeline.errors import ConfigError
from pipeline.publish import target_of
from pipeline.publisher import check_settings
from pipeline.serve import serving
from pipeline.stats import StreamStats


class Running:
    """restore_stream in a thread, until it is left."""

    def __init__(self, source, sink, **settings):
        self.stats, self.stop, self.error = StreamStats(), threading.Event(), None
        overrides = {"model.strength": 0, "pool.kind": "local", **settings}
        config = RestoreConfig.load(overrides=overrides)

        def run():
            try:
                restore_stream(source, sink, config, stats=self.stats, stop=self.stop)
            except Exception as error:  # the test asks for it
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.mark.usefixtures("one_thread")
def test_a_camera_is_restored_and_audio_stays_in_step(rtsp_server, tiny_checkpoint):
    settings = {"model.model": tiny_checkpoint, "model.strength": 0.05}
    with (
        Camera(rtsp_server.url("cam"), "96x64", 25, "aac"),
        Running(rtsp_server.url("cam"), rtsp_server.url("out"), **settings) as running,
        Viewer(rtsp_server.url("out")) as viewer,
    ):
        viewer.wait_for(20, 60)
        seen = viewer.wait_for(50)
        heard = viewer.heard[-1]
    assert running.error is None
    assert all(a[1] < b[1] for a, b in pairwise(seen))
    assert abs(heard - seen[-1][1]) < 0.3
    stats = running.stats
    # A busy machine passes most frames through.
    assert stats["frames_restored"] > 0
    assert stats["frames_restored"] + stats["frames_passed"] > 50
    assert stats["audio_sent"] > 60


@pytest.mark.slow
def test_a_model_twice_too_slow_drops_half_and_stays_below_the_bound(rtsp_server, monkeypatch):
    slow(monkeypatch, 0.08)
    with (
        Camera(rtsp_server.url("cam")),
        Running(rtsp_server.url("cam"), rtsp_server.url("out")) as running,
        Viewer(rtsp_server.url("out")) as viewer,
    ):
        viewer.wait_for(80, 40)
    stats = running.stats
    assert stats.quantiles()[0.99] < 0.5 + 0.08
    assert stats["frames_in"] - stats["frames_dropped"] == stats["frames_restored"]
    gone = stats["frames_late"] + stats["frames_unpublished"]
    assert stats["frames_restored"] == stats["frames_sent"] + gone
    assert 0.3 < stats["frames_dropped"] / stats["frames_in"] < 0.7
    assert stats["decisions_drop"] >= 1
    assert stats["frames_passed"] == 0


@pytest.mark.slow
def test_a_model_far_too_slow_gives_way_to_the_smaller_one(rtsp_server, monkeypatch):
    slow(monkeypatch, 0.4)
    settings = {"model.fallback": "tiny"}
    with (
        Camera(rtsp_server.url("cam")),
        Running(rtsp_server.url("cam"), rtsp_server.url("out"), **settings) as running,
        Viewer(rtsp_server.url("out")) as viewer,
    ):
        stats = running.stats
        until = time.monotonic() + 40
        while stats["frames_smaller"] < 40:
            assert time.monotonic() < until, stats.values()
            time.sleep(0.05)
        viewer.wait_for(10)
        inverted = viewer.seen[-1][2]
        seen = viewer.wait_for(10)
    assert stats["decisions_drop"] >= 1
    assert stats["decisions_pass"] == stats["decisions_smaller"] == 1
    assert 0 <= (inverted - seen[-1][2]) % 256 <= 40, "what the smaller one made counts backwards"
    kept = stats["frames_restored"] + stats["frames_passed"] + stats["frames_dropped"]
    assert stats["frames_in"] - kept in (0, 1, 2)


def test_another_size_after_a_reconnect_is_restored_too(rtsp_server, monkeypatch):
    slow(monkeypatch, 0.001)
    with (
        Running(rtsp_server.url("cam"), rtsp_server.url("out")) as running,
        Viewer(rtsp_server.url("out")) as viewer,
    ):
        with Camera(rtsp_server.url("cam"), "160x120"):
            viewer.wait_for(10, 30)
        with Camera(rtsp_server.url("cam"), "96x64"):
            until = time.monotonic() + 20
            while viewer.seen[-1][3] != (96, 64):
                assert time.monotonic() < until
                time.sleep(0.02)
    assert running.error is None


@pytest.mark.slow
def test_the_command_serves_metrics_drains_on_sigterm_and_shows_no_password(tiny_checkpoint):
    port = free_port()
    with RtspServer(0, "me", PASSWORD, "digest") as server:
        url = server.url("cam", f"me:{PASSWORD}@")
        process = command(
            "--source-env", "CAM", "--sink-env", "OUT", "--metrics", f"127.0.0.1:{port}",
            "--model", tiny_checkpoint, "--strength", 0, "--pool", "local", "--log-format", "json",
            CAM=url, OUT=server.url("out", f"me:{PASSWORD}@"),
        )  # fmt: skip
        try:
            pages = [get(port, "/readyz")]
            with Camera(server.url("cam", f"me:{ENCODED}@")) as camera:
                until = time.monotonic() + 60
                while get(port, "/readyz")[0] != 200 or "_published_total 0" in get(
                    port, "/metrics"
                )[1]:  # fmt: skip
                    assert time.monotonic() < until
                    time.sleep(0.1)
                time.sleep(2)
                children = subprocess.run(
                    ["ps", "-e", "-o", "args"], capture_output=True, text=True, check=True
                ).stdout
                pages += [get(port, path) for path in ("/metrics", "/healthz", "/readyz", "/x")]
                camera.kill()
                time.sleep(1)
                pages.append(get(port, "/readyz"))
        finally:
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0, stderr
    assert [status for status, _ in pages[1:]] == [200, 200, 200, 404, 503]
    families = {f.name: f for f in text_string_to_metric_families(pages[1][1])}
    assert families["restore_stream_frames_published"].samples[0].value > 0
    assert {s.labels["quantile"] for s in families["restore_stream_latency_seconds"].samples} == {
        "0.5", "0.95", "0.99",
    }  # fmt: skip
    entries = [json.loads(line) for line in stderr.splitlines()]
    assert any("frames_in" in entry for entry in entries)
    ours = "\n".join(line for line in children.splitlines() if "pipeline." in line)
    everything = "".join([stdout, stderr, ours, *(text for _, text in pages)])
    for secret in (PASSWORD, ENCODED, "p@ss", "rd#1", "w/rd"):
        assert secret not in everything


def test_a_wrong_password_is_code_3_in_one_line_that_masks_it():
    with RtspServer(0, "me", "right") as server:
        url = server.url("cam", f"me:{PASSWORD}@")
        process = command(url, server.url("out"), "-q", "--model", "tiny")
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 3, stderr
    assert len(stderr.strip().splitlines()) == 1
    assert f"rtsp://***@127.0.0.1:{server.port}/cam: user or password is wrong" in stderr
    for secret in (PASSWORD, ENCODED, "p@ss", "rd#1"):
        assert secret not in stdout + stderr


def test_a_source_that_does_not_come_back_in_its_attempts_is_code_7(rtsp_server):
    result = CliRunner().invoke(app, [rtsp_server.url("no"), "out.mkv", "--reconnects", "1", "-q"])
    assert result.exit_code == 7, result.output


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "SOURCE is missing"),
        (["rtsp://cam/1"], "SINK is missing"),
        (["rtsp://cam/1", "out.xyz"], "not a sink"),
        (["--source-env", "NO_SUCH", "out.mkv"], "NO_SUCH_FILE"),
        (["rtsp://cam/1", "out.mkv", "--metrics", "nonsense"], "HOST:PORT"),
        (["rtsp://cam/1", "out.mkv", "more"], "too many"),
        (["rtsp://cam/1", "out.mkv", "--max-latency", "-1"], "max_latency"),
    ],
)
def test_wrong_usage_is_code_2_and_one_line(arguments, word):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert word in lines[-1]
    assert "Traceback" not in result.output


def test_what_live_streams_cannot_do_yet_is_said():
    for name, value in {
        "segment.frames": 9,
        "encode.quality": "high",
        "end_seconds": 3,
        "pool.window": 2,
    }.items():
        with pytest.raises(ConfigError, match=name):
            restore_stream("rtsp://cam/1", "out.mkv", RestoreConfig.load(None, {name: value}))


def test_the_shipped_preset_is_the_default():
    preset = Path(__file__).parents[1] / "configs/presets/live.yaml"
    assert RestoreConfig.load(preset) == RestoreConfig()
    assert set(yaml.safe_load(preset.read_text())["live"]) == set(LiveConfig.model_fields)


def test_metrics_are_served_on_an_ipv6_address_too():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
    with serving("[::1]:0", {"": StreamStats()}) as port:
        assert urllib.request.urlopen(f"http://[::1]:{port}/healthz").read() == b"ok\n"


@pytest.mark.parametrize(
    ("sink", "options", "words"),
    [
        ("rec.mp4", ("--codec", "nope"), "codec 'nope' is unknown"),
        ("rec.mp4", ("--preset", "nope"), "does not open"),
        ("rec.mp4", ("--crf", "60"), "outside 0 to 51"),
        ("rec.mp4", ("--codec", "prores_ks"), "cannot hold prores_ks"),
        ("rtsp://127.0.0.1:1/out", ("--preset", "nope"), "does not open"),
        ("rec.mkv", ("--device", "cuda:7"), "'cuda:7' is not here"),
    ],
)
def test_what_is_wrong_is_said_before_there_is_a_camera(
    tmp_path, monkeypatch, sink, options, words
):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["udp://127.0.0.1:1", sink, *options])
    assert result.exit_code == (5 if "--device" in options else 2), result.output
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ["ffv1", "h264", "libvpx-vp9", "libsvtav1"])
def test_other_encoders_record_too(codec):
    check_settings(target_of(Address.parse("rec.mkv")), EncodeConfig(codec=codec))
