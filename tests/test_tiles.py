"""The grid: what is split comes back, whatever the size, and no pixel comes from near a cut."""

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.tiles import TileGrid

SUBSAMPLINGS = {
    "444": (0, 0, 3),
    "422": (1, 0, 3),
    "440": (0, 1, 3),
    "420": (1, 1, 3),
    "411": (2, 0, 3),
    "410": (2, 2, 3),
    "gray": (0, 0, 1),
}


def plan(width, height, subsampling="420", tile=(64, 48), overlap=16, batch_size=4, align=1):
    log2_w, log2_h, n_planes = SUBSAMPLINGS[subsampling]
    return TileGrid.plan(
        width,
        height,
        log2_chroma_w=log2_w,
        log2_chroma_h=log2_h,
        n_planes=n_planes,
        tile=tile,
        overlap=overlap,
        batch_size=batch_size,
        align=align,
    )


def noise(grid, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    x, y = 1 << grid.log2_chroma_w, 1 << grid.log2_chroma_h
    chroma = (-(-grid.height // y), -(-grid.width // x))
    shapes = [(grid.height, grid.width), chroma, chroma][: grid.n_planes]
    return tuple(rng.integers(0, np.iinfo(dtype).max, s, dtype, endpoint=True) for s in shapes)


@st.composite
def grids(draw):
    side, tile_side = st.integers(1, 97), st.integers(1, 60)
    tile = draw(st.none() | st.tuples(tile_side, tile_side))
    overlap = draw(st.integers(0, 40))
    assume(tile is None or overlap + 4 <= min(tile))
    return plan(
        draw(side),
        draw(side),
        draw(st.sampled_from(sorted(SUBSAMPLINGS))),
        tile,
        overlap,
        draw(st.integers(1, 9)),
        draw(st.sampled_from([1, 2, 3, 8])),
    )


@given(grid=grids(), dtype=st.sampled_from([np.uint8, np.uint16]), seed=st.integers(0, 99))
def test_merge_of_split_is_the_frame(grid, dtype, seed):
    planes = noise(grid, dtype, seed)
    merged = grid.merge(grid.split(planes))
    assert len(merged) == len(planes)
    for before, after in zip(planes, merged, strict=True):
        np.testing.assert_array_equal(before, after, strict=True)
        assert not after.flags.writeable


@given(grid=grids())
def test_batches_are_contiguous_tiles_of_one_size_in_bounded_batches(grid):
    planes = noise(grid)
    batches = grid.split(planes)
    assert len(batches) == grid.n_batches
    assert sum(len(batch[0]) for batch in batches) == grid.n_tiles
    assert all(len(batch[0]) == grid.batch_size for batch in batches[:-1])
    chroma = (grid.tile_height >> grid.log2_chroma_h, grid.tile_width >> grid.log2_chroma_w)
    sizes = [(grid.tile_height, grid.tile_width), chroma, chroma]
    for batch, (i, size) in product(batches, enumerate(sizes[: grid.n_planes])):
        assert batch[i].shape == (len(batch[0]), *size)
        assert batch[i].flags.c_contiguous
        assert batch[i].flags.writeable
        assert not np.shares_memory(batch[i], planes[i])


@given(grid=grids(), overlap=st.integers(0, 40), data=st.data())
def test_geometry_of_each_axis(grid, overlap, data):
    subsampling = data.draw(st.sampled_from(sorted(SUBSAMPLINGS)))
    align = data.draw(st.sampled_from([1, 2, 6, 8]))
    side = data.draw(st.integers(overlap + 4, 70))
    grid = plan(grid.width, grid.height, subsampling, (side, side), overlap, align=align)
    axes = [
        (grid.columns, grid.tile_width, grid.width, 1 << grid.log2_chroma_w),
        (grid.rows, grid.tile_height, grid.height, 1 << grid.log2_chroma_h),
    ]
    for spans, tile, size, chroma in axes:
        padded = -(-size // chroma) * chroma
        unit = np.lcm(align, chroma)
        assert spans[0].start == 0
        assert spans[-1].start + tile == padded, "flush with the border"
        assert all(span.start % chroma == 0 for span in spans)
        assert all(a.start + tile - b.start >= overlap for a, b in pairwise(spans))
        assert [s.keep_from for s in spans] == [0, *(s.keep_to for s in spans[:-1])]
        assert spans[-1].keep_to == size
        for span in spans:
            assert span.start <= span.keep_from < span.keep_to <= span.start + tile
        for before, after in pairwise(spans):
            halo = min(after.keep_from - after.start, before.start + tile - before.keep_to)
            assert halo >= overlap // 2 - (chroma - 1)
        if len(spans) > 1:
            assert tile % unit == 0
            assert tile <= -(-side // unit) * unit
        else:
            assert tile == padded


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "align", "tile_size", "n"),
    [
        ((1920, 1080), (512, 512), 32, 8, (504, 384), (4, 3)),
        ((1920, 1080), (256, 256), 32, 8, (248, 248), (9, 5)),
        ((1280, 720), (1280, 720), 32, 8, (1280, 720), (1, 1)),
        ((1280, 720), (2000, 400), 32, 8, (1280, 376), (1, 2)),
        ((257, 64), (256, 64), 32, 8, (152, 64), (2, 1)),
        ((31, 17), (256, 256), 32, 8, (32, 18), (1, 1)),
        ((1, 1), (256, 256), 32, 8, (2, 2), (1, 1)),
        ((1919, 1079), None, 32, 8, (1920, 1080), (1, 1)),
    ],
)
def test_plan_takes_few_tiles_and_no_larger_than_needed(size, tile, overlap, align, tile_size, n):
    grid = plan(*size, tile=tile, overlap=overlap, align=align)
    assert (grid.tile_width, grid.tile_height) == tile_size
    assert (len(grid.columns), len(grid.rows)) == n


def test_tiles_are_row_major_and_cut_in_the_middle_of_the_overlap():
    grid = plan(96, 64, "gray", tile=(64, 64), overlap=32, batch_size=8)
    assert [(s.start, s.keep_from, s.keep_to) for s in grid.columns] == [(0, 0, 48), (32, 48, 96)]
    ((tiles,),) = grid.split((np.zeros((64, 96), np.uint8),))
    (merged,) = grid.merge([(np.stack([tiles[0] + 1, tiles[1] + 2]),)])
    assert (merged[:, :48] == 1).all()
    assert (merged[:, 48:] == 2).all()


def test_an_odd_frame_is_extended_by_its_border():
    grid = plan(5, 3, tile=None)
    planes = noise(grid)
    ((luma, cb, _),) = grid.split(planes)
    np.testing.assert_array_equal(luma[0], np.pad(planes[0], ((0, 1), (0, 1)), mode="edge"))
    np.testing.assert_array_equal(cb[0], planes[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "0x1080"),
        ({"height": -3}, "1920x-3"),
        ({"tile": (0, 64)}, "tiles of 0"),
        ({"tile": (64, -1)}, "tiles of -1"),
        ({"overlap": -1}, "-1"),
        ({"overlap": 48}, "48 pixels with an overlap of 48"),
        ({"tile": (16, 16), "overlap": 15}, "16 pixels with an overlap of 15"),
        ({"batch_size": 0}, "batch_size \\(0\\)"),
        ({"align": 0}, "align \\(0\\)"),
    ],
)
def test_nonsense_is_refused_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"width": 1920, "height": 1080, **changes})


@pytest.mark.parametrize(
    ("log2_chroma_w", "n_planes", "message"), [(-1, 3, "2\\*\\*-1"), (0, 4, "not 4")]
)
def test_unknown_layouts_are_refused(log2_chroma_w, n_planes, message):
    with pytest.raises(ValueError, match=message):
        TileGrid.plan(
            8,
            8,
            log2_chroma_w=log2_chroma_w,
            log2_chroma_h=0,
            n_planes=n_planes,
            tile=None,
            overlap=0,
            batch_size=1,
        )


def test_planes_of_another_size_and_missing_tiles_are_refused():
    grid = plan(100, 80, batch_size=3)
    planes = noise(grid)
    with pytest.raises(ValueError, match=r"\(80, 100\)"):
        grid.split((planes[0][:, :-1], *planes[1:]))
    with pytest.raises(ValueError, match="do not fit"):
        grid.split(planes[:1])
    batches = grid.split(planes)
    assert len(batches) > 1
    with pytest.raises(ValueError, match=f"grid of {grid.n_tiles}"):
        grid.merge(batches[:-1])
