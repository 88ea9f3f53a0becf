"""What a training run is given: a folder of pictures, a tiny network, a schedule of seconds."""

import cv2
import numpy as np
import yaml

from mtair.schedule import TrainConfig

NANO = {
    "widths": [4, 4, 8, 8], "depths": [1, 0, 0, 1], "refinement": 0, "heads": [1, 1, 2, 2],
    "ffn_expansion": 1.0, "prompt_dims": [2, 2, 2, 2], "prompt_sizes": [2, 2, 2, 2], "d_state": 2,
    "expand": 1.0, "stem": 2, "wide_dec1": False,
}  # fmt: skip


def picture(seed, h=48, w=64):
    """A smooth random picture, uint8 RGB."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (5, 7, 3)).astype(np.uint8)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


def write(path, rgb):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.ascontiguousarray(rgb[..., ::-1]))


def lay_out(root):
    """The layout that docs/training.md has. Hazy and rainy are half as bright as clean."""
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


def nano_config(folder):
    model = folder / "nano.yaml"
    model.write_text(yaml.safe_dump(NANO))
    return TrainConfig(
        model=str(model), seed=4, steps=40, stages=[(0.5, 16, 4), (0.3, 24, 2), (0.2, 32, 1)],
        learning_rate=2e-3, warmup_steps=4, final_learning_rate=1e-5, weight_decay=1e-4,
        clip_norm=0.1, ema_decay=0.9,
        mixture={"noise": 0.4, "rain": 0.3, "haze": 0.2, "clean": 0.1}, wide_share=0.0,
    )  # fmt: skip


def write_config(path, config, **change):
    values = {f: getattr(config, f) for f in config.__dataclass_fields__}
    values["stages"] = [list(stage) for stage in config.stages]
    values |= change
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path
