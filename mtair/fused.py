"""The blocks' forward pass for a CPU without gradients: the same parameters, the same result.

Owns which blocks it can run and the arithmetic of one; the plain pass is in `blocks.py` and is what
trains. Maps stay channels-last throughout: matrix products by PyTorch on `[pixels, channels]`, and
between two of them one kernel of `fused_kernels.py`. Linear maps that follow one another are
multiplied out first: attention's weights, its projection and the fusion are one matrix.
"""

import math
import threading
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtair.scan import choose

if TYPE_CHECKING:
    from mtair.blocks import GDFN, MTDN, SS2D, PromptGenBlock, TransformerBlock, Upsample

_scratch = threading.local()
BANDS = 32  # of rows, whose parts of a sum are added up in their own order
LANES = 16


def runs_on(x: Tensor) -> bool:
    """Whether a map `[N, C, H, W]` can go through: CPU, no gradients, float32 or bfloat16."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")  # it leaves the weights in another precision
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.shape[1] % LANES == 0
        and x.numel() > 0
        and choose("auto", x.device) == "numba"
    )


def _flat(x: Tensor) -> Any:
    """All numbers of a contiguous tensor as the kernels take them, bfloat16 as int16."""
    x = x.detach().view(-1)
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _room(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor whose memory this thread uses again under the same name.

    Blocks above 32 MiB are not kept by malloc: the kernel would hand out each page anew, in every
    block of the network (a fifth of the time of a 1280x720 frame).
    """
    numbers = math.prod(shape)
    kept: Tensor | None = getattr(_scratch, name, None)
    if kept is None or kept.dtype != dtype or len(kept) < numbers:
        with torch.inference_mode(False):  # or it could not be written to outside that mode
            kept = torch.empty(numbers, dtype=dtype)
        setattr(_scratch, name, kept)
    return kept[:numbers].view(shape)


def _product(name: str, x: Tensor, weights: Tensor) -> Tensor:
    """`x @ weightsᵀ` in the memory of `name`: x `[N, P, C]`, weights `[D, C]`."""
    out = _room(name, *x.shape[:2], len(weights), dtype=x.dtype)
    torch.mm(x.flatten(0, 1), weights.t(), out=out.flatten(0, 1))
    return out


def _numbers(x: Tensor) -> Any:
    """Parameters as float32, flat."""
    return _flat(x.float().contiguous())


def _taps(*convolutions: nn.Conv2d) -> Any:
    """The weights of depth-wise 3x3 convolutions side by side: `[9, channels]`, flat."""
    return _numbers(torch.cat([c.weight.flatten(1) for c in convolutions]).t())


def _pixels(x: Tensor) -> Tensor:
    """`[N, C, H, W]` → `[N, H·W, C]`, a view where x is channels-last."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _image(x: Tensor, like: Tensor) -> Tensor:
    n, _, h, w = like.shape
    return x.view(n, h, w, -1).permute(0, 3, 1, 2)


def _layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    from mtair import fused_kernels

    out = torch.empty_like(x)
    fused_kernels.layer_norm(
        _flat(x), _numbers(norm.weight), _numbers(norm.bias), x.shape[0] * x.shape[1], x.shape[2],
        _flat(out),
    )  # fmt: skip
    return out


def _add_product(x: Tensor, y: Tensor, weights: Tensor, out: Tensor) -> Tensor:
    """`x + y @ weightsᵀ` in out, which may be x `[N, P, C]`; y `[N, P, D]`, weights `[N, C, D]`."""
    for i in range(len(x)):
        torch.addmm(x[i], y[i], weights[i].t(), out=out[i])
    return out


def _attend(
    q: Tensor, kv: Tensor, kv_at: int, taps: Any, heads: int, temperature: Tensor,
    spatial: Tensor | None, out: Tensor, size: torch.Size,
) -> Tensor:  # fmt: skip
    """Write v (and v gated by `spatial`) to `out`; returns attention's weights `[N, heads, c, c]`.

    q, kv and out `[N, P, …]` before their depth-wise convolutions, `size` the map's.
    """
    from mtair import fused_kernels

    n, channels, height, width = size
    c, bands = channels // heads, min(BANDS, height)
    scores = q.new_zeros(n, bands, heads, -(-c // 8) * 8, -(-c // LANES) * LANES, dtype=torch.float)
    lengths = q.new_zeros(n, bands, 2, channels, dtype=torch.float)
    fused_kernels.depthwise_attention(
        _flat(q), q.shape[2], _flat(kv), kv.shape[2], kv_at, taps, n, height, width, channels,
        heads, np.empty(0, np.float32) if spatial is None else _numbers(spatial), bands,
        _flat(scores), _flat(lengths), _flat(out), out.shape[2],
    )  # fmt: skip
    product = scores.sum(1)[:, :, :c, :c]
    length = lengths.sum(1).sqrt().clamp_min(1e-12).view(n, 2, heads, c)
    product = product / (length[:, 0].unsqueeze(3) * length[:, 1].unsqueeze(2))
    return (product * temperature.float()).softmax(-1)


def _projected(weight: Tensor, attention: Tensor) -> Tensor:
    """`weight @ attention`, attention's heads on the diagonal: float32 `[N, outputs, C]`."""
    _, heads, c, _ = attention.shape
    return torch.einsum("ohi,nhij->nohj", weight.float().view(-1, heads, c), attention).flatten(2)


