"""The blocks of MTAIR, named as in the paper; every map is `[N, C, H, W]`, best in channels-last.

Owns the arithmetic of one block; knows nothing of how many there are or at which scale.
The structure of M-T DN and S-C PB is the paper's (arXiv 2412.15845), their inside is a
reconstruction from the ancestors named at each class: not confirmed against the authors' code.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtair import fused
from mtair.scan import Backend, cross_scan

Fuse = Literal["concat", "sum"]


class LayerNorm(nn.Module):
    """LayerNorm over the channels of each pixel, with bias (Restormer's 'WithBias')."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same; free of copies where x is channels-last."""
        return self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def _conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def _depthwise3x3(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[N, C, H, W]` → `[N, heads, H·W, C/heads]`, a view where x is channels-last."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, heads, c // heads).transpose(1, 2)


def _from_heads(x: Tensor, height: int, width: int) -> Tensor:
    n, heads, _, c = x.shape
    return x.transpose(1, 2).reshape(n, height, width, heads * c).permute(0, 3, 1, 2)


def _length(x: Tensor, dim: int) -> Tensor:
    """The L2 norm along `dim`, kept, at least 1e-12: in float32 (or float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide)
    return norm.clamp_min(1e-12)


def channel_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """Attention between channels, q and k normalised along the pixels (Restormer, eq. 1).

    q, k, v `[N, heads, H·W, c]`, temperature `[heads, 1, 1]`; returns `[N, heads, H·W, c]`. The
    norms are applied to the small c x c product instead of to the two large maps; in float16, whose
    largest number is 65504, that product of many pixels overflows: there q is normalised first.
    """
    first, second = _length(q, 2), _length(k, 2)
    if q.dtype == torch.float16:
        scores = ((q / first).to(q.dtype).transpose(2, 3) @ k) / second
    else:
        scores = (q.transpose(2, 3) @ k) / (first.transpose(2, 3) * second)
    weights: Tensor = (scores * temperature).softmax(-1).to(v.dtype)
    return v @ weights.transpose(2, 3)


def _no_autocast(device: str) -> AbstractContextManager[object]:
    # The meta device, on which costs are counted, has no autocast to switch off.
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention (Restormer, arXiv 2111.09881): linear in H·W."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = _conv1x1(channels, 3 * channels)
        self.qkv_dwconv = _depthwise3x3(3 * channels)
        self.project_out = _conv1x1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same."""
        q, k, v = (_by_head(t, self.heads) for t in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1))
        out = channel_attention(q, k, v, self.temperature)
        return self.project_out(_from_heads(out, *x.shape[2:]))  # type: ignore[no-any-return]


class GDFN(nn.Module):
    """Gated-Dconv feed-forward network (Restormer): `project_out(gelu(a) * b)`."""

    def __init__(self, channels: int, expansion: float) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = _conv1x1(channels, 2 * hidden)
        self.dwconv = _depthwise3x3(2 * hidden)
        self.project_out = _conv1x1(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same."""
        a, b = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(a) * b)  # type: ignore[no-any-return]


class SS2D(nn.Module):
    """The spatial branch: Vision State-Space Module (MambaIR, arXiv 2402.15648; VMamba's scans).

    Linear → depth-wise conv → SiLU → selective scan in four directions → LayerNorm → gate → Linear.
    """

    def __init__(self, channels: int, d_state: int, expand: float) -> None:
        super().__init__()
        d = int(channels * expand)
        self.d_state, self.dt_rank = d_state, math.ceil(channels / 16)
        self.scan_backend: Backend = "auto"
        self.in_proj = nn.Linear(channels, 2 * d, bias=False)
        self.conv2d = nn.Conv2d(d, d, 3, padding=1, groups=d)
        bound = d**-0.5
        rows = self.dt_rank + 2 * d_state
        self.x_proj_weight = nn.Parameter(torch.empty(4, rows, d).uniform_(-bound, bound))
        bound = self.dt_rank**-0.5
        self.dt_projs_weight = nn.Parameter(torch.empty(4, d, self.dt_rank).uniform_(-bound, bound))
        # Steps start between 1e-3 and 1e-1, log-uniformly: the bias is their inverse softplus.
        dt = torch.exp(torch.empty(4, d).uniform_(math.log(1e-3), math.log(1e-1))).clamp_min(1e-4)
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, d_state + 1)).repeat(4 * d, 1))
        self.Ds = nn.Parameter(torch.ones(4 * d))
        self.out_norm = nn.LayerNorm(d)
        self.out_proj = nn.Linear(d, channels, bias=False)

    def fits_fused(self) -> bool:
        """Whether `fused` can run this branch of a block that it runs."""
        return self.scan_backend in ("auto", "numba") and len(self.out_norm.weight) % 16 == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same; the scan itself runs in float32 whatever the dtype of x."""
        inner, gate = self.in_proj(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)
        inner = F.silu(self.conv2d(inner.permute(0, 3, 1, 2)))
        with _no_autocast(x.device.type):  # under which the projections would be bfloat16
            y = self._scan(inner.permute(0, 2, 3, 1))
        out = self.out_proj(self._normed(y).to(gate.dtype) * F.silu(gate))
        return out.permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def _normed(self, y: Tensor) -> Tensor:
        """In the scan's own precision: float16 does not hold all that it gives."""
        norm = self.out_norm
        weight, bias = norm.weight.to(y.dtype), norm.bias.to(y.dtype)
        return F.layer_norm(y, norm.normalized_shape, weight, bias, norm.eps)

    def _scan(self, x: Tensor) -> Tensor:
        """`[N, H, W, d]` → the sum of the four scans and the skip, float32 (or float64)."""
        n, h, w, d = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.reshape(n, h * w, d).to(wide)
        # A projection does not mind the order of the pixels: all four directions in one product.
        projection = F.linear(x, self.x_proj_weight.to(wide).flatten(0, 1))
        y = cross_scan(
            x, projection.view(n, h * w, 4, -1), self.dt_projs_weight.to(wide),
            -torch.exp(self.A_logs.to(wide)).view(4, d, self.d_state), self.dt_projs_bias.to(wide),
            self.Ds.to(wide).view(4, d), height=h, width=w, backend=self.scan_backend,
        )  # fmt: skip
        return y.view(n, h, w, d)


class TransformerBlock(nn.Module):
    """A plain block: channel attention, then the gated feed-forward network (Restormer)."""

    def __init__(self, channels: int, heads: int, expansion: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn = MDTA(channels, heads)
        self.norm2 = LayerNorm(channels)
        self.ffn = GDFN(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same."""
        if fused.runs_on(x):
            return fused.transformer_block(self, x)
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))  # type: ignore[no-any-return]


class MTDN(TransformerBlock):
    """Mamba-Transformer dual-branch block: channels by attention, space by selective scan.

    The two branches share a norm; their outputs are concatenated and brought back by a 1x1
    convolution (as TransMamba's block does), or summed.
    """

    def __init__(
        self, channels: int, heads: int, expansion: float, d_state: int, expand: float, fuse: Fuse
    ) -> None:
        super().__init__(channels, heads, expansion)
        self.ssm = SS2D(channels, d_state, expand)
        self.fuse = _conv1x1(2 * channels, channels) if fuse == "concat" else None

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same."""
        if fused.runs_on(x) and self.ssm.fits_fused():
            return fused.dual_block(self, x)
        n = self.norm1(x)
        channel, spatial = self.attn(n), self.ssm(n)
        if self.fuse is None:
            x = x + channel + spatial
        else:
            x = x + self.fuse(torch.cat([channel, spatial], dim=1))
        return x + self.ffn(self.norm2(x))  # type: ignore[no-any-return]


class PromptGenBlock(nn.Module):
    """Spatial-channel prompt block (S-C PB) on a skip path or the latent: same shape out as in.

    Generation after PromptIR (arXiv 2306.13090): the map's mean weighs a bank of learned prompts,
    the sum is resized to the map. Interaction by cross-attention, feature = query, prompt = key
    and value, once between channels and once pixel by pixel.
    """

    def __init__(
        self, prompt_dim: int, prompt_len: int, prompt_size: int, channels: int, heads: int,
        expansion: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads = heads
        bank = torch.rand(1, prompt_len, prompt_dim, prompt_size, prompt_size)
        self.prompt_param = nn.Parameter(bank)
        self.linear_layer = nn.Linear(channels, prompt_len)
        self.conv3x3 = nn.Conv2d(prompt_dim, prompt_dim, 3, padding=1, bias=False)
        self.align = _conv1x1(prompt_dim, channels)
        self.norm_x, self.norm_p = LayerNorm(channels), LayerNorm(channels)
        self.q, self.q_dwconv = _conv1x1(channels, channels), _depthwise3x3(channels)
        self.kv, self.kv_dwconv = _conv1x1(channels, 2 * channels), _depthwise3x3(2 * channels)
        self.temperature_channel = nn.Parameter(torch.ones(heads, 1, 1))
        self.temperature_spatial = nn.Parameter(torch.ones(heads, 1, 1))
        self.project_out = _conv1x1(2 * channels, channels)
        self.norm2 = LayerNorm(channels)
        self.ffn = GDFN(channels, expansion)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same."""
        if fused.runs_on(x):
            return fused.prompt_block(self, x)
        h, w = x.shape[2:]
        q = _by_head(self.q_dwconv(self.q(self.norm_x(x))), self.heads)
        prompt = self.norm_p(self.align(self._generate(x)))
        k, v = (_by_head(t, self.heads) for t in self.kv_dwconv(self.kv(prompt)).chunk(2, dim=1))
        channel = channel_attention(q, k, v, self.temperature_channel)
        match = (q * k).sum(-1, keepdim=True) / (_length(q, -1) * _length(k, -1))
        spatial = torch.sigmoid(match * self.temperature_spatial).to(v.dtype) * v
        both = torch.cat([_from_heads(channel, h, w), _from_heads(spatial, h, w)], dim=1)
        x = x + self.project_out(both)
        return x + self.ffn(self.norm2(x))  # type: ignore[no-any-return]

    def _generate(self, x: Tensor) -> Tensor:
        weights = self.linear_layer(x.mean((2, 3))).softmax(-1)
        bank = self.prompt_param[0].to(weights.dtype)
        prompt = torch.einsum("nl,ldhw->ndhw", weights, bank)
        prompt = F.interpolate(prompt, x.shape[2:], mode="bilinear", align_corners=False)
        prompt = prompt.contiguous(memory_format=torch.channels_last)
        return self.conv3x3(prompt)  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Half the size, twice the channels (or any given number that 4 divides)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs // 4, 3, padding=1, bias=False)
        self.body = nn.Sequential(conv, nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → `[N, outputs, H/2, W/2]`."""
        return self.body(x).contiguous(memory_format=torch.channels_last)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Twice the size, half the channels (or any given number), by a 3x3 or 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        conv = nn.Conv2d(inputs, outputs * 4, kernel, padding=kernel // 2, bias=False)
        self.body = nn.Sequential(conv, nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → `[N, outputs, 2H, 2W]`."""
        return self.body(x).contiguous(memory_format=torch.channels_last)  # type: ignore[no-any-return]
