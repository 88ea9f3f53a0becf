"""What scripts of benchmarks/ make and others use: H.264 clips and pairs, the ablation."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from mtair import Dimensions

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """As if started from there: scripts import one another by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def image(height=124, width=164):
    rng = np.random.default_rng(2)
    coarse = rng.integers(0, 255, (9, 12, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def decibels(a, b):
    return 10 * np.log10(255**2 / np.mean(np.square(a.astype(np.float64) - b)))


def test_x264_gives_every_frame_back_and_better_at_a_lower_crf():
    import clips
    import h264_pairs
    from video_quality import through_x264

    info = h264_pairs.StreamInfo(
        160, 96, h264_pairs.Fraction(1, 1000), h264_pairs.Fraction(30), h264_pairs.FORMAT
    )
    clip = [h264_pairs.planes_of(image(96, 160 + n)[:, n : n + 160].copy()) for n in range(9)]
    high, low = (through_x264(clip, info, crf) for crf in (18, 40))
    assert len(high) == len(low) == 9
    assert clips.psnr(high, clip) > clips.psnr(low, clip) + 3
    again = through_x264(clip, info, 40)
    assert clips.psnr(again, low) == np.inf


def test_pairs_are_aligned_and_repeat():
    import h264_pairs

    for seed in range(4):
        degraded, clean = h264_pairs.pair(image(), np.random.default_rng(seed))
        assert degraded.shape == clean.shape == (100, 140, 3)
        here = decibels(degraded, clean)
        assert here > 18
        assert here > decibels(degraded[:, 2:], clean[:, :-2])
        again, _ = h264_pairs.pair(image(), np.random.default_rng(seed))
        np.testing.assert_array_equal(again, degraded)


def test_the_comparison_of_runtimes_says_what_to_install(monkeypatch):
    import runtimes

    monkeypatch.setattr(sys, "argv", ["runtimes.py"])
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install onnx onnxscript onnxruntime openvino"):
        runtimes.main()


def test_the_comparison_of_runtimes_counts_the_scan_once():
    import runtimes

    times = {"fused, bf16": [(0.5, 0.1)] * 3, "other": [(0.3, 0.0)] * 3}
    rows = runtimes.table(times).splitlines()[2:]
    assert rows == ["| fused, bf16 | 400 | 500 | 1.00 |", "| other | 300 | 400 | 0.80 |"]


def test_the_variants_of_the_ablation_are_networks_each_smaller_than_the_whole():
    import torch
    from ablation import VARIANTS

    from mtair import MTAIR

    shape = yaml.safe_load((BENCHMARKS.parent / "configs/models/tiny.yaml").read_text())
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in MTAIR(Dimensions.from_dict(shape | change)).parameters())
            for change in VARIANTS.values()
        ]
    assert max(sizes[1:]) < sizes[0]
