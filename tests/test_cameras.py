"""Several cameras on one set of workers: real servers, one of everything dies, the others go on."""

import json
import signal
import threading
import time
from contextlib import contextmanager
from itertools import pairwise

import pytest
import yaml
from commands import command, free_port, get
from prometheus_client.parser import text_string_to_metric_families
from streams import ENCODED, PASSWORD, RtspServer, SlowPool, Viewer, slow
from streams import Camera as CameraProcess
from typer.testing import CliRunner

from pipeline import RestoreConfig, pools
from pipeline.address import Address
from pipeline.cameras import Camera, restore_cameras
from pipeline.cli_stream import app
from pipeline.config import load_cameras
from pipeline.errors import ConfigError, DeviceError, SourceError
from workers import WorkerError


class Cameras:
    """restore_cameras in a thread, until it is left; `ends` are (source, sink) by name."""

    def __init__(self, ends, **settings):
        overrides = {"model.strength": 0, "pool.kind": "local", **settings}
        config = RestoreConfig.load(overrides=overrides)
        self.all = {
            name: Camera(Address.parse(source).named(name), Address.parse(sink).named(name), config)
            for name, (source, sink) in ends.items()
        }
        self.stop, self.failures, self.error = threading.Event(), [], None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        try:
            self.failures = restore_cameras(list(self.all.values()), self.stop)
        except Exception as error:  # the test asks for it
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join(30)
        assert not self.thread.is_alive()
        assert self.error is None

    def __getitem__(self, name):
        return self.all[name].stats

    def wait_for(self, condition, timeout=40):
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until, {n: c.stats.values() for n, c in self.all.items()}
            assert self.error is None
            time.sleep(0.02)


def ends_of(server, *names, sink=None):
    return {name: (server.url(name), (sink or server).url(f"{name}-out")) for name in names}


def test_one_camera_dies_and_the_other_two_do_not_notice(rtsp_server, monkeypatch):
    slow(monkeypatch, 0.003)
    with (
        CameraProcess(rtsp_server.url("a"), "160x120", 12),
        CameraProcess(rtsp_server.url("b"), "96x64", 12),
        CameraProcess(rtsp_server.url("c"), "160x120", 12) as dying,
        Cameras(ends_of(rtsp_server, "a", "b", "c")) as cameras,
        Viewer(rtsp_server.url("a-out")) as a,
        Viewer(rtsp_server.url("b-out")) as b,
        Viewer(rtsp_server.url("c-out")) as c,
    ):
        for viewer in (a, b, c):
            viewer.wait_for(10, 40)
        dying.kill()
        cameras.wait_for(lambda: cameras["c"]["source_disconnects"] >= 2)
        seen = [viewer.wait_for(30) for viewer in (a, b)]
        c.wait_for(10)
        with CameraProcess(rtsp_server.url("c"), "160x120", 12):
            connects = cameras["c"]["source_connects"]
            cameras.wait_for(lambda: cameras["c"]["source_connects"] > connects)
    for frames in seen:
        assert max(after[0] - before[0] for before, after in pairwise(frames)) < 1
    assert {size for _, _, _, size in b.seen} == {(96, 64)}
    # A busy machine may stand still for a moment too.
    assert max(cameras[name]["frames_repeated"] for name in "ab") < 10
    assert cameras["c"]["frames_repeated"] > 20
    assert cameras.failures == []


def test_a_wrong_password_and_a_dead_sink_end_or_hurt_their_own_camera_alone(monkeypatch):
    slow(monkeypatch, 0.003)
    with (
        RtspServer() as server,
        RtspServer(0, "me", "right", "digest") as guarded,
        RtspServer() as sink,
        CameraProcess(server.url("good"), "160x120", 12),
    ):
        ends = {
            **ends_of(server, "good"),
            "locked": (guarded.url("cam", f"me:{PASSWORD}@"), server.url("locked-out")),
            "deaf": (server.url("good"), sink.url("deaf-out")),
        }
        with Cameras(ends) as cameras, Viewer(server.url("good-out")) as viewer:
            cameras.wait_for(lambda: cameras["deaf"]["frames_published"] > 10)
            cameras.wait_for(lambda: cameras["locked"].ended)
            disconnects = cameras["deaf"]["source_disconnects"]
            sink.kill()
            cameras.wait_for(lambda: cameras["deaf"]["sink_disconnects"] >= 2)
            before = time.monotonic()
            viewer.wait_for(24)
            assert time.monotonic() - before < 6
            assert cameras["deaf"]["source_disconnects"] == disconnects
            assert cameras["locked"].stuck() == []
    (failure,) = cameras.failures
    assert type(failure) is SourceError
    assert str(failure).startswith(f"locked (rtsp://***@127.0.0.1:{guarded.port}/cam): ")
    assert "password is wrong" in str(failure)
    assert "rd#1" not in str(failure)


