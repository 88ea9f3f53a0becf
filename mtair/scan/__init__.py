"""The selective scan behind one function, whichever backend computes it.

Owns the choice of backend and mamba's calling convention; knows nothing of the network.
"""

import functools
import importlib.util
import logging
import math
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtair.scan import reference

__all__ = [
    "Availability",
    "Backend",
    "ScanUnavailable",
    "choose",
    "cross_scan",
    "explain",
    "selective_scan",
]

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "numba", "triton", "mamba_ssm"]
FASTEST: dict[str, tuple[Backend, ...]] = {"cpu": ("numba",), "cuda": ("triton", "mamba_ssm")}
MAMBA_INSTALL = "MAMBA_KEEP_CUDA_BUILD=TRUE pip install mamba-ssm --no-build-isolation"


class ScanUnavailable(RuntimeError):  # noqa: N818
    """A backend was asked for that this machine or these tensors cannot have."""


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether `backend` can run on tensors of a device, and in one line why or why not."""

    backend: Backend
    available: bool
    why: str


def explain(device: torch.device) -> list[Availability]:
    """Every backend on `device`, in the order in which `auto` would take them."""
    order: list[Backend] = [*FASTEST.get(device.type, ()), "reference"]
    names: tuple[Backend, ...] = ("numba", "triton", "mamba_ssm")
    found = []
    for name in order + [name for name in names if name not in order]:
        obstacle = _obstacle(name, device)
        found.append(Availability(name, not obstacle, obstacle or _PURPOSE[name]))
    return found


_PURPOSE: dict[Backend, str] = {
    "reference": "the plain loop in PyTorch: any device, slow",
    "numba": "compiled for this CPU",
    "triton": "a chunked parallel scan, four directions in one kernel",
    "mamba_ssm": "mamba's own kernel, the four scans laid out one by one",
}


def choose(backend: Backend, device: torch.device) -> Backend:
    """The backend that will run on `device`: the one asked for, or the fastest present.

    Raises ScanUnavailable with the command that would install the one asked for.
    """
    if backend != "auto":
        obstacle = _obstacle(backend, device)
        if obstacle:
            raise ScanUnavailable(f"{obstacle}; or use backend='auto'")
        return backend
    for name in FASTEST.get(device.type, ()):
        if not _obstacle(name, device):
            return name
    if device.type in FASTEST:
        _warn_slow(device.type)
    return "reference"


@functools.cache
def _warn_slow(device_type: str) -> None:
    """Once per process and kind of device: a scan runs dozens of times per image."""
    logger.warning(
        "no fast scan for %s here, the slow reference runs; `mtair doctor` says why", device_type
    )


def _obstacle(backend: Backend, device: torch.device) -> str:
    """Why `backend` cannot run on `device`, and what to do; empty where it can."""
    if backend == "numba":
        if device.type != "cpu":
            return f"the numba scan runs on the CPU only, not on {device}"
        return "" if _has("numba") else "the numba scan needs `pip install numba`"
    if backend == "triton":
        if not _has("triton"):
            return (
                "the triton scan needs `pip install triton` (Linux; CUDA builds of torch bring it)"
            )
        # Triton's own switch, for tests: its kernels run, slowly, on CPU tensors.
        interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type == "cuda" or interpreted:
            return ""
        return f"the triton scan needs CUDA tensors, not {device}"
    if backend == "mamba_ssm":
        if device.type != "cuda":
            return f"the mamba_ssm scan needs CUDA tensors and `{MAMBA_INSTALL}`, not {device}"
        # The CUDA part is a module of its own, and pip installs the rest without it.
        whole = _has("mamba_ssm") and _has("selective_scan_cuda")
        return "" if whole else f"the mamba_ssm scan with its CUDA part needs `{MAMBA_INSTALL}`"
    return ""


@functools.cache
def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Mamba's selective scan, with the shapes of `mamba_ssm`'s `selective_scan_fn`.

    u, delta, z `[N, D, L]`; A `[D, S]` real; B, C `[D, S]`, `[N, S, L]` or `[N, G, S, L]` with G
    dividing D; D and delta_bias `[D]`. Returns `[N, D, L]` in the dtype of u; the state is float32
    (float64 for float64 inputs). Raises ScanUnavailable, or ValueError on shapes that do not fit.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    backend = choose(backend, u.device)
    if backend == "mamba_ssm":
        from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found]
            selective_scan_fn,
        )

        return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)  # type: ignore[no-any-return]
    n, d, length = u.shape
    wide = torch.promote_types(u.dtype, torch.float32)

    def read(t: Tensor) -> Tensor:  # Triton widens what it reads, in registers
        return t if backend == "triton" else t.to(wide)

    B, C = read(_grouped(B, n, length, d)), read(_grouped(C, n, length, d))
    groups = math.lcm(B.shape[2], C.shape[2])
    B, C = (x.repeat_interleave(groups // x.shape[2], dim=2) for x in (B, C))
    split = (n, length, groups, d // groups)
    y = _grouped_scan(
        read(u).transpose(1, 2).reshape(split),
        read(delta).transpose(1, 2).reshape(split),
        A.to(wide).reshape(groups, d // groups, -1), B, C,
        bias=(u.new_zeros(d) if delta_bias is None else delta_bias).to(wide).reshape(split[2:]),
        softplus=delta_softplus, backend=backend,
    )  # fmt: skip
    y = y.reshape(n, length, d).transpose(1, 2)
    if D is not None:
        y = y + u.to(wide) * D.to(wide)[:, None]
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(u.dtype)


def _check_shapes(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:  # fmt: skip
    if A.is_complex() or B.is_complex() or C.is_complex():
        raise ValueError("complex A, B or C are not supported: pass real tensors")
    if u.dim() != 3 or delta.shape != u.shape or A.dim() != 2 or A.shape[0] != u.shape[1]:
        raise ValueError(
            f"u and delta must be [N, D, L] and A [D, S], got {tuple(u.shape)}, "
            f"{tuple(delta.shape)}, {tuple(A.shape)}"
        )
    if u.shape[2] == 0:
        raise ValueError("the sequence is empty: L must be at least 1")
    n, d, length = u.shape
    for name, x in (("B", B), ("C", C)):
        states = A.shape[1]
        forms = [(d, states), (n, states, length), (n, *x.shape[1:2], states, length)]
        if tuple(x.shape) not in forms:
            raise ValueError(f"{name} must be one of {forms}, got {tuple(x.shape)}")
    for name, given, shape in (("D", D, (d,)), ("delta_bias", delta_bias, (d,)), ("z", z, u.shape)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(given.shape)}")


def _grouped(x: Tensor, n: int, length: int, d: int) -> Tensor:
    """B or C in any of mamba's three forms → `[N, L, G, S]`; a fixed one has a group a channel."""
    if x.dim() == 2:
        return x.expand(n, length, d, x.shape[1])
    if x.dim() == 3:
        x = x.unsqueeze(1)
    if d % x.shape[1]:
        raise ValueError(f"{x.shape[1]} groups do not divide {d} channels")
    return x.permute(0, 3, 1, 2)


