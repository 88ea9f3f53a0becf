"""The types that flow through the pipeline. Knows no FFmpeg, no workers and no files."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[Any]  # uint8 or uint16 [h, w]
Planes = tuple[Plane, ...]
TileBatch = tuple[Plane, ...]
"""One array `[N, h, w]` per plane; the same N in each. A tile is a row, its place is its number."""

Matrix = Literal["bt601", "bt709", "bt2020", "smpte240m", "fcc", "ycgco", "rgb"]
ChromaLocation = Literal["left", "center", "topleft", "top", "bottomleft", "bottom"]


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """The planar layout of a frame's pixels and what their numbers mean."""

    name: str
    """FFmpeg's name of the planar format that travels, e.g. `yuv420p10le`."""
    n_planes: int
    """1 (gray) or 3."""
    log2_chroma_w: int
    """0 or 1 or 2: a chroma plane is `ceil(width / 2**log2_chroma_w)` wide."""
    log2_chroma_h: int
    bit_depth: int
    """8 to 16; above 8 the samples are uint16 with the value in the low bits."""
    matrix: Matrix
    """`rgb` means that the planes are G, B, R (FFmpeg's gbrp order)."""
    full_range: bool
    chroma_location: ChromaLocation

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The sample type of every plane."""
        return np.uint8 if self.bit_depth == 8 else np.uint16

    def plane_shapes(self, width: int, height: int) -> tuple[tuple[int, int], ...]:
        """`(h, w)` of each plane of a `width` x `height` frame."""
        if self.n_planes == 1:
            return ((height, width),)
        chroma = (-(-height >> self.log2_chroma_h), -(-width >> self.log2_chroma_w))
        return ((height, width), chroma, chroma)


@dataclass(frozen=True, slots=True)
class MasteringDisplay:
    """The screen on which HDR was graded: SMPTE ST 2086, as HDR10 carries it."""

    primaries: tuple[tuple[Fraction, Fraction], ...]
    """CIE 1931 x and y of red, green and blue."""
    white_point: tuple[Fraction, Fraction]
    min_luminance: Fraction
    """In cd/m²; likewise `max_luminance`."""
    max_luminance: Fraction


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """What is known of a video stream before its first frame is decoded."""

    width: int
    height: int
    time_base: Fraction
    """The unit of every pts of this stream, in seconds."""
    frame_rate: Fraction | None
    """A hint for encoders and progress; never used to compute a pts."""
    pixel_format: PixelFormat
    sample_aspect_ratio: Fraction | None = None
    rotation: int = 0
    """Display rotation in degrees, counter-clockwise as FFmpeg reports it; pixels stay as coded."""
    display_matrix: tuple[int, ...] | None = None
    """FFmpeg's nine numbers: rotation and mirroring, which `rotation` alone cannot say."""
    n_frames: int | None = None
    """The container's own count, or None; a hint, never trusted."""
    duration_seconds: float | None = None
    color_primaries: int = 2
    """FFmpeg's number; 2 is unspecified. Likewise the three below."""
    color_trc: int = 2
    colorspace: int = 2
    color_range: int = 0
    mastering_display: MasteringDisplay | None = None
    content_light: tuple[int, int] | None = None
    """MaxCLL and MaxFALL of HDR10, in cd/m²."""
    metadata: dict[str, str] = field(default_factory=dict)
    start_pts: int = 0
    """The pts of the first frame."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded picture. Its arrays are read-only; a stage that changes pixels makes new ones."""

    index: int
    """0, 1, 2 … without gaps, in presentation order."""
    pts: int
    """Presentation time in the stream's time_base."""
    planes: Planes
    duration: int = 0
    """In time_base; 0 when the source does not say."""
    key: bool = False
    """The source can be decoded from here on: segments end before such frames."""
    ends_segment: str = ""
    """Not empty for the last frame of a segment: the hash of its source planes (segments.py)."""
    counts: tuple[int, ...] = field(default=(), compare=False)
    """What its source had counted when it came: a resumed job goes on counting from there."""
    captured_seconds: float = 0.0
    """Of a live frame: when its packet was read, on the machine's monotonic clock."""
