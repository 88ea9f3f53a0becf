"""URLs with any password reach FFmpeg whole and are shown without it."""

import pytest

from pipeline.address import Address
from pipeline.errors import ConfigError

PASSWORD = "p@ss:w/rd#1"


@pytest.mark.parametrize(
    ("text", "secret", "shown"),
    [
        ("rtsp://cam/1", "rtsp://cam/1", "rtsp://cam/1"),
        ("RTSP://cam:8554", "rtsp://cam:8554", "rtsp://cam:8554"),
        ("rtsp://me:pw@cam/1", "rtsp://me:pw@cam/1", "rtsp://***@cam/1"),
        (f"rtsp://me:{PASSWORD}@cam:8554/1", "rtsp://me:p%40ss%3Aw%2Frd%231@cam:8554/1",
         "rtsp://***@cam:8554/1"),
        ("rtsp://me:p%40ss%3Aw%2Frd%231@cam/1", "rtsp://me:p%40ss%3Aw%2Frd%231@cam/1",
         "rtsp://***@cam/1"),
        ("rtsp://me:100%@cam/1", "rtsp://me:100%25@cam/1", "rtsp://***@cam/1"),
        ("rtsp://me:p@ss/w@cam/1", "rtsp://me:p%40ss%2Fw@cam/1", "rtsp://***@cam/1"),
        ("rtsp://cam:554/a@b", "rtsp://cam:554/a@b", "rtsp://***@b"),
        ("rtsp://me:pw@[::1]:8554/1", "rtsp://me:pw@[::1]:8554/1", "rtsp://***@[::1]:8554/1"),
        ("http://cam/live?user=me&password=pw", "http://cam/live?user=me&password=pw",
         "http://cam/live?***"),
        ("rtsp://cam:554/user=me&password=pw&channel=1", "rtsp://cam:554/user=me&password=pw&channel=1",
         "rtsp://cam:554/user=***"),
        ("rtsp://cam/live/token:pw/1", "rtsp://cam/live/token:pw/1", "rtsp://cam/live/token:***"),
        ("rtmp://srv/live/KEY", "rtmp://srv/live/KEY", "rtmp://srv/live/***"),
        ("udp://@239.0.0.1:1234", "udp://@239.0.0.1:1234", "udp://@239.0.0.1:1234"),
        ("/dev/video0", "/dev/video0", "/dev/video0"),
        ("out/", "out/", "out/"),
    ],
)  # fmt: skip
def test_what_ffmpeg_gets_and_what_is_shown(text, secret, shown):
    address = Address.parse(text)
    assert (address.secret, str(address)) == (secret, shown)
    assert "pw" not in repr(address)
    assert PASSWORD not in repr(address)


def test_what_is_no_url_is_an_error_that_does_not_repeat_it():
    with pytest.raises(ConfigError) as caught:
        Address.parse(f"rtsp://me:{PASSWORD}@")
    assert "p@ss" not in str(caught.value)


def test_from_a_variable_or_from_the_file_that_one_names(tmp_path):
    (tmp_path / "url").write_text("rtsp://me:pw@cam/1\n")
    assert Address.from_environment("CAM", {"CAM": "rtsp://cam/1"}).secret == "rtsp://cam/1"
    found = Address.from_environment("CAM", {"CAM_FILE": str(tmp_path / "url")})
    assert found.secret == "rtsp://me:pw@cam/1"
    with pytest.raises(ConfigError, match="CAM_FILE"):
        Address.from_environment("CAM", {})
    with pytest.raises(ConfigError, match="nowhere"):
        Address.from_environment("CAM", {"CAM_FILE": str(tmp_path / "nowhere")})
