"""The selective scan on NVIDIA GPUs as one autograd function over the Triton kernels.

Owns block sizes, launches and what is saved between them; knows neither modules nor mamba's
layouts. Set TRITON_INTERPRET=1 before the first import to run it on CPU tensors, slowly, as a test.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtair.scan import triton_kernels as kernels
from mtair.scan.triton_gradients import chunk_gradients

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the work is cut: steps of a chunk, channels of a program, and the tile of pass 2."""

    chunk: int
    channels: int = 32
    chunks: int = 128
    lanes: int = 32


# The gradients of a chunk are computed in registers: a longer one would not fit.
TRAINING = Blocks(chunk=16)


def _for_inference(dt: Tensor, parts: int) -> Blocks:
    """Long chunks read and write few carries; short ones fill the chip with one image."""
    n, length, _, channels = dt.shape
    wanted = 16 * _processors(dt.device)  # programs of one warp; hides the wait for memory
    chunk = 256
    while chunk > 32 and n * parts * -(-channels // 32) * -(-length // chunk) < wanted:
        chunk //= 2
    return Blocks(chunk)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class _Shape:
    """What every kernel is told of a scan."""

    n: int
    length: int
    height: int
    width: int
    channels: int
    states: int
    groups: int
    cross: bool
    softplus: bool
    blocks: Blocks
    acc: Any

    @property
    def chunks(self) -> int:
        return -(-self.length // self.blocks.chunk)

    @property
    def block_s(self) -> int:
        return int(triton.next_power_of_2(self.states))

    @property
    def channel_blocks(self) -> int:
        return -(-self.channels // self.blocks.channels)

    def grid(self, groups: int) -> tuple[int, int]:
        return (self.n * groups * self.chunks, self.channel_blocks)


def _carries(shape: _Shape, u: Tensor, dt: Tensor, A2: Tensor, B: Tensor, bias: Tensor,
             adjoint: bool) -> Tensor:  # fmt: skip
    """Passes 1 and 2: the state (or adjoint) before every chunk, `[N, G, chunks, S, d]`."""
    n, chunks, d = shape.n, shape.chunks, shape.channels
    ends = A2.new_empty((n, shape.groups, chunks, shape.states, d))
    totals = A2.new_empty((n, shape.groups, chunks, d))
    kernels.chunk_ends[shape.grid(shape.groups)](
        u, dt, A2, B, bias, ends, totals, shape.length, shape.height, shape.width, d,
        shape.states, shape.groups, chunks, CROSS=shape.cross, SOFTPLUS=shape.softplus,
        ADJOINT=int(adjoint), CHUNK=shape.blocks.chunk, BLOCK_C=shape.blocks.channels,
        BLOCK_S=shape.block_s, ACC=shape.acc, num_warps=1,
    )  # fmt: skip
    lanes = -(-shape.states * d // shape.blocks.lanes)
    together = min(shape.blocks.chunks, int(triton.next_power_of_2(chunks)))
    kernels.chunk_starts[(n * shape.groups, lanes)](
        ends, totals, A2, d, shape.states, shape.groups, chunks, CROSS=shape.cross,
        ADJOINT=int(adjoint), BLOCK_K=together, BLOCK_E=shape.blocks.lanes,
        ACC=shape.acc, num_warps=4,
    )  # fmt: skip
    return ends


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]  # noqa: ANN205
        ctx: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, bias: Tensor,
        softplus: bool, cross: bool, height: int, width: int,
    ):  # fmt: skip
        u, dt, B, C, bias = (x.detach().contiguous() for x in (u, dt, B, C, bias))
        A2 = (A.detach() * LOG2E).transpose(1, 2).contiguous()  # [G, S, d]
        n, length, groups, d = dt.shape
        parts = 2 if cross else groups
        training = any(ctx.needs_input_grad)
        blocks = TRAINING if training else _for_inference(dt, parts)
        acc = tl.float64 if A.dtype == torch.float64 else tl.float32
        shape = _Shape(
            n, length, height, width, d, A.shape[2], groups, cross, softplus, blocks, acc
        )
        y = A2.new_empty((n, length, parts, d))
        starts = _carries(shape, u, dt, A2, B, bias, adjoint=False)
        kernels.chunk_outputs[shape.grid(parts)](
            u, dt, A2, B, C, bias, starts, y, length, height, width, d, shape.states, groups,
            parts, shape.chunks, CROSS=cross, SOFTPLUS=softplus, CHUNK=blocks.chunk,
            BLOCK_C=blocks.channels, BLOCK_S=shape.block_s, ACC=acc, num_warps=1,
        )  # fmt: skip
        if training:
            ctx.save_for_backward(u, dt, A2, B, C, bias, starts)
            ctx.shape = shape
        return y[:, :, 0] + y[:, :, 1] if cross else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        u, dt, A2, B, C, bias, starts = ctx.saved_tensors
        shape: _Shape = ctx.shape
        dy = dy.contiguous()
        adjoints = _carries(shape, dy, dt, A2, C, bias, adjoint=True)
        du, ddt = (torch.empty_like(dt, dtype=A2.dtype) for _ in range(2))
        dA = torch.empty_like(starts)
        dB, dC = (A2.new_empty((shape.channel_blocks, *B.shape)) for _ in range(2))
        chunk_gradients[shape.grid(shape.groups)](
            u, dt, A2, B, C, bias, starts, adjoints, dy, du, ddt, dA, dB, dC, shape.length,
            shape.height, shape.width, shape.channels, shape.states, shape.groups, shape.chunks,
            B.numel() // shape.states, CROSS=shape.cross, SOFTPLUS=shape.softplus,
            CHUNK=shape.blocks.chunk, BLOCK_C=shape.blocks.channels, ACC=shape.acc, num_warps=1,
        )  # fmt: skip
        if shape.cross:
            du = du.sum(2)
        dA = dA.sum((0, 2)).transpose(1, 2)
        dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
        return (
            du.to(u.dtype), ddt.to(dt.dtype), dA, dB, dC, ddt.sum((0, 1)),
            None, None, None, None,
        )  # fmt: skip


def scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, bias: Tensor, softplus: bool,
    cross: bool, height: int, width: int,
) -> Tensor:  # fmt: skip
    """Scan every group along L, or with `cross` an image in four directions, and sum these.

    dt `[N, L, G, d]` before bias `[G, d]` and softplus; B, C `[N, L, G, S]`; A `[G, d, S]`; A and
    bias float32, the others float32, bfloat16 or float16 (all float64 works too). Without `cross`
    u and the answer are `[N, L, G, d]`; with it G is 4 and they are `[N, L, d]`, L = height·width.
    The answer is float32 (float64), as the state is.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    if u.numel() == 0:
        return u.to(wide)
    args = (u, dt, A.to(wide), B, C, bias.to(wide))
    # Triton launches on the current device, not on the tensor's.
    with torch.cuda.device_of(u):  # type: ignore[no-untyped-call]
        y: Tensor = _Scan.apply(*args, softplus, cross, height, width)  # type: ignore[no-untyped-call]
    return y
