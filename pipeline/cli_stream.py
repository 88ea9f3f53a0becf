"""`restore-stream`: arguments → RestoreConfig → one call in cameras.py. Knows no stage."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.interrupt import INTERRUPTED, SIGNALS, ignore_signals
from pipeline.options import (
    NETWORK,
    OUTPUT,
    Device,
    LogFormat,
    Model,
    Pool,
    Quiet,
    StaticThreshold,
    Strength,
    Tile,
)

if TYPE_CHECKING:
    from pipeline.address import Address
    from pipeline.config import RestoreConfig
    from pipeline.preview import StreamView
    from pipeline.stats import StreamStats

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ENDS, _KEEPING_UP = "Source and sink", "Keeping up"


@app.command()
def restore_stream(
    ends: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE] [SINK]",
            help="SOURCE: rtsp:// or any live URL, /dev/videoN. SINK: rtsp://, rtmp://, udp://, "
            "a folder/ for HLS, or a file. Either is left out where its variable is named.",
        ),
    ] = None,
    source_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The source's URL is in the variable NAME, or in the file that NAME_FILE names.",
            rich_help_panel=_ENDS,
        ),
    ] = None,
    sink_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Likewise the sink's.", rich_help_panel=_ENDS),
    ] = None,
    transport: Annotated[
        Literal["tcp", "udp"] | None,
        typer.Option(help="Of an RTSP source.", rich_help_panel=_ENDS),
    ] = None,
    audio: Annotated[
        bool, typer.Option(help="Pass the source's audio through.", rich_help_panel=_ENDS)
    ] = True,
    stall_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="A source silent for so long is opened anew; 10.",
            rich_help_panel=_ENDS,
        ),
    ] = None,
    stub: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="Shown in place of the last frame once the source was away for 3 s.",
            rich_help_panel=_ENDS,
        ),
    ] = None,
    reconnects: Annotated[
        int | None,
        typer.Option(help="Attempts in a row; without end by default.", rich_help_panel=_ENDS),
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="How long a frame may wait beyond the model's own time; 500.",
            rich_help_panel=_KEEPING_UP,
        ),
    ] = None,
    drop_policy: Annotated[
        Literal["oldest", "latest", "none"] | None,
        typer.Option(
            help="Which frames go when the model is too slow; none: they pass unrestored.",
            rich_help_panel=_KEEPING_UP,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML settings, as in configs/presets; options win over it. With a list of "
            "`cameras`, as in configs/deploy/cameras.yaml, all of them share one set of workers."
        ),
    ] = None,
    pool: Pool = None,
    model: Model = None,
    fallback_model: Annotated[
        str | None,
        typer.Option(
            help="Likewise a smaller one, for when frames had to be passed unrestored.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    strength: Strength = None,
    device: Device = None,
    tile: Tile = None,
    static_threshold: StaticThreshold = None,
    codec: Annotated[
        str | None, typer.Option(help="FFmpeg encoder; libx264.", rich_help_panel=OUTPUT)
    ] = None,
    crf: Annotated[
        float | None,
        typer.Option(help="Constant quality, lower is better; 21.", rich_help_panel=OUTPUT),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Speed of the encoder; veryfast.", rich_help_panel=OUTPUT)
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve /metrics, /healthz and /readyz there."),
    ] = None,
    monitor: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve a page there: before and after, charts, states."
        ),
    ] = None,
    log_format: LogFormat = "text",
    quiet: Quiet = False,
) -> None:
    """Restore a live stream and publish it, for as long as both ends can be reached.

    SIGTERM or Ctrl-C publishes what is in flight, closes both ends and returns 0. Several cameras
    of one --config run until the last has ended; if any failed, the exit code is that of the last.
    """
    settings = {
        "live.transport": transport, "live.audio": None if audio else False,
        "live.stall_timeout_seconds": stall_timeout, "live.reconnects": reconnects,
        "live.stub": stub,
        "live.max_latency_seconds": None if max_latency is None else max_latency / 1000,
        "live.drop_policy": drop_policy, "pool.kind": pool, "model.model": model,
        "model.fallback": fallback_model,
        "model.strength": strength, "model.device": device, "tile.size": tile,
        "tile.static_threshold": static_threshold, "encode.codec": codec, "encode.crf": crf,
        "encode.preset": preset,
    }  # fmt: skip
    level = logging.ERROR if quiet else logging.INFO
    variables = source_env, sink_env
    ports = metrics, monitor
    raise typer.Exit(_run(ends or [], variables, config, settings, ports, log_format, level))


def _run(
    ends: list[str], variables: tuple[str | None, str | None], config: Path | None,
    settings: dict[str, Any], ports: tuple[str | None, str | None],
    log_format: Literal["text", "json"], level: int,
) -> int:  # fmt: skip
    """Returns the exit code of what failed last and leaves a line for each on stderr."""
    from pipeline.errors import RestoreError
    from pipeline.monitor import configure_logging, reporting
    from pipeline.serve import serving
    from pipeline.stats import StreamStats

    configure_logging(log_format, level)
    logger = logging.getLogger("pipeline.cli_stream")
    stop = _stop_on_signals()
    metrics, monitor = ports
    try:
        streams = _streams(ends, variables, config, settings)
        stats = {name: StreamStats() for name in streams}
        with ExitStack() as stack:
            if metrics is not None:
                port = stack.enter_context(serving(metrics, stats))
                logger.info("metrics at port %d", port)
            views: dict[str, StreamView] = {}
            if monitor is not None:
                names = {name: name or str(source) for name, (source, _, _) in streams.items()}
                views = stack.enter_context(_page(monitor, names, stats))
            from pipeline.cameras import Camera, restore_cameras, restore_stream

            cameras = []
            for name, (source, sink, checked) in streams.items():
                stack.enter_context(reporting(str(source), stats[name].values))
                on_frame = views[name].show if views else None
                cameras.append(Camera(source, sink, checked, stats[name], on_frame))
            if list(streams) != [""]:
                failures = restore_cameras(cameras, stop)
                return failures[-1].exit_code if failures else 0
            restore_stream(source, sink, checked, stats=stats[""], stop=stop, on_frame=on_frame)
    except RestoreError as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


@contextmanager
def _page(
    where: str, names: dict[str, str], stats: dict[str, "StreamStats"]
) -> Iterator[dict[str, "StreamView"]]:
    """The monitor page at HOST:PORT, and for each stream what is to be told of its frames."""
    from pipeline.page import PageServer, page
    from pipeline.preview import StreamView

    views = {key: StreamView(shown, stats[key]) for key, shown in names.items()}
    shown = {view.name: view for view in views.values()}
    app = page(lambda: [v.figures() for v in views.values()], lambda name: shown[name].pair())
    with PageServer(app, where) as server:
        host, port = server.address
        logging.getLogger("pipeline.cli_stream").info("monitor at http://%s:%d/", host, port)
        yield views


def _streams(
    ends: list[str], variables: tuple[str | None, str | None], config: Path | None,
    settings: dict[str, Any],
) -> dict[str, tuple["Address", "Address", "RestoreConfig"]]:  # fmt: skip
    """Source, sink and settings by the camera's name; it is "" where there is one alone."""
    from pipeline.config import RestoreConfig, load_cameras
    from pipeline.errors import ConfigError

    cameras = load_cameras(config, settings) if config else []
    if not cameras:
        source, sink = _addresses(ends, variables)
        return {"": (source, sink, RestoreConfig.load(config, settings))}
    if ends or any(variables):
        raise ConfigError(f"{config}: its cameras name their ends; leave out SOURCE and SINK")
    streams = {}
    for camera, checked in cameras:
        given = [end for end in (camera.source, camera.sink) if end is not None]
        source, sink = _addresses(given, (camera.source_env, camera.sink_env))
        streams[camera.name] = source.named(camera.name), sink.named(camera.name), checked
    secrets = [sink.secret for _, sink, _ in streams.values()]
    for name, (_, sink, _) in streams.items():
        if secrets.count(sink.secret) > 1:
            raise ConfigError(f"{config}: camera {name}: another one has the same sink")
    return streams


def _addresses(ends: list[str], variables: tuple[str | None, str | None]) -> list[Any]:
    """SOURCE and SINK, each from its variable if one is named, else the next argument."""
    from pipeline.address import Address
    from pipeline.errors import ConfigError

    left = list(ends)
    found = []
    for name, variable in zip(("SOURCE", "SINK"), variables, strict=True):
        if variable is None and not left:
            raise ConfigError(f"{name} is missing: restore-stream SOURCE SINK")
        found.append(
            Address.parse(left.pop(0)) if variable is None else Address.from_environment(variable)
        )
    if left:
        raise ConfigError("too many arguments: restore-stream SOURCE SINK")
    return found


def _stop_on_signals() -> threading.Event:
    """Set by SIGTERM, SIGHUP and the first Ctrl-C; the second one interrupts."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        # Not here: this may be the very thread that holds the event's lock.
        threading.Thread(target=stop.set).start()

    for number in SIGNALS:
        signal.signal(number, on_signal)
    return stop


def main() -> None:
    """Entry point of the `restore-stream` command."""
    try:
        app()
    finally:
        ignore_signals()
