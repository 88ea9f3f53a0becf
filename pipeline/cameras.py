"""Owns live streams, one or several: a thread for each, one set of workers for all of them.

Knows how their stages are joined; knows neither devices nor networks, which pools.py opens.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path

from pipeline import pools
from pipeline.address import Address
from pipeline.config import RestoreConfig
from pipeline.derived import plan_grid, static_tiles
from pipeline.errors import ConfigError, RestoreError, SinkError, SourceError
from pipeline.frames import Frame, StreamInfo, TileBatch
from pipeline.live import LiveSource, Take
from pipeline.output import LiveOutput
from pipeline.publish import target_of
from pipeline.publisher import check_settings
from pipeline.restore import Submit, restore_frames
from pipeline.shares import Shares
from pipeline.stats import StreamStats
from pipeline.stub import Stub

_OF_FILES_ALONE = (
    "decode", "segment.frames", "start_seconds", "end_seconds", "encode.quality", "pool.window",
)  # fmt: skip

logger = logging.getLogger(__name__)

RESTARTS = 5
RESTART_WINDOW_SECONDS = 600.0
"""A camera whose workers failed begins anew, until that has come so many times within so long."""
RESTART_SECONDS = 2.0
"""And so long after."""
POLL_SECONDS = 0.2
"""How soon several streams are told to stop."""

OnFrame = Callable[[StreamInfo, Frame, Frame], None]
"""A frame as it came and as it goes out; must not wait."""


@dataclass(frozen=True, slots=True)
class Camera:
    """One live stream, from where to where and how."""

    source: Address
    """Its text begins every message about it: `Address.named` says which camera it is."""
    sink: Address
    config: RestoreConfig
    stats: StreamStats = field(default_factory=StreamStats)
    on_frame: OnFrame | None = None


def restore_stream(
    source: str | Address, sink: str | Address, config: RestoreConfig | None = None, *,
    stats: StreamStats | None = None, stop: threading.Event | None = None,
    on_frame: OnFrame | None = None,
) -> StreamStats:  # fmt: skip
    """Restore a live stream until `stop` is set, or one of its ends is lost for good.

    `on_frame` is called with every frame as it came and as it goes out, and must not wait. Raises
    the subclasses of RestoreError: StreamLost where the source did not come back within
    `config.live.reconnects`, SourceError or SinkError where trying again is no use.
    """
    source, sink = (Address.parse(a) if isinstance(a, str) else a for a in (source, sink))
    camera = Camera(source, sink, config or RestoreConfig(), stats or StreamStats(), on_frame)
    _check(camera)
    try:
        with pools.shared_pool(camera.config, source) as workers:
            _restore(camera, workers, _shares(workers, [camera]), stop or threading.Event())
    finally:
        camera.stats.ended = True
    return camera.stats


def restore_cameras(cameras: Sequence[Camera], stop: threading.Event) -> list[RestoreError]:
    """Restore several streams on one set of workers, until `stop` is set or all have ended.

    The settings of `model` and `pool` are those of the first. One that fails is logged, and the
    others go on; returns the errors in the order in which they came. Raises ConfigError where one
    of them cannot begin, DeviceError where the workers cannot.
    """
    for camera in cameras:
        _check(camera)
    failures: list[RestoreError] = []
    with pools.shared_pool(cameras[0].config, Path("the workers")) as workers:
        shares = _shares(workers, cameras)
        ending = threading.Event()
        threads = [
            threading.Thread(
                target=_keep, args=[camera, workers, shares, ending, failures], daemon=True,
                name=str(camera.source),
            )
            for camera in cameras
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads) and not stop.wait(POLL_SECONDS):
                pass
        finally:
            ending.set()
            for thread in threads:
                thread.join()
    return failures


def _check(camera: Camera) -> None:
    """Raise the ConfigError that is known before anything is opened."""
    default = RestoreConfig()
    for name in _OF_FILES_ALONE:
        if attrgetter(name)(camera.config) != attrgetter(name)(default):
            raise ConfigError(f"{name}: not there for live streams; leave it out")
    check_settings(target_of(camera.sink), camera.config.encode)
    if camera.config.live.stub is not None:
        Stub(camera.config.live.stub)


def _shares(workers: pools.SharedPool, cameras: Sequence[Camera]) -> Shares:
    # No more with the workers than they restore at once: what waits there has had its turn.
    return Shares(workers.pool.n_workers, max(c.config.tile.batch for c in cameras))


def _keep(
    camera: Camera, workers: pools.SharedPool, shares: Shares, stop: threading.Event,
    failures: list[RestoreError],
) -> None:  # fmt: skip
    """One of several streams, to its end: what goes wrong with it is logged and kept.

    Its ends are opened again until trying is no use; so is all of it where its workers failed, or
    this program: one batch that did not fit into a GPU's memory must not end a camera for good.
    """
    failed_at: deque[float] = deque(maxlen=RESTARTS)
    while (failure := _failure_of(camera, workers, shares, stop)) is not None:
        failed_at.append(time.monotonic())
        often = len(failed_at) == RESTARTS and failed_at[-1] - failed_at[0] < RESTART_WINDOW_SECONDS
        if often or isinstance(failure, ConfigError | SourceError | SinkError):
            logger.error("%s", failure)
            failures.append(failure)
            break
        logger.warning("%s; it begins anew in %g s", failure, RESTART_SECONDS)
        camera.stats.begin_anew()
        if stop.wait(RESTART_SECONDS):
            break
    camera.stats.ended = True


def _failure_of(
    camera: Camera, workers: pools.SharedPool, shares: Shares, stop: threading.Event
) -> RestoreError | None:
    """Restore one stream; what ended it."""
    try:
        _restore(camera, workers, shares, stop)
    except RestoreError as error:
        return error
    except Exception as error:
        logger.exception("%s: failed", camera.source)
        return RestoreError(f"{camera.source}: {type(error).__name__}; see the log")
    return None


def _restore(
    camera: Camera, workers: pools.SharedPool, shares: Shares, stop: threading.Event
) -> None:
    config, stats, pool = camera.config, camera.stats, workers.pool
    with pools.worker_errors(camera.source), ExitStack() as stack:
        output = stack.enter_context(
            LiveOutput(target_of(camera.sink), config.encode, config.live, stats)
        )
        live = stack.enter_context(
            LiveSource(
                camera.source, config.live, stats, output.write_audio, stop,
                has_smaller=config.model.fallback is not None,
            )
        )  # fmt: skip
        output.repeat_while(live.away)
        for take, frames in live.takes():
            planes = pools.plane_spec(take.info.pixel_format)
            grid = plan_grid(take.info, config, workers.device, workers.stride)
            pool.warm_up(pools.blank(take.info, grid), planes)
            output.begin(take)
            # Tiles that stand still are remembered for each network by itself.
            networks = {
                treatment: static_tiles(
                    shares.member(partial(pool.submit, planes=planes, smaller=smaller),
                                  (planes, smaller)),
                    take.info, grid, config,
                )
                for treatment, smaller in (("restore", False), ("smaller", True))
            }  # fmt: skip
            # As few in flight as keep the workers busy: each more is one model's time of delay.
            window = -(-pool.n_workers // grid.n_batches)
            sources: deque[Frame] = deque()  # those in the window
            for frame in restore_frames(_watched(frames, output, stats, sources), grid,
                                        _chosen(networks, live), window):  # fmt: skip
                output.write(frame)
                _show(camera, take, sources.popleft(), frame)


def _show(camera: Camera, take: Take, source: Frame, restored: Frame) -> None:
    if camera.on_frame is not None:
        camera.on_frame(take.info, source, restored)


def _watched(
    frames: Iterator[Frame | None], output: LiveOutput, stats: StreamStats, sources: deque[Frame]
) -> Iterator[Frame | None]:
    for frame in frames:
        stats.alive("restore")
        output.check()
        if frame is not None:
            sources.append(frame)
        yield frame


def _chosen(networks: Mapping[str, Submit], live: LiveSource) -> Submit:
    """The network that the controller chose, or the tiles as they are."""

    def switched(batch: TileBatch) -> Future[TileBatch]:
        if live.treatment in networks:
            return networks[live.treatment](batch)
        passed: Future[TileBatch] = Future()
        passed.set_result(batch)
        return passed

    return switched
