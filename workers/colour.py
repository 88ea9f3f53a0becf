"""Owns the way from a stream's planes to the network's RGB, and of its residual back to the planes.
Knows no video, no network and no Ray: only what the numbers in a plane mean.

Colour is never converted there and back: the source's own samples stay, and the residual, turned
into Y, Cb, Cr by a linear map, is added to them. Where it is zero the planes are bit-identical.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.spec import PlaneSpec

Rows = tuple[tuple[float, ...], ...]

# Kr and Kb: ITU-R BT.601-7 (2.5.1), BT.709-6 (3.2), BT.2020-2 (table 4, non-constant luminance);
# SMPTE 240M and FCC 73.682 as in ITU-T H.273 (MatrixCoefficients 7 and 4).
_LUMA_WEIGHTS: dict[str, tuple[float, float]] = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}


def to_tensor(plane: NDArray[Any], device: torch.device | str) -> Tensor:
    """One plane's samples on `device`, as they are; a read-only array is copied."""
    samples = torch.from_numpy(plane if plane.flags.writeable else plane.copy())
    if torch.device(device).type == "cuda":
        # From memory that could be swapped out, the copy would wait for all that the GPU is at.
        return samples.pin_memory().to(device, non_blocking=True)
    return samples.to(device)


def planes_to_rgb(planes: tuple[Tensor, ...], spec: PlaneSpec) -> Tensor:
    """The network's input: float32 RGB `[N, 3, H, W]` in 0..1, channels_last, on their device.

    `planes` are uint8 or uint16 `[N, h, w]`. Chroma is interpolated linearly from where it is
    sited; colours outside the RGB cube are clamped to it; gray gives R = G = B.
    """
    luma = _normalise(planes[0], *_scale(spec)[0])
    n, height, width = luma.shape
    rgb = torch.empty(
        (n, 3, height, width), dtype=torch.float32, device=luma.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    if spec.n_planes == 1:
        return rgb.copy_(luma.clamp_(0, 1).unsqueeze(1))
    chroma = torch.stack(
        [_normalise(p, *s) for p, s in zip(planes[1:], _scale(spec)[1:], strict=True)]
    )
    for dim, factor, site in _chroma_axes(spec):
        chroma = _interpolate(chroma, factor, site, dim)
    for channel, weights in enumerate(_to_rgb(spec)):
        rgb[:, channel] = _mix((luma, *chroma), weights).clamp_(0, 1)
    return rgb


def add_residual(
    planes: Sequence[NDArray[Any] | Tensor], residual: Tensor, spec: PlaneSpec, strength: float
) -> tuple[NDArray[Any], ...]:
    """The planes `[N, h, w]` plus `strength` times the RGB residual `[N, 3, H, W]`, as new arrays.

    The residual is in units of the RGB range 0..1. Chroma takes the mean of the residual around
    each of its samples. The sum is rounded and clipped to the bit depth; 0 changes no sample.
    Raises FloatingPointError where the residual is not finite (a half-precision overflow): such
    a tile must not be written.
    """
    rgb = residual.detach().to(torch.float32).contiguous().unbind(1)
    if not math.isfinite(float(residual.sum(dtype=torch.float32))):
        raise FloatingPointError("the network's residual has infinite or undefined values")
    changes = [_mix(rgb, _from_rgb(spec, strength)[0])]
    if spec.n_planes == 3:
        small = torch.stack(rgb)
        for dim, factor, site in _chroma_axes(spec):
            small = _average(small, factor, site, dim)
        changes += [_mix(small, weights) for weights in _from_rgb(spec, strength)[1:]]
    return _to_arrays(
        [_add(plane, change, spec) for plane, change in zip(planes, changes, strict=True)]
    )


def _add(plane: NDArray[Any] | Tensor, change: Tensor, spec: PlaneSpec) -> Tensor:
    source = plane if isinstance(plane, Tensor) else to_tensor(plane, change.device)
    # float32 holds every 16-bit sample exactly, so that a change of 0 gives the sample back.
    total = source.to(change.device, torch.float32).add_(change)
    return total.round_().clamp_(0, (1 << spec.bit_depth) - 1).to(source.dtype)


def _to_arrays(planes: list[Tensor]) -> tuple[NDArray[Any], ...]:
    """The planes in this machine's memory; a GPU is waited for once, not plane by plane."""
    device = planes[0].device
    if device.type == "cuda":
        planes = [
            torch.empty_like(plane, device="cpu", pin_memory=True).copy_(plane, non_blocking=True)
            for plane in planes
        ]
        torch.cuda.current_stream(device).synchronize()
        # Copied once more, so that pinned memory is freed by this thread: PyTorch records an event
        # on the stream then, which must not be in the middle of a capture (mtair/graphs.py).
        return tuple(plane.numpy().copy() for plane in planes)
    return tuple(plane.numpy() for plane in planes)


def _normalise(plane: Tensor, offset: int, extent: int) -> Tensor:
    return plane.to(torch.float32).sub_(offset).div_(extent)


def _mix(planes: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
    terms = [(plane, weight) for plane, weight in zip(planes, weights, strict=True) if weight]
    if not terms:
        return torch.zeros_like(planes[0])
    total: Tensor = terms[0][0] * terms[0][1]
    for plane, weight in terms[1:]:
        total.add_(plane, alpha=weight)
    return total


def _scale(spec: PlaneSpec) -> tuple[tuple[int, int], ...]:
    """(offset, extent) of each plane: a sample is offset + extent * value; as in H.273."""
    unit, top = 1 << (spec.bit_depth - 8), (1 << spec.bit_depth) - 1
    luma = (0, top) if spec.full_range else (16 * unit, 219 * unit)
    if spec.n_planes == 1:
        return (luma,)
    if spec.matrix == "rgb":
        return (luma, luma, luma)
    # Y, Cg, Co are made of RGB that is already quantised to the luma extent.
    narrow = 219 if spec.matrix == "ycgco" else 224
    chroma = (128 * unit, top if spec.full_range else narrow * unit)
    return (luma, chroma, chroma)


@lru_cache
def _from_rgb(spec: PlaneSpec, strength: float) -> Rows:
    """Weights of R, G, B in each plane, in sample units, times `strength`."""
    rows = _matrix(spec)
    return tuple(
        tuple(weight * extent * strength for weight in row)
        for row, (_, extent) in zip(rows, _scale(spec), strict=True)
    )


@lru_cache
def _to_rgb(spec: PlaneSpec) -> Rows:
    """Weights of the normalised planes in R, G and B."""
    # Rounded so that what is 0 or 1 on paper is so here.
    inverse = np.linalg.inv(np.array(_matrix(spec))).round(12)
    return tuple(tuple(float(weight) for weight in row) for row in inverse)


def _matrix(spec: PlaneSpec) -> Rows:
    """Weights of R, G, B in each plane, for planes of extent 1; H.273, MatrixCoefficients."""
    if spec.n_planes == 1:
        # The network saw R = G = B: its three answers count alike.
        return ((1 / 3, 1 / 3, 1 / 3),)
    if spec.matrix == "rgb":
        return ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
    if spec.matrix == "ycgco":
        return ((0.25, 0.5, 0.25), (-0.25, 0.5, -0.25), (0.5, 0.0, -0.5))
    kr, kb = _LUMA_WEIGHTS[spec.matrix]
    kg = 1 - kr - kb
    blue, red = 0.5 / (1 - kb), 0.5 / (1 - kr)
    return (
        (kr, kg, kb),
        (-kr * blue, -kg * blue, 0.5),
        (0.5, -kg * red, -kb * red),
    )


def _chroma_axes(spec: PlaneSpec) -> Iterator[tuple[int, int, float]]:
    """(dim, factor, site) of the subsampled axes of `[3, N, H, W]`.

    Chroma sample k is sited at pixel `factor * k + site`; H.273, Chroma420SampleLocType.
    """
    location = spec.chroma_location
    if spec.log2_chroma_h:
        factor = 1 << spec.log2_chroma_h
        top, bottom = location.startswith("top"), location.startswith("bottom")
        yield 2, factor, 0 if top else factor - 1 if bottom else (factor - 1) / 2
    if spec.log2_chroma_w:
        factor = 1 << spec.log2_chroma_w
        yield 3, factor, 0 if location.endswith("left") else (factor - 1) / 2


def _interpolate(samples: Tensor, factor: int, site: float, dim: int) -> Tensor:
    """Linear interpolation to `factor` times as many; beyond the border its sample is repeated."""
    phases = []
    for place in range(factor):
        distance = (place - site) / factor
        neighbour = _shift(samples, 1 if distance > 0 else -1, dim)
        phases.append(torch.lerp(samples, neighbour, abs(distance)) if distance else samples)
    return torch.stack(phases, dim + 1).flatten(dim, dim + 1)


def _average(pixels: Tensor, factor: int, site: float, dim: int) -> Tensor:
    """One value for `factor` pixels: their mean where chroma is sited in the middle of them.

    Where it is sited on a pixel, the triangle around that pixel ([1 2 1] / 4 for factor 2): the
    transpose of the linear interpolation. Beyond the border the nearest pixels count twice.
    """
    phases = torch.unflatten(pixels, dim, (-1, factor)).unbind(dim + 1)
    if site == (factor - 1) / 2:
        return _mix(phases, [1 / factor] * factor)
    places = [int(site) + offset for offset in range(1 - factor, factor)]
    taps = [_shift(phases[place % factor], place // factor, dim) for place in places]
    return _mix(taps, [(factor - abs(place - site)) / factor**2 for place in places])


def _shift(samples: Tensor, by: int, dim: int) -> Tensor:
    """Each sample's neighbour, 0 or 1 before (-1) or after (1) it; at the border itself."""
    length = samples.shape[dim]
    if by < 0:
        return torch.cat((samples.narrow(dim, 0, 1), samples.narrow(dim, 0, length - 1)), dim)
    if by > 0:
        return torch.cat((samples.narrow(dim, 1, length - 1), samples.narrow(dim, -1, 1)), dim)
    return samples
