"""The whole path on real footage with the weights that ship: noise in, clean video out."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from readback import frames_of, packets_of

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings
from pipeline.frames import Frame

FOOTAGE = Path(__file__).parents[2] / "shared/data/val/video"
SIGMA = 25


@pytest.fixture
def noisy_and_clean(tmp_path):
    clip = FOOTAGE / "exo_skyline_360p.mp4"
    if not clip.is_file():
        pytest.skip(f"no real footage at {FOOTAGE}: the end-to-end test needs {clip.name}")
    noisy, clean = tmp_path / "noisy.mp4", []
    rng = np.random.default_rng(0)
    with (
        VideoSource(clip) as source,
        VideoWriter(
            noisy, source.info, EncodeSettings("libx264", crf=10, preset="ultrafast"),
            copy_from=clip,
        ) as writer,
    ):  # fmt: skip
        for frame in source.frames():
            clean.append(frame)
            planes = tuple(
                np.clip(np.rint(p + rng.normal(0, SIGMA, p.shape)), 0, 255).astype(np.uint8)
                for p in frame.planes
            )
            writer.write(Frame(frame.index, frame.pts, planes, frame.duration))
    return noisy, clean


def psnr(frames, clean):
    pairs = [
        (p.astype(float), q) for f, g in zip(frames, clean, strict=True)
        for p, q in zip(f.planes, g.planes, strict=True)
    ]  # fmt: skip
    error = sum(np.square(p - q).sum() for p, q in pairs) / sum(p.size for p, _ in pairs)
    return 10 * np.log10(255**2 / error)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_real_clip_comes_out_complete_and_at_least_3_db_cleaner(noisy_and_clean):
    noisy, clean = noisy_and_clean
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", str(noisy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    restored = noisy.with_name("noisy_restored.mp4")
    before, after = frames_of(noisy), frames_of(restored)
    assert len(after) == len(clean) == 512
    assert [f.pts for f in after] == [f.pts for f in before]
    assert packets_of(restored, "audio") == packets_of(noisy, "audio") != []
    assert psnr(after, clean) > psnr(before, clean) + 3
