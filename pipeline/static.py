"""Owns the memory of what was last restored at each place, so that a still picture costs nothing.
Knows no frames, no time and no network: it is a Submit around another one.
"""

from concurrent.futures import Future

import cv2
import numpy as np

from pipeline.frames import Plane, TileBatch
from pipeline.restore import Submit

BLOCK = 16
"""Samples a side of the blocks in which a change is looked for."""


class StaticTiles:
    """Gives the Future of the batch last restored at a place to every later one that equals it.

    A place is a batch's number in its frame: one tile with `tile.batch: 1`, the default. Whole
    batches are compared because a network's result depends, in its last bits, on the tiles that it
    is given together; reused by batch, the output is bit for bit what it is without reuse.

    With a `threshold` above 0, in sample units, a batch also counts as equal where no plane of any
    tile has a block of BLOCK x BLOCK samples whose mean absolute difference reaches it. Always
    compared with the batch that was really restored, so that nothing drifts; the picture stands
    still until then. What is restored then depends on where the frames began: call `reset` where
    a segment begins.

    Holds one frame's tiles and results. Not thread-safe.
    """

    def __init__(self, submit: Submit, n_batches: int, threshold: float = 0) -> None:
        self.n_tiles = self.n_reused = 0
        self._submit = submit
        self._n_batches = n_batches
        self._threshold = threshold
        self.reset()

    def reset(self) -> None:
        """Forget every tile; the next batch is the first of a frame."""
        self._place = 0
        self._last: dict[int, tuple[TileBatch, Future[TileBatch]]] = {}

    def __call__(self, batch: TileBatch) -> Future[TileBatch]:
        """Take the batches of every frame, all of them and in their order, as TileGrid makes them.

        Raises what the Submit within raises.
        """
        place, self._place = self._place, (self._place + 1) % self._n_batches
        self.n_tiles += len(batch[0])
        future = self._reusable(place, batch)
        if future is None:
            future = self._submit(batch)
            self._last[place] = batch, future
        else:
            self.n_reused += len(batch[0])
        return future

    def _reusable(self, place: int, batch: TileBatch) -> Future[TileBatch] | None:
        if place not in self._last:
            return None
        last, future = self._last[place]
        if future.cancelled() or (future.done() and future.exception() is not None):
            return None
        return future if _equal(last, batch, self._threshold) else None


def _equal(last: TileBatch, batch: TileBatch, threshold: float) -> bool:
    pairs = list(zip(last, batch, strict=True))
    if all(np.array_equal(a, b) for a, b in pairs):
        return True
    if not threshold or any(a.shape != b.shape for a, b in pairs):
        return False
    tiles = (pair for a, b in pairs for pair in zip(a, b, strict=True))
    return all(_largest_change(a, b) < threshold for a, b in tiles)


def _largest_change(a: Plane, b: Plane) -> float:
    """Of the mean absolute differences in all blocks.

    The mean of a whole tile would not see a ball that rolls through a corner of it.
    """
    side = min(BLOCK, *a.shape)
    border = side // 2
    means = cv2.boxFilter(cv2.absdiff(a, b), cv2.CV_32F, (side, side))
    # Centres of blocks that lie inside: at the border OpenCV mirrors, and noise counts twice.
    inside = means[border : a.shape[0] - side + border + 1, border : a.shape[1] - side + border + 1]
    return float(inside.max())
