"""What is put into a finished Matroska header: there, true to others, and nothing else moved."""

import io
import shutil
import subprocess
import zlib
from fractions import Fraction

import av
import pytest
from media import make_clip
from readback import recode

from pipeline.decode import VideoSource
from pipeline.encoder import EncodeSettings
from pipeline.errors import IntegrityError
from pipeline.matroska import fill_room
from pipeline.verify import verify

ASPECT = {"sample_aspect_ratio": Fraction(16, 15), "n_frames": 5}
FONT = ("font.ttf", "application/x-truetype-font", b"glyphs" * 9)
TRACKS = b"\x16\x54\xae\x6b"


@pytest.mark.parametrize(
    ("codec", "suffix"), [("ffv1", ".mkv"), ("libsvtav1", ".mkv"), ("libvpx-vp9", ".webm")]
)
@pytest.mark.parametrize("size", [(720, 576), (162, 122), (2, 2)])
def test_a_shape_is_exact_where_the_codec_says_nothing_of_it(tmp_path, codec, suffix, size):
    if size == (2, 2) and codec == "libsvtav1":
        pytest.skip("SVT-AV1 takes no picture that small")
    source = make_clip(tmp_path / "in.mp4", size=size, **ASPECT)
    writer = recode(source, tmp_path / f"out{suffix}", EncodeSettings(codec))
    assert not any("aspect" in warning for warning in writer.warnings)
    assert verify(source, tmp_path / f"out{suffix}").differences == []
    with VideoSource(tmp_path / f"out{suffix}") as out:
        assert out.info.sample_aspect_ratio == Fraction(16, 15)


def test_all_else_in_the_header_stays_as_it_was(tmp_path):
    source = make_clip(
        tmp_path / "in.mkv", audio="aac", attachment=FONT, chapters=[(0, 0.1, "one")],
        subtitles=[(0.1, 0.2, "eins")], metadata={"title": "A"}, **ASPECT,
    )  # fmt: skip
    recode(source, tmp_path / "out.mkv", EncodeSettings("ffv1"))
    assert verify(source, tmp_path / "out.mkv").differences == []
    with av.open(str(tmp_path / "out.mkv")) as out:
        assert out.streams.video[0].metadata["title"] == "the video"
    plain = make_clip(tmp_path / "plain.ts", **ASPECT)  # which holds no titles
    recode(plain, tmp_path / "untitled.mkv", EncodeSettings("ffv1"))
    with av.open(str(tmp_path / "untitled.mkv")) as out:
        assert "title" not in out.streams.video[0].metadata


def test_the_checksum_of_the_header_is_right(tmp_path):
    recode(make_clip(tmp_path / "in.mp4", **ASPECT), tmp_path / "out.mkv", EncodeSettings("ffv1"))
    data = (tmp_path / "out.mkv").read_bytes()
    at = data.index(TRACKS, data.index(TRACKS) + 1) + len(TRACKS)  # the first says where it is
    digits = 9 - data[at].bit_length()
    size = int.from_bytes(data[at : at + digits]) & ((1 << 7 * digits) - 1)
    tracks = data[at + digits : at + digits + size]
    assert tracks[:2] == b"\xbf\x84"
    assert zlib.crc32(tracks[6:]).to_bytes(4, "little") == tracks[2:6]


def test_a_file_without_room_is_an_error_and_stays_as_it_is(tmp_path):
    source = make_clip(tmp_path / "in.mkv", **ASPECT)
    with VideoSource(source) as opened:
        file = io.BytesIO(source.read_bytes())
        with pytest.raises(IntegrityError, match="no room"):
            fill_room(file, opened.info)
    assert file.getvalue() == source.read_bytes()


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="Debian's ffmpeg is not installed")
@pytest.mark.parametrize(("codec", "suffix"), [("ffv1", ".mkv"), ("libvpx-vp9", ".webm")])
def test_ffprobe_reads_the_same_shape_and_no_error(tmp_path, codec, suffix):
    source = make_clip(tmp_path / "in.mp4", size=(720, 576), audio="libopus", **ASPECT)
    recode(source, tmp_path / f"out{suffix}", EncodeSettings(codec))
    done = subprocess.run(
        ["ffprobe", "-v", "warning", "-err_detect", "crccheck", "-count_frames", "-of", "csv=p=0",
         "-select_streams", "v", "-show_entries", "stream=sample_aspect_ratio,nb_read_frames",
         str(tmp_path / f"out{suffix}")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("16:15,5", "")
