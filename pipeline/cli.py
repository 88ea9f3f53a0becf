"""`restore-video`: arguments → settings → one call in cli_job.py. Knows no stage.

`--help` must stay quick: nothing here imports torch, ray or av before a job really starts.
"""

import logging
import os
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pipeline._version import __version__
from pipeline.options import (
    NETWORK,
    OUTPUT,
    Codec,
    Config,
    Crf,
    Device,
    LogFormat,
    Model,
    Pool,
    Preset,
    Quiet,
    StaticThreshold,
    Strength,
    Tile,
    Verbose,
)
from pipeline.supervise import note_place, supervised


class _RestoreUnlessNamed(TyperGroup):
    """`restore-video INPUT` without the name of a command; a file called verify is `./verify`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command before what is not the name of another."""
        if args[:1] != ["verify"]:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


_DEFAULT = " "  # what stands between `restore-video` and its options in a usage line
app = typer.Typer(
    cls=_RestoreUnlessNamed, add_completion=False, pretty_exceptions_enable=False
)  # fmt: skip

_JOB, _INPUT = "Job", "Input video"


def _seconds(text: str) -> float:
    """`90`, `1:30` or `00:01:30.5`."""
    try:
        parts = [float(part) for part in text.split(":")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or not all(map(isfinite, parts)):
        raise typer.BadParameter(f"{text!r} is not a time: give seconds or HH:MM:SS")
    return float(sum(part * 60**power for power, part in enumerate(reversed(parts))))


def _local(path: Path | None) -> Path | None:
    """A URL is no file, and may hold a password, which a message about a file would show."""
    from pipeline.address import without_secrets

    shown = None if path is None or os.path.exists(path) else without_secrets(str(path))
    if shown:
        raise typer.BadParameter(
            f"{shown} is a URL: restore-batch takes files at URLs, restore-stream live ones"
        )
    return path


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"restore-video {__version__}")
        raise typer.Exit


