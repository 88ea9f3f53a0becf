"""Encoders: quality levels, options, depth, and what happens where the hardware is missing."""

from itertools import pairwise
from pathlib import Path

import av
import pytest
from media import make_clip
from readback import indices_of, recode

from pipeline.config import RestoreConfig
from pipeline.decode import VideoSource
from pipeline.derived import encode_settings
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.errors import ConfigError
from pipeline.quality import _CQ, _CRF, _PRORES, _QUANTISERS, LEVELS, quality_options
from pipeline.verify import verify

# What is quick enough for a test, with the container that holds it.
QUICK = {
    "libx264": (".mp4", {"preset": "ultrafast"}),
    "libx264rgb": (".mkv", {"preset": "ultrafast"}),
    "libx265": (".mp4", {"preset": "ultrafast"}),
    "libsvtav1": (".mp4", {"preset": "12"}),
    "libvpx-vp9": (".webm", {"cpu-used": "8", "deadline": "realtime"}),
    "libvpx": (".webm", {"cpu-used": "8", "deadline": "realtime"}),
    "prores_ks": (".mov", {}),
    "mpeg4": (".mp4", {}),
    "mjpeg": (".mov", {}),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Half a second of moving noise."""
    path = tmp_path_factory.mktemp("clip") / "in.mp4"
    return make_clip(path, n_frames=12, size=(64, 64), noise=True, color=(1, 1, 1, 1))


@pytest.mark.parametrize("codec", QUICK)
def test_a_lower_level_is_a_smaller_file_with_every_frame(tmp_path, clip, codec):
    suffix, options = QUICK[codec]
    sizes = []
    for level in LEVELS:
        path = tmp_path / f"{level}{suffix}"
        writer = recode(clip, path, EncodeSettings(codec, quality=level, options=options))
        wrong_colours = any("wrong colours" in warning for warning in writer.warnings)
        assert wrong_colours == (codec in ("libvpx", "mjpeg"))
        differences = verify(clip, path).differences
        assert all("matrix" in d or "chroma" in d for d in differences)
        assert bool(differences) == wrong_colours
        sizes.append(path.stat().st_size)
    assert all(a > b for a, b in pairwise(sizes)), sizes


def test_nothing_said_is_visually_lossless(tmp_path, clip):
    for name, quality in [("a", None), ("b", "visually-lossless")]:
        recode(clip, tmp_path / f"{name}.mkv", EncodeSettings("libx264", quality=quality))
    assert (tmp_path / "a.mkv").read_bytes() == (tmp_path / "b.mkv").read_bytes()


def test_the_documents_levels_are_the_levels():
    rows = {}
    text = (Path(__file__).parents[1] / "docs" / "streams.md").read_text()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[1] in ("crf", "cq", "qmin, qmax", "profile"):
            rows |= {name: tuple(cells[2:]) for name in cells[0].split(", ")}
    known = {name: values for name, (values, _) in _CRF.items()} | _CQ | _QUANTISERS
    known |= dict.fromkeys(("prores_ks", "prores_aw", "prores"), _PRORES)
    assert rows == {name: tuple(map(str, values)) for name, values in known.items()}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EncodeSettings("ffv1", quality="small"), "ffv1 is always lossless"),
        (EncodeSettings("jpeg2000", quality="high"), "jpeg2000 has no levels here"),
        (EncodeSettings("prores_ks", crf=20), "prores_ks has none"),
        (EncodeSettings(crf=60), "outside 0 to 51"),
        (EncodeSettings(options={"warp": "1"}), "no option warp"),
        (EncodeSettings(options={"refs": "many"}), "does not open"),
    ],
)
def test_what_an_encoder_does_not_have_is_an_error(tmp_path, clip, settings, words):
    with VideoSource(clip) as source, pytest.raises(ConfigError, match=words):
        VideoWriter(tmp_path / "out.mkv", source.info, settings, copy_from=clip)
    assert not list(tmp_path.iterdir())


def test_an_option_that_sets_a_rate_takes_the_place_of_the_level():
    codec, target = av.Codec("libx264", "w"), av.VideoFormat("yuv420p")
    assert quality_options(codec, target, None, None, {"b": "1M"}) == {}
    assert quality_options(codec, target, None, None, {"tune": "grain"}) == {"crf": "18"}
    assert quality_options(codec, target, None, None, {"profile": "high"}) == {"crf": "18"}
    assert quality_options(codec, target, None, 23, {"tune": "grain"}) == {"crf": "23"}


def test_options_reach_the_encoder_and_those_of_the_container_stay(tmp_path, clip):
    config = RestoreConfig.load(overrides={"encode.options": {"g": "4", "sc_threshold": "0"}})
    with VideoSource(clip) as source:
        options = encode_settings(tmp_path / "out.webm", source.info, config).options
        assert options == {"row-mt": "1", "cpu-used": "2", "g": "4", "sc_threshold": "0"}
        settings = encode_settings(tmp_path / "out.mkv", source.info, config)
    recode(clip, tmp_path / "out.mkv", settings)
    with av.open(str(tmp_path / "out.mkv")) as out:
        keys = [p.is_keyframe for p in out.demux(video=0) if p.size]
    assert [n for n, key in enumerate(keys) if key] == [0, 4, 8]


def test_numbers_in_yaml_are_text_for_ffmpeg(tmp_path):
    (tmp_path / "a.yaml").write_text("encode: {preset: 10, options: {g: 48}}")
    config = RestoreConfig.load(tmp_path / "a.yaml").encode
    assert (config.preset, config.options) == ("10", {"g": "48"})


def test_an_option_that_sets_a_rate_wins_over_a_quality_and_contradicts_a_crf():
    codec, target = av.codec.Codec("libx264", "w"), av.VideoFormat("yuv420p")
    for asked in ({"qp": "0"}, {"b": "100k"}):
        assert quality_options(codec, target, "high", None, asked) == {}
        with pytest.raises(ConfigError, match=rf"crf 20 and {next(iter(asked))}: choose one"):
            quality_options(codec, target, None, 20, asked)
    assert quality_options(codec, target, None, 20, {"qmax": "40"}) == {"crf": "20"}
    vp9 = av.codec.Codec("libvpx-vp9", "w")
    assert quality_options(vp9, target, None, 20, {"b": "2M"})["crf"] == "20"


def test_crf_and_quality_are_one_too_many():
    with pytest.raises(ConfigError, match="choose one"):
        RestoreConfig.load(overrides={"encode.crf": 20, "encode.quality": "high"})


@pytest.mark.parametrize(("asked", "found"), [("h264", "libx264"), ("hevc", "libx265")])
def test_the_name_of_a_codec_is_its_first_encoder(clip, asked, found):
    config = RestoreConfig.load(overrides={"encode.codec": asked})
    with VideoSource(clip) as source:
        assert encode_settings(Path("out.mkv"), source.info, config).codec == found


DEEP = [
    ("libx264", ".mp4", "yuv420p10le"), ("libx265", ".mp4", "yuv420p10le"),
    ("libsvtav1", ".mkv", "yuv420p10le"), (None, ".webm", "yuv420p10le"),
    ("ffv1", ".mkv", "yuv420p10le"), ("prores_ks", ".mov", "yuv422p10le"),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "suffix", "pix_fmt"), DEEP)
def test_ten_bits_stay_ten_bits(tmp_path, codec, suffix, pix_fmt):
    source = make_clip(
        tmp_path / "in.mkv", n_frames=4, pix_fmt="yuv420p10le", codec="ffv1", options={},
        size=(64, 64),
    )  # fmt: skip
    options = QUICK.get(codec, ("", {}))[1]
    settings = EncodeSettings(codec, options=options) if codec else None
    recode(source, tmp_path / f"out{suffix}", settings)
    with VideoSource(tmp_path / f"out{suffix}") as out:
        assert out.info.pixel_format.name == pix_fmt
    assert indices_of(tmp_path / f"out{suffix}") == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", [".mov", ".mp4", ".webm"])
def test_a_codec_that_does_not_fit_the_container_is_said_with_what_does(tmp_path, clip, suffix):
    codec = {".mov": "libvpx-vp9", ".mp4": "prores_ks", ".webm": "libx264"}[suffix]
    with VideoSource(clip) as source, pytest.raises(ConfigError, match=r"cannot hold.*\.mkv"):
        VideoWriter(tmp_path / f"out{suffix}", source.info, EncodeSettings(codec), copy_from=clip)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("codec", ["h264_nvenc", "hevc_nvenc", "av1_nvenc", "h264_qsv"])
def test_hardware_that_is_not_there_is_one_line(tmp_path, clip, codec, capfd):
    if codec not in av.codecs_available:
        pytest.skip(f"{codec} is not compiled into this FFmpeg")
    if Path("/dev/nvidia0").exists() or Path("/dev/dri").exists():
        pytest.skip("this machine may have the hardware")
    with VideoSource(clip) as source, pytest.raises(ConfigError) as caught:
        VideoWriter(tmp_path / "out.mkv", source.info, EncodeSettings(codec), copy_from=clip)
    assert "needs hardware and a driver" in str(caught.value)
    assert "libx264" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())
