"""Owns the way from the packets of one stream to Frames, be they of a file or of a part of one."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
from av.sidedata.sidedata import Type

from pipeline.alpha import has_alpha, is_opaque, transparent
from pipeline.deinterlace import can_deinterlace, deinterlaced
from pipeline.demux import is_after
from pipeline.errors import SourceError
from pipeline.frames import Frame, StreamInfo
from pipeline.irregular import Tally
from pipeline.opening import cause_of
from pipeline.planes import as_planar, planes_of
from pipeline.side_data import side_data_of

Deinterlace = Literal["auto", "off", "error"]
Coded = tuple[int, int, str]
"""Width, height and FFmpeg's pixel format of a picture as the decoder gives it."""

MAX_CONSECUTIVE_DECODE_ERRORS = 8
"""So many packets in a row may be undecodable; one more ends the job."""
MAX_STEP_BACK_SECONDS = Fraction(1)
"""A pts that lies further back than that belongs to another clock: the file was joined of two."""
_UNKEPT = {
    Type.A53_CC: "closed captions", Type.DYNAMIC_HDR_PLUS: "HDR10+ metadata",
    Type.DOVI_METADATA: "Dolby Vision metadata", Type.DOVI_RPU_BUFFER: "Dolby Vision metadata",
    Type.DYNAMIC_HDR_VIVID: "HDR Vivid metadata", Type.STEREO3D: "what makes it stereoscopic",
    Type.SPHERICAL: "what makes it spherical",
}  # fmt: skip


class FormatChanged(SourceError):  # noqa: N818 - what the source does
    """A picture is of another size or pixel format than the first one of its file."""


def coded_of(picture: Any) -> Coded:
    """The size and format of a decoder's picture."""
    return picture.width, picture.height, picture.format.name


def labels_of(picture: Any, context: Any) -> dict[str, Any]:
    """What else an output says once for all of its frames."""
    return {
        "sample aspect ratio": context.sample_aspect_ratio,
        "matrix": int(picture.colorspace), "range": int(picture.color_range),
    }  # fmt: skip


class PictureDecoder:
    """Pictures from packets: counts what cannot be decoded, and what pictures carry besides.

    `packets` ends with empty ones, without end; `context` decodes them. A picture that is not
    `coded` raises FormatChanged, but before `range_pts` it is left out and after it the end; None
    takes any.
    `shown_at` (demux.FilePackets) loses the time of each packet that gives no picture. `path` is
    for messages.
    """

    def __init__(
        self, path: Path, packets: Iterable[Any], context: Any, tally: Tally,
        coded: Coded | None = None, shown_at: deque[int] | None = None,
        range_pts: tuple[int | None, int | None] = (None, None),
    ) -> None:  # fmt: skip
        self.path, self.tally = path, tally
        self.shown_at: deque[int] = deque() if shown_at is None else shown_at
        self._packets, self._context = packets, context
        self._coded, (self._start_pts, self._end_pts) = coded, range_pts
        self._labels: dict[str, Any] = {}

    def pictures(self) -> Iterator[Any]:
        """Every decodable picture, the decoder drained at the end. Raises SourceError."""
        consecutive = 0
        for packet in self._packets:
            try:
                pictures = self._context.decode(packet if packet.size else None)
            except av.EOFError:
                break
            except av.FFmpegError as error:
                if not (packet.is_corrupt or is_after(packet, self._end_pts)):
                    self.tally.n_corrupt += 1  # corrupt ones are counted already
                if self.shown_at:
                    self.shown_at.popleft()
                consecutive += 1
                if consecutive > MAX_CONSECUTIVE_DECODE_ERRORS:
                    raise SourceError(
                        f"{self.path}: {consecutive} packets in a row cannot be decoded at frame "
                        f"{self.tally.n_decoded} ({cause_of(error)}); repair the file or trim "
                        "before it"
                    ) from error
                continue
            consecutive = 0
            for picture in pictures:
                self.tally.progress.made()
                early, late = self._is_outside(picture)
                now = coded_of(picture)
                if self._coded in (None, now):
                    self._look_at(picture, early)
                    yield picture
                elif late:
                    return
                elif not early:
                    raise FormatChanged(
                        f"{self.path}: frame {self.tally.n_decoded} is {_said(now)}, the first one "
                        f"{_said(self._coded)}; cut the file where it changes and restore the parts"
                    )

    def _is_outside(self, picture: Any) -> tuple[bool, bool]:
        start, end, pts = self._start_pts, self._end_pts, picture.pts
        early = pts is not None and start is not None and pts < start
        return early, pts is not None and end is not None and pts >= end

    def _look_at(self, picture: Any, early: bool) -> None:
        """Note what it carries besides; transparency is an error."""
        if has_alpha(picture.format):
            if not is_opaque(picture):
                name = f"{picture.format.name} of frame {self.tally.n_decoded}"
                raise transparent(self.path, name)
            self.tally.unkept.add("an alpha channel without transparency")
        if not early:
            self._note_labels(picture)
        self.tally.unkept.update(_UNKEPT[k] for k in side_data_of(picture) if k in _UNKEPT)

    def _note_labels(self, picture: Any) -> None:
        """Remember where what an output says once for all of its frames first changes."""
        now = labels_of(picture, self._context)
        before, self._labels = self._labels or now, now
        if now != before and not self.tally.relabelled:
            names = [name for name in now if now[name] != before[name]]
            changes = ", ".join(f"{name} {before[name]} to {now[name]}" for name in names)
            self.tally.relabelled = f"{changes} near frame {self.tally.n_decoded}"


