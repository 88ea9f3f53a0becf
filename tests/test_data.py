"""What a network is trained on: pairs, kinds, batches that are the same at any pace."""

import shutil
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_data import lay_out, nano_config, picture, write

from mtair.data import TrainingData, batches, make_batch, make_pair, white_board
from mtair.schedule import MIXTURE
from mtair.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return lay_out(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def data(root):
    return TrainingData(root)


@pytest.fixture
def config(tmp_path):
    return nano_config(tmp_path)


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