@app.command(_DEFAULT, epilog="restore-video verify INPUT OUTPUT compares a finished pair.")
def restore_video(
    source: Annotated[
        Path, typer.Argument(metavar="INPUT", callback=_local, readable=False, help="A video file.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            callback=_local,
            help="File or folder. Default: INPUT_restored beside it.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("-y", "--overwrite", help="Replace the output.", rich_help_panel=_JOB)
    ] = False,
    start: Annotated[
        float | None,
        typer.Option(
            "--ss",
            parser=_seconds,
            metavar="TIME",
            help="Start there: seconds or HH:MM:SS.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    end: Annotated[
        float | None,
        typer.Option(
            "--to", parser=_seconds, metavar="TIME", help="Stop there.", rich_help_panel=_JOB
        ),
    ] = None,
    config: Config = None,
    pool: Pool = None,
    model: Model = None,
    strength: Strength = None,
    temporal: Annotated[
        float | None,
        typer.Option(
            help="Less flicker: average along the motion, 0..1; 0.5 if not given.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    device: Device = None,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None,
        typer.Option(help="Arithmetic of the network.", rich_help_panel=NETWORK),
    ] = None,
    tile: Tile = None,
    tile_overlap: Annotated[
        int | None, typer.Option(help="Pixels that tiles share.", rich_help_panel=NETWORK)
    ] = None,
    static_threshold: StaticThreshold = None,
    deinterlace: Annotated[
        Literal["auto", "off", "error"] | None,
        typer.Option(help="What to do with interlaced frames.", rich_help_panel=_INPUT),
    ] = None,
    hwaccel: Annotated[
        Literal["none", "auto"] | None,
        typer.Option(help="Decode on a GPU if one can.", rich_help_panel=_INPUT),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(help="Refuse larger pictures (134217728).", rich_help_panel=_INPUT),
    ] = None,
    stall_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds without progress in decoding (60).", rich_help_panel=_INPUT),
    ] = None,
    codec: Codec = None,
    crf: Crf = None,
    quality: Annotated[
        Literal["visually-lossless", "high", "small"] | None,
        typer.Option(help="Instead of a crf, for any encoder.", rich_help_panel=OUTPUT),
    ] = None,
    preset: Preset = None,
    encoder_opt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An FFmpeg option for the encoder; may be repeated.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    pix_fmt: Annotated[
        str | None,
        typer.Option(help="Default: the source's.", rich_help_panel=OUTPUT),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what becomes of each stream; restore and write nothing.",
            rich_help_panel=_JOB,
        ),
    ] = False,
    log_format: LogFormat = "text",
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Go on from an interrupted run's finished segments. Ctrl-C once stops after the "
            "segment in progress, twice (or SIGTERM) at once; either can be resumed.",
            rich_help_panel=_JOB,
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Restore a video: remove noise, rain, haze and compression, keep everything else as it is."""
    settings = {
        "model.model": model, "model.strength": strength, "model.device": device,
        "model.precision": precision, "tile.size": tile, "tile.overlap": tile_overlap,
        "pool.kind": pool, "encode.codec": codec, "encode.crf": crf, "encode.preset": preset,
        "encode.pix_fmt": pix_fmt, "start_seconds": start, "end_seconds": end,
        "overwrite": overwrite or None, "resume": resume,
        "tile.static_threshold": static_threshold, "temporal": temporal,
        "encode.quality": quality, "encode.options": _options(encoder_opt),
        "decode.deinterlace": deinterlace, "decode.hwaccel": hwaccel,
        "decode.max_pixels": max_pixels, "decode.stall_timeout": stall_timeout,
    }  # fmt: skip
    from pipeline.cli_job import plan, run
    from pipeline.monitor import log_level, shows_bar

    level = log_level(log_format, quiet=quiet, verbose=verbose)
    if dry_run:
        raise typer.Exit(plan(source, output, config, settings, log_format, level))
    bar = shows_bar(log_format, quiet=quiet)
    raise typer.Exit(run(source, output, config, settings, log_format, level, bar))


@app.command()
def verify(
    source: Annotated[
        Path,
        typer.Argument(metavar="INPUT", callback=_local, readable=False, help="What was restored."),
    ],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUTPUT", callback=_local, readable=False, help="What came of it."),
    ],
    quiet: Quiet = False,
) -> None:
    """Compare a finished output with its source: frames, times, streams, tags, chapters.

    Exit code 0 where all is as the stream plan says, 6 where something differs.
    """
    from pipeline.errors import IntegrityError, RestoreError
    from pipeline.monitor import configure_logging, progress, shows_bar
    from pipeline.verify import verify as compare

    note_place(f"{source} or {output}")
    configure_logging("text", logging.WARNING)
    try:
        with progress(source.name, bar=shows_bar("text", quiet=quiet)) as on_frame:
            found = compare(source, output, on_frame)
    except RestoreError as error:
        logging.getLogger("pipeline.cli").error("%s", error)
        raise typer.Exit(error.exit_code) from None
    for line in found.differences if quiet else found.lines:
        typer.echo(("DIFFERS  " if line in found.differences else "         ") + line)
    n = len(found.differences)
    if not quiet:
        typer.echo(f"{output}: {f'{n} differences from' if n else 'faithful to'} {source}")
    raise typer.Exit(IntegrityError.exit_code if n else 0)


def _options(texts: list[str] | None) -> dict[str, str] | None:
    """`["tune=grain"]` → `{"tune": "grain"}`."""
    for text in texts or ():
        if not text.partition("=")[0] or "=" not in text:
            raise typer.BadParameter(f"--encoder-opt {text!r}: give NAME=VALUE, as tune=grain")
    return dict(text.split("=", 1) for text in texts) if texts else None


def main() -> None:
    """Entry point of the `restore-video` command."""
    supervised(app)
