"""MTAIR: the all-in-one restoration network (arXiv 2412.15845), top to bottom in its own order.

Owns the shape of the network and its size rule; knows nothing of files, training or video.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtair import fused
from mtair.blocks import (
    MTDN,
    Downsample,
    Fuse,
    PromptGenBlock,
    TransformerBlock,
    Upsample,
)

Stage = Literal["enc1", "enc2", "enc3", "latent", "dec3", "dec2", "dec1", "refinement"]


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Every number that shapes an MTAIR. A checkpoint carries its own."""

    widths: tuple[int, int, int, int]
    """Channels at the four scales; each must be divided by its heads and by prompt_heads."""
    depths: tuple[int, int, int, int]
    """Blocks at the four scales, the same number in the encoder and in the decoder."""
    refinement: int
    heads: tuple[int, int, int, int]
    ffn_expansion: float
    prompt_dims: tuple[int, int, int, int]
    prompt_sizes: tuple[int, int, int, int]
    prompt_len: int = 5
    """Prompts in each bank; 0 leaves the prompt blocks out (an ablation)."""
    prompt_heads: int = 4
    prompt_ffn_expansion: float = 2.66
    d_state: int = 16
    expand: float = 2.0
    stem: int = 1
    """2 folds 2x2 pixels into channels (PixelUnshuffle) before the first convolution."""
    wide_dec1: bool = True
    """The published shape: level 1 of the decoder keeps the concatenation, at twice the width."""
    mamba_stages: tuple[Stage, ...] = ("enc1", "enc2", "dec2", "dec1")
    """Where the dual-branch block stands; the others are plain. Inferred, not confirmed."""
    fuse: Fuse = "concat"
    up_kernel: int = 3
    """Side of the convolution before each PixelShuffle: 3 as published, 1 for a ninth of it."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field that does not fit."""
        for name in ("widths", "heads", "prompt_dims", "prompt_sizes"):
            _check_counts(name, getattr(self, name), scales=4, least=1)
        _check_counts("depths", self.depths, scales=4, least=0)
        _check_counts("refinement", (self.refinement,), scales=1, least=0)
        _check_counts("prompt_len", (self.prompt_len,), scales=1, least=0)
        for name in ("prompt_heads", "d_state"):
            _check_counts(name, (getattr(self, name),), scales=1, least=1)
        for name in ("ffn_expansion", "prompt_ffn_expansion", "expand"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 1 <= min(self.widths) * value < math.inf:
                raise ValueError(f"{name} must be a number that leaves a channel, got {value!r}")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads or width % self.prompt_heads or width % 4:
                raise ValueError(
                    f"widths: {width} is not a multiple of 4, of its {heads} heads and of "
                    f"{self.prompt_heads} prompt_heads"
                )
        if unknown := set(self.mamba_stages) - set(get_args(Stage)):
            raise ValueError(f"mamba_stages: unknown {sorted(unknown)}; known {get_args(Stage)}")
        if self.stem not in (1, 2):
            raise ValueError(f"stem must be 1 or 2, got {self.stem!r}")
        if self.up_kernel not in (1, 3):
            raise ValueError(f"up_kernel must be 1 or 3, got {self.up_kernel!r}")
        if self.fuse not in get_args(Fuse):
            raise ValueError(f"fuse must be one of {get_args(Fuse)}, got {self.fuse!r}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Dimensions":
        """From YAML or JSON, where tuples are lists. Raises ValueError naming what is wrong."""
        if not isinstance(values, dict):
            raise ValueError(f"dimensions: expected names and values, got {values!r}")
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"dimensions: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The inverse of from_dict."""
        return asdict(self)


def _check_counts(name: str, values: tuple[int, ...], *, scales: int, least: int) -> None:
    if not isinstance(values, tuple) or len(values) != scales:
        raise ValueError(f"{name} needs four values, one per scale: {values!r}")
    if not all(type(v) is int and v >= least for v in values):
        raise ValueError(f"{name}: expected whole numbers of at least {least}, got {values!r}")


class MTAIR(nn.Module):
    """Restores RGB images: one set of weights for noise, rain and haze, told by none.

    The encoder-decoder of Restormer with dual-branch blocks (M-T DN) at its `mamba_stages` and a
    prompt block (S-C PB) on every skip and on the latent.
    """

    def __init__(self, dims: Dimensions) -> None:
        super().__init__()
        self.dims = dims
        w1, w2, w3, w4 = dims.widths
        folded = 3 * dims.stem**2
        proj = nn.Conv2d(folded, w1, 3, padding=1, bias=False)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.encoder_level1 = self._stage("enc1", 0, w1)
        self.down1_2 = Downsample(w1, w2)
        self.encoder_level2 = self._stage("enc2", 1, w2)
        self.down2_3 = Downsample(w2, w3)
        self.encoder_level3 = self._stage("enc3", 2, w3)
        self.down3_4 = Downsample(w3, w4)
        self.latent = self._stage("latent", 3, w4)
        self.prompt1, self.prompt2, self.prompt3, self.prompt4 = (
            PromptGenBlock(
                dims.prompt_dims[i], dims.prompt_len, dims.prompt_sizes[i], dims.widths[i],
                dims.prompt_heads, dims.prompt_ffn_expansion,
            ) if dims.prompt_len else nn.Identity() for i in range(4)
        )  # fmt: skip
        self.up4_3 = Upsample(w4, w3, dims.up_kernel)
        self.reduce_chan_level3 = nn.Conv2d(2 * w3, w3, 1, bias=False)
        self.decoder_level3 = self._stage("dec3", 2, w3)
        self.up3_2 = Upsample(w3, w2, dims.up_kernel)
        self.reduce_chan_level2 = nn.Conv2d(2 * w2, w2, 1, bias=False)
        self.decoder_level2 = self._stage("dec2", 1, w2)
        self.up2_1 = Upsample(w2, w1, dims.up_kernel)
        wd = 2 * w1 if dims.wide_dec1 else w1
        self.reduce_chan_level1 = (
            nn.Identity() if dims.wide_dec1 else nn.Conv2d(2 * w1, w1, 1, bias=False)
        )
        self.decoder_level1 = self._stage("dec1", 0, wd)
        self.refinement = self._stage("refinement", 0, wd)
        self.output = nn.Conv2d(wd, folded, 3, padding=1, bias=False)
        for module in self.modules():  # the prompt banks are 5-D: convolutions only
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _stage(self, stage: Stage, level: int, width: int) -> nn.Sequential:
        dims = self.dims
        depth = dims.refinement if stage == "refinement" else dims.depths[level]
        heads, expansion = dims.heads[level], dims.ffn_expansion
        if stage in dims.mamba_stages:
            return nn.Sequential(*(
                MTDN(width, heads, expansion, dims.d_state, dims.expand, dims.fuse)
                for _ in range(depth)
            ))  # fmt: skip
        return nn.Sequential(*(TransformerBlock(width, heads, expansion) for _ in range(depth)))

    @property
    def stride(self) -> int:
        """Heights and widths that are multiples of this need no padding inside."""
        return 8 * self.dims.stem

    def forward(self, image: Tensor) -> Tensor:
        """Float RGB `[N, 3, H, W]`, nominally 0..1, any H and W → the same shape, not clamped.

        A network in bfloat16 takes a float32 image as well: only the correction is computed in
        its precision, the sum keeps the image's.
        """
        h, w = image.shape[2:]
        padded = _pad_to_multiple(image, self.stride).to(self.output.weight.dtype)
        return image + self._residual(padded)[:, :, :h, :w]

    def _residual(self, image: Tensor) -> Tensor:
        x = F.pixel_unshuffle(image, self.dims.stem) if self.dims.stem > 1 else image
        x = self.patch_embed["proj"](x.contiguous(memory_format=torch.channels_last))
        enc1 = self.encoder_level1(x)
        enc2 = self.encoder_level2(self.down1_2(enc1))
        enc3 = self.encoder_level3(self.down2_3(enc2))
        latent = self.prompt4(self.latent(self.down3_4(enc3)))
        x = _join(self.up4_3, self.reduce_chan_level3, latent, self.prompt3(enc3))
        x = self.decoder_level3(x)
        x = _join(self.up3_2, self.reduce_chan_level2, x, self.prompt2(enc2))
        x = self.decoder_level2(x)
        x = _join(self.up2_1, self.reduce_chan_level1, x, self.prompt1(enc1))
        x = self.refinement(self.decoder_level1(x))
        x = self.output(x)
        return F.pixel_shuffle(x, self.dims.stem) if self.dims.stem > 1 else x


def _join(up: Upsample, reduce: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """A decoder's input: the map from below, upsampled, beside the one from the encoder."""
    if fused.runs_on(x) and isinstance(reduce, nn.Conv2d):
        return fused.join(up, reduce, x, skip)
    return reduce(torch.cat([up(x), skip], dim=1))  # type: ignore[no-any-return]


def _pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad right and bottom by reflection; by repetition where the image is too small to reflect."""
    h, w = image.shape[2:]
    bottom, right = -h % multiple, -w % multiple
    if not bottom and not right:
        return image
    mode = "reflect" if bottom < h and right < w else "replicate"
    return F.pad(image, (0, right, 0, bottom), mode=mode)
