"""Owns what a worker does with a part of a file, decode to encode, and the crew that does it."""

import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from pipeline.cut import Cut, CutVideo
from pipeline.decode import VideoSource
from pipeline.derived import open_source, static_tiles, temporal_filter
from pipeline.errors import ConfigError, RestoreError, SinkError
from pipeline.parts import Part, PartWriter, RestoredPart, first_segment
from pipeline.pools import size_batches, worker_errors, worker_spec
from pipeline.segments import plan
from pipeline.stages import DECODE_AHEAD, ENCODE_BEHIND, ahead, behind, restored
from workers import (
    Limits,
    LocalPool,
    Outcome,
    RayCrew,
    WeightsError,
    WeightsInfo,
    WorkerError,
    WorkerSpec,
    describe_weights,
    ray_session,
    spread,
)

KEPT_NETWORKS = 4
"""Streams of another pixel format need a network of their own; a worker keeps so many loaded."""


class PartJob:
    """What a worker does with each part, in its own process: decode, restore, encode.

    `weights` are the files that do not ship with this project, by the name that the settings have
    for them; `threads` those of the network and of the decoder.
    """

    def __init__(self, weights: Mapping[str, bytes], device: str, threads: int) -> None:
        self._weights, self._device, self._threads = dict(weights), device, threads
        self._pools: dict[WorkerSpec, LocalPool] = {}

    def __call__(self, part: Part) -> RestoredPart | RestoreError:
        """The finished segments; an error of the source, that every worker would meet, is one too.

        Raises WorkerError where this worker failed and another might not.
        """
        try:
            with tempfile.TemporaryDirectory() as folder:
                return self._restored(part, Path(folder))
        except (ConfigError, SinkError, WeightsError) as error:
            # Settings, encoder and weights have passed on the driver: it is this machine.
            raise WorkerError(f"on {platform.node()}: {error}") from error
        except RestoreError as error:
            # A whole file was read from a copy in that folder, under a name that no user knows.
            copy = str(_copy_of(part, Path(folder)))
            error.args = (str(error).replace(copy, str(part.source)),)
            return error

    def close(self) -> None:
        """Let go of the networks. Again does nothing."""
        while self._pools:
            self._pools.popitem()[1].close()

    def _restored(self, part: Part, folder: Path) -> RestoredPart:
        info = part.encoding.info
        pool = self._pool(part)
        size_batches(pool, info, part.grid)
        static = static_tiles(pool.submit, info, part.grid, part.config)
        segments = PartWriter(part.encoding, folder)
        with _part_video(part, folder, self._threads) as video:
            planned = plan(video.frames(), part.config.segment.frames)
            if isinstance(video, CutVideo):
                planned = first_segment(planned)
            temporal = temporal_filter(info, part.config)
            # Closed first: its thread decodes out of the video.
            with closing(ahead(planned, DECODE_AHEAD)) as frames:
                done = restored(frames, part.grid, static, temporal, part.config.pool.window)
                for _ in behind(segments.write, done, ENCODE_BEHIND):
                    pass
            if isinstance(video, CutVideo):
                segments.finished = [video.checked(segment) for segment in segments.finished]
                # Without the frames after its last one, which may have been decoded ahead.
                video.tally.counts = segments.finished[-1].counts
            return RestoredPart(segments.with_data(), video.tally.irregular)

    def _pool(self, part: Part) -> LocalPool:
        spec = worker_spec(part.encoding.info.pixel_format, part.config, self._device)
        spec = replace(spec, threads=self._threads)
        if spec not in self._pools:
            if len(self._pools) == KEPT_NETWORKS:
                self._pools.pop(next(iter(self._pools))).close()
            checkpoint = self._checkpoint(part)
            found = describe_weights(checkpoint).sha256
            if found != part.weights_sha256:
                raise WorkerError(  # another worker may have the right ones
                    f"this worker has other weights of that name ({found[:12]}): use the same "
                    "version on every machine"
                )
            self._pools[spec] = LocalPool(replace(spec, checkpoint=checkpoint))
        return self._pools[spec]

    def _checkpoint(self, part: Part) -> str:
        """The weights' shipped name, or where this machine has what was sent: one file of a kind.

        Ray kills workers: what each had for itself would stay on the disk for ever.
        """
        name = part.config.model.model
        if name not in self._weights:
            return name
        folder = Path(tempfile.gettempdir()) / f"restore-video-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{part.weights_sha256}.safetensors"
        mine = path.with_suffix(f".{os.getpid()}")
        mine.write_bytes(self._weights[name])
        mine.replace(path)
        return str(path)


def weights_of(model: str) -> tuple[WeightsInfo, bytes | None]:
    """Which weights `model` names, and the file itself where it does not ship with this project.

    Raises ConfigError.
    """
    with worker_errors(Path(model)):
        info = describe_weights(model)
    path = Path(model)
    return info, path.read_bytes() if path.suffix or "/" in model else None


@contextmanager
def part_workers(
    job: PartJob, *, address: str | None, cpus: float, gpus: float, n_workers: int | None
) -> Iterator[Callable[[Iterable[Part | None]], Iterator[Outcome]]]:
    """Workers on the Ray at `address`, or on one of our own, that do `job`.

    Gives the function that has them do parts and yields the outcome of each as it comes. Raises
    DeviceError, as does that.
    """
    with (
        worker_errors(Path("Ray")),
        ray_session(address),
        RayCrew(
            job, num_cpus_per_worker=cpus, num_gpus_per_worker=gpus, n_workers=n_workers
        ) as crew,
    ):
        if address is None and not crew.fits():  # no machine will join it
            raise WorkerError(f"no worker fits on this machine: {crew.room()}")
        limits = Limits(item_seconds=_patience)
        yield lambda parts: spread(crew, parts, limits)


def _patience(part: Part) -> float:
    """Seconds after which a worker hangs for certain: no frame takes 90 of them."""
    piece = part.piece
    n_packets = len(piece.packets) if isinstance(piece, Cut) else piece.n_packets
    return max(6 * 3600.0, 90.0 * n_packets)


def _part_video(
    part: Part, folder: Path, threads: int
) -> AbstractContextManager[VideoSource | CutVideo]:
    if isinstance(part.piece, Cut):
        deinterlace = part.config.decode.deinterlace
        return nullcontext(CutVideo(part.piece, part.source, threads, deinterlace))
    path = _copy_of(part, folder)
    path.write_bytes(part.piece.data)
    return open_source(path, part.config, threads, hwaccel="none")  # as it was planned


def _copy_of(part: Part, folder: Path) -> Path:
    """Where a worker puts the file that it was sent."""
    return folder / f"source{part.source.suffix}"
