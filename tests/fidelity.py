"""The cases of the fidelity matrix: a source, a job with an identity network, what must be equal.

`test_fidelity.py` asserts them, `benchmarks/fidelity.py` prints the table in docs/fidelity.md.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np
import torch
from media import make_clip, numbered_picture

from pipeline import RestoreConfig, restore_file
from pipeline.decode import VideoSource

FFV1 = {"codec": "ffv1"}
X264 = {"codec": "libx264", "preset": "ultrafast", "crf": 0}  # 0 is lossless at 8 bit alone
X265 = {"codec": "libx265", "preset": "ultrafast"}
SVT = {"codec": "libsvtav1", "preset": "12"}
VP9 = {"codec": "libvpx-vp9"}
OUTPUTS = {
    "FFV1 mkv": ("out.mkv", FFV1), "x264 mp4": ("out.mp4", X264),
    "x264 mkv": ("out.mkv", X264), "x265 mov": ("out.mov", X265), "SVT-AV1 mkv": ("out.mkv", SVT),
    "SVT-AV1 mp4": ("out.mp4", SVT), "VP9 webm": ("out.webm", VP9),
}  # fmt: skip
PQ, HLG = (9, 16, 9, 1), (9, 18, 9, 1)

PLANAR = [
    f"{kind}{depth}"
    for kind, depths in {
        "gray": (8, 9, 10, 12, 14, 16), "yuv410p": (8,), "yuv411p": (8,),
        "yuv420p": (8, 9, 10, 12, 14, 16), "yuv422p": (8, 9, 10, 12, 14, 16),
        "yuv440p": (8, 10, 12), "yuv444p": (8, 9, 10, 12, 14, 16),
        "gbrp": (8, 9, 10, 12, 14, 16),
    }.items()
    for depth in ["" if d == 8 else f"{d}le" for d in depths]
]  # fmt: skip
PACKED = {
    "nv12": "yuv420p", "nv21": "yuv420p", "y210le": "yuv422p10le", "xv30le": "yuv444p10le",
    "v30xle": "yuv444p10le", "vyu444": "yuv444p", "yuyv422": "yuv422p", "uyvy422": "yuv422p",
    "yvyu422": "yuv422p", "rgb24": "gbrp", "bgr24": "gbrp", "rgb0": "gbrp", "bgr0": "gbrp",
    "0rgb": "gbrp", "0bgr": "gbrp", "rgb48le": "gbrp16le", "bgr48le": "gbrp16le",
    "rgb48be": "gbrp16le", "bgr48be": "gbrp16le", "pal8": "gbrp", "yuvj420p": "yuv420p",
    "yuvj422p": "yuv422p", "yuvj444p": "yuv444p",
} | {
    name.replace("le", "be"): name
    for name in PLANAR
    if name.endswith("le") and not name.startswith("yuv440p")  # no container holds those
}  # fmt: skip
"""Other formats that a file can hold, and the planar one in which their samples travel.

Those that only decoders of the hardware give (nv16, p010le …) are held by test_probe.py.
"""


@dataclass(frozen=True)
class Case:
    """A source, how it is encoded, and what is allowed to be lost."""

    group: str
    name: str
    make: Callable[[Path], Path]
    """Writes the source into a folder."""
    output: str = "out.mkv"
    encode: dict[str, object] = field(default_factory=lambda: dict(FFV1))
    settings: dict[str, object] = field(default_factory=dict)
    lossless: bool = True
    loses: frozenset[str] = frozenset()
    """Properties that this output cannot keep, as a warning says before anything is restored."""

    @property
    def needs(self) -> str | None:
        """What this machine's FFmpeg lacks for it, or None."""
        codec = str(self.encode["codec"])
        return None if codec in av.codecs_available else f"FFmpeg lacks {codec}"

    def __str__(self) -> str:
        return f"{self.group}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What a job kept: each property, and whether it is equal before and after."""

    kept: dict[str, bool]
    warnings: tuple[str, ...]
    planar: str
    """The format in which the samples travelled."""


class _Identity(torch.nn.Module):
    """A network that corrects nothing. The worker's own arithmetic around it stays the real one."""

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        return rgb.clone()


@contextmanager
def identity_network() -> Iterator[None]:
    """Every worker of this process gets a network that changes nothing."""
    with patch("workers.worker.TileWorker._load", lambda *_: _Identity()):
        yield


