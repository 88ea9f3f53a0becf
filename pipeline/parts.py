"""Owns one part of one file on another machine: what is sent there and what comes back.

Knows no worker and no network.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import RestoreConfig
from pipeline.cut import Cut, WholeFile
from pipeline.encoder import Encoding
from pipeline.frames import Frame
from pipeline.irregular import Irregular
from pipeline.segments import Segment, SegmentWriter
from pipeline.tiles import TileGrid


@dataclass(frozen=True, slots=True)
class Part:
    """One part of one file, with all that a worker on another machine needs to restore it."""

    source: Path
    """For messages: no worker opens it."""
    piece: Cut | WholeFile
    grid: TileGrid
    encoding: Encoding
    config: RestoreConfig
    weights_sha256: str


@dataclass(frozen=True, slots=True)
class RestoredPart:
    """What comes back of a part."""

    segments: tuple[tuple[Segment, bytes], ...]
    """Finished ones, each with the bytes of its file."""
    irregular: Irregular


class PartWriter:
    """Encodes frames into one segment file after the other."""

    def __init__(self, encoding: Encoding, folder: Path) -> None:
        self.finished: list[Segment] = []
        self._encoding, self._folder = encoding, folder
        self._writer: SegmentWriter | None = None

    def write(self, frame: Frame) -> None:
        """Encode one planned frame."""
        if self._writer is None:
            path = self._folder / f"{len(self.finished)}.segment"
            self._writer = SegmentWriter(path, self._encoding.open())
        self._writer.encode(frame, self._encoding.picture(frame))
        if frame.ends_segment:
            self.finished.append(self._writer.finish(len(self.finished)))
            self._writer = None

    def with_data(self) -> tuple[tuple[Segment, bytes], ...]:
        """What has been finished, read back."""
        paths = (self._folder / f"{place}.segment" for place in range(len(self.finished)))
        return tuple((s, path.read_bytes()) for s, path in zip(self.finished, paths, strict=True))


def first_segment(planned: Iterable[Frame]) -> Iterator[Frame]:
    """Planned frames up to the end of their segment."""
    for frame in planned:
        yield frame
        if frame.ends_segment:
            return
