"""One call of `restore-video` once its arguments are read: the job or its plan → an exit code.

Knows no option. Imports av; torch and ray only when the settings are known to be right.
"""

import logging
import signal
from functools import partial
from pathlib import Path
from typing import Any, Literal

import typer

from pipeline.config import RestoreConfig
from pipeline.errors import RestoreError, notes_of
from pipeline.interrupt import INTERRUPTED, Interrupt
from pipeline.monitor import configure_logging, progress
from pipeline.plan import table
from pipeline.segments import StopRequest
from pipeline.supervise import note_place

logger = logging.getLogger(__name__)


def plan(
    source: Path, output: Path | None, config: Path | None, settings: dict[str, Any],
    log_format: Literal["text", "json"], level: int,
) -> int:  # fmt: skip
    """Print the stream plan; returns the exit code with which the job would fail, or 0."""
    configure_logging(log_format, level)
    note_place(str(source))
    try:
        checked = RestoreConfig.load(config, settings)
        from pipeline.jobs import plan_file

        planned = plan_file(source, output, checked)
    except RestoreError as error:
        logger.error("%s", error)
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


def run(
    source: Path, output: Path | None, config: Path | None, settings: dict[str, Any],
    log_format: Literal["text", "json"], level: int, bar: bool,
) -> int:  # fmt: skip
    """One job; returns the exit code of its cause and leaves one line on stderr."""
    configure_logging(log_format, level)
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


def _waits(stop: StopRequest, number: int) -> bool:
    """The first Ctrl-C asks the job to stop where it can wait for that, all else stops it."""
    if number != signal.SIGINT or stop.asked or not stop.can_wait:
        return False
    stop.asked = True
    return True
