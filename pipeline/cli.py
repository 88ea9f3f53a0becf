"""`restore-video`: arguments → RestoreConfig → one call in jobs.py. Knows no stage.

`--help` must stay quick: nothing here imports torch, ray or av before a job really starts.
"""

import logging
import os
import signal
import sys
from functools import partial
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pipeline._version import __version__
from pipeline.interrupt import INTERRUPTED, Interrupt
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

if TYPE_CHECKING:
    from pipeline.segments import StopRequest


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
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    bar = not (quiet or log_format == "json") and sys.stderr.isatty()
    run = _plan if dry_run else _run
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
    from pipeline.monitor import configure_logging, progress
    from pipeline.verify import verify as compare

    note_place(f"{source} or {output}")
    configure_logging("text", logging.WARNING)
    try:
        with progress(source.name, bar=not quiet and sys.stderr.isatty()) as on_frame:
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


def _plan(
    source: Path, output: Path | None, config: Path | None, settings: dict[str, Any],
    log_format: Literal["text", "json"], level: int, bar: bool,
) -> int:  # fmt: skip
    """Print the stream plan; returns the exit code with which the job would fail, or 0."""
    from pipeline.config import RestoreConfig
    from pipeline.errors import RestoreError
    from pipeline.monitor import configure_logging

    configure_logging(log_format, level)
    note_place(str(source))
    try:
        checked = RestoreConfig.load(config, settings)
        from pipeline.jobs import plan_file
        from pipeline.plan import table

        planned = plan_file(source, output, checked)
    except RestoreError as error:
        logging.getLogger("pipeline.cli").error("%s", error)
        return error.exit_code
    typer.echo(f"{source} → {planned.output}")
    for line in table(planned.streams):
        typer.echo("  " + line)
    in_table = {f"{plan.name} {plan.outcome}" for plan in planned.streams}
    for line in planned.warnings:
        if line not in in_table:
            typer.echo("  note: " + line)
    typer.echo("nothing was written")
    return 0


def _run(
    source: Path, output: Path | None, config: Path | None, settings: dict[str, Any],
    log_format: Literal["text", "json"], level: int, bar: bool,
) -> int:  # fmt: skip
    """One job; returns the exit code of its cause and leaves one line on stderr."""
    from pipeline.config import RestoreConfig
    from pipeline.errors import RestoreError, notes_of
    from pipeline.monitor import configure_logging, progress
    from pipeline.segments import StopRequest

    if log_format == "json":
        level = min(level, logging.INFO) if level < logging.ERROR else level
    configure_logging(log_format, level)
    logger = logging.getLogger("pipeline.cli")
    stop = StopRequest()
    note_place(str(source))
    with Interrupt(partial(_waits, stop)) as interrupt:
        try:
            checked = RestoreConfig.load(config, settings)
            advice = "the same command goes on after the last finished segment"
            advice = advice if checked.resume else ""
            from pipeline.jobs import restore_file

            interrupt.check()
            with progress(source.name, bar=bar) as on_frame:

                def on_each(done: int, expected: int | None) -> None:
                    interrupt.check()
                    note_place(f"{source}, frame {done}", advice)
                    on_frame(done, expected)

                report = restore_file(source, output, checked, on_frame=on_each, stop=stop)
        except RestoreError as error:
            logger.error("%s%s", error, notes_of(error))
            return error.exit_code
        except KeyboardInterrupt as error:
            logger.error("%s: interrupted; no output was written%s", source, notes_of(error))
            return INTERRUPTED
        except Exception as error:  # a fault of this program: its traceback with -v
            logger.info("%s", source, exc_info=error)
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            logger.error(
                "%s: %s; report this, with what -v prints%s", source, cause, notes_of(error)
            )
            return RestoreError.exit_code
    if level < logging.ERROR:
        rate = (report.n_frames - report.n_earlier) / report.seconds if report.seconds else 0
        typer.echo(f"{report.output}: {report.n_frames} frames, {rate:.2f} fps")
    return 0


def _waits(stop: "StopRequest", number: int) -> bool:
    """The first Ctrl-C asks the job to stop where it can wait for that, all else stops it."""
    if number != signal.SIGINT or stop.asked or not stop.can_wait:
        return False
    stop.asked = True
    return True


def main() -> None:
    """Entry point of the `restore-video` command."""
    supervised(app)
