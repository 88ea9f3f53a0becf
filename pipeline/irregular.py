"""Owns what a file turned out to have that its output cannot keep: counted where it is decoded, on
whatever machine that is, and said of the whole file. Knows no decoder."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


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
    """What pictures carry that no output here keeps, such as closed captions."""

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


def unkept_warning(names: Iterable[str]) -> tuple[str, ...]:
    """One line, or none where there is nothing to say."""
    found = " and ".join(sorted(names))
    return (f"{found}: in its pictures, and in no output of this program",) if found else ()
