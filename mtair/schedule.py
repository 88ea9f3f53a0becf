"""What a training run is asked to do: a YAML of configs/train, and what follows from it per step.

Owns names, defaults and bounds; knows neither data nor network.
"""

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

MIXTURE = (
    "noise", "blind_noise", "video_noise", "rain", "haze", "clean", "sensor_noise", "compression",
    "h264",
)  # fmt: skip

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One YAML of configs/train. Unknown keys are errors."""

    model: str
    """Path of a configs/models YAML."""
    seed: int
    steps: int
    stages: list[tuple[float, int, int]]
    """(share of the steps, patch side in pixels, batch size), in order; the shares sum to 1."""
    learning_rate: float
    warmup_steps: int
    final_learning_rate: float
    weight_decay: float
    clip_norm: float
    """Longer gradients are shortened to this; `.inf` for none."""
    ema_decay: float
    """Of the moving average whose weights are kept; 0 keeps the weights themselves."""
    mixture: dict[str, float]
    """Share of the pixels of each degradation; sums to 1."""
    wide_share: float
    """Share of the steps that take a quarter as many patches of twice the side: haze and rain are
    told by what lies further around a pixel than noise is. Of every degradation alike, for a
    network that never saw noise on the larger patches leaves faint noise on whole pictures."""
    fft_weight: float = 0.0
    """Weight of the L1 of the spectra beside that of the pixels; 0 for none."""
    precision: Precision = "fp32"
    """`bf16`: products and convolutions in bfloat16; weights, norms, scan and loss in float32."""
    check_steps: int = 1000
    """Steps between two looks at the held-out images, each with a picture of samples."""
    loaders: int = 1
    """Threads that make batches ahead: 1 keeps up with a CPU, a GPU needs more."""

    @classmethod
    def load(cls, path: Path) -> "TrainConfig":
        """Raises ValueError naming the key that is unknown, missing or out of range."""
        with path.open() as file:  # whose name is in what YAML complains of
            values = yaml.safe_load(file)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected keys and values")
        known = {f.name for f in fields(cls)}
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        if wrong := set(values) - known | needed - set(values):
            raise ValueError(f"{path}: unknown or missing keys {sorted(wrong)}")
        for f in fields(cls):
            if f.type is float and f.name in values:  # YAML takes 1e-3, without a point, for text
                values[f.name] = _number(values[f.name], f"{path}: {f.name}")
        values["stages"] = [tuple(stage) for stage in values["stages"]]
        config = cls(**values)
        config._check(path)
        return config

    def _check(self, path: Path) -> None:
        if not math.isclose(sum(s[0] for s in self.stages), 1.0):
            raise ValueError(f"{path}: the shares of the stages do not sum to 1")
        if not math.isclose(sum(self.mixture.values()), 1.0):
            raise ValueError(f"{path}: the mixture does not sum to 1")
        if wrong := set(self.mixture) - set(MIXTURE):
            raise ValueError(f"{path}: unknown degradations {sorted(wrong)}; known {MIXTURE}")
        if not 0 <= self.wide_share <= 1:
            raise ValueError(f"{path}: wide_share must be 0 to 1, got {self.wide_share:g}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"{path}: precision must be one of {get_args(Precision)}")
        for name in ("check_steps", "loaders"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{path}: {name} must be a whole number above 0, got {value!r}")

    def stage(self, step: int) -> tuple[int, int]:
        """(patch side, batch size) at `step`."""
        done = 0.0
        for share, patch, batch in self.stages:
            done += share
            if step < done * self.steps:
                return patch, batch
        return self.stages[-1][1], self.stages[-1][2]

    def largest_patch(self) -> int:
        """The side in pixels of the largest patch that any step asks for."""
        return max(patch for _, patch, _ in self.stages) * (2 if self.wide_share else 1)

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine to final_learning_rate."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        t = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        low = self.final_learning_rate
        return low + (self.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * t))


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a number, got {value!r}") from error