def test_a_burst_of_frames_does_not_take_the_share_of_a_slow_camera(rtsp_server, monkeypatch):
    # 20 batches a second; `calm` asks for 4 of them, `burst` for 2 x 30.
    slow(monkeypatch, 0.05)
    with (
        CameraProcess(rtsp_server.url("burst"), "160x120", 30),
        CameraProcess(rtsp_server.url("calm"), "96x64", 4),
        Cameras(ends_of(rtsp_server, "burst", "calm"), **{"tile.size": "96x120"}) as cameras,
    ):
        cameras.wait_for(lambda: min(cameras[n]["frames_published"] for n in cameras.all) > 8)
        before = cameras["calm"].values(), cameras["burst"].values()
        time.sleep(6)
        calm, burst = (
            {key: now[key] - then.get(key, 0) for key in now}
            for now, then in zip(
                (cameras["calm"].values(), cameras["burst"].values()), before, strict=True
            )
        )
    assert calm["frames_in"] >= 12
    assert calm["frames_restored"] >= 0.8 * calm["frames_in"], "it needs less than its share"
    assert burst["frames_dropped"] > 0.4 * burst["frames_in"]
    assert burst["frames_restored"] > 12, "what is left is its own"


def test_two_cameras_for_which_the_model_is_too_slow_get_the_same(rtsp_server, monkeypatch):
    slow(monkeypatch, 0.05)
    with (
        CameraProcess(rtsp_server.url("a"), "160x120", 25),
        CameraProcess(rtsp_server.url("b"), "160x120", 15),
        Cameras(ends_of(rtsp_server, "a", "b")) as cameras,
    ):
        cameras.wait_for(lambda: min(cameras[n]["frames_published"] for n in "ab") > 8)
        before = {name: cameras[name]["frames_restored"] for name in "ab"}
        time.sleep(6)
        a, b = (cameras[name]["frames_restored"] - before[name] for name in "ab")
        quantiles = [cameras[name].quantiles()[0.95] for name in "ab"]
    assert 0.7 < a / b < 1.4
    assert a + b > 60
    assert max(quantiles) < 0.5 + 2 * 0.05, "beyond the model's own time, for which they take turns"


def test_batches_of_several_cameras_go_to_the_network_together(rtsp_server, monkeypatch):
    sizes = []

    class Counting(SlowPool):
        def submit(self, batch, planes=None, smaller=False):
            sizes.append(len(batch[0]))
            return super().submit(batch)

    @contextmanager
    def open_pool(*_):
        yield Counting(0.1)

    monkeypatch.setattr(pools, "open_pool", open_pool)
    names = ("a", "b", "c")
    with (
        CameraProcess(rtsp_server.url("a"), "160x120", 12),
        Cameras(
            {name: (rtsp_server.url("a"), rtsp_server.url(f"{name}-out")) for name in names},
            **{"tile.batch": 4},
        ) as cameras,
    ):
        cameras.wait_for(lambda: min(cameras[n]["frames_published"] for n in names) > 20)
    assert max(sizes) == 2, "one is with the worker, those of the other two wait"
    assert all(cameras[name]["frames_restored"] > 20 for name in names)


@pytest.fixture
def config_of(tmp_path):
    def write(cameras, **settings):
        path = tmp_path / "cameras.yaml"
        path.write_text(yaml.safe_dump({**settings, "cameras": cameras}))
        return path

    return write


