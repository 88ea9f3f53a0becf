"""Files at URLs, most on a real S3 server on this machine: listed, named, fetched."""

import http.server
import json
import re
import threading
import time
from pathlib import Path

import pytest

import pipeline.remote
from pipeline.errors import ConfigError
from pipeline.inputs import list_inputs
from pipeline.remote import place

pytestmark = pytest.mark.timeout(200)


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