def _grouped_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, bias: Tensor, softplus: bool,
    backend: Backend,
) -> Tensor:  # fmt: skip
    if backend == "numba":
        from mtair.scan import numba_cpu

        return numba_cpu.scan(u, dt, A, B, C, bias=bias, softplus=softplus)
    if backend == "triton":
        from mtair.scan import triton_cuda

        return triton_cuda.scan(
            u, dt, A, B, C, bias=bias, softplus=softplus, cross=False, height=1, width=u.shape[1]
        )
    dt = F.softplus(dt + bias) if softplus else dt + bias
    return reference.scan(u, dt, A, B, C)


def cross_scan(
    x: Tensor, projection: Tensor, dt_weight: Tensor, A: Tensor, dt_bias: Tensor, D: Tensor, *,
    height: int, width: int, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Scan an image in four directions and sum, with the skip: x `[N, L, d]` → `[N, L, d]`.

    L = height·width, all in pixel (row-major) order. `projection` `[N, L, 4, R + 2 S]` holds, for
    each direction, the low-rank step, B and C; the step is softplus(dt_weight·low + dt_bias) with
    dt_weight `[4, d, R]` and dt_bias `[4, d]`; A `[4, d, S]`; skip weights D `[4, d]`. Of any float
    type; computed and returned in float32 (float64 for a float64 x). Raises ScanUnavailable, or
    ValueError on shapes that do not fit.
    """
    _check_cross_shapes(x, projection, dt_weight, A, dt_bias, D, height, width)
    backend = choose(backend, x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    x, projection, dt_weight, A, dt_bias, D = (
        t.to(wide) for t in (x, projection, dt_weight, A, dt_bias, D)
    )
    if backend == "numba":
        from mtair.scan import numba_cross

        return numba_cross.scan(x, projection, dt_weight, A, dt_bias, D, height=height, width=width)
    rank, states = dt_weight.shape[2], A.shape[2]
    low, B, C = torch.split(projection, [rank, states, states], dim=3)
    dt = torch.einsum("nlkr,kdr->nlkd", low, dt_weight)
    if backend == "triton":
        from mtair.scan import triton_cuda

        y = triton_cuda.scan(
            x, dt, A, B, C, bias=dt_bias, softplus=True, cross=True, height=height, width=width
        )
    elif backend == "mamba_ssm":
        y = _cross_scan_mamba(x, dt, A, B, C, dt_bias, height, width)
    else:
        y = reference.cross_scan(x, F.softplus(dt + dt_bias), A, B, C, height, width)
    return y + x * D.sum(0)


def _check_cross_shapes(
    x: Tensor, projection: Tensor, dt_weight: Tensor, A: Tensor, dt_bias: Tensor, D: Tensor,
    height: int, width: int,
) -> None:  # fmt: skip
    """The compiled loops trust the shapes: a wrong one would read past the end of an array."""
    n, length, d = x.shape
    rank, states = dt_weight.shape[-1], A.shape[-1]
    want = [(n, length, 4, rank + 2 * states), (4, d, rank), (4, d, states), (4, d), (4, d)]
    got = [tuple(t.shape) for t in (projection, dt_weight, A, dt_bias, D)]
    if any(t.is_complex() for t in (projection, dt_weight, A)):
        raise ValueError("complex coefficients are not supported: pass real tensors")
    if got != want or length != height * width or length == 0:
        raise ValueError(
            f"x {tuple(x.shape)} of {height}x{width} pixels needs projection, dt_weight, A, "
            f"dt_bias and D {want}, got {got}"
        )


def _cross_scan_mamba(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor, height: int, width: int
) -> Tensor:
    """The four scans laid out side by side as groups of one call of mamba's kernel."""
    order = reference.direction_order(height, width, x.device)
    n, length, d = x.shape

    def along(t: Tensor) -> Tensor:  # [N, L, 4, c] → [N, 4, c, L], each group in its own order
        return torch.stack([t[:, order[k], k].transpose(1, 2) for k in range(4)], dim=1)

    y = selective_scan(
        along(x.unsqueeze(2).expand(n, length, 4, d)).reshape(n, 4 * d, length),
        along(dt).reshape(n, 4 * d, length), A.reshape(4 * d, -1), along(B), along(C),
        delta_bias=bias.reshape(-1), delta_softplus=True, backend="mamba_ssm",
    ).view(n, 4, d, length)  # fmt: skip
    merged = torch.zeros_like(x)
    for k in range(4):
        merged = merged.index_add(1, order[k], y[:, k].transpose(1, 2))
    return merged