def test_the_settings_of_one_camera_win_over_those_of_all(config_of):
    path = config_of(
        [
            {"name": "gate", "source": "rtsp://a/1", "sink_env": "OUT", "live": {"audio": False}},
            {"name": "yard", "source": "rtsp://a/2", "sink": "y.mkv", "encode": {"crf": 30}},
        ],
        live={"stall_timeout_seconds": 3}, encode={"crf": 20},
    )  # fmt: skip
    (gate, at_gate), (yard, at_yard) = load_cameras(path, {"live.reconnects": 7})
    assert (gate.name, gate.sink_env, yard.sink) == ("gate", "OUT", "y.mkv")
    assert (at_gate.live.audio, at_yard.live.audio) == (False, True)
    assert (at_gate.encode.crf, at_yard.encode.crf) == (20, 30)
    for config in (at_gate, at_yard):
        assert (config.live.stall_timeout_seconds, config.live.reconnects) == (3, 7)


GATE = {"name": "gate", "source": f"rtsp://me:{PASSWORD}@cam/1", "sink": "rtsp://server/gate"}


@pytest.mark.parametrize(
    ("cameras", "word"),
    [
        ([], "at least 1"),
        (f"rtsp://me:{PASSWORD}@cam/1", "valid list"),
        ([GATE["source"]], "cameras.0"),
        ([GATE, GATE], "two cameras have the name gate"),
        ([GATE, {**GATE, "name": "yard"}], "same sink"),
        ([{**GATE, "source_env": "CAM"}], "either source or source_env"),
        ([{**GATE, "source": [GATE["source"]]}], "cameras.0.source"),
        ([{**GATE, "sorce": GATE["source"]}], "sorce: unknown setting"),
        ([{**GATE, GATE["source"]: 1}], "unknown setting"),
        ([{**GATE, "name": "a b"}], "pattern"),
        ([{**GATE, "live": {"transport": "smoke"}}], "camera gate: live.transport"),
        ([{**GATE, "sink": "out.xyz"}], "not a sink"),
        ([{"name": "gate", "source_env": "NO_SUCH", "sink": "out.mkv"}], "NO_SUCH_FILE"),
    ],
)
def test_what_is_wrong_in_the_file_is_one_line_that_shows_no_address(config_of, cameras, word):
    result = CliRunner().invoke(app, ["--config", str(config_of(cameras))])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
    assert len(lines) == 1
    assert word in lines[0]
    assert "rd#1" not in result.output
    assert "p@ss" not in result.output


def test_a_line_that_is_no_yaml_is_not_quoted(tmp_path):
    path = tmp_path / "cameras.yaml"
    path.write_text(f"cameras:\n  - name: gate\n    source: rtsp://me:{PASSWORD}: x@cam/1\n")
    with pytest.raises(ConfigError, match="line 3: mapping values") as caught:
        load_cameras(path)
    assert "rd#1" not in str(caught.value)


def test_ends_beside_a_list_of_cameras_are_an_error(config_of):
    result = CliRunner().invoke(app, ["rtsp://a/1", "b.mkv", "--config", str(config_of([GATE]))])
    assert result.exit_code == 2
    assert "leave out SOURCE and SINK" in result.stderr


