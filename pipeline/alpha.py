"""Owns pictures with an alpha channel: its format without it, and whether it lets anything through.

Screen recorders and editors add one to every picture (GIF, PNG, ProRes 4444), opaque throughout.
"""

from typing import Any

import numpy as np

from pipeline.errors import SourceError

WITHOUT_ALPHA = {
    **{f"yuva{kind}p": f"yuv{kind}p" for kind in (420, 422, 444)},
    **{
        f"yuva{kind}p{bits}le": f"yuv{kind}p{bits}le"
        for kind in (420, 422, 444) for bits in (9, 10, 12, 16)
    },
    "gbrap": "gbrp",
    "rgba": "gbrp", "bgra": "gbrp", "argb": "gbrp", "abgr": "gbrp",
    "rgba64le": "gbrp16le", "rgba64be": "gbrp16le", "bgra64le": "gbrp16le",
    "ya8": "gray", "ya16le": "gray16le", "ya16be": "gray16le",
}  # fmt: skip
"""The planar format that has the other channels' samples."""
_FIRST = {"argb", "abgr"}


def has_alpha(pixel_format: Any) -> bool:
    """Whether one of its channels is alpha."""
    return any(component.is_alpha for component in pixel_format.components)


def is_opaque(picture: Any) -> bool:
    """Whether no sample of a picture's alpha lets anything through; it has one."""
    name = str(picture.format.name)
    bits = picture.format.components[-1].bits
    sample = np.dtype(np.uint8 if bits == 8 else ">u2" if name.endswith("be") else "<u2")
    packed = len(picture.planes) == 1
    plane, channels = picture.planes[-1], len(picture.format.components) if packed else 1
    data = np.frombuffer(plane, np.uint8)[: picture.height * plane.line_size]
    rows = data.reshape(picture.height, plane.line_size).view(sample)[:, : picture.width * channels]
    alpha = rows[:, 0 if name in _FIRST else channels - 1 :: channels]
    return bool((alpha == (1 << bits) - 1).all())


def transparent(path: object, what: str) -> SourceError:
    """For what an output could not show."""
    return SourceError(f"{path}: {what} has transparency, which is not kept; flatten it first")
