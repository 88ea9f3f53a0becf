"""Owns the cutting of planes into overlapping tiles of one size, and putting them together again.
Knows no frames, no time, no workers and no pixel's meaning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.frames import Plane, Planes, TileBatch


class Span(NamedTuple):
    """One tile's place on one axis, in luma pixels."""

    start: int
    """The tile's first pixel; a multiple of the chroma subsampling."""
    keep_from: int
    """The first pixel of the result that this tile gives; what lies before it is halo."""
    keep_to: int
    """The pixel after the last one given; only at the frame's own border not a chroma multiple."""


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The geometry of a stream's tiles, computed once: row-major, all of one size.

    Make it with `plan`. A frame whose size is no multiple of the chroma subsampling is extended by
    repeating its border, and cropped by `merge`.
    """

    width: int
    height: int
    log2_chroma_w: int
    log2_chroma_h: int
    n_planes: int
    batch_size: int
    tile_width: int
    """In luma pixels; a multiple of `2**log2_chroma_w`. Likewise `tile_height`."""
    tile_height: int
    columns: tuple[Span, ...]
    rows: tuple[Span, ...]

    @classmethod
    def plan(
        cls,
        width: int,
        height: int,
        *,
        log2_chroma_w: int,
        log2_chroma_h: int,
        n_planes: int,
        tile: tuple[int, int] | None,
        overlap: int,
        batch_size: int,
        align: int = 1,
    ) -> "TileGrid":
        """Choose the fewest tiles of about `tile` (width, height; None: the whole frame) pixels.

        Neighbours share at least `overlap` pixels. Where the frame needs several tiles, their size
        is the smallest multiple of `align` and of the chroma subsampling that still covers it with
        as many: never above `tile` rounded up to such a multiple. Raises ValueError on sizes that
        make no grid.
        """
        _check(width, height, n_planes, (log2_chroma_w, log2_chroma_h), overlap, batch_size, align)
        if n_planes == 1:
            log2_chroma_w = log2_chroma_h = 0
        wanted_width, wanted_height = (None, None) if tile is None else tile
        tile_width, columns = _plan_axis(width, wanted_width, overlap, 1 << log2_chroma_w, align)
        tile_height, rows = _plan_axis(height, wanted_height, overlap, 1 << log2_chroma_h, align)
        return cls(
            width=width,
            height=height,
            log2_chroma_w=log2_chroma_w,
            log2_chroma_h=log2_chroma_h,
            n_planes=n_planes,
            batch_size=batch_size,
            tile_width=tile_width,
            tile_height=tile_height,
            columns=columns,
            rows=rows,
        )

    @property
    def n_tiles(self) -> int:
        """Tiles per frame."""
        return len(self.columns) * len(self.rows)

    @property
    def n_batches(self) -> int:
        """Batches per frame: all of `batch_size` tiles but the last, which may hold fewer."""
        return -(-self.n_tiles // self.batch_size)

    def split(self, planes: Planes) -> list[TileBatch]:
        """Copy the tiles of one frame into `n_batches` batches of contiguous arrays `[n, h, w]`.

        Raises ValueError where the planes are not those of a `width` x `height` frame.
        """
        self._check_planes(planes)
        padded = [self._pad(plane, i) for i, plane in enumerate(planes)]
        cells = self._cells()
        starts = range(0, self.n_tiles, self.batch_size)
        parts = [cells[start : start + self.batch_size] for start in starts]
        return [
            tuple(self._gather(plane, i, part) for i, plane in enumerate(padded)) for part in parts
        ]

    def merge(self, batches: Sequence[TileBatch]) -> Planes:
        """Put a frame together from the batches of `split`, in their order; read-only planes.

        Each overlap is cut in its middle: no blending, so a tile's pixels arrive as they are.
        Raises ValueError on another number of tiles than `n_tiles`.
        """
        n_tiles = sum(len(batch[0]) for batch in batches)
        if n_tiles != self.n_tiles:
            raise ValueError(f"{n_tiles} tiles cannot fill a grid of {self.n_tiles}")
        return tuple(
            self._scatter([tile for batch in batches for tile in batch[i]], i)
            for i in range(self.n_planes)
        )

    def _cells(self) -> list[tuple[Span, Span]]:
        return [(row, column) for row in self.rows for column in self.columns]

    def _shifts(self, plane_number: int) -> tuple[int, int]:
        return (0, 0) if plane_number == 0 else (self.log2_chroma_h, self.log2_chroma_w)

    def _check_planes(self, planes: Planes) -> None:
        shifts = map(self._shifts, range(self.n_planes))
        expected = [(_shift_up(self.height, y), _shift_up(self.width, x)) for y, x in shifts]
        found = [plane.shape for plane in planes]
        if found != expected:
            raise ValueError(f"planes of shapes {found} do not fit the grid's {expected}")

    def _pad(self, plane: Plane, plane_number: int) -> Plane:
        shift_y, shift_x = self._shifts(plane_number)
        height = self.rows[-1].start + self.tile_height >> shift_y
        width = self.columns[-1].start + self.tile_width >> shift_x
        if plane.shape == (height, width):
            return plane
        missing = ((0, height - plane.shape[0]), (0, width - plane.shape[1]))
        return np.pad(plane, missing, mode="edge")

    def _gather(self, plane: Plane, plane_number: int, cells: list[tuple[Span, Span]]) -> Plane:
        shift_y, shift_x = self._shifts(plane_number)
        h, w = self.tile_height >> shift_y, self.tile_width >> shift_x
        tiles = np.empty((len(cells), h, w), plane.dtype)
        for tile, (row, column) in zip(tiles, cells, strict=True):
            y, x = row.start >> shift_y, column.start >> shift_x
            tile[:] = plane[y : y + h, x : x + w]
        return tiles

    def _scatter(self, tiles: list[Plane], plane_number: int) -> Plane:
        shift_y, shift_x = self._shifts(plane_number)
        shape = (_shift_up(self.height, shift_y), _shift_up(self.width, shift_x))
        plane = np.empty(shape, tiles[0].dtype)
        for tile, (row, column) in zip(tiles, self._cells(), strict=True):
            into_y, from_y = _kept(row, shift_y)
            into_x, from_x = _kept(column, shift_x)
            plane[into_y, into_x] = tile[from_y, from_x]
        plane.setflags(write=False)
        return plane


def _check(
    width: int,
    height: int,
    n_planes: int,
    log2_chroma: tuple[int, int],
    overlap: int,
    batch_size: int,
    align: int,
) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"a frame of {width}x{height} has no pixels")
    if n_planes not in (1, 3):
        raise ValueError(f"a frame has 1 or 3 planes, not {n_planes}")
    if min(log2_chroma) < 0:
        raise ValueError(f"the chroma subsampling cannot be 2**{min(log2_chroma)}")
    if overlap < 0:
        raise ValueError(f"the overlap must not be negative: {overlap}")
    if batch_size < 1 or align < 1:
        raise ValueError(f"batch_size ({batch_size}) and align ({align}) must be at least 1")


def _plan_axis(
    size: int, wanted: int | None, overlap: int, chroma: int, align: int
) -> tuple[int, tuple[Span, ...]]:
    """The tile size and the tiles' places on one axis; `chroma` is the subsampling factor."""
    padded = _round_up(size, chroma)
    if wanted is None:
        return padded, (Span(0, 0, size),)
    unit = math.lcm(align, chroma)
    largest, shared = _round_up(wanted, unit), _round_up(overlap, chroma)
    if wanted < 1 or overlap >= wanted or shared >= largest:
        raise ValueError(
            f"tiles of {wanted} pixels with an overlap of {overlap} do not advance"
            f" (chroma subsampling {chroma}): choose larger tiles or less overlap"
        )
    if padded <= largest:
        return padded, (Span(0, 0, size),)
    n = 1 + -(-(padded - largest) // (largest - shared))
    tile = _round_up(-(-(padded + (n - 1) * shared) // n), unit)
    return tile, _place(size, padded, tile, n, chroma)


def _place(size: int, padded: int, tile: int, n: int, chroma: int) -> tuple[Span, ...]:
    # Counted in chroma samples, so that every start and every cut falls between two of them.
    slack, length = (padded - tile) // chroma, tile // chroma
    starts = [i * slack // (n - 1) for i in range(n)]
    cuts = [(a + b + length) // 2 * chroma for a, b in pairwise(starts)]
    edges = [0, *cuts, size]
    return tuple(Span(starts[i] * chroma, edges[i], edges[i + 1]) for i in range(n))


def _kept(span: Span, shift: int) -> tuple[slice, slice]:
    """Where a tile's kept part goes in the plane, and where it lies in the tile."""
    start, first, last = (
        span.start >> shift,
        span.keep_from >> shift,
        _shift_up(span.keep_to, shift),
    )
    return slice(first, last), slice(first - start, last - start)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _shift_up(value: int, shift: int) -> int:
    return -(-value >> shift)
