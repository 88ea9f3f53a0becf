"""Colour against published values, swscale, OpenCV and np.interp; no residual, no change."""

import os
from dataclasses import replace
from itertools import product

import av
import cv2
import numpy as np
import pytest
import torch

from workers.colour import add_residual, planes_to_rgb, to_tensor
from workers.spec import PlaneSpec

YUV = PlaneSpec(3, 0, 0, 8, "bt709", full_range=False, chroma_location="left")
SUBSAMPLINGS = {"444": (0, 0), "422": (1, 0), "440": (0, 1), "420": (1, 1), "410": (2, 2)}
LOCATIONS = ["left", "center", "topleft", "top", "bottomleft", "bottom"]
MATRICES = ["bt601", "bt709", "bt2020", "smpte240m", "fcc", "ycgco", "rgb"]
WEIGHTS = {  # Kr, Kb
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}


def spec(subsampling="444", **changes):
    log2_w, log2_h = SUBSAMPLINGS[subsampling]
    return replace(YUV, log2_chroma_w=log2_w, log2_chroma_h=log2_h, **changes)


def dtype_of(s):
    return np.uint8 if s.bit_depth == 8 else np.uint16


def noise(s, n=2, width=16, height=8, seed=0):
    """Samples over all of the bit depth, as the read-only arrays that frames and Ray give."""
    rng = np.random.default_rng(seed)
    shapes = [(n, height, width)] + 2 * [(n, height >> s.log2_chroma_h, width >> s.log2_chroma_w)]
    planes = tuple(rng.integers(0, 1 << s.bit_depth, shape, dtype_of(s)) for shape in shapes)
    for plane in planes:
        plane.setflags(write=False)
    return planes[: s.n_planes]


def to_rgb(planes, s):
    return planes_to_rgb(tuple(to_tensor(plane, "cpu") for plane in planes), s)


def constant(s, *values):
    shapes = [(1, 8, 8)] + 2 * [(1, 8 >> s.log2_chroma_h, 8 >> s.log2_chroma_w)]
    return tuple(np.full(shape, v, dtype_of(s)) for shape, v in zip(shapes, values, strict=False))


def from_rgb(rgb, s):
    """RGB [N, 3, H, W] to planes without subsampling, by the textbook's formulas in float64."""
    unit, top = 1 << (s.bit_depth - 8), (1 << s.bit_depth) - 1
    narrow = 219 if s.matrix == "ycgco" else 224
    luma = (0, top) if s.full_range else (16 * unit, 219 * unit)
    chroma = (128 * unit, top if s.full_range else narrow * unit)
    r, g, b = rgb[:, 0], rgb[:, 1], rgb[:, 2]
    if s.matrix == "rgb":
        values, scales = (g, b, r), (luma, luma, luma)
    elif s.matrix == "ycgco":
        values = (g / 2 + (r + b) / 4, g / 2 - (r + b) / 4, (r - b) / 2)
        scales = (luma, chroma, chroma)
    else:
        kr, kb = WEIGHTS[s.matrix]
        y = kr * r + (1 - kr - kb) * g + kb * b
        values = (y, (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr))
        scales = (luma, chroma, chroma)
    pairs = zip(values, scales, strict=True)
    return tuple(np.clip(np.rint(o + e * v), 0, top).astype(dtype_of(s)) for v, (o, e) in pairs)


@pytest.mark.parametrize("bit_depth", [8, 9, 10, 12, 16])
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("full_range", [False, True])
def test_a_zero_residual_leaves_every_sample_as_it_is(bit_depth, subsampling, full_range):
    for matrix, location in product(MATRICES, LOCATIONS):
        s = spec(subsampling, bit_depth=bit_depth, matrix=matrix, chroma_location=location)
        s = replace(s, full_range=full_range)
        for width, height in ((16, 8), (1 << s.log2_chroma_w, 1 << s.log2_chroma_h)):
            planes = noise(s, 2, width, height)
            out = add_residual(planes, torch.zeros(2, 3, height, width), s, 1.0)
            for before, after in zip(planes, out, strict=True):
                np.testing.assert_array_equal(before, after, strict=True)


