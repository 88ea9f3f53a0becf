"""The published protocol, step by step, and the commands that print it."""

import csv
import math

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from typer.testing import CliRunner

import mtair
from mtair import evaluate
from mtair.cli import app


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def data(tmp_path):
    """A miniature of the validation folder, with the three ways of naming a pair."""
    for number in range(2):
        clean = picture(36, 50, number)
        write(tmp_path / f"CBSD68/{number}.png", clean)
        write(tmp_path / f"Rain100L/rain/rain-{number}.png", np.maximum(clean, 40))
        write(tmp_path / f"Rain100L/gt/norain-{number}.png", clean)
        write(tmp_path / f"SOTS_outdoor/hazy/000{number}_0.8_0.2.png", clean // 2 + 100)
        write(tmp_path / f"SOTS_outdoor/gt/000{number}.png", clean)
    return tmp_path


class Nothing(torch.nn.Module):
    """A network that changes nothing."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, image):
        return image


@pytest.mark.parametrize(
    ("shape", "top", "left"), [((32, 48), 0, 0), ((47, 33), 7, 0), ((36, 50), 2, 1)]
)
def test_cropping_drops_the_remainder_half_of_it_before(shape, top, left):
    image = np.arange(shape[0] * shape[1] * 3, dtype=np.uint32).reshape(*shape, 3)
    out = evaluate.crop_to_16(image)
    assert out.shape[0] % 16 == out.shape[1] % 16 == 0
    assert out.shape[0] == shape[0] - shape[0] % 16
    assert out[0, 0, 0] == image[top, left, 0]


def test_psnr_is_scikit_images_and_infinite_for_equals():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 16, 16, 3), dtype=np.float32)
    assert evaluate.psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1))
    assert evaluate.psnr(a, a) == math.inf
    assert evaluate.ssim(a, a) == pytest.approx(1)


def test_a_network_that_does_nothing_scores_as_the_input(data):
    scores = list(evaluate.evaluate(Nothing(), data))
    tasks = ["CBSD68 15", "CBSD68 25", "CBSD68 50", "Rain100L", "SOTS val", "CBSD68 clean"]
    assert [s.task for s in scores] == [t for t in tasks for _ in range(2)]
    for score in scores:
        assert score.psnr == pytest.approx(score.psnr_input)
        assert score.ssim == pytest.approx(score.ssim_input)
    by_sigma = [next(s.psnr for s in scores if s.task == f"CBSD68 {n}") for n in (15, 25, 50)]
    assert by_sigma == sorted(by_sigma, reverse=True)
    assert by_sigma[1] == pytest.approx(20 * math.log10(255 / 25), abs=0.8)
    assert all(s.psnr == math.inf for s in scores if s.task == "CBSD68 clean")


def test_noise_is_the_same_every_time(data):
    first, second = (list(evaluate.evaluate(Nothing(), data, tasks=["CBSD68 50"])) for _ in "ab")
    assert first == second


def test_the_output_is_clipped_before_it_is_scored(data):
    class TooBright(Nothing):
        def forward(self, image):
            return image + 10

    (score,) = evaluate.evaluate(TooBright(), data, limit=1, tasks=["CBSD68 15"])
    assert score.psnr > -1  # white everywhere; unclipped it would be below -19 dB


def test_a_pair_without_its_clean_image_is_an_error_that_names_it(data):
    (data / "SOTS_outdoor/gt/0001.png").unlink()
    with pytest.raises(FileNotFoundError, match="0001_0"):
        list(evaluate.evaluate(Nothing(), data, tasks=["SOTS val"]))


def test_the_command_prints_a_table_and_writes_a_line_per_image(data, tiny_checkpoint):
    target = data / "scores.csv"
    arguments = ["--data", str(data), "--model", tiny_checkpoint, "--csv", str(target)]
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--task", "Rain100L"])
    assert result.exit_code == 0, result.output
    assert mtair.checkpoint.describe(tiny_checkpoint).sha256 in result.output
    assert "| Rain100L | 2 |" in result.output
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert [r["image"] for r in rows] == ["rain-0.png", "rain-1.png"]


def evaluated(monkeypatch, *arguments):
    """Run as `mtair evaluate ARGUMENTS`; the command line is part of what is printed."""
    command = ["evaluate", *map(str, arguments)]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/mtair", *command])
    return CliRunner().invoke(app, command)


def test_a_pair_of_folders_is_a_task_of_its_own(data, tiny_checkpoint, monkeypatch):
    hazy, clean = data / "SOTS_outdoor/hazy", data / "SOTS_outdoor/gt"
    result = evaluated(monkeypatch, "--pair", hazy, clean, "--model", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    assert "| hazy | 2 |" in result.output
    assert f"`mtair evaluate --pair {hazy} {clean} --model {tiny_checkpoint}`" in result.output
    assert "CBSD68" not in result.output


def test_folders_of_different_sizes_are_refused_by_name(data, tiny_checkpoint):
    write(data / "other/0.png", picture(64, 50))
    pairs = evaluate.pair_task(data / "other", data / "CBSD68")
    with pytest.raises(ValueError, match=r"0\.png: .* 48x64 and 48x32"):
        list(evaluate.scores(Nothing(), "other", pairs))


def test_nothing_to_evaluate_is_a_usage_error(monkeypatch):
    result = evaluated(monkeypatch)
    assert result.exit_code == 2
    assert "--pair" in result.output


def test_the_shipped_models_are_listed():
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0
    assert "tiny" in result.output
