"""Owns what `--quality` and `--crf` mean for each encoder. Knows no stream and no file.

The levels are this project's choice, the same in intent for every encoder, not in bits:
docs/streams.md has them with sizes and PSNR.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.errors import ConfigError

Quality = Literal["visually-lossless", "high", "small"]
LEVELS: tuple[Quality, ...] = ("visually-lossless", "high", "small")

# An option with its value for each of LEVELS, and what it needs beside it.
_CRF: dict[str, tuple[tuple[int, int, int], int]] = {
    "libx264": ((18, 22, 27), 51), "libx264rgb": ((18, 22, 27), 51), "libx265": ((18, 23, 28), 51),
    "libsvtav1": ((20, 28, 38), 63), "libvpx-vp9": ((24, 31, 38), 63), "libvpx": ((8, 16, 28), 63),
}  # fmt: skip
"""The crf of each level, and the largest there is."""
_CRF_NEEDS = {"libvpx-vp9": {"b": "0"}, "libvpx": {"b": "100M"}}
"""libvpx takes the crf for a bound of a bit rate: none in VP9, one that is never reached in VP8."""
_CQ = {"h264_nvenc": (19, 24, 30), "hevc_nvenc": (19, 25, 31), "av1_nvenc": (20, 28, 36)}
_QUANTISERS = {"mpeg4": (2, 3, 6), "mjpeg": (2, 4, 8)}
"""Fixed by equal bounds: FFmpeg's qscale is a property of frames that PyAV does not reach."""
_PRORES, _PRORES_444 = ("3", "2", "1"), ("5", "4", "4")
"""hq, standard and lt; 4444xq and 4444: the names are known to prores_ks alone."""
_RATE_OPTIONS = {"b", "cq", "crf", "global_quality", "lossless", "qmax", "qmin", "qp"}
"""Where one of these is asked for, nothing else is chosen beside it."""


def takes_crf(name: str) -> bool:
    """Whether this encoder has a crf."""
    return name in _CRF


def sets_rate(options: Mapping[str, str]) -> bool:
    """Whether an encoder's options say how many bits it takes, or how well it keeps the picture."""
    return not _RATE_OPTIONS.isdisjoint(options)


def quality_options(
    codec: Any, target: Any, quality: Quality | None, crf: float | None, asked: dict[str, str]
) -> dict[str, str]:
    """Encoder options for `codec` and its pixel format `target`.

    `asked` are the user's own, which win over a quality. With neither quality nor crf the first
    level, where the encoder has levels. Raises ConfigError for a crf or a level that the encoder
    does not have, and for a crf beside another rate.
    """
    name = codec.name
    rates = _RATE_OPTIONS & asked.keys()
    if crf is not None:
        beside = rates - {"qmin", "qmax", *_CRF_NEEDS.get(name, {})}
        if beside:
            raise ConfigError(f"crf {crf:g} and {' '.join(sorted(beside))}: choose one")
        return _crf_options(name, crf)
    if rates:
        return {}
    level = LEVELS.index(quality or LEVELS[0])
    if name in _CRF:
        return {"crf": str(_CRF[name][0][level]), **_CRF_NEEDS.get(name, {})}
    if name in _CQ:
        return {"rc": "vbr", "cq": str(_CQ[name][level]), "b": "0"}
    if name in _QUANTISERS:
        return dict.fromkeys(("qmin", "qmax"), str(_QUANTISERS[name][level]))
    if name in ("prores_ks", "prores_aw", "prores"):
        return {"profile": (_PRORES_444 if "444" in target.name else _PRORES)[level]}
    lossless = codec.lossless and not codec.lossy
    if quality is None or (level == 0 and lossless):
        return {}
    why = "is always lossless" if lossless else "has no levels here"
    raise ConfigError(f"quality {quality}: {name} {why}; leave it out or use --encoder-opt")


def _crf_options(name: str, crf: float) -> dict[str, str]:
    if name not in _CRF:
        raise ConfigError(f"crf {crf:g}: {name} has none; use --quality or --encoder-opt")
    most = _CRF[name][1]
    if not 0 <= crf <= most:
        raise ConfigError(f"crf {crf:g} is outside 0 to {most} for {name}")
    return {"crf": f"{crf:g}", **_CRF_NEEDS.get(name, {})}