# 100 % colours: the colour bar levels of BT.601 and BT.709, JFIF's for full range.
PUBLISHED = [
    ("bt601", False, (235, 128, 128), (1, 1, 1)),
    ("bt601", False, (16, 128, 128), (0, 0, 0)),
    ("bt601", False, (81, 90, 240), (1, 0, 0)),
    ("bt601", False, (145, 54, 34), (0, 1, 0)),
    ("bt601", False, (41, 240, 110), (0, 0, 1)),
    ("bt601", True, (255, 128, 128), (1, 1, 1)),
    ("bt601", True, (76, 85, 255), (1, 0, 0)),
    ("bt709", False, (235, 128, 128), (1, 1, 1)),
    ("bt709", False, (16, 128, 128), (0, 0, 0)),
    ("bt709", False, (63, 102, 240), (1, 0, 0)),
    ("bt709", False, (173, 42, 26), (0, 1, 0)),
    ("bt709", False, (32, 240, 118), (0, 0, 1)),
    ("bt2020", False, (235, 128, 128), (1, 1, 1)),
    ("rgb", True, (0, 255, 255), (1, 0, 1)),
    ("rgb", False, (235, 16, 16), (0, 1, 0)),
]


@pytest.mark.parametrize("subsampling", ["444", "420"])
@pytest.mark.parametrize(("matrix", "full_range", "ycc", "rgb"), PUBLISHED)
def test_published_values(subsampling, matrix, full_range, ycc, rgb):
    s = spec(subsampling, matrix=matrix, full_range=full_range)
    out = to_rgb(constant(s, *ycc), s)
    is_gray = ycc[1:] == (128, 128) or matrix == "rgb"
    expected = torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    # The levels of the primaries are rounded to 8 bits: half a step in each plane.
    torch.testing.assert_close(out, expected, rtol=0, atol=0 if is_gray else 1.5 / 219)


@pytest.mark.parametrize("bit_depth", [8, 10, 12, 16])
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
def test_rgb_matches_the_textbook_and_its_difference_leads_back(matrix, full_range, bit_depth):
    s = spec(bit_depth=bit_depth, full_range=full_range, matrix=matrix)
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 2, 3, 16, 16)) * 0.98 + 0.01
    before, after = from_rgb(first, s), from_rgb(second, s)
    step = 1 / (219 << (bit_depth - 8))
    torch.testing.assert_close(
        to_rgb(before, s).double(), torch.from_numpy(first), rtol=0, atol=1.6 * step + 1e-6
    )
    out = add_residual(before, to_rgb(after, s) - to_rgb(before, s), s, 1.0)
    for got, expected in zip(out, after, strict=True):
        assert got.dtype == expected.dtype
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
def test_rgb_matches_swscale(matrix, full_range):
    s = spec(matrix=matrix, full_range=full_range)
    planes = from_rgb(np.random.default_rng(2).random((1, 3, 32, 64)), s)
    frame = av.VideoFrame.from_ndarray(np.concatenate(planes), format="yuv444p")
    frame = frame.reformat(
        format="rgb24",
        src_colorspace={"bt601": "ITU601", "bt709": "ITU709"}[matrix],
        src_color_range="JPEG" if full_range else "MPEG",
        dst_color_range="JPEG",
    )
    ours = to_rgb(planes, s)[0].permute(1, 2, 0).numpy() * 255
    # swscale rounds its coefficients and its result.
    assert np.abs(ours - frame.to_ndarray()).max() <= 2.5


def test_rgb_matches_opencv():
    s = spec(matrix="bt601", full_range=True)
    planes = from_rgb(np.random.default_rng(3).random((1, 3, 32, 64)), s)
    y, cb, cr = (plane[0] for plane in planes)
    reference = cv2.cvtColor(np.dstack([y, cr, cb]), cv2.COLOR_YCrCb2RGB)
    ours = to_rgb(planes, s)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - reference).max() <= 1