def run(case: Case, folder: Path, strength: float = 1) -> Outcome:
    """Restore the case's source in `folder` and compare."""
    source = case.make(folder)
    settings = {
        "model.strength": strength, "pool.kind": "local", "resume": False,
        **{f"encode.{key}": value for key, value in case.encode.items()}, **case.settings,
    }  # fmt: skip
    with identity_network():
        report = restore_file(source, folder / case.output, RestoreConfig.load(overrides=settings))
    with VideoSource(source) as one, VideoSource(report.output) as two:
        kept = _tags(one.info, two.info)
        before, after = list(one.frames()), list(two.frames())
        kept["times"] = [f.pts * one.info.time_base for f in before] == [
            f.pts * two.info.time_base for f in after
        ]
        kept["planes"] = kept["times"] and all(
            np.array_equal(p, q)
            for f, g in zip(before, after, strict=True)
            for p, q in zip(f.planes, g.planes, strict=True)
        )
        return Outcome(kept, report.warnings, one.info.pixel_format.name)


def _tags(one, two) -> dict[str, bool]:
    return {
        "format": one.pixel_format.name == two.pixel_format.name,
        "matrix": (one.colorspace, one.pixel_format.matrix)
        == (two.colorspace, two.pixel_format.matrix),
        "range": one.pixel_format.full_range == two.pixel_format.full_range,
        "primaries": one.color_primaries == two.color_primaries,
        "transfer": one.color_trc == two.color_trc,
        "chroma site": one.pixel_format.chroma_location == two.pixel_format.chroma_location,
        "mastering display": _near(one.mastering_display, two.mastering_display),
        "light level": one.content_light == two.content_light,
        "size": (one.width, one.height) == (two.width, two.height),
        "aspect": (one.sample_aspect_ratio or 1) == (two.sample_aspect_ratio or 1),
        "rotation, mirror": one.display_matrix == two.display_matrix,
    }


def _near(one, two) -> bool:
    """Equal to the rounding of AV1's fixed point: 16 bits for colour, 8 to 18 for luminance."""
    if one is None or two is None:
        return one is two
    places = [
        (one.white_point, two.white_point), *zip(one.primaries, two.primaries, strict=True)
    ]  # fmt: skip
    return (
        all(abs(a - b) < Fraction(1, 50000) for p, q in places for a, b in zip(p, q, strict=True))
        and abs(one.max_luminance - two.max_luminance) < Fraction(1, 100)
        and abs(one.min_luminance - two.min_luminance) < Fraction(1, 10000)
    )


def clip(name: str = "in.mkv", **what) -> Callable[[Path], Path]:
    """A source of noise, without loss unless `what` says otherwise."""
    values = {"n_frames": 2, "codec": "ffv1", "options": {}, "noise": True, **what}
    return lambda folder: make_clip(folder / name, **values)


def raw(pix_fmt: str, size: tuple[int, int] = (64, 48)) -> Callable[[Path], Path]:
    """Two pictures of noise as they are in memory: NUT holds any pixel format."""

    def make(folder: Path) -> Path:
        if pix_fmt.startswith("yuvj"):
            codec, planar = "mjpeg", pix_fmt
        else:
            codec, planar = "rawvideo", PACKED.get(pix_fmt, pix_fmt)
        with av.open(str(folder / "in.nut"), "w") as out:
            stream = out.add_stream(codec, rate=25)
            stream.width, stream.height = size
            stream.pix_fmt = pix_fmt
            stream.codec_context.time_base = Fraction(1, 1000)
            for index in range(2):
                picture = _picture(pix_fmt, planar, size, index)
                picture.pts, picture.time_base = 40 * index, Fraction(1, 1000)
                out.mux(stream.encode(picture))
            out.mux(stream.encode(None))
        return folder / "in.nut"

    return make


def _picture(pix_fmt, planar, size, index):
    if pix_fmt == "pal8":
        random = np.random.default_rng(index)
        palette = random.integers(0, 256, (256, 4), np.uint8)
        palette[:, 0] = 255  # opaque
        indices = random.integers(0, 256, (size[1], size[0]), np.uint8)
        return av.VideoFrame.from_ndarray((indices, palette), format="pal8")
    return numbered_picture(index, size, planar, noise=True).reformat(format=pix_fmt)


