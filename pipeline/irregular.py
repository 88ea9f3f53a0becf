"""Owns what a file turned out to have that its output cannot keep: counted where it is decoded, on
whatever machine that is, and said of the whole file. Knows no decoder."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_COUNTS = ("n_demuxed", "n_corrupt", "n_retimed", "n_interlaced", "n_skipped")


@dataclass(frozen=True, slots=True)
class Irregular:
    """Of one file, or of a part of one: parts add up."""

    n_corrupt: int = 0
    """Packets that gave no frame."""
    n_retimed: int = 0
    """Frames whose time was made."""
    n_interlaced: int = 0
    relabelled: str = ""
    """What changed in mid-stream and cannot be told to the output."""
    unkept: frozenset[str] = frozenset()
    """What there is that no output here keeps, such as closed captions in the pictures."""

    def __add__(self, other: "Irregular") -> "Irregular":
        return Irregular(
            self.n_corrupt + other.n_corrupt, self.n_retimed + other.n_retimed,
            self.n_interlaced + other.n_interlaced, self.relabelled or other.relabelled,
            self.unkept | other.unkept,
        )  # fmt: skip

    def warnings(self, deinterlace: str, said: frozenset[str] = frozenset()) -> Iterator[str]:
        """A line for each kind; `deinterlace` is the setting that the frames were decoded with, and
        of `unkept` what was said before the work is not said again."""
        yield from unkept_warning(self.unkept - said)
        if self.n_interlaced:
            how = "left as they are" if deinterlace == "off" else "deinterlaced"
            yield f"{self.n_interlaced} frames are interlaced and were {how}"
        if self.n_corrupt:
            yield f"{self.n_corrupt} corrupt packets gave no frame"
        if self.relabelled:
            yield (
                f"{self.relabelled}; the output has that of the first frame throughout: cut the "
                "file there and restore the parts to keep both"
            )
        if self.n_retimed:
            yield (
                f"{self.n_retimed} frames had no time of their own, or one not after that of the "
                "frame before; they follow it"
            )


@dataclass(slots=True)
class Progress:
    """When something was last read or decoded, by time.monotonic()."""

    at: float = field(default_factory=time.monotonic)

    def made(self) -> None:
        """Something came."""
        self.at = time.monotonic()


@dataclass(slots=True)
class Tally:
    """What is counted while a stream is read, and found in its pictures."""

    n_demuxed: int = 0
    """Packets read."""
    n_decoded: int = 0
    """Frames given."""
    n_corrupt: int = 0
    """Packets that were damaged or could not be decoded."""
    n_retimed: int = 0
    """Frames whose pts was absent or did not increase."""
    n_interlaced: int = 0
    n_skipped: int = 0
    """Packets that an edit list has decoded and never shown."""
    relabelled: str = ""
    """Where the aspect ratio, matrix or range of the samples first changes."""
    unkept: set[str] = field(default_factory=set)
    progress: Progress = field(default_factory=Progress)
    """Made with each packet and picture."""

    @property
    def counts(self) -> tuple[int, ...]:
        """What a resumed job goes on counting from; a ledger on disk has them in this order."""
        return tuple(getattr(self, name) for name in _COUNTS)

    @counts.setter
    def counts(self, counts: tuple[int, ...]) -> None:
        for name, count in zip(_COUNTS, counts, strict=False):
            setattr(self, name, count)

    @property
    def irregular(self) -> Irregular:
        """What has been found so far."""
        return Irregular(
            self.n_corrupt, self.n_retimed, self.n_interlaced, self.relabelled,
            frozenset(self.unkept),
        )  # fmt: skip


def irregular_before(counts: tuple[int, ...]) -> Irregular:
    """What had been counted when a frame with these `counts` was decoded; none: nothing."""
    found = Tally()
    found.counts = counts
    return found.irregular


def unkept_warning(names: Iterable[str]) -> tuple[str, ...]:
    """One line, or none where there is nothing to say."""
    found = " and ".join(sorted(names))
    return (f"{found}: in the source, and in no output of this program",) if found else ()