def _feed_forward(x: Tensor, norm: nn.LayerNorm, ffn: "GDFN", size: torch.Size) -> Tensor:
    """`x + ffn(norm(x))` of `[N, P, C]`, in the memory of x."""
    from mtair import fused_kernels

    n, _, height, width = size
    hidden = ffn.project_out.in_channels
    spare = -hidden % LANES  # channels of zeros behind each half

    def halves(weight: Tensor) -> Tensor:
        return F.pad(weight.flatten(1).view(2, hidden, -1), (0, 0, 0, spare)).flatten(0, 1)

    both = _product("wide", _layer_norm(x, norm), halves(ffn.project_in.weight))
    gated = _room("branches", *x.shape[:2], hidden + spare, dtype=x.dtype)
    fused_kernels.depthwise_gelu_gate(
        _flat(both), _numbers(halves(ffn.dwconv.weight).t()), n, height, width, hidden + spare,
        _flat(gated),
    )  # fmt: skip
    weights = F.pad(ffn.project_out.weight.flatten(1), (0, spare)).expand(n, -1, -1)
    return _add_product(x, gated, weights, out=x)


def transformer_block(block: "TransformerBlock", x: Tensor) -> Tensor:
    """A plain block on `[N, C, H, W]`."""
    _threads()
    pixels, attn = _pixels(x), block.attn
    qkv = _product("wide", _layer_norm(pixels, block.norm1.body), attn.qkv.weight.flatten(1))
    values = _room("branches", *pixels.shape, dtype=x.dtype)
    attention = _attend(
        qkv, qkv, x.shape[1], _taps(attn.qkv_dwconv), attn.heads, attn.temperature, None, values,
        x.shape,
    )  # fmt: skip
    weights = _projected(attn.project_out.weight.flatten(1), attention)
    pixels = _add_product(pixels, values, weights.to(x.dtype), torch.empty_like(pixels))
    return _image(_feed_forward(pixels, block.norm2.body, block.ffn, x.shape), x)


def dual_block(block: "MTDN", x: Tensor) -> Tensor:
    """A dual-branch block on `[N, C, H, W]`."""
    _threads()
    pixels, attn, ssm = _pixels(x), block.attn, block.ssm
    channels, d = x.shape[1], ssm.out_norm.weight.numel()
    into = torch.cat([attn.qkv.weight.flatten(1), ssm.in_proj.weight])
    wide = _product("wide", _layer_norm(pixels, block.norm1.body), into)  # q, k, v, inner, gate
    branches = _room("branches", *pixels.shape[:2], channels + d, dtype=x.dtype)
    attention = _attend(
        wide, wide, channels, _taps(attn.qkv_dwconv), attn.heads, attn.temperature, None, branches,
        x.shape,
    )  # fmt: skip
    _scan(ssm, wide, 3 * channels, branches, channels, x.shape)
    left = _projected(attn.project_out.weight.flatten(1), attention)
    right = ssm.out_proj.weight.float()
    if block.fuse is not None:
        fuse = block.fuse.weight.flatten(1).float()
        left, right = fuse[:, :channels] @ left, fuse[:, channels:] @ right
    weights = torch.cat([left, right.expand(len(left), -1, -1)], dim=2)
    pixels = _add_product(pixels, branches, weights.to(x.dtype), torch.empty_like(pixels))
    return _image(_feed_forward(pixels, block.norm2.body, block.ffn, x.shape), x)