@pytest.mark.parametrize(
    ("bit_depth", "rgb", "moved"),
    [
        (8, (10 / 219, 10 / 219, 10 / 219), (10, 0, 0)),
        (8, (0.5, 0, 0), (23, -13, 56)),  # 219·0.2126/2, -224·0.2126/1.8556/2, 224/4
        (10, (0.5, 0, 0), (93, -51, 224)),
        (8, (0, 0, -0.5), (-8, -56, 5)),  # -219·0.0722/2, -224/4, 224·0.0722/1.5748/2
    ],
)
@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
@pytest.mark.parametrize("location", LOCATIONS)
def test_a_constant_residual_moves_each_plane_by_its_number(
    bit_depth, rgb, moved, subsampling, location
):
    s = spec(subsampling, bit_depth=bit_depth, chroma_location=location)
    planes = constant(s, *(125 << (bit_depth - 8),) * 3)
    residual = torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    out = add_residual(planes, residual, s, 1.0)
    for before, after, by in zip(planes, out, moved, strict=True):
        np.testing.assert_array_equal(after.astype(int), before.astype(int) + by)


def test_strength_is_one_multiplication():
    s = spec("420", bit_depth=16)
    planes = tuple(plane // 2 + 16000 for plane in noise(s))
    residual = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)) * 0.02

    def moved(strength):
        out = add_residual(planes, residual, s, strength)
        return [a.astype(int) - b.astype(int) for a, b in zip(out, planes, strict=True)]

    for whole, half, none in zip(moved(1.0), moved(0.5), moved(0.0), strict=True):
        assert np.abs(whole).max() > 100
        assert np.abs(whole / 2 - half).max() <= 1
        assert not none.any()


@pytest.mark.parametrize("bit_depth", [8, 10, 16])
@pytest.mark.parametrize(("residual", "level"), [(9.0, 1), (-9.0, 0)])
def test_the_sum_is_clipped_to_the_bit_depth(bit_depth, residual, level):
    s = spec(bit_depth=bit_depth, matrix="rgb")
    for plane in add_residual(noise(s), torch.full((2, 3, 8, 16), residual), s, 1.0):
        assert (plane == level * ((1 << bit_depth) - 1)).all()


@pytest.mark.parametrize("bit_depth", [8, 10])
@pytest.mark.parametrize("matrix", MATRICES)
def test_gray_is_luma_alone(bit_depth, matrix):
    s = spec(n_planes=1, bit_depth=bit_depth, matrix=matrix, full_range=True)
    planes = noise(s)
    rgb = to_rgb(planes, s)
    expected = torch.from_numpy(planes[0] / ((1 << bit_depth) - 1)).float()
    for channel in range(3):
        torch.testing.assert_close(rgb[:, channel], expected)
    out = add_residual(constant(s, 100), torch.full((1, 3, 8, 8), 20 / 255), s, 1.0)
    assert len(out) == 1
    assert (out[0] == (120 if bit_depth == 8 else 180)).all()


def site_of(location, factor, vertical):
    """In pixels, of a chroma sample within its block."""
    if vertical:
        first, last = location.startswith("top"), location.startswith("bottom")
        return 0 if first else factor - 1 if last else (factor - 1) / 2
    return 0 if "left" in location else (factor - 1) / 2


def resample(plane, shape, sites, factors):
    """Linear interpolation between sited samples, rows then columns, by np.interp."""
    for axis in (0, 1):
        at = np.arange(plane.shape[axis]) * factors[axis] + sites[axis]
        target = np.arange(shape[axis])
        lines = np.moveaxis(plane, axis, -1)
        plane = np.moveaxis(np.array([np.interp(target, at, x) for x in lines]), -1, axis)
    return plane


