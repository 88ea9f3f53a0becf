"""Every shipped YAML of the network and of its training is one that the code accepts."""

from pathlib import Path

import pytest
import yaml

from mtair import Dimensions
from mtair.train import TrainConfig

ROOT = Path(__file__).parents[1]


def shipped(folder):
    return sorted((ROOT / "configs" / folder).glob("*.yaml"))


@pytest.mark.parametrize("folder", ["models", "train"])
def test_the_folder_is_not_empty_and_holds_yaml_alone(folder):
    files = sorted((ROOT / "configs" / folder).iterdir())
    assert files
    assert files == shipped(folder)


@pytest.mark.parametrize("path", shipped("models"), ids=lambda p: p.stem)
def test_a_model_config_builds_dimensions(path):
    values = yaml.safe_load(path.read_text())
    given = Dimensions.from_dict(values).to_dict()
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}.items() <= (
        given.items()
    )


@pytest.mark.parametrize("path", shipped("train"), ids=lambda p: p.stem)
def test_a_training_config_loads_and_names_a_model_that_ships(path):
    config = TrainConfig.load(path)
    assert ROOT / config.model in shipped("models")
    assert config.steps > config.warmup_steps
    dims = Dimensions.from_dict(yaml.safe_load((ROOT / config.model).read_text()))
    sides = {patch for _, patch, _ in config.stages}
    assert all(side % (8 * dims.stem) == 0 for side in sides)
