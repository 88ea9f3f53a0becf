"""Owns the words between a worker and whoever asks it: what it is, what it is given, how it fails.

Knows no torch and no Ray, so that who only passes these on need not load them.
"""

from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

Matrix = Literal["bt601", "bt709", "bt2020", "smpte240m", "fcc", "ycgco", "rgb"]
ChromaLocation = Literal["left", "center", "topleft", "top", "bottomleft", "bottom"]
TileBatch = tuple[NDArray[Any], ...]
"""One uint8 or uint16 array `[N, h, w]` per plane; the same N in each."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class PlaneSpec:
    """What the numbers in a stream's planes mean, in the terms of ITU-T H.273."""

    n_planes: int
    """1 (gray) or 3."""
    log2_chroma_w: int
    """A chroma plane has `width / 2**log2_chroma_w` columns. Likewise `log2_chroma_h`."""
    log2_chroma_h: int
    bit_depth: int
    """8 (uint8) to 16; above 8 the samples are uint16 with the value in the low bits."""
    matrix: Matrix
    """`rgb`: the planes are G, B, R. `ycgco`: Cg and Co are in the places of Cb and Cr."""
    full_range: bool
    chroma_location: ChromaLocation


class WorkerError(RuntimeError):
    """A device, a worker or Ray failed beyond its retries; one line: the cause and what to do."""


class WeightsError(WorkerError):
    """The weights are missing, damaged or of another network."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker needs to start, in any process on any machine."""

    checkpoint: str
    """A shipped model's name, or the path of a weights file."""
    planes: PlaneSpec | None = None
    """Of the batches that come without their own."""
    device: str = "cpu"
    """`cpu` or `cuda:N`."""
    precision: Precision = "auto"
    """`auto` is bf16 where the device computes in it, else fp16 on CUDA and fp32 on a CPU."""
    strength: float = 1.0
    """Factor on the residual; at 0 the tiles come back as they are and no network is run."""
    smaller: str = ""
    """A second network, named as the first is, for batches that ask for it; empty: none."""
    threads: int = 0
    """CPU threads of the network; 0 leaves it to torch."""


@dataclass(frozen=True, slots=True)
class WeightsInfo:
    """Which network a weights file holds."""

    name: str
    sha256: str
    stride: int
    """Tiles whose sides are multiples of it are restored without padding."""
