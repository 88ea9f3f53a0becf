"""Owns the in-flight window: the order of the frames and the backpressure while tiles are restored.
Knows no Ray, no network, no codec and no device: it is given `submit`."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from pipeline.errors import IntegrityError
from pipeline.frames import Frame, TileBatch
from pipeline.tiles import TileGrid

Submit = Callable[[TileBatch], Future[TileBatch]]
"""Start restoring a batch; the Future's result has the same shapes and dtypes."""

_Layout = tuple[tuple[tuple[int, ...], str], ...]


@dataclass(frozen=True, slots=True)
class _Pending:
    """A frame admitted and not yet emitted."""

    frame: Frame
    futures: list[Future[TileBatch]] = field(default_factory=list)
    layouts: list[_Layout] = field(default_factory=list)

    def done(self) -> bool:
        return all(future.done() for future in self.futures)

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


def restore_frames(
    frames: Iterable[Frame | None], grid: TileGrid, submit: Submit, window: int
) -> Iterator[Frame]:
    """Yield every frame once, in order, with its planes restored and its pts as it was.

    At most `window` frames are admitted and not yet emitted: the next one is pulled only when the
    oldest is done. Frames that are done are emitted before the source is asked again; a live source
    that has none just now gives None, so that they need not wait for its next one. An error in
    `submit` or in a batch is raised as it is, with the frame's index and pts as a note; the other
    batches are then cancelled, as they are when the iterator is closed early. Raises
    IntegrityError where a batch comes back in another shape or dtype than it left, ValueError
    where `window` is below 1. Waits for a batch as long as it takes: `submit` bounds that.
    """
    if window < 1:
        raise ValueError(f"the window must hold at least 1 frame, not {window}")
    return _restore_frames(frames, grid, submit, window)


def _restore_frames(
    frames: Iterable[Frame | None], grid: TileGrid, submit: Submit, window: int
) -> Iterator[Frame]:
    in_flight: deque[_Pending] = deque()
    try:
        for frame in frames:
            if frame is not None:
                in_flight.append(_Pending(frame))
                _admit(in_flight[-1], grid, submit)
            while in_flight and (len(in_flight) >= window or in_flight[0].done()):
                yield _emit(in_flight, grid)
        while in_flight:
            yield _emit(in_flight, grid)
    finally:
        for pending in in_flight:
            pending.cancel()


def _admit(pending: _Pending, grid: TileGrid, submit: Submit) -> None:
    with _naming(pending.frame):
        for batch in grid.split(pending.frame.planes):
            pending.layouts.append(_layout(batch))
            pending.futures.append(submit(batch))


def _emit(in_flight: deque[_Pending], grid: TileGrid) -> Frame:
    pending = in_flight[0]
    with _naming(pending.frame):
        batches = [future.result() for future in pending.futures]
        for batch, sent in zip(batches, pending.layouts, strict=True):
            if _layout(batch) != sent:
                raise IntegrityError(
                    f"frame {pending.frame.index}: a batch of {sent} came back as {_layout(batch)}"
                )
        restored = replace(pending.frame, planes=grid.merge(batches))
    # Only now: a failing frame stays in the window, so that its other batches are cancelled too.
    in_flight.popleft()
    return restored


def _layout(batch: TileBatch) -> _Layout:
    return tuple((plane.shape, str(plane.dtype)) for plane in batch)


@contextmanager
def _naming(frame: Frame) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"while restoring frame {frame.index} (pts {frame.pts})")
        raise
