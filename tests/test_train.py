"""Training: the data, the schedule, and a run that is the same run after an interruption."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from mtair import checkpoint, state
from mtair.data import TrainingData, batches, make_batch, make_pair, white_board
from mtair.progress import held_out_psnr
from mtair.schedule import MIXTURE, TrainConfig
from mtair.train import Trainer, train

NANO = {
    "widths": [4, 4, 8, 8], "depths": [1, 0, 0, 1], "refinement": 0, "heads": [1, 1, 2, 2],
    "ffn_expansion": 1.0, "prompt_dims": [2, 2, 2, 2], "prompt_sizes": [2, 2, 2, 2], "d_state": 2,
    "expand": 1.0, "stem": 2, "wide_dec1": False,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def picture(seed, h=48, w=64):
    """A smooth random picture, uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (5, 7, 3)).astype(np.uint8)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


def write(path, rgb):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.ascontiguousarray(rgb[..., ::-1]))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The layout that docs/training.md has. Hazy and rainy are half as bright as clean."""
    root = tmp_path_factory.mktemp("train")
    for i in range(3):
        write(root / f"clean_bsd/train_{i}.jpg", picture(i))
        write(root / f"clean_bsd/val_{i}.jpg", picture(10 + i))
    write(root / "clean_imagenet_sample/n01.jpg", picture(20, 72, 96))
    (root / "clean_imagenet_sample/n01.jpg").rename(root / "clean_imagenet_sample/n01.JPEG")
    for number, folder in enumerate(("SOTS_outdoor", "SOTS_indoor")):
        write(root / folder / "gt/0001.png", picture(30 + number))
        write(root / folder / "hazy/0001_0.8_0.2.png", picture(30 + number) // 2)
    write(root / "SOTS_indoor/gt/0007.png", picture(33))
    write(root / "SOTS_indoor/hazy/0007.png", picture(33) // 2)
    write(root / "h264/degraded/a.png", picture(34) // 2)
    write(root / "h264/clean/a.png", picture(34))
    side = np.concatenate([picture(40) // 2, picture(40)], axis=1)
    write(root / "rain1200_sample_sidebyside/1.jpg", side)
    return root


@pytest.fixture(scope="module")
def data(root):
    return TrainingData(root)


@pytest.fixture
def config(tmp_path):
    model = tmp_path / "nano.yaml"
    model.write_text(yaml.safe_dump(NANO))
    return TrainConfig(
        model=str(model), seed=4, steps=40, stages=[(0.5, 16, 4), (0.3, 24, 2), (0.2, 32, 1)],
        learning_rate=2e-3, warmup_steps=4, final_learning_rate=1e-5, weight_decay=1e-4,
        clip_norm=0.1, ema_decay=0.9,
        mixture={"noise": 0.4, "rain": 0.3, "haze": 0.2, "clean": 0.1}, wide_share=0.0,
    )  # fmt: skip


# Configuration


def write_config(path, config, **change):
    values = {f: getattr(config, f) for f in config.__dataclass_fields__}
    values["stages"] = [list(stage) for stage in config.stages]
    values |= change
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


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


# Data


def test_the_held_out_images_are_not_trained_on(data):
    assert [len(x) for x in (data.held_out, data.clean, data.haze, data.rain)] == [3, 4, 3, 1]
    for held in data.held_out:
        assert all(held.shape != x.shape or (held != x).any() for x in data.clean)


def test_only_what_is_held_out_is_left_untrained(root, tmp_path):
    more = shutil.copytree(root, tmp_path / "more")
    for number in range(3, 15):
        write(more / f"clean_bsd/val_{number:02}.jpg", picture(50 + number))
    data = TrainingData(more)
    assert (len(data.held_out), len(data.clean)) == (12, 4 + 3)


def test_jpeg_sourced_images_are_reduced(data):
    assert data.clean[-1].shape == (48, 64, 3)


def test_pairs_are_degraded_first(data):
    for degraded, clean in data.haze:
        np.testing.assert_array_equal(degraded, clean // 2)
    (degraded, clean) = data.rain[0]
    assert degraded.shape == clean.shape == (48, 64, 3)
    assert clean.mean() == pytest.approx(2 * degraded.mean(), rel=0.05)


def test_both_images_of_a_pair_get_the_same_window(data):
    """Real haze pairs are half as bright, to the level; made ones are brighter than that."""
    found = 0
    for seed in range(80):
        degraded, clean = make_pair(data, "haze", 16, np.random.default_rng(seed))
        half = np.floor(clean * np.float32(255) / 2 + 1e-3) / 255
        found += bool(np.abs(degraded - half).max() < 1e-5)
    assert 8 <= found <= 60


@pytest.mark.parametrize("kind", ["rain", "haze", "clean"])
def test_rain_falls_down_and_the_sky_is_above(data, kind):
    """In the pairs and the scenes with a depth; what is degraded after the turn may be turned."""
    below = np.tile(np.arange(48, dtype=np.uint8)[:, None, None] * 5, (1, 64, 3))
    depth = np.ones(below.shape[:2], np.float32)
    upright = copy(data)
    upright.rain = upright.haze = [(below, below)]
    upright.scenes = [(below, depth)]
    upright.clean = [np.full_like(below, 128)]
    found = 0
    for seed in range(60):
        _, clean = make_pair(upright, kind, 16, np.random.default_rng(seed))
        across, down = (float(np.ptp(clean, axis=axis).max()) for axis in (1, 0))
        if max(across, down) > 0.1 and min(across, down) == 0:  # neither grey nor a white board
            assert across == 0, seed
            assert (np.diff(clean[:, 0, 0]) > 0).all(), seed
            found += 1
    assert found > 4


def test_every_degradation_comes_on_small_and_on_wide_patches(data, config):
    """A size that told the degradation would be learnt: faint noise then stays on whole pictures,
    which are large, as it did where only rain and haze had the wider patches."""
    config = replace(config, wide_share=0.5, mixture={"clean": 0.5, "noise": 0.5})
    seen = {(16, True): 0, (16, False): 0, (32, True): 0, (32, False): 0}
    for step in range(20):
        degraded, clean = make_batch(data, config, step)
        assert degraded.shape in ((1, 3, 32, 32), (4, 3, 16, 16)), step
        for one, other in zip(degraded, clean, strict=True):
            seen[one.shape[-1], not torch.equal(one, other)] += 1
    assert min(seen.values()) > 0, seen


def test_white_boards_are_among_the_pictures(data):
    """Mostly near white, which no photo here is: what is pale all over is not behind haze."""
    pairs = [make_pair(data, "noise", 32, np.random.default_rng(seed)) for seed in range(200)]
    boards = [(noisy, clean) for noisy, clean in pairs if (clean.min(axis=2) > 0.6).mean() > 0.3]
    assert 4 <= len(boards) <= 24
    assert all(not np.array_equal(noisy, clean) for noisy, clean in boards)


def test_a_white_board_has_writing_and_the_picture_on_it():
    picture = np.full((64, 64, 3), (0.0, 1.0, 0.0), np.float32)
    boards = [white_board(picture, np.random.default_rng(seed)) for seed in range(60)]
    assert all(
        board.dtype == np.float32 and 0 <= board.min() <= board.max() <= 1 for board in boards
    )
    white = [(board.min(axis=2) > 0.6).mean() for board in boards]
    assert np.median(white) > 0.5, white
    assert sum(board.min() < 0.4 for board in boards) > 30
    green = [(board[..., 1] - board[..., [0, 2]].max(axis=2)).max() > 0.6 for board in boards]
    assert 5 < sum(green) < 55
    np.testing.assert_array_equal(picture, np.full((64, 64, 3), (0.0, 1.0, 0.0), np.float32))


@pytest.mark.parametrize("kind", MIXTURE)
def test_every_kind_gives_a_pair_of_images(data, kind):
    for seed in range(10):
        degraded, clean = make_pair(data, kind, 16, np.random.default_rng(seed))
        for side in (degraded, clean):
            assert (side.shape, side.dtype) == ((16, 16, 3), np.float32)
            assert 0 <= side.min() <= side.max() <= 1
        assert kind != "clean" or np.array_equal(degraded, clean)
        assert kind != "noise" or 3 < np.std(degraded - clean) * 255 < 60


def test_a_batch_is_a_function_of_seed_and_step(data, config):
    first, again = make_batch(data, config, 7), make_batch(data, config, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (make_batch(data, config, 8), make_batch(data, replace(config, seed=5), 7)):
        assert not torch.equal(first[1], other[1])
    assert [x.shape for x in make_batch(data, config, 25)] == [(2, 3, 24, 24)] * 2


def test_loaders_change_the_pace_and_not_the_batches(data, config):
    config = replace(config, steps=9)
    one, three = (list(batches(data, replace(config, loaders=n), 2)) for n in (1, 3))
    assert len(one) == len(three) == 7
    for step, (a, b) in enumerate(zip(one, three, strict=True)):
        want = make_batch(data, config, 2 + step)
        assert all(torch.equal(x, y) for x, y in zip(a, want, strict=True))
        assert all(torch.equal(x, y) for x, y in zip(b, want, strict=True))


def test_what_the_data_cannot_give_is_refused_before_training(root, config, tmp_path):
    large = replace(config, stages=[(1.0, 32, 1)], wide_share=0.5)
    with pytest.raises(ValueError, match=r"patches of 64 pixels .* smallest image, of 48"):
        train(large, root, tmp_path)
    data = TrainingData(root)
    data.h264.clear()
    with pytest.raises(ValueError, match="h264 pairs"):
        data.check(replace(config, mixture={"h264": 1.0}))


def test_a_mixture_of_one_kind_is_of_that_kind(data, config):
    degraded, clean = make_batch(data, replace(config, mixture={"clean": 1.0}), 0)
    assert torch.equal(degraded, clean)


@pytest.mark.parametrize("missing", ["val", "train", "rain"])
def test_a_folder_without_images_is_refused_before_training(root, tmp_path, missing):
    for path in (p for p in root.rglob("*.*") if p.is_file()):
        kind = path.name.split("_")[0] if path.parent.name == "clean_bsd" else path.parent.name
        if missing not in kind and not (missing == "train" and "imagenet" in kind):
            target = tmp_path / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        TrainingData(tmp_path)


# Runs


def interrupt_after(monkeypatch, steps):
    whole = Trainer.train_step

    def train_step(self, degraded, clean):
        if self.step == steps:
            raise KeyboardInterrupt
        return whole(self, degraded, clean)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def states(folder):
    return state.load(folder)


def test_an_interrupted_run_ends_as_an_unbroken_one(root, config, tmp_path, monkeypatch):
    config = replace(config, steps=12)
    whole = train(config, root, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(config, root, tmp_path / "broken", save_seconds=0)
    assert states(tmp_path / "broken")["step"] == 7
    broken = train(config, root, tmp_path / "broken")
    for part in ("model", "average"):
        want, got = states(tmp_path / "whole")[part], states(tmp_path / "broken")[part]
        assert [k for k in want if not torch.equal(want[k], got[k])] == []
    first, second = checkpoint.describe(str(whole)), checkpoint.describe(str(broken))
    assert first.sha256 == second.sha256
    assert second.record["steps_done"] == 12
    assert second.record["config"]["mixture"] == config.mixture


def test_a_state_of_one_file_is_still_read(data, config, tmp_path):
    """As runs wrote it before there were pieces."""
    trainer = Trainer(config, tmp_path)
    trainer.train_step(*make_batch(data, config, 0))
    keys = ("step", "seconds", "model", "average", "optimiser")
    trainer.save()
    values = {key: states(tmp_path)[key] for key in keys}
    (tmp_path / "state.json").unlink()
    torch.save(values, tmp_path / "state.pt")
    again = Trainer(config, tmp_path)
    again.resume()
    for one in (trainer, again):
        one.train_step(*make_batch(data, config, 1))
    assert again.step == 2
    want, got = trainer.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)
    again.save()
    assert not (tmp_path / "state.pt").exists()
    assert states(tmp_path)["step"] == 2


def test_a_finished_run_is_not_trained_further(root, config, tmp_path):
    config = replace(config, steps=3)
    path = train(config, root, tmp_path / "run")
    before = checkpoint.describe(str(path)).sha256
    assert checkpoint.describe(str(train(config, root, tmp_path / "run"))).sha256 == before


def test_a_run_begins_with_other_weights_and_says_so_also_when_resumed(root, config, tmp_path):
    first = train(replace(config, steps=4), root, tmp_path / "first")
    earlier = checkpoint.describe(str(first))
    trainer = Trainer(config, tmp_path)
    trainer.start_from(str(first))
    trained = checkpoint.load_model(str(first)).state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in trainer.model.state_dict().items())
    second = train(replace(config, steps=6), root, tmp_path / "second", init=str(first))
    train(replace(config, steps=8), root, tmp_path / "second")
    assert checkpoint.describe(str(second)).record["started_from"]["sha256"] == earlier.sha256
    assert earlier.record["started_from"] is None


def test_a_folder_with_the_run_of_another_network_is_refused(root, config, tmp_path):
    train(replace(config, steps=1), root, tmp_path / "run")
    other = yaml.safe_load(Path(config.model).read_text()) | {"refinement": 3}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    config = replace(config, model=str(tmp_path / "other.yaml"), steps=2)
    with pytest.raises(
        state.StateError, match="run: the run there is of another network"
    ) as caught:
        train(config, root, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_folder_with_another_run_is_refused(root, config, tmp_path):
    """Else its weights would say that they are of this one."""
    path = train(replace(config, steps=2), root, tmp_path / "run")
    before = path.read_bytes()
    other = replace(config, steps=4, seed=9, mixture={"rain": 1.0})
    with pytest.raises(state.StateError, match=r"run: .* another mixture and seed; start one in"):
        train(other, root, tmp_path / "run")
    assert path.read_bytes() == before


def test_a_run_is_resumed_without_the_weights_it_began_with(root, config, tmp_path):
    first = train(replace(config, steps=2), root, tmp_path / "first")
    train(replace(config, steps=2), root, tmp_path / "second", init=str(first))
    first.unlink()
    path = train(replace(config, steps=4), root, tmp_path / "second", init=str(first))
    assert checkpoint.describe(str(path)).record["steps_done"] == 4


def test_the_log_of_a_resumed_run_has_each_step_once(root, config, tmp_path):
    """What came after the last saved state is trained, and written, again."""
    config = replace(config, steps=100, stages=[(1.0, 16, 1)], check_steps=25)
    train(replace(config, steps=50), root, tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 75, "held_out_psnr_25": 1.0}\n{"step": 100, "loss": 1.0}\n{"st')
    train(config, root, tmp_path)
    after = (tmp_path / "log.jsonl").read_text()
    assert after.startswith(before)
    assert [json.loads(line)["step"] for line in after.splitlines()] == [25, 50, 75, 100]
    assert "1.0}" not in after


def test_hours_are_those_of_all_runs():
    info = checkpoint.describe("tiny")
    record = {"hours": 0.5, "started_from": {"sha256": "0", "hours": 1.25}}
    assert replace(info, record=record).hours == 1.75
    assert replace(info, record={}).hours == 0


def test_progress_is_logged(root, config, tmp_path):
    config = replace(config, steps=50, stages=[(1.0, 16, 1)], check_steps=25)
    train(config, root, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [
        {"step", "held_out_psnr_25"},
        {"step", "loss", "rate", "seconds", "held_out_psnr_25"},
    ]
    assert lines[1]["step"] == 50
    assert 0 < lines[1]["loss"] < 1
    assert 5 < lines[1]["held_out_psnr_25"] < 60
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["0000025.png", "0000050.png"]
    first, second = (cv2.imread(str(path)) for path in pictures)
    assert first.shape == (len(config.mixture) * 16, 3 * 16, 3)  # degraded, restored, clean
    for column in (slice(0, 16), slice(32, 48)):
        np.testing.assert_array_equal(first[:, column], second[:, column])


def test_the_loss_falls(data, config, tmp_path):
    config = replace(config, steps=400, mixture={"blind_noise": 1.0}, clip_norm=1.0)
    trainer = Trainer(config, tmp_path)
    batch = make_batch(data, config, 0)
    losses = [trainer.train_step(*batch) for _ in range(80)]
    assert np.mean(losses[-3:]) < 0.8 * losses[0]


def test_the_average_follows_the_weights(data, config, tmp_path):
    trainer = Trainer(config, tmp_path)
    start = trainer.model.output.weight.detach().clone()
    trainer.train_step(*make_batch(data, config, 0))
    # decay = min(0.9, (1 + 1) / (10 + 1)) after the first step
    want = torch.lerp(start, trainer.model.output.weight, 1 - 2 / 11)
    torch.testing.assert_close(trainer.average.output.weight, want)
    assert not torch.equal(start, trainer.model.output.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights(data, config, tmp_path, value):
    trainer = Trainer(config, tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    degraded, clean = make_batch(data, config, 0)
    clean[0, 0, 0, 0] = value
    with pytest.raises(FloatingPointError, match=f"loss is {value} at step 0"):
        trainer.train_step(degraded, clean)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_a_gradient_that_is_no_number_stops_before_the_weights(data, config, tmp_path):
    trainer = Trainer(config, tmp_path)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.model.output.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="gradient is nan at step 0"):
        trainer.train_step(*make_batch(data, config, 0))
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_held_out_psnr_is_that_of_the_noise_where_nothing_is_restored(data, config, tmp_path):
    trainer = Trainer(config, tmp_path)
    with torch.no_grad():
        trainer.average.output.weight.zero_()
    psnr = held_out_psnr(trainer.average, data)
    assert psnr == pytest.approx(20 * np.log10(255 / 25), abs=0.7)


def test_the_config_names_a_model_that_exists(config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        Trainer(replace(config, model=str(Path("nowhere.yaml"))), tmp_path)


# Loss and precision


def test_the_spectra_count_as_much_as_they_are_weighted(data, config, tmp_path):
    """Of an error that is the same everywhere, all is in one coefficient: the square root of the
    number of pixels times as large, of n * (n // 2 + 1) complex ones."""
    n = 16
    trainer = Trainer(replace(config, fft_weight=0.5), tmp_path)
    with torch.no_grad():
        trainer.model.output.weight.zero_()
    clean = torch.rand(2, 3, n, n)
    got = trainer.train_step(clean + 0.1, clean)
    assert got == pytest.approx(0.1 + 0.5 * 0.1 * n / (2 * n * (n // 2 + 1)), rel=1e-4)


def test_bfloat16_learns_beside_float32(data, config, tmp_path):
    """The same to some digits, not to all; what is kept is float32."""
    config = replace(config, steps=400, mixture={"blind_noise": 1.0}, clip_norm=1.0)
    low = replace(config, precision="bf16")
    batch = make_batch(data, config, 0)
    one, other = Trainer(config, tmp_path), Trainer(low, tmp_path)
    wide, narrow = ([t.train_step(*batch) for _ in range(20)] for t in (one, other))
    assert narrow == pytest.approx(wide, rel=0.02)
    assert narrow[1:] != wide[1:]
    assert {v.dtype for v in other.model.state_dict().values()} == {torch.float32}


def test_the_scan_is_float32_under_autocast(monkeypatch):
    from mtair import blocks

    seen = []
    scan = blocks.cross_scan

    def spy(*tensors, **options):
        seen.extend(t.dtype for t in tensors)
        return scan(*tensors, **options)

    monkeypatch.setattr(blocks, "cross_scan", spy)
    module = blocks.SS2D(8, 2, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.rand(1, 8, 6, 6))
    assert out.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}


# Several processes


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two_processes(before, config_path, root, out):
    """`mtair train` by torchrun, each process after having done what `before` says."""
    options = ["--config", config_path, "--data", root, "--out", out]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python",
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()), sys.executable, "-c",
        f"import os, sys; {before}\nfrom mtair.cli import main; main()", "train",
        *map(str, options),
    ]  # fmt: skip
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_processes_that_do_not_see_the_same_folder_are_refused(root, config, tmp_path):
    """As where each node has a disk of its own: only the first would find a state to resume."""
    train(replace(config, steps=2), root, tmp_path / "run0")
    path = write_config(tmp_path / "t.yaml", replace(config, steps=4))
    done = in_two_processes("sys.argv[-1] += os.environ['RANK']", path, root, tmp_path / "run")
    assert done.returncode != 0
    assert "the processes found runs of 0 to 2 steps" in done.stderr
    assert state.load(tmp_path / "run0")["step"] == 2


def test_two_processes_train_as_one_on_the_whole_batch(root, config, tmp_path):
    """Also where a batch has a row for one of them only."""
    stages = [(0.4, 16, 3), (0.6, 16, 1)]
    config = replace(config, steps=50, stages=stages, fft_weight=0.1, check_steps=50)
    config = replace(config, learning_rate=1e-4)  # Adam makes a step of the last bit's sign
    path = write_config(tmp_path / "t.yaml", config)
    alone = train(TrainConfig.load(path), root, tmp_path / "one")  # whose mixture is sorted
    done = in_two_processes("", path, root, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [
        json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1])
        for run in ("one", "two")
    ]
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-3)
    assert lines[1]["held_out_psnr_25"] == pytest.approx(lines[0]["held_out_psnr_25"], abs=0.03)
    want = checkpoint.load_model(str(alone)).state_dict()
    got = checkpoint.load_model(str(tmp_path / "two/weights.safetensors")).state_dict()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=5e-4, rtol=0)
    assert checkpoint.describe(str(tmp_path / "two/weights.safetensors")).record["processes"] == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_a_step_gets_the_memory_of_the_one_before():
    """Activations that go back to the system are zeroed page by page at every step: without this
    a step here has 39,000 faults, for 160 MB."""
    code = (
        "import resource, torch\n"
        "from mtair.memory import keep_freed_memory\n"
        "keep_freed_memory(2**31 - 1)\n"
        "def step():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    kept = [torch.ones(2_000_000) for _ in range(20)]\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(*(step() for _ in range(8)))\n"
    )
    faults = list(map(int, subprocess.check_output([sys.executable, "-c", code]).split()))
    # The first step needs the pages, and the heap is cut up anew in the second.
    assert max(faults[4:]) < 1000, faults
