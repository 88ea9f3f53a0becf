"""The options that several commands share: one meaning and one help text for each.

None means not given: what `--config` says, or the default, holds.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

NETWORK, OUTPUT = "Network", "Output video"
"""Headings of `--help`."""

Model = Annotated[
    str | None,
    typer.Option(
        help="tiny or small (their weights ship), or a .safetensors file.", rich_help_panel=NETWORK
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(help="Share of the correction applied, 0..1.", rich_help_panel=NETWORK),
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu or cuda:N.", rich_help_panel=NETWORK)
]  # fmt: skip
Pool = Annotated[
    Literal["auto", "local", "ray"] | None,
    typer.Option(help="Restore in this process or in Ray workers.", rich_help_panel=NETWORK),
]
Tile = Annotated[
    str | None,
    typer.Option(help="auto, 0 (whole frame), N or WxH pixels.", rich_help_panel=NETWORK),
]
StaticThreshold = Annotated[
    float | None,
    typer.Option(
        help="Reuse tiles that changed by less, in 8-bit code values; 0: identical ones.",
        rich_help_panel=NETWORK,
    ),
]
Codec = Annotated[
    str | None,
    typer.Option(help="FFmpeg encoder: libx264, libx265, ffv1 …", rich_help_panel=OUTPUT),
]
Crf = Annotated[
    float | None,
    typer.Option(help="Constant quality, lower is better.", rich_help_panel=OUTPUT),
]
Preset = Annotated[
    str | None, typer.Option(help="Speed of the encoder.", rich_help_panel=OUTPUT)
]  # fmt: skip
Config = Annotated[
    Path | None, typer.Option(help="YAML settings, as in configs/presets; options win over it.")
]
LogFormat = Annotated[Literal["text", "json"], typer.Option(help="Of stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")]
