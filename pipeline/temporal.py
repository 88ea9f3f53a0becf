"""Owns the calm between frames: averages a restored picture with those before it, along its motion.
Knows no network, no tiles and no files.

Restored frames are averaged and not residuals: a residual holds the noise of its own frame alone,
which the next one's source does not have; docs/temporal.md has the figures.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.frames import Frame, Plane, Planes

Map = NDArray[Any]  # float32

LARGEST_WEIGHT = 0.9
"""Of the past at strength 1: more would keep a picture that is never renewed."""
MATCH_PER_CHANGE = 2.0
"""How far frames may differ and still be averaged, in mean changes that the network made."""
LARGEST_MATCH = 12.0
"""The bound of that, in 8-bit code values; tuned, as all of these, on two training clips."""
SMALLEST_CHANGE = 0.5
"""Below it, in 8-bit code values, the source was clean and each frame stays as restored."""
FOUND_AGAIN = 0.4
"""Mean gate below which the scene was cut."""
WINDOW = 5
"""Half-resolution pixels a side over which differences and changes are averaged."""
SMALLEST_SIDE = 32
"""Pixels; smaller pictures have nothing that the flow could hold on to and stay as they are."""
MOST_SLENDER = 16
"""Sides of this ratio at most: OpenCV's DIS flow fails on a board of 48x1536, and its remap on any
side of 32767."""


class TemporalFilter:
    """Restored frames in, calmer ones out: out = restored + weight * (last out, moved - restored).

    `strength` 0..1 sets the weight of the past. It is lowered, place by place, where the luma of
    the moved last restored frame differs from this one's: occlusions, wrong flow, changes of
    light. How much may differ follows from how much the network changed: what it left alone has
    no noise to average. A scene that is not found again starts afresh.

    A frame depends on those before it: call `reset` where the frames must not, as at the start of
    a segment. The same frames since then give the same output. Holds one frame; not thread-safe.
    """

    def __init__(self, strength: float, bit_depth: int) -> None:
        self.n_cuts = 0
        self._weight = LARGEST_WEIGHT * strength
        self._unit = 1 << (bit_depth - 8)
        # The fast preset costs a third of the medium one and 0.1 dB where things move normally.
        self._flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self.reset()

    def reset(self) -> None:
        """Forget what came before."""
        self._luma: Plane | None = None
        self._past: Planes = ()

    def __call__(self, source: Frame, restored: Frame) -> Frame:
        """Take every frame of one size in order, before and after the network; read-only planes."""
        short, long = sorted(restored.planes[0].shape)
        if not self._weight or short < SMALLEST_SIDE or long > min(MOST_SLENDER * short, 32766):
            return restored
        luma, last = self._small(restored), self._luma
        match = self._match(self._small(source), luma)
        self._luma = np.rint(luma).astype(np.uint8)
        if last is None or not match:
            return self._afresh(restored)
        # From this frame to the last: where each of its pixels was.
        flow = self._flow.calc(self._luma, last, None)
        gate = _gate(self._luma, _moved(last, *_maps(flow, luma.shape), cv2.INTER_LINEAR), match)
        if gate.mean() < FOUND_AGAIN:
            self.n_cuts += 1
            return self._afresh(restored)
        self._past = self._blended(restored.planes, flow, gate * np.float32(self._weight))
        return replace(restored, planes=tuple(map(self._samples, self._past, restored.planes)))

    def _afresh(self, restored: Frame) -> Frame:
        self._past = tuple(plane.astype(np.float32) for plane in restored.planes)
        return restored

    def _small(self, frame: Frame) -> Map:
        """Luma at half the size, float32 in 8-bit code values."""
        height, width = frame.planes[0].shape
        luma = frame.planes[0].astype(np.float32) / np.float32(self._unit)
        small: Map = cv2.resize(luma, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        return small

    def _match(self, source: Map, restored: Map) -> float:
        """How far frames may differ; 0 where the network changed next to nothing."""
        change = source - restored
        change -= cv2.blur(change, (WINDOW, WINDOW))  # haze is no noise
        mean = float(np.abs(change).mean())
        return 0 if mean < SMALLEST_CHANGE else min(MATCH_PER_CHANGE * mean, LARGEST_MATCH)

    def _blended(self, planes: Planes, flow: Map, weight: Map) -> Planes:
        blended, shape = [], (0, 0)
        for plane, past in zip(planes, self._past, strict=True):
            if plane.shape != shape:
                shape = plane.shape
                maps, share = _maps(flow, shape), _resized(weight, shape)
            moved = _moved(past, *maps, cv2.INTER_CUBIC)  # linear blurs a little more every frame
            blended.append(plane + share * (moved - plane))
        return tuple(blended)

    def _samples(self, blended: Map, plane: Plane) -> Plane:
        top = 256 * self._unit - 1
        samples = np.clip(np.rint(blended), 0, top).astype(plane.dtype)
        samples.setflags(write=False)
        return samples


def _gate(luma: Plane, moved: Plane, match: float) -> Map:
    difference = cv2.absdiff(luma, moved).astype(np.float32)
    mean = cv2.blur(difference, (WINDOW, WINDOW)) / np.float32(match)
    return np.exp(-mean * mean)


def _maps(flow: Map, shape: tuple[int, ...]) -> tuple[Map, Map]:
    """For cv2.remap: where each pixel of a plane of `shape` was, columns and rows."""
    columns, rows = _places(shape)
    x, y = flow[..., 0], flow[..., 1]
    by_x, by_y = shape[1] / flow.shape[1], shape[0] / flow.shape[0]
    along_x, along_y = _resized(x, shape) * np.float32(by_x), _resized(y, shape) * np.float32(by_y)
    return columns + along_x, rows + along_y


@lru_cache(maxsize=4)
def _places(shape: tuple[int, ...]) -> tuple[Map, Map]:
    rows, columns = np.indices(shape, dtype=np.float32)
    return columns, rows


def _resized(values: Map, shape: tuple[int, ...]) -> Map:
    if values.shape == shape:
        return values
    resized: Map = cv2.resize(values, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)
    return resized


def _moved(plane: Plane, columns: Map, rows: Map, interpolation: int) -> Plane:
    return cv2.remap(plane, columns, rows, interpolation, borderMode=cv2.BORDER_REPLICATE)