def _said(coded: Coded) -> str:
    return "{}x{} {}".format(*coded)


class FrameDecoder:
    """Frames from pictures: their times, whole where they were interlaced, their planes copied."""

    def __init__(self, decoder: PictureDecoder, info: StreamInfo, deinterlace: Deinterlace) -> None:
        self.ended_early = False
        """A frame at or after the end that was asked for has been seen."""
        self._decoder, self._info, self._deinterlace = decoder, info, deinterlace
        self._tally, self._path = decoder.tally, decoder.path

    def frames(self, start_pts: int | None, end_pts: int | None) -> Iterator[Frame]:
        """Those with `start_pts <= pts < end_pts`, with the durations that the decoder claims.

        Their indices count on from `n_decoded`.
        """
        last: Frame | None = None
        for picture, shown in self._whole(self._decoder.pictures()):
            pts = self._pts_of(picture, last)
            if end_pts is not None and pts >= end_pts:
                self.ended_early = True
                return
            key = bool(picture.key_frame)
            last = Frame(self._tally.n_decoded, pts, (), picture.duration or 0, key)
            if start_pts is None or pts >= start_pts:
                if picture.interlaced_frame:
                    self._note_interlaced()
                self._tally.n_decoded += 1
                planes = planes_of(shown, self._info, self._path)
                yield replace(last, planes=planes, counts=self._tally.counts)

    def _whole(self, pictures: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
        """Each picture with what is shown of it."""
        name = self._info.pixel_format.name
        if self._deinterlace == "auto" and can_deinterlace(self._info):
            return deinterlaced(pictures, lambda picture: as_planar(picture, name))
        return ((picture, picture) for picture in pictures)

    def _note_interlaced(self) -> None:
        self._tally.n_interlaced += 1
        if self._deinterlace == "off" or (
            self._deinterlace == "auto" and can_deinterlace(self._info)
        ):
            return
        what = f"{self._info.width}x{self._info.height} {self._info.pixel_format.name}"
        why = f" and {what} cannot be deinterlaced" if self._deinterlace == "auto" else ""
        raise SourceError(
            f"{self._path}: frame {self._tally.n_decoded} is interlaced{why}; --deinterlace off "
            "restores it as if it were not"
        )

    def _pts_of(self, picture: Any, last: Frame | None) -> int:
        # AVI stores no pts, and FFmpeg's guess is wrong for B-frames.
        shown_at = self._decoder.shown_at
        pts: int | None = shown_at.popleft() if shown_at else picture.pts
        if pts is not None and (last is None or pts > last.pts):
            return pts
        self._tally.n_retimed += 1
        if last is None:
            return int(picture.dts or 0)
        if pts is not None and last.pts - pts > MAX_STEP_BACK_SECONDS / self._info.time_base:
            back = float((last.pts - pts) * self._info.time_base)
            raise SourceError(
                f"{self._path}: frame {self._tally.n_decoded} is {back:.3f} s before the one "
                "before it, where another recording begins; cut the file there and restore the "
                "parts"
            )
        if pts is None:
            pts = picture.dts if picture.dts is not None else last.pts + interval(last, self._info)
        return max(pts, last.pts + 1)


def interval(frame: Frame, info: StreamInfo) -> int:
    """How long a frame is shown, in time_base, at least 1: as it says, else by the frame rate."""
    if frame.duration or not info.frame_rate:
        return max(frame.duration, 1)
    return max(round(1 / info.frame_rate / info.time_base), 1)


def timed(
    frames: Iterator[Frame], known: Frame | None, last_duration: Callable[[Frame], int]
) -> Generator[Frame, None, Frame | None]:
    """Each frame but `known` with the time to the next one as its duration; returns the last.

    What containers say of durations is in coded order. `last_duration` is asked at the end.
    """
    held: Frame | None = None
    for frame in frames:
        if held is not None and held is not known:
            yield replace(held, duration=frame.pts - held.pts)
        held = frame
    if held is not None and held is not known:
        yield replace(held, duration=last_duration(held))
    return held
