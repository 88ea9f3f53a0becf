"""Owns how the stages of a job run beside one another: threads for the codecs, and what follows the
frames through the window. Knows no settings, no pool and no file.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import TypeVar

from pipeline.frames import Frame
from pipeline.irregular import Progress
from pipeline.restore import restore_frames
from pipeline.static import StaticTiles
from pipeline.temporal import TemporalFilter
from pipeline.tiles import TileGrid
from pipeline.watch import WatchedThread

DECODE_AHEAD = ENCODE_BEHIND = 2
"""Frames that wait between a codec's thread and the window; part of the memory bound."""

T = TypeVar("T")


def decoded(frames: Iterator[Frame], progress: Progress, decoder: WatchedThread) -> Iterator[Frame]:
    """The same frames, DECODE_AHEAD of them decoded in a thread before they are asked for."""
    coming = deque(decoder.submit(lambda: next(frames, None)) for _ in range(DECODE_AHEAD))
    while True:
        frame = decoder.wait(coming.popleft(), lambda: progress.at)
        if frame is None:
            return
        coming.append(decoder.submit(lambda: next(frames, None)))
        yield frame


def ahead(items: Iterator[T], depth: int) -> Generator[T]:
    """The same items, up to `depth` of them fetched in a thread before they are asked for."""
    with closing(as_they_come(items, depth, None)) as coming:
        for item in coming:
            if item is not None:
                yield item


def as_they_come(items: Iterator[T], depth: int, seconds: float | None) -> Generator[T | None]:
    """Likewise, and None instead of waiting longer than so many seconds for the next one."""
    end = object()
    with ThreadPoolExecutor(1, "decode") as thread:
        try:
            coming = deque(thread.submit(next, items, end) for _ in range(depth))
            while True:
                if not wait([coming[0]], seconds).done:
                    yield None
                    continue
                item = coming.popleft().result()
                if item is end:
                    return
                coming.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            thread.shutdown(cancel_futures=True)


def behind(write: Callable[[Frame], None], frames: Iterable[Frame], depth: int) -> Iterator[None]:
    """Write every frame in a thread, at most `depth` of them waiting; yields as each is written."""
    with ThreadPoolExecutor(1, "encode") as thread:
        try:
            waiting: deque[Future[None]] = deque()
            for frame in frames:
                waiting.append(thread.submit(write, frame))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)


def restored(
    frames: Iterator[Frame], grid: TileGrid, static: StaticTiles, temporal: TemporalFilter | None,
    window: int,
) -> Iterator[Frame]:  # fmt: skip
    """Planned frames, restored in order and through the filter, each with its source."""
    frames = forgetting(frames, static)
    if temporal is None:
        return restore_frames(frames, grid, static, window)
    sources: deque[Frame] = deque()  # those in the window

    def kept() -> Iterator[Frame]:
        for frame in frames:
            sources.append(frame)
            yield frame

    return _filtered(restore_frames(kept(), grid, static, window), sources, temporal)


def _filtered(
    restored: Iterable[Frame], sources: deque[Frame], temporal: TemporalFilter
) -> Iterator[Frame]:
    for frame in restored:
        yield temporal(sources.popleft(), frame)
        if frame.ends_segment:  # a job that goes on after it has nothing to remember either
            temporal.reset()


def forgetting(frames: Iterable[Frame], static: StaticTiles) -> Iterator[Frame]:
    """The same frames; no tile of one segment is reused in another, whoever restores that."""
    for frame in frames:
        yield frame
        if frame.ends_segment:  # asked for the next: this one's tiles have all been submitted
            static.reset()
