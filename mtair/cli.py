"""`mtair`: train, evaluate and list the network's weights."""

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True,
    help="Train and evaluate MTAIR.",
)  # fmt: skip


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="A file of configs/train.")],
    data: Annotated[Path, typer.Option(help="Folder of training images.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an earlier run there is resumed.")],
    steps: Annotated[int, typer.Option(help="Replace the config's number of steps.")] = 0,
    init: Annotated[str | None, typer.Option(help="Weights to start a new run from.")] = None,
) -> None:
    """Train from the beginning, or go on from the last checkpoint in OUT."""
    from dataclasses import replace

    from mtair.schedule import TrainConfig
    from mtair.train import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = TrainConfig.load(config)
    if steps:
        settings = replace(settings, steps=steps)
    typer.echo(run(settings, data, out, init=init))


@app.command()
def evaluate(
    data: Annotated[
        Path | None, typer.Option(help="Folder with CBSD68, Rain100L and SOTS_outdoor.")
    ] = None,
    pair: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="DEGRADED CLEAN", help="Two folders of images with matching names."),
    ] = None,
    model: Annotated[str, typer.Option(help="A shipped name or a .safetensors file.")] = "tiny",
    csv: Annotated[Path | None, typer.Option(help="Write a line per image there.")] = None,
    limit: Annotated[int | None, typer.Option(help="First images of each task only.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only these tasks; repeatable.")] = None,
) -> None:
    """Print PSNR and SSIM per task as a Markdown table, with the weights' hash and the command.

    --data gives the published tasks, --pair one of your own; both may be given.
    """
    from mtair import evaluate as protocol
    from mtair.checkpoint import describe, load_model

    if data is None and pair is None:
        raise typer.BadParameter("give --data or --pair")
    info, network = describe(model), load_model(model)
    scores = list(protocol.evaluate(network, data, limit=limit, tasks=task)) if data else []
    if pair:
        source = protocol.pair_task(*pair)
        scores += protocol.scores(network, pair[0].name, source, limit=limit)
    command = shlex.join(["mtair", *sys.argv[1:]])
    typer.echo(f"`{command}`, weights {info.name} sha256 `{info.sha256}`\n")
    typer.echo(protocol.table(scores))
    if csv:
        protocol.write_csv(scores, csv)


@app.command()
def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="The authors' Lightning checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    model: Annotated[Path, typer.Option(help="The shape expected, a file of configs/models.")],
) -> None:
    """Take over an upstream checkpoint if all of it is known; list what matched and what did not.

    Exit code 2, and nothing written, where a tensor is unknown or missing.
    """
    import yaml

    from mtair import Dimensions, upstream

    dims = Dimensions.from_dict(yaml.safe_load(model.read_text()))
    report = upstream.import_checkpoint(file, out, dims)
    typer.echo(report)
    if not report.complete:
        typer.echo(f"error: {file}: refused, {out} was not written: see the list above", err=True)
        raise typer.Exit(2)
    typer.echo(f"wrote {out}")


@app.command()
def models() -> None:
    """List the weights that ship with the package."""
    from mtair.checkpoint import describe, list_models

    for name in list_models():
        info = describe(name)
        typer.echo(f"{name}  sha256 {info.sha256[:16]}  {info.hours} h of training")


@app.command()
def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(help="A shipped name, a .safetensors file or a YAML of dimensions."),
    ] = None,
    size: Annotated[list[str] | None, typer.Option(help="WIDTHxHEIGHT; repeatable.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    runs: Annotated[int, typer.Option(min=1, help="Passes measured, after one to warm up.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time the network by path and kind of block, as a ratio to the plain float32 path."""
    import json as encoder
    import re

    import torch

    from mtair import bench as benchmark
    from mtair.checkpoint import CheckpointError
    from mtair.machine import machine

    sizes = size or ["256x256", "1280x720"]
    if wrong := [s for s in sizes if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", s)]:
        raise typer.BadParameter(f"--size {wrong[0]}: expected WIDTHxHEIGHT, such as 1280x720")
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {device}: no such device; cpu or cuda:N") from error
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"no {device} here: torch sees {torch.cuda.device_count()}")
    pairs = [(int(w), int(h)) for w, h in (s.split("x") for s in sizes)]
    rows: list[benchmark.Row] = []
    try:
        for row in benchmark.bench(model or ["tiny"], pairs, where, runs):
            if not json:  # each as it comes: a plain path may take a quarter of an hour
                if not rows:
                    typer.echo(f"median of {runs}; {machine(where)}\n")
                typer.echo("\n".join(benchmark.table([row]).splitlines()[2 if rows else 0 :]))
            rows.append(row)
    except CheckpointError as error:
        raise typer.BadParameter(str(error)) from error
    if json:
        typer.echo(encoder.dumps(benchmark.as_json(rows, where), indent=2))


@app.command()
def doctor() -> None:
    """Say what the network can run on here, and which scan it takes on which device and why."""
    import torch

    from mtair import scan
    from mtair.machine import cpu_computes_bf16

    typer.echo(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    threads = torch.get_num_threads()
    bf16 = "native" if cpu_computes_bf16() else "emulated"
    capability = torch.backends.cpu.get_cpu_capability()
    typer.echo(f"cpu: {capability}, {threads} threads, bfloat16 {bf16}")
    for i in range(torch.cuda.device_count()):
        typer.echo(f"cuda:{i}: {_describe_gpu(i)}")
    if not torch.cuda.is_available():
        typer.echo("cuda: no device")
    for name in ("cpu", "cuda"):
        backends = scan.explain(torch.device(name))
        chosen = next(found.backend for found in backends if found.available)
        absent = "" if name == "cpu" or torch.cuda.is_available() else " (were there a device)"
        typer.echo(f"\nscan on {name}: {chosen}{absent}")
        for found in backends:
            typer.echo(f"  {'yes' if found.available else 'no '} {found.backend:<10} {found.why}")


def _describe_gpu(index: int) -> str:
    import torch

    gpu = torch.cuda.get_device_properties(index)
    # Tensor cores take bfloat16 from compute capability 8.0 on; before, it is emulated.
    bf16 = "native" if gpu.major >= 8 else "emulated"
    memory = gpu.total_memory / 2**30
    return f"{gpu.name}, {gpu.major}.{gpu.minor}, {memory:.0f} GiB, bfloat16 {bf16}"


def main() -> None:
    """Entry point of the `mtair` command: what the user can mend is one line and exit code 2."""
    try:
        app()
    except Exception as error:
        from yaml import YAMLError

        from mtair import CheckpointError
        from mtair.scan import ScanUnavailable
        from mtair.state import StateError

        mended = CheckpointError, ScanUnavailable, StateError, YAMLError, OSError, ValueError
        if not isinstance(error, (*mended, FloatingPointError)):
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