DISPLAY = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
HDR10 = {
    "pix_fmt": "yuv420p10le", "codec": "libx265", "color": PQ,
    "options": {"x265-params": f"log-level=error:lossless=1:bframes=0:master-display={DISPLAY}"
                ":max-cll=1000,400"},
}  # fmt: skip
SITE = frozenset({"chroma site"})
MIRRORS = {
    "mirrored": (-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30),
    "upside down, mirrored": (65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30),
    "turned by 90, mirrored": (0, 65536, 0, 65536, 0, 0, 0, 0, 1 << 30),
}


def _formats() -> Iterator[Case]:
    for name in [*PLANAR, *PACKED]:
        # No raw container takes this one.
        source = clip(pix_fmt=name) if name.startswith("yuv440p1") else raw(name)
        yield Case("pixel format", name, source)
    for name in ("yuv420p", "yuv422p", "yuv444p"):
        yield Case("x264 without loss", name, clip(pix_fmt=name), "out.mp4", X264)


def _colours() -> Iterator[Case]:
    colours = {
        "BT.601 limited": (6, 6, 6, 1), "BT.709 limited": (1, 1, 1, 1),
        "BT.709 full": (1, 1, 1, 2), "BT.2020": (9, 14, 9, 1), "SMPTE 240M": (7, 7, 7, 1),
        "FCC": (4, 4, 4, 1), "PQ": PQ, "HLG": HLG, "untagged": (2, 2, 2, 0),
    }  # fmt: skip
    for name, color in colours.items():
        for where, (output, encode) in OUTPUTS.items():
            loses: frozenset[str] = frozenset()
            if output == "out.webm" and name == "FCC":
                loses = frozenset({"matrix"})
            deep = {} if output == "out.webm" else {"pix_fmt": "yuv420p10le"}
            yield Case("colour", f"{name}, {where}", clip(color=color, **deep), output, encode,
                       lossless=encode is FFV1, loses=loses)  # fmt: skip
    for site in ("topleft", "center", "left", "top"):
        for where, (output, encode) in OUTPUTS.items():
            source = clip(options={"chroma_sample_location": site})
            no_site = where == "SVT-AV1 mp4" and site != "topleft"
            yield Case("chroma site", f"{site}, {where}", source, output, encode,
                       lossless=encode in (FFV1, X264),
                       loses=SITE if no_site and site != "left" else frozenset())  # fmt: skip


def _hdr() -> Iterator[Case]:
    for where, (output, encode) in OUTPUTS.items():
        loses = frozenset({"format"} if encode is VP9 else ())
        yield Case("HDR10", where, clip(**HDR10), output, encode,
                   lossless=encode is FFV1, loses=loses)  # fmt: skip


def _shapes() -> Iterator[Case]:
    for suffix in (".mp4", ".mkv", ".mov"):
        for degrees in (90, -90, 180):
            source = clip(f"in{suffix}", rotation=degrees, codec="libx264", noise=False)
            yield Case("shape", f"turned by {degrees}, {suffix}", source, f"out{suffix}", X264)
        for name, matrix in MIRRORS.items():
            source = clip(f"in{suffix}", display_matrix=matrix, codec="libx264", noise=False)
            yield Case("shape", f"{name}, {suffix}", source, f"out{suffix}", X264)
        source = clip(
            f"in{suffix}", sample_aspect_ratio=Fraction(16, 15), codec="libx264", noise=False
        )
        yield Case("shape", f"aspect 16:15, {suffix}", source, f"out{suffix}", X264)
    for where, (output, encode) in OUTPUTS.items():
        source = clip(sample_aspect_ratio=Fraction(16, 15), codec="libx264", noise=False)
        yield Case("shape", f"aspect 16:15, {where}", source, output, encode,
                   lossless=encode in (FFV1, X264))  # fmt: skip
    for size in ((1, 1), (2, 3), (15, 7), (35, 19), (853, 479)):
        for name in ("yuv420p", "yuv411p", "gbrp10le"):
            yield Case("shape", f"{size[0]}x{size[1]} {name}", raw(name, size))
    for size in ((1, 1), (47, 33), (49, 31)):
        settings = {"tile.size": "48x32", "tile.overlap": 8}
        yield Case("shape", f"{size[0]}x{size[1]} in tiles of 48x32", raw("yuv420p", size),
                   settings=settings)  # fmt: skip


def all_cases() -> list[Case]:
    """The matrix, in the order of the table."""
    return [*_formats(), *_colours(), *_hdr(), *_shapes()]
