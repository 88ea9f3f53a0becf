"""Training on a Ray: the processes of a run find each other, and a failure ends all of them."""

from dataclasses import replace

import pytest
import yaml
from training_data import NANO, picture, write

import workers.training
from mtair import checkpoint
from mtair.schedule import TrainConfig
from mtair.train import train
from workers import WorkerError
from workers.training import train_on_ray

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(200),
    pytest.mark.usefixtures("ray_of_two_cpus", "one_thread"),
]


@pytest.fixture
def root(tmp_path):
    for name in ("clean_bsd/train_0.jpg", "clean_bsd/val_0.jpg"):
        write(tmp_path / "data" / name, picture(1))
    for side in ("hazy", "gt"):
        for folder in ("SOTS_outdoor", "SOTS_indoor"):
            write(tmp_path / "data" / folder / side / "0001_0.8_0.2.png", picture(2))
    write(tmp_path / "data/rain1200_sample_sidebyside/1.jpg", picture(3, 48, 128))
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "nano.yaml").write_text(yaml.safe_dump(NANO))
    return TrainConfig(
        model=str(tmp_path / "nano.yaml"), seed=1, steps=50, stages=[(1.0, 16, 3)],
        learning_rate=1e-4, warmup_steps=2, final_learning_rate=1e-5, weight_decay=1e-4,
        clip_norm=0.1, ema_decay=0.9, mixture={"noise": 0.6, "clean": 0.4}, wide_share=0.0,
    )  # fmt: skip


def loss(folder):
    return yaml.safe_load((folder / "log.jsonl").read_text().splitlines()[-1])["loss"]


def test_two_actors_train_as_one_process(root, config, tmp_path):
    path = train_on_ray(config, root, tmp_path / "two", processes=2)
    assert checkpoint.describe(str(path)).record["processes"] == 2
    train(config, root, tmp_path / "one")
    assert loss(tmp_path / "two") == pytest.approx(loss(tmp_path / "one"), rel=1e-3)


def test_a_failure_ends_the_run_with_its_cause(root, config, tmp_path):
    with pytest.raises(WorkerError, match="patches of 999 pixels"):
        train_on_ray(replace(config, stages=[(1.0, 999, 2)]), root, tmp_path / "run", processes=2)


def test_without_a_gpu_the_number_of_processes_must_be_said(root, config, tmp_path):
    with pytest.raises(WorkerError, match="no GPU"):
        train_on_ray(config, root, tmp_path / "run")


def test_processes_that_the_cluster_has_no_room_for_are_an_error(
    root, config, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers.training, "START_SECONDS", 5)
    with pytest.raises(WorkerError, match=r"[123] of 3 processes .* in 5 s: .* of 2 CPU"):
        train_on_ray(config, root, tmp_path / "run", processes=3)