def _scan(ssm: "SS2D", wide: Tensor, at: int, out: Tensor, out_at: int, size: torch.Size) -> None:
    """Inner and gate in columns `at` of `wide` → the gated, normed scan in `out_at` of `out`."""
    from mtair import fused_kernels
    from mtair.scan import numba_cross

    n, _, height, width = size
    d, states = ssm.out_norm.weight.numel(), ssm.d_state
    u = _room("u", n, height * width, d, dtype=wide.dtype)
    rows = ssm.x_proj_weight.shape[1]
    projection = _room("projection", n, height * width, 4, rows, dtype=torch.float)
    y = _room("y", 2, n, height * width, d, dtype=torch.float)
    weight = F.pad(ssm.x_proj_weight.flatten(0, 1), (0, 0, 0, -4 * rows % LANES)).t()
    fused_kernels.depthwise_silu_project(
        _flat(wide), wide.shape[2], at, _taps(ssm.conv2d), _numbers(cast(Tensor, ssm.conv2d.bias)),
        _numbers(weight), n, height, width, d, 4 * rows, _flat(u), _flat(projection),
    )  # fmt: skip
    numba_cross.parts(
        _flat(y), _flat(u), _flat(projection), ssm.dt_projs_weight.float(),
        -torch.exp(ssm.A_logs.float()).view(4, d, states), ssm.dt_projs_bias.float(),
        ssm.Ds.float().view(4, d), n=n, height=height, width=width,
    )  # fmt: skip
    fused_kernels.norm_gate(
        _flat(y[0]), _flat(y[1]), _flat(wide), wide.shape[2], at + d,
        _numbers(ssm.out_norm.weight), _numbers(ssm.out_norm.bias), n * height * width, d,
        _flat(out), out.shape[2], out_at,
    )  # fmt: skip


def prompt_block(block: "PromptGenBlock", x: Tensor) -> Tensor:
    """A prompt block on `[N, C, H, W]`."""
    _threads()
    pixels, channels = _pixels(x), x.shape[1]
    prompt = _layer_norm(_pixels(_prompt(block, pixels, x)), block.norm_p.body)
    kv = _product("wide", prompt, block.kv.weight.flatten(1))
    q = _product("u", _layer_norm(pixels, block.norm_x.body), block.q.weight.flatten(1))
    both = _room("branches", *pixels.shape[:2], 2 * channels, dtype=x.dtype)
    attention = _attend(
        q, kv, 0, _taps(block.q_dwconv, block.kv_dwconv), block.heads, block.temperature_channel,
        block.temperature_spatial, both, x.shape,
    )  # fmt: skip
    left, right = torch.split(block.project_out.weight.flatten(1).float(), channels, dim=1)
    left = _projected(left, attention)
    weights = torch.cat([left, right.expand(len(left), -1, -1)], dim=2)
    pixels = _add_product(pixels, both, weights.to(x.dtype), torch.empty_like(pixels))
    return _image(_feed_forward(pixels, block.norm2.body, block.ffn, x.shape), x)


def _prompt(block: "PromptGenBlock", pixels: Tensor, x: Tensor) -> Tensor:
    """The weighed and resized prompt after both its convolutions, which make one."""
    shares = block.linear_layer(pixels.mean(1)).softmax(-1)
    bank = torch.einsum("nl,ldhw->ndhw", shares, block.prompt_param[0])
    bank = bank.contiguous(memory_format=torch.channels_last)
    prompt = F.interpolate(bank, x.shape[2:], mode="bilinear", align_corners=False)
    weight = torch.einsum(
        "oc,cikl->oikl", block.align.weight.flatten(1).float(), block.conv3x3.weight.float()
    )
    weight = weight.to(x.dtype).contiguous(memory_format=torch.channels_last)
    return F.conv2d(prompt, weight, padding=1)


def join(up: "Upsample", reduce: nn.Conv2d, x: Tensor, skip: Tensor) -> Tensor:
    """`reduce(cat([up(x), skip]))` without the concatenation: one half is folded into `up`."""
    n, channels = len(x), reduce.out_channels
    left, right = torch.tensor_split(reduce.weight.flatten(1), [-skip.shape[1]], dim=1)
    conv = cast(nn.Conv2d, up.body[0])
    shuffled = conv.weight.float().view(-1, 4, *conv.weight.shape[1:])  # PixelShuffle's order
    weight = torch.einsum("oc,cpikl->poikl", left.float(), shuffled).flatten(0, 1).to(x.dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, padding=conv.kernel_size[0] // 2).permute(0, 2, 3, 1)
    y = y.reshape(*y.shape[:3], 2, 2, channels).transpose(2, 3).reshape(n, -1, channels)
    return _image(_add_product(y, _pixels(skip), right.expand(n, -1, -1), out=y), skip)


def _threads() -> None:
    from mtair.scan.numba_cpu import use_torch_threads

    use_torch_threads()
