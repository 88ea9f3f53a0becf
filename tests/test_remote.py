"""restore_batch from and to a real S3 server on this machine: the bytes of a local run."""

import hashlib
import http.server
import json
import logging
import re
import threading
import time
from pathlib import Path

import pytest
from clips import SHORT_GOPS
from media import make_clip

import pipeline.batch
import pipeline.remote
from pipeline import RestoreConfig, restore_file
from pipeline.batch import Cluster, restore_batch
from pipeline.errors import ConfigError, SinkError
from pipeline.in_work import FileInWork
from pipeline.inputs import BatchItem, list_inputs
from pipeline.remote import Remote, place
from pipeline.report import Journal
from workers import Limits

pytestmark = pytest.mark.timeout(200)
on_ray = [pytest.mark.ray, pytest.mark.usefixtures("ray_of_two_cpus", "one_thread")]


@pytest.fixture(scope="module")
def server():
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A client of its own kind, with an empty bucket `videos`, and one `closed`."""
    import boto3
    import requests

    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "one", "AWS_SECRET_ACCESS_KEY": "two",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    _forget_login()
    client = boto3.client("s3")
    for name in ("videos", "closed"):
        client.create_bucket(Bucket=name)
    yield client
    client.close()
    requests.post(f"{server}/moto-api/reset", timeout=10)
    _forget_login()


def _forget_login():
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def a_login_for_videos_alone(s3, server, monkeypatch):
    """Switches to a user who may not see the bucket `closed`."""
    import boto3
    import requests

    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    allowed = {"Effect": "Allow", "Action": "s3:*",
               "Resource": ["arn:aws:s3:::videos*", "arn:aws:s3:::nowhere*"]}  # fmt: skip
    iam.put_user_policy(
        UserName="reader", PolicyName="videos",
        PolicyDocument=json.dumps({"Version": "2012-10-17", "Statement": [allowed]}),
    )  # fmt: skip
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    requests.post(f"{server}/moto-api/reset-auth", data=b"0", timeout=10)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        _forget_login()
        yield
    requests.post(f"{server}/moto-api/reset-auth", data=b"inf", timeout=10)
    iam.close()


@pytest.fixture
def settings(tiny_checkpoint):
    return {
        "model.model": tiny_checkpoint, "model.strength": 0.5, "segment.frames": 10,
        "encode.preset": "ultrafast",
    }  # fmt: skip


@pytest.fixture
def clip(tmp_path):
    return make_clip(tmp_path / "a.mkv", n_frames=40, options=SHORT_GOPS, audio="aac")


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def body(s3, key, bucket="videos"):
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def keys(s3, bucket="videos"):
    found = s3.list_objects_v2(Bucket=bucket).get("Contents", ())
    return [entry["Key"] for entry in found if "/.restore-batch/" not in entry["Key"]]


def batch(inputs, output, settings, work, **more):
    items = list_inputs(inputs if isinstance(inputs, list) else [inputs], output, settings, None)
    return restore_batch(items, output, work=work, **more)


def alone(clip, settings):
    config = RestoreConfig.load(overrides=settings | {"pool.kind": "local"})
    return sha256(restore_file(clip, clip.with_name("alone.mkv"), config).output.read_bytes())


class TestOnRay:
    pytestmark = on_ray

    def test_from_s3_to_s3_the_bytes_are_those_of_a_local_run(
        self, tmp_path, s3, clip, settings, work
    ):
        s3.upload_file(str(clip), "videos", "in/a.mkv")
        other = make_clip(tmp_path / "b.mp4", n_frames=12)
        s3.upload_file(str(other), "videos", "in/tape 1/b.mp4")
        s3.put_object(Bucket="videos", Key="in/notes.txt", Body=b"no video")
        report = batch("s3://videos/in", "s3://videos/out", settings, work)
        assert report.succeeded, report
        assert [str(f.output) for f in report.files if f.n_frames == 40] == [
            "s3://videos/out/a.mkv"
        ]
        assert sha256(body(s3, "out/a.mkv")) == alone(clip, settings)
        assert keys(s3) == [
            "in/a.mkv", "in/notes.txt", "in/tape 1/b.mp4", "out/a.mkv", "out/tape 1/b.mp4",
        ]  # fmt: skip
        assert not list(work.rglob("*.*"))
        assert list(work.iterdir()) == []

    def test_what_is_finished_there_is_skipped_and_what_changed_is_not(
        self, s3, clip, settings, work
    ):
        s3.upload_file(str(clip), "videos", "in/a.mkv")
        s3.upload_file(str(clip), "videos", "in/b.mkv")
        url = "s3://videos/in/*.mkv"

        def run(**more):
            report = batch(url, "s3://videos/out", settings | more, work)
            return {file.source.name: file for file in report.files}

        first = run()
        assert [f.status for f in first.values()] == ["done", "done"]
        assert [f.status for f in run().values()] == ["skipped", "skipped"]
        s3.put_object(Bucket="videos", Key="out/a.mkv", Body=b"something else")
        s3.delete_object(Bucket="videos", Key="out/b.mkv")
        again = run()
        assert again["b.mkv"].status == "done"
        assert again["a.mkv"].exit_code == 2
        assert again["a.mkv"].error == (
            "s3://videos/out/a.mkv: exists already; choose another name or allow overwriting"
        )
        assert body(s3, "out/a.mkv") == b"something else"
        assert run(overwrite=True)["a.mkv"].status == "done"
        s3.put_object(Bucket="videos", Key="in/a.mkv", Body=make_clip(clip).read_bytes())
        changed = run(overwrite=True)
        assert (changed["a.mkv"].status, changed["b.mkv"].status) == ("done", "skipped")
        assert changed["a.mkv"].n_frames == 20

    def test_what_cannot_be_reached_is_one_line_each_and_the_others_are_done(
        self, s3, clip, settings, work, a_login_for_videos_alone
    ):
        place("s3://videos/a.mkv").store(clip)
        inputs = [
            "s3://videos/a.mkv", "s3://videos/none.mkv", "s3://nowhere/x.mkv", "s3://closed/y.mkv",
            "s3://nowhere/*.mp4", "s3://closed/folder/",
        ]  # fmt: skip
        report = batch(inputs, "s3://videos/out/", settings, work)
        found = {str(file.source): file for file in report.files}
        assert found.pop("s3://videos/a.mkv").status == "done"
        assert {(file.status, file.exit_code) for file in found.values()} == {("failed", 3)}
        missing, denied = "cannot be read (no such file", "cannot be read (access denied"
        for source, cause in {
            "s3://videos/none.mkv": missing, "s3://nowhere/x.mkv": missing,
            "s3://nowhere/*.mp4": missing, "s3://closed/y.mkv": denied,
            "s3://closed/folder/": denied,
        }.items():  # fmt: skip
            assert found[source].error.startswith(f"{source}: {cause}")
            assert "\n" not in found[source].error

    def test_an_output_that_cannot_be_written_fails_before_any_work(
        self, s3, clip, settings, work, a_login_for_videos_alone
    ):
        for bucket, cause in {"closed": "access denied", "nowhere": "no such file"}.items():
            with pytest.raises(SinkError, match=rf"^s3://{bucket}/out: .*{cause}"):
                batch(clip, f"s3://{bucket}/out", settings, work)

    def test_an_upload_that_broke_off_is_made_up_for_without_restoring_anew(
        self, s3, clip, settings, work, monkeypatch
    ):
        s3.upload_file(str(clip), "videos", "a.mkv")

        def broken(self, path):
            raise OSError(5, "Connection was closed")

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "store", broken)
            (file,) = batch("s3://videos/a.mkv", "s3://videos/out", settings, work).files
        assert file.exit_code == 4
        assert file.error.startswith(
            "s3://videos/out/a.mkv: cannot be written (Connection was closed)"
        )
        assert "finished segments are kept" in file.error
        assert keys(s3) == ["a.mkv"]
        assert not list(work.rglob("source*"))

        class NoWork(pipeline.batch.PartJob):
            def __call__(self, part):
                raise AssertionError("restored again")

        monkeypatch.setattr(pipeline.batch, "PartJob", NoWork)
        report = batch("s3://videos/a.mkv", "s3://videos/out", settings, work)
        assert report.succeeded, report
        assert sha256(body(s3, "out/a.mkv")) == alone(clip, settings)

    def test_a_run_killed_right_after_an_upload_does_not_stand_in_its_own_way(
        self, s3, clip, settings, work, monkeypatch
    ):
        honest = Remote.store

        def killed(self, path):
            honest(self, path)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Remote, "store", killed)
            with pytest.raises(KeyboardInterrupt):
                batch(clip, "s3://videos/out", settings, work)
        assert keys(s3) == ["out/a.mkv"]
        assert batch(clip, "s3://videos/out", settings, work).succeeded
        (file,) = batch(clip, "s3://videos/out", settings, work).files
        assert file.status == "skipped"

    def test_only_the_files_in_work_are_on_the_disk(self, tmp_path, s3, settings, work):
        tiny = make_clip(tmp_path / "t.mkv", n_frames=2)
        for number in range(40):
            s3.upload_file(str(tiny), "videos", f"in/{number:02}.mkv")
        most = []

        def count(now):
            most.append(len(list(work.rglob("source*"))))

        report = batch("s3://videos/in/", tmp_path / "out", settings, work, on_progress=count)
        assert report.succeeded
        assert len(list((tmp_path / "out").glob("*.mkv"))) == 40
        # Fetched, read ahead, with two workers, waiting to be joined.
        assert max(most) <= 3 + 4 + 2 * 2 + 8
        assert list(work.iterdir()) == []

    def test_a_damaged_file_is_named_by_its_url(self, s3, settings, work):
        s3.put_object(Bucket="videos", Key="bad.mkv", Body=b"this is no video")
        (file,) = batch("s3://videos/bad.mkv", "s3://videos/out", settings, work).files
        assert file.exit_code == 3
        assert file.error.startswith("s3://videos/bad.mkv: ")
        assert str(work) not in file.error

    def test_workers_that_fail_name_the_url_too(self, s3, clip, settings, work, monkeypatch):
        s3.upload_file(str(clip), "videos", "a.mkv")
        monkeypatch.setattr("workers.schedule.Limits", lambda: Limits(no_worker_seconds=1))
        report = batch(
            "s3://videos/a.mkv", "s3://videos/out", settings, work,
            cluster=Cluster(gpus_per_worker=1, n_workers=1),
        )  # fmt: skip
        assert "no worker fits" in report.files[0].error
        assert not list(work.rglob("*.*"))

    def test_the_command_takes_urls_and_leaves_its_report_there(self, s3, clip, settings, work):
        from typer.testing import CliRunner

        from pipeline.batch_cli import app

        s3.upload_file(str(clip), "videos", "in/a.mkv")
        s3.put_object(
            Bucket="videos", Key="in/list.csv",
            Body=b"source,output,segment.frames\na.mkv,b.mkv,10\n",
        )  # fmt: skip
        result = CliRunner().invoke(
            app,
            ["s3://videos/in/list.csv", "-o", "s3://videos/out", "--work-dir", str(work),
             "--model", settings["model.model"], "--strength", "0.5", "--preset", "ultrafast"],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert sha256(body(s3, "out/b.mkv")) == alone(clip, settings)
        report = json.loads(body(s3, "out/restore-batch.json"))
        assert report["files"][0]["source"] == "s3://videos/in/a.mkv"


# URLs


def test_globs_and_folders_at_a_url(s3):
    for key in ("in/b.mkv", "in/a.avi", "in/sub/c.MP4", "in/.hidden/d.mp4", "in/take [1].mkv"):
        s3.put_object(Bucket="videos", Key=key, Body=b"x")

    def listed(*inputs):
        return [
            (str(item.source).removeprefix("s3://videos/in/"), str(item.output))
            for item in list_inputs(inputs, "out", {}, None)
        ]

    folder = [
        ("a.avi", "out/a.mkv"), ("b.mkv", "out/b.mkv"), ("sub/c.MP4", "out/sub/c.MP4"),
        ("take [1].mkv", "out/take [1].mkv"),
    ]  # fmt: skip
    assert listed("s3://videos/in") == listed("s3://videos/in/") == folder
    assert listed("s3://videos/in/*.mkv") == [folder[1], folder[3]]
    assert listed("s3://videos/in/**/*.MP4") == [("sub/c.MP4", "out/c.MP4")]
    assert listed("s3://videos/in/take [1].mkv") == [folder[3]]
    assert listed("s3://videos/in/b.mkv", "s3://videos/in/b.mkv") == [folder[1]]


def test_a_key_cannot_lead_out_of_the_output_folder(s3, tmp_path):
    for key in ("in/../../up.mkv", "in//etc/slash.mkv", "in/b.mkv"):
        s3.put_object(Bucket="videos", Key=key, Body=b"x")
    items = list_inputs(["s3://videos/in/"], tmp_path / "out", {}, None)
    assert {"b.mkv"} <= {item.output.name for item in items}
    assert all(tmp_path / "out" in item.output.resolve().parents for item in items)


def test_a_manifest_names_urls(tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text("source,output\ns3://videos/a.avi,\nb.mkv,s3://other/x/c.mkv\n")
    first, second = list_inputs([manifest], "s3://videos/out", {}, None)
    assert (str(first.source), str(first.output)) == (
        "s3://videos/a.avi", "s3://videos/out/a.mkv",
    )  # fmt: skip
    assert (second.source, str(second.output)) == (tmp_path / "b.mkv", "s3://other/x/c.mkv")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nowhere://x/a.mkv", r"nowhere://x/a\.mkv: nothing here opens nowhere://"),
        ("s3://KEY:SECRET@videos/a.mkv", r"s3://\*\*\*@videos/a\.mkv: no bucket's name"),
    ],
)
def test_a_url_that_nothing_opens_is_a_config_error(url, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        place(url)
    assert "SECRET" not in str(error.value)


def test_secrets_in_a_url_are_never_shown(tmp_path):
    url = "http://user:secret@127.0.0.1:1/in/a.mkv?X-Amz-Signature=secret"
    remote = place(url)
    assert str(remote) == "http://***@127.0.0.1:1/in/a.mkv?***"
    assert (remote.name, remote.suffix) == ("a.mkv", ".mkv")
    with pytest.raises(OSError, match="Connect") as error:
        remote.fetch(tmp_path / "a.mkv")
    assert not re.search("secret", f"{remote!r} {error.value}")


def test_a_report_holds_no_secrets(tmp_path):
    from pipeline.report import BatchReport, FileReport

    url = place("http://user:secret@127.0.0.1:1/a.mkv?key=secret")
    BatchReport((FileReport(url, url, "done"),), 1.0).write(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    assert "secret" not in text
    assert json.loads(text)["files"][0]["source"] == "http://***@127.0.0.1:1/a.mkv?***"


def test_a_file_url_is_a_path(tmp_path):
    assert place(f"file://{tmp_path}/a.mkv") == tmp_path / "a.mkv"
    assert place("in/a.mkv") == Path("in/a.mkv")


def test_a_second_run_of_the_same_command_leaves_the_first_ones_file_alone(tmp_path):
    """As where the night's job is not done when the next one begins."""
    import fsspec

    clip = make_clip(tmp_path / "a.mkv", n_frames=3)
    with fsspec.open("memory://in/a.mkv", "wb") as file:
        file.write(clip.read_bytes())
    item = BatchItem(place("memory://in/a.mkv"), tmp_path / "out.mkv", RestoreConfig())
    first, second = (FileInWork(item, tmp_path / "work", threading.Event()) for _ in range(2))
    journal = Journal(tmp_path)
    first.open("cpu", 1, "sha", 16, journal)
    fetched = list((tmp_path / "work").rglob("source*"))
    with pytest.raises(SinkError, match=r"out\.mkv: another job has it in work") as error:
        second.open("cpu", 1, "sha", 16, journal)
    second.fail(error.value)
    assert list((tmp_path / "work").rglob("source*")) == fetched != []
    first.fail(error.value)
    journal.close()
    assert list((tmp_path / "work").iterdir()) == []


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends 5 bytes, one each 0.4 s; nothing at all for /dead."""

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        for _ in range(5):
            time.sleep(4 if "dead" in self.path else 0.4)
            self.wfile.write(b"x")

    def log_message(self, *_):
        pass


@pytest.fixture
def slow_web():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_may_take_longer_than_any_request_and_not_stand_still(
    tmp_path, slow_web, monkeypatch
):
    import aiohttp.client

    monkeypatch.setattr(aiohttp.client, "DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=1))
    monkeypatch.setattr(pipeline.remote, "SILENCE_SECONDS", 1.5)
    assert place(f"{slow_web}/a.mkv").fetch(tmp_path / "a.mkv")[0] == 5
    assert (tmp_path / "a.mkv").read_bytes() == b"xxxxx"
    with pytest.raises(OSError, match="imeout"):
        place(f"{slow_web}/dead.mkv").fetch(tmp_path / "b.mkv")


def test_an_interrupted_job_does_not_wait_for_a_download(tmp_path, slow_web):
    stop = threading.Event()
    threading.Timer(0.6, stop.set).start()
    began = time.monotonic()
    with pytest.raises(OSError, match="interrupted"):
        place(f"{slow_web}/a.mkv").fetch(tmp_path / "a.mkv", stop)
    assert time.monotonic() - began < 1.9
    assert list(tmp_path.iterdir()) == []


def test_a_fetch_that_breaks_off_leaves_nothing(tmp_path, s3, monkeypatch):
    import s3fs

    s3.put_object(Bucket="videos", Key="a.mkv", Body=b"x" * 1000)

    def broken(self, there, here, **more):
        Path(here).write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", broken)
    with pytest.raises(OSError, match="No space left"):
        place("s3://videos/a.mkv").fetch(tmp_path / "a.mkv")
    assert list(tmp_path.iterdir()) == []
