"""`restore-batch`: arguments → a list of files with their settings → one call of restore_batch.

`--help` must stay quick: nothing here imports torch, ray or av before a batch really starts.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.interrupt import INTERRUPTED, Interrupt
from pipeline.options import Codec, Config, Crf, LogFormat, Model, Preset, Quiet, Strength, Verbose
from pipeline.supervise import supervised

if TYPE_CHECKING:
    from pipeline.batch import BatchProgress
    from pipeline.report import BatchReport, FileReport

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

FAILED = 1
_CLUSTER = "Cluster"


@app.command()
def restore_batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUTS...",
            help="Video files, folders, globs, manifests (.csv, .jsonl), or their URLs (s3://…).",
        ),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="DIR", help="Where the outputs go; or a URL.")
    ],
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="auto or HOST:PORT of a Ray cluster. Default: a Ray of this command's own.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Default: as many as there is room for at any time.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    cpus_per_worker: Annotated[
        float, typer.Option(min=0, help="Also its threads.", rich_help_panel=_CLUSTER)
    ] = 1,
    gpus_per_worker: Annotated[
        float,
        typer.Option(
            min=0, help="0: restore on CPUs; 0.5: two workers share a GPU.",
            rich_help_panel=_CLUSTER,
        ),
    ] = 0,
    report: Annotated[
        str | None, typer.Option(help="JSON. Default: DIR/restore-batch.json.")
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Holds files from and for URLs meanwhile. Default: ~/.cache/restore-batch."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("-y", "--overwrite", help="Replace outputs of other jobs.")
    ] = False,
    config: Config = None,
    model: Model = None,
    strength: Strength = None,
    codec: Codec = None,
    crf: Crf = None,
    preset: Preset = None,
    log_format: LogFormat = "text",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:  # fmt: skip
    """Restore many videos on all cores of this machine, or on a Ray cluster.

    Segments of all files are spread over all workers. A file that fails stops no other. Run again,
    the same command skips what is finished and goes on with the rest. Exit code 0 only if every
    file succeeded.
    """
    settings = {
        "model.model": model, "model.strength": strength, "encode.codec": codec, "encode.crf": crf,
        "encode.preset": preset, "overwrite": overwrite or None,
    }  # fmt: skip
    from pipeline.monitor import configure_logging, log_level, shows_bar

    configure_logging(log_format, log_level(log_format, quiet=quiet, verbose=verbose))
    bar = shows_bar(log_format, quiet=quiet)
    cluster = {
        "address": ray_address, "cpus_per_worker": cpus_per_worker,
        "gpus_per_worker": gpus_per_worker, "n_workers": workers,
    }  # fmt: skip
    raise typer.Exit(_run(inputs, output, settings, config, cluster, report, work_dir, bar))


def _run(
    inputs: list[str], output: str, settings: dict[str, Any], preset: Path | None,
    cluster: dict[str, Any], report_path: str | None, work: Path | None, bar: bool,
) -> int:  # fmt: skip
    from pipeline.errors import ConfigError, RestoreError
    from pipeline.inputs import list_inputs
    from pipeline.monitor import batch_progress
    from pipeline.remote import place

    logger = logging.getLogger("pipeline.cli_batch")
    with Interrupt() as interrupt:
        try:
            folder = place(output)
            report_to = place(report_path) if report_path else folder / "restore-batch.json"
            if report_path and isinstance(report_to, Path) and not report_to.parent.is_dir():
                raise ConfigError(f"--report {report_to}: no such folder; make it first")
            items = list_inputs(inputs, folder, settings, preset)
            from pipeline.batch import Cluster, restore_batch

            interrupt.check()
            with batch_progress(bar=bar) as show:

                def on_progress(progress: "BatchProgress") -> None:
                    interrupt.check()
                    show(progress)

                report = restore_batch(
                    items, folder, Cluster(**cluster), work=work, on_progress=on_progress
                )
            typer.echo(_table(report))
            report.write(report_to)
        except RestoreError as error:
            logger.error("%s", error)
            return error.exit_code
        except KeyboardInterrupt:
            logger.error("interrupted; run the same command again to go on")
            return INTERRUPTED
    return 0 if report.succeeded else FAILED


def _table(report: "BatchReport") -> str:
    """One line a file, the failed ones last with their causes, and a sum."""
    order = {"skipped": 0, "done": 1, "failed": 2}
    lines = []
    for file in sorted(report.files, key=lambda file: order[file.status]):
        frames = "" if file.status == "failed" else f"{file.n_frames} frames"
        what = _named(file) if file.error else file.output
        lines.append(f"{file.status:8} {what}  {frames}".rstrip())
    counts = {status: sum(f.status == status for f in report.files) for status in order}
    lines.append(
        f"{counts['done']} done, {counts['skipped']} finished before, {counts['failed']} failed "
        f"in {report.seconds:.1f} s"
    )
    # A name may be no text in any encoding.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _named(file: "FileReport") -> str:
    """Its error, which may be of something else than the file, with the file's name."""
    source = str(file.source)
    return file.error if file.error.startswith(source) else f"{source}: {file.error}"


def main() -> None:
    """Entry point of the `restore-batch` command."""
    supervised(app)
