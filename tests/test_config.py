"""RestoreConfig: what users write in YAML and on the command line, and what they are told."""

from pathlib import Path

import pytest

from pipeline.config import RestoreConfig
from pipeline.errors import ConfigError

PRESETS = sorted(Path("configs/presets").glob("*.yaml"))


def test_there_are_presets():
    assert PRESETS


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_loads(path):
    assert RestoreConfig.load(path).model.model == "tiny"


def test_the_file_preset_is_what_happens_without_one():
    assert RestoreConfig.load(Path("configs/presets/file.yaml")) == RestoreConfig()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", "auto"),
        ("0", None),
        ("256", (256, 256)),
        ("320x192", (320, 192)),
        (512, (512, 512)),
    ],
)
def test_tile_sizes(text, size):
    assert RestoreConfig.load(overrides={"tile.size": text}).tile.size == size


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"tile.size": "8"}, ["tile.size", "16 pixels"]),
        ({"tile.size": "wide"}, ["tile.size", "WxH"]),
        ({"tile.size": "64", "tile.overlap": 64}, ["tile", "overlap of 64"]),
        ({"temporal": 1.1}, ["temporal", "1.1"]),
        ({"tile.static_threshold": -1}, ["tile.static_threshold", "-1"]),
        ({"tile.overlap": -1}, ["tile.overlap", "-1"]),
        ({"model.strength": 1.5}, ["model.strength", "1.5"]),
        ({"model.device": "tpu"}, ["model.device", "tpu"]),
        ({"pool.kind": "threads"}, ["pool.kind", "threads"]),
        ({"start_seconds": 5.0, "end_seconds": 4.0}, ["4 s", "after the start"]),
        ({"colour": "red"}, ["colour", "unknown setting"]),
        ({"encode.colour": 3}, ["encode.colour", "unknown setting"]),
        ({"encode.quality": "best"}, ["encode.quality", "visually-lossless"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(overrides, words):
    with pytest.raises(ConfigError) as caught:
        RestoreConfig.load(overrides=overrides)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "just words", "model: tiny", "model: {model: [}", "tile: {sice: 3}"]
)
def test_a_bad_preset_is_one_line_with_its_name(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        RestoreConfig.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_preset_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        RestoreConfig.load(tmp_path / "none.yaml")


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("model: {strength: 0.3}\ntile: {overlap: 16}\n")
    config = RestoreConfig.load(path, {"model.strength": 0.7, "tile.overlap": None})
    assert (config.model.strength, config.tile.overlap) == (0.7, 16)


def test_the_encoders_threads_can_be_named_where_machines_differ():
    assert RestoreConfig.load(overrides={"encode.threads": 4}).encode.threads == 4


@pytest.mark.parametrize(
    ("text", "overrides", "encode"),
    [
        ("encode: {quality: high}", {"encode.crf": 20.0}, {"crf": 20.0, "quality": None}),
        ("encode: {crf: 20}", {"encode.quality": "high"}, {"crf": None, "quality": "high"}),
        ("encode: {options: {g: 48, bf: 2}}", {"encode.options": {"g": "9"}},
         {"options": {"g": "9", "bf": "2"}}),
    ],
)  # fmt: skip
def test_what_an_option_contradicts_in_the_file_gives_way(tmp_path, text, overrides, encode):
    path = tmp_path / "preset.yaml"
    path.write_text(text)
    found = RestoreConfig.load(path, overrides).encode
    assert {name: getattr(found, name) for name in encode} == encode


def test_an_option_against_another_one_is_an_error():
    with pytest.raises(ConfigError, match="choose one"):
        RestoreConfig.load(None, {"encode.crf": 20.0, "encode.quality": "high"})