@pytest.mark.slow
def test_the_command_runs_them_and_no_password_is_seen_anywhere(config_of, tiny_checkpoint):
    port, monitor = free_port(), free_port()
    with RtspServer(0, "me", PASSWORD, "digest") as server:

        def url(path, login=f"me:{PASSWORD}@"):
            return server.url(path, login)

        path = config_of(
            [
                {"name": "gate", "source": url("gate"), "sink": url("gate-out")},
                {"name": "yard", "source_env": "YARD", "sink_env": "YARD_OUT"},
                {"name": "shut", "source": url("s", f"me:{PASSWORD}x@"), "sink": url("s-out")},
            ],
            model={"model": tiny_checkpoint, "strength": 0}, pool={"kind": "local"},
        )  # fmt: skip
        process = command(
            "--config", path, "--metrics", f"127.0.0.1:{port}", "--monitor", f"127.0.0.1:{monitor}",
            "--log-format", "json", YARD=url("yard"), YARD_OUT=url("yard-out"),
        )  # fmt: skip
        try:
            login = f"me:{ENCODED}@"
            with CameraProcess(server.url("gate", login), "160x120", 10):
                camera = CameraProcess(server.url("yard", login), "160x120", 10)
                until = time.monotonic() + 90
                while len(ups := up(get(port, "/metrics")[1])) < 2:
                    assert time.monotonic() < until
                    assert process.poll() is None
                    time.sleep(0.1)
                paths = ("/metrics", "/healthz", "/readyz")
                pages = [get(port, path) for path in paths]
                pages += [get(monitor, path) for path in ("/", "/cameras", "/cameras/x/pair.jpg")]
                camera.kill()
                until = time.monotonic() + 20
                while "yard source" not in (away := get(port, "/readyz"))[1]:
                    assert time.monotonic() < until
                    time.sleep(0.1)
                pages.append(away)
        finally:
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 3, stderr  # that of `shut`
    assert ups == {"gate", "yard"}
    assert [status for status, _ in pages] == [200, 200, 503, 200, 200, 404, 503]
    assert "shut source" in pages[2][1]
    figures = {camera["name"]: camera for camera in json.loads(pages[4][1])}
    assert figures["shut"]["state"] == "ended"
    # Beside other work a camera may be late just then.
    assert {figures[name]["state"] for name in ("gate", "yard")} <= {"live", "late"}
    entries = [json.loads(line) for line in stderr.splitlines()]
    errors = [entry["message"] for entry in entries if entry["level"] == "error"]
    assert len(errors) == 1
    assert "shut (rtsp://***@" in errors[0]
    assert "password is wrong" in errors[0]
    everything = "".join([stdout, stderr, *(text for _, text in pages)])
    for secret in (PASSWORD, ENCODED, "p@ss", "rd#1", "w/rd"):
        assert secret not in everything


def up(metrics):
    """The cameras that have published something."""
    families = {f.name: f for f in text_string_to_metric_families(metrics)}
    if "restore_stream_frames_published" not in families:
        return set()
    samples = families["restore_stream_frames_published"].samples
    return {sample.labels["camera"] for sample in samples if sample.value > 5}


class FaultyPool(SlowPool):
    """Its next `n_faults` batches fail."""

    n_faults = 0

    def submit(self, batch, planes=None, smaller=False):
        if self.n_faults:
            self.n_faults -= 1
            raise WorkerError("out of memory on cuda:0 with one tile of 768x768")
        return super().submit(batch, planes, smaller)


@pytest.fixture
def pool(monkeypatch):
    pool = FaultyPool(0.003)

    @contextmanager
    def open_pool(*_):
        yield pool

    monkeypatch.setattr(pools, "open_pool", open_pool)
    return pool


def test_a_camera_goes_on_after_a_batch_that_failed(rtsp_server, pool):
    with (
        CameraProcess(rtsp_server.url("a"), "96x64", 8),
        CameraProcess(rtsp_server.url("b"), "96x64", 8),
        Cameras(ends_of(rtsp_server, "a", "b")) as cameras,
    ):
        cameras.wait_for(lambda: min(cameras[n]["frames_published"] for n in "ab") >= 5)
        pool.n_faults = 1
        cameras.wait_for(lambda: not pool.n_faults)
        published = {name: cameras[name]["frames_published"] for name in "ab"}
        cameras.wait_for(
            lambda: min(cameras[n]["frames_published"] - published[n] for n in "ab") >= 20
        )
        assert not any(cameras[name].ended for name in "ab")
    assert cameras.failures == []


def test_cameras_whose_every_batch_fails_end_and_say_so(rtsp_server, pool, monkeypatch):
    monkeypatch.setattr("pipeline.cameras.RESTART_SECONDS", 0.1)
    pool.n_faults = 1_000_000
    with (
        CameraProcess(rtsp_server.url("a"), "96x64", 8),
        Cameras(ends_of(rtsp_server, "a")) as cameras,
    ):
        cameras.thread.join(60)
        assert not cameras.thread.is_alive()
    (failure,) = cameras.failures
    assert isinstance(failure, DeviceError)
    assert "out of memory on cuda:0" in str(failure)
    assert cameras["a"].ended