@pytest.mark.parametrize("subsampling", ["422", "440", "420", "410"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_chroma_is_interpolated_from_where_it_is_sited(subsampling, location):
    s = spec(subsampling, bit_depth=16, full_range=True, chroma_location=location)
    factors = (1 << s.log2_chroma_h, 1 << s.log2_chroma_w)
    y, cb, cr = constant(s, 30000, 32768, 32768)
    cr = (cr + np.random.default_rng(4).integers(-9000, 9000, cr.shape)).astype(np.uint16)
    red = to_rgb((y, cb, cr), s)[0, 0].numpy()
    sites = tuple(site_of(location, f, vertical=axis == 0) for axis, f in enumerate(factors))
    expected = resample(cr[0].astype(float), (8, 8), sites, factors)
    got = (red * 65535 - 30000) / (2 * (1 - 0.2126)) + 32768
    np.testing.assert_allclose(got, expected, atol=0.02)


KERNELS = {  # by (factor, site): first pixel relative to the block, weights
    (1, 0): (0, [1]),
    (2, 0): (-1, [0.25, 0.5, 0.25]),
    (2, 0.5): (0, [0.5, 0.5]),
    (2, 1): (0, [0.25, 0.5, 0.25]),
    (4, 0): (-3, np.array([1, 2, 3, 4, 3, 2, 1]) / 16),
    (4, 1.5): (0, [0.25] * 4),
    (4, 3): (0, np.array([1, 2, 3, 4, 3, 2, 1]) / 16),
}


@pytest.mark.parametrize("subsampling", ["422", "440", "420", "410"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_the_residual_is_averaged_around_where_chroma_is_sited(subsampling, location):
    s = spec(subsampling, bit_depth=16, full_range=True, chroma_location=location)
    planes = constant(s, 32768, 32768, 32768)
    residual = np.zeros((1, 3, 8, 8), np.float32)
    residual[0, 0] = np.random.default_rng(5).uniform(-0.3, 0.3, (8, 8))
    expected = residual[0, 0].astype(float)
    for axis, factor in ((0, 1 << s.log2_chroma_h), (1, 1 << s.log2_chroma_w)):
        first, kernel = KERNELS[factor, site_of(location, factor, vertical=axis == 0)]
        lines = np.pad(np.moveaxis(expected, axis, -1), ((0, 0), (8, 8)), constant_values=np.nan)
        starts = [8 + k * factor + first for k in range(8 // factor)]
        means = [lines[:, at : at + len(kernel)] @ kernel for at in starts]
        expected = np.moveaxis(np.stack(means, -1), -1, axis)
    out = add_residual(planes, torch.from_numpy(residual), s, 1.0)[2][0].astype(float)
    inside = ~np.isnan(expected)
    assert inside.any()
    np.testing.assert_allclose(out[inside] - 32768, 32767.5 * expected[inside], atol=0.52)


@pytest.mark.parametrize("n_planes", [1, 3])
def test_the_networks_input_is_in_range_and_in_its_layout_and_dtype(n_planes):
    s = replace(spec("420"), n_planes=n_planes)
    rgb = to_rgb(noise(s, n=3), s)
    assert (rgb.shape, rgb.dtype) == ((3, 3, 8, 16), torch.float32)
    assert rgb.is_contiguous(memory_format=torch.channels_last)
    assert rgb.min() == 0
    assert rgb.max() == 1


def test_a_residual_of_any_layout_and_dtype_and_planes_on_the_device_give_the_same():
    s = spec("420")
    planes = noise(s)
    residual = (torch.randn(2, 3, 8, 16) * 0.1).to(torch.bfloat16)
    expected = add_residual(planes, residual.float(), s, 1.0)
    tensors = [to_tensor(plane, "cpu") for plane in planes]
    last = residual.contiguous(memory_format=torch.channels_last)
    for given, changes in ((planes, last), (tensors, residual)):
        for got, wanted in zip(add_residual(given, changes, s, 1.0), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_residual_that_is_not_finite_is_never_written(value):
    residual = torch.zeros(2, 3, 8, 16)
    residual[1, 2, 3, 4] = value
    with pytest.raises(FloatingPointError, match="infinite or undefined"):
        add_residual(noise(spec()), residual, spec(), 1.0)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives():
    if not torch.cuda.is_available():
        assert os.environ.get("REQUIRE_GPU") != "1", "REQUIRE_GPU=1, and there is none"
        pytest.skip("no GPU")
    for s in (spec("420"), spec("420", bit_depth=10)):
        planes = noise(s)
        rgb = to_rgb(planes, s)
        on_gpu = tuple(to_tensor(plane, "cuda") for plane in planes)
        torch.testing.assert_close(planes_to_rgb(on_gpu, s).cpu(), rgb)
        expected = add_residual(planes, rgb * -0.1, s, 1.0)
        for got, plane in zip(
            add_residual(on_gpu, rgb.cuda() * -0.1, s, 1.0), expected, strict=True
        ):
            assert np.abs(got.astype(int) - plane.astype(int)).max() <= 1
