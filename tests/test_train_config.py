"""The settings of a training run: what is wrong with them is named, and the rate and stages."""

from dataclasses import replace
from pathlib import Path

import pytest
from training_data import nano_config, write_config

from mtair.schedule import TrainConfig
from mtair.train import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    return nano_config(tmp_path)


def test_a_config_comes_back_from_yaml(config, tmp_path):
    assert TrainConfig.load(write_config(tmp_path / "t.yaml", config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 0.9}, "momentum"),
        ({"seed": None}, "seed"),
        ({"learning_rate": "fast"}, "learning_rate.*'fast'"),
        ({"stages": [[0.5, 16, 4], [0.4, 16, 4]]}, "stages"),
        ({"mixture": {"noise": 0.5, "haze": 0.4}}, "mixture"),
        ({"mixture": {"noise": 0.5, "snow": 0.5}}, "snow"),
        ({"precision": "fp8"}, "precision"),
        ({"check_steps": 0}, "check_steps"),
        ({"loaders": "many"}, "loaders.*'many'"),
    ],
)
def test_a_wrong_config_is_refused_by_name(config, tmp_path, change, message):
    path = write_config(tmp_path / "t.yaml", config, **change)
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig.load(path)
    assert str(path) in str(caught.value)


def test_an_empty_config_is_refused(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ValueError, match="expected keys and values"):
        TrainConfig.load(path)


def test_a_rate_without_a_point_is_a_number(config, tmp_path):
    """YAML 1.1 takes 1e-3 for text."""
    path = write_config(tmp_path / "t.yaml", config)
    path.write_text(path.read_text().replace("learning_rate: 0.002", "learning_rate: 2e-3"))
    assert "learning_rate: 2e-3" in path.read_text()
    assert TrainConfig.load(path) == config


def test_the_rate_warms_up_and_follows_half_a_cosine(config):
    config = replace(config, steps=104, learning_rate=1.0, final_learning_rate=0.2)
    table = {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 29: 0.8828427, 54: 0.6, 79: 0.3171573, 104: 0.2}
    assert {step: config.rate(step) for step in table} == pytest.approx(table)
    assert config.rate(1000) == pytest.approx(0.2)
    assert replace(config, warmup_steps=0).rate(0) == 1.0


def test_stages_follow_one_another(config):
    table = {0: (16, 4), 19: (16, 4), 20: (24, 2), 31: (24, 2), 32: (32, 1), 39: (32, 1)}
    assert {step: config.stage(step) for step in table} == table
    assert config.stage(40) == (32, 1)


def test_the_config_names_a_model_that_exists(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Trainer(replace(config, model=str(Path("nowhere.yaml"))), tmp_path)
