"""Owns the comparison of a finished output with its source: frames, times, streams, tags.

Decodes both videos and reads every packet of both files. Knows what may differ from the stream
plan alone (plan.py), never from the job that wrote the output.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

import av

from pipeline.containers import codec_of, content_tags, disposition_for, language_for
from pipeline.decode import VideoSource
from pipeline.errors import ConfigError
from pipeline.frames import StreamInfo
from pipeline.likeness import compared
from pipeline.opening import open_container, pick_video_stream
from pipeline.packets import Packets, Streams, Times
from pipeline.plan import StreamPlan, plan_streams
from pipeline.timecode import timecodes

SLACK_SECONDS = Fraction(1, 10)
"""How far start and end of sound that was encoded anew may move: an encoder's frame and delay."""

_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2": "mp4", "matroska,webm": "matroska"}


@dataclass(slots=True)
class Verification:
    """What was compared: lines for a person, and those of them that are differences."""

    lines: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def say(self, what: str, line: str, *, same: bool = True) -> None:
        """Enter a finding."""
        text = f"{what}: {line}"
        self.lines.append(text)
        if not same:
            self.differences.append(text)

    def equal(self, what: str, before: object, after: object) -> None:
        """Enter whether two values are the same."""
        same = before == after
        self.say(what, str(before) if same else f"{before} became {after}", same=same)


def verify(
    source: Path, output: Path, on_frame: Callable[[int, int | None], None] | None = None
) -> Verification:
    """Compare a whole source with its restored output.

    `on_frame(done, expected)` is called for the frames of both. Raises SourceError for either file
    where it cannot be read, ConfigError for an output in no container of this project.
    """
    found = Verification()
    infos = _compare_video(source, output, found, on_frame)
    with open_container(source) as before, open_container(output) as after:
        video = pick_video_stream(before, source)
        name = _format_name(output, after)
        plans = plan_streams(before, video, name, infos[0], "")
        restored = pick_video_stream(after, output)
        kept = (
            Streams(source, before, video.index, _origin(infos[0])),
            Streams(output, after, restored.index),
        )
        picture = next(plan for plan in plans if plan.index == video.index)
        _compare_labels(picture, video, restored, name, found)
        _compare_streams(plans, *kept, name, found)
        _compare_timecodes(plans, before, after, found)
        _compare_chapters(plans, before, after, _origin(infos[0]), found)
        _compare_tags(plans, before, after, found)
    return found


def _format_name(path: Path, container: Any) -> str:
    """The muxer that wrote the file: demuxers serve several."""
    suffix = path.suffix.lower()
    names = {".mov": "mov", ".webm": "webm"}
    name = names.get(suffix) or _FORMATS.get(container.format.name, container.format.name)
    if name not in ("mp4", "mov", "matroska", "webm"):
        raise ConfigError(f"{path}: is no output of this program ({container.format.long_name})")
    return name


# the video


def _compare_video(
    source: Path, output: Path, found: Verification,
    on_frame: Callable[[int, int | None], None] | None,
) -> tuple[StreamInfo, StreamInfo]:  # fmt: skip
    times, infos = [], []
    n_interlaced: list[int] = []
    done = 0
    for path in (source, output):
        pts = array("q")
        with VideoSource(path, deinterlace="off") as video:
            for frame in video.frames():
                pts.append(frame.pts)
                done += 1
                if on_frame is not None:
                    on_frame(done, video.info.n_frames and 2 * video.info.n_frames)
            infos.append(video.info)
            n_interlaced.append(video.tally.n_interlaced)
            if video.tally.n_corrupt:
                found.say(
                    str(path), f"{video.tally.n_corrupt} damaged packets", same=path == source
                )
        times.append(pts)
    before, after = infos
    found.equal("frames", len(times[0]), len(times[1]))
    origin = _origin(before)
    if origin:
        found.say("start", f"moved from {float(origin):.6f} s to 0")
    _compare_times("times of frames", Times(times[0], before.time_base, origin),
                   Times(times[1], after.time_base), found)  # fmt: skip
    if before.pixel_format.name != after.pixel_format.name:
        names = (info.pixel_format.name for info in (before, after))
        found.say("pixel format", " encoded as ".join(names))
    for row in compared(before, after):
        found.equal(*row)
    if n_interlaced[0]:
        text = f"{n_interlaced[0]} interlaced frames were made whole, or left as they are"
        found.say("fields", text)
    if n_interlaced[1]:  # whichever of the two: a player would take them apart
        text = f"{n_interlaced[1]} frames of the output are flagged interlaced"
        found.say("fields", text, same=False)
    return before, after


# time


def _origin(info: StreamInfo) -> Fraction:
    """Frames before 0 are in no output: all of such a source is moved."""
    return min(info.start_pts * info.time_base, Fraction(0))


def _compare_times(
    what: str, before: Times, after: Times, found: Verification, *, counted: bool = False
) -> None:
    """Every time must be the same, or within one unit of the output where that is coarser.

    `counted`: mp4 counts the samples of sound without compression, which may be finer than what the
    source says.
    """
    n = min(len(before.ticks), len(after.ticks))
    exact = (before.unit / after.unit).denominator == 1 and not counted
    tolerance = Fraction(0) if exact else max(after.unit, before.unit * counted)
    offsets = (after.seconds(i) - before.seconds(i) for i in range(n))
    wrong = [(i, offset) for i, offset in enumerate(offsets) if abs(offset) > tolerance]
    if not wrong:
        how = "all the same" if exact else f"all the same, rounded to {after.unit} s"
        found.say(what, how)
        return
    number, offset = wrong[0]
    every = len(wrong) == n and max(o for _, o in wrong) - min(o for _, o in wrong) <= after.unit
    which = "all" if every else f"{len(wrong)} of {n} differ, first number {number}: it"
    way = "later" if offset > 0 else "earlier"
    found.say(what, f"{which} {abs(float(offset)):.6f} s {way}", same=False)


# streams


def _compare_streams(
    plans: Iterable[StreamPlan], before: Streams, after: Streams, name: str, found: Verification
) -> None:
    """Pair what the plan keeps with what the output has, in order, kind by kind."""
    plans = [p for p in plans if p.fate in ("copied", "transcoded", "lost") and p.index is not None]
    for plan in plans:
        if plan.fate == "lost":
            found.say(plan.name, plan.outcome)
    for kind in ("video", "audio", "subtitle", "data", "attachment", "cover"):
        kept = [p for p in plans if p.kind == kind and p.fate != "lost"]
        streams = [s for s in after.of_kind(kind) if not _is_written_anew(s)]
        for plan, stream in zip_longest(kept, streams):
            if stream is None and plan.kind != "attachment" and not before.holds(plan.index):
                found.say(plan.name, "has no packets and is not in the output")
            elif stream is None:
                found.say(plan.name, "is missing from the output", same=False)
            elif plan is None:
                found.say(f"{kind} stream {stream.index}", "is in the output alone", same=False)
            else:
                _compare_labels(plan, before.by_index[plan.index], stream, name, found)
                _compare_stream(plan, before, stream, after, found)


def _is_written_anew(stream: Any) -> bool:
    # Timecode tracks and the text track of mp4's chapters.
    return stream.type == "data" and ("timecode" in stream.metadata or bool(stream.discard))


def _compare_stream(
    plan: StreamPlan, before: Streams, stream: Any, after: Streams, found: Verification
) -> None:
    assert plan.index is not None
    original = before.by_index[plan.index]
    one, two = before.packets[plan.index], after.packets[stream.index]
    if plan.kind == "attachment":
        found.equal(f"{plan.name} sha256", _hash(original.data), _hash(stream.data))
    elif plan.fate == "copied":
        _compare_packets(plan.name, one, two, found, timed=plan.kind != "cover")
    elif plan.kind == "subtitle":
        found.equal(f"{plan.name} as {codec_of(stream)}, subtitles", len(one.texts), len(two.texts))
        wrong = [a for a, b in zip(one.texts, two.texts, strict=False) if a != b]
        if wrong:
            found.say(plan.name, f"{len(wrong)} texts differ, first {wrong[0]!r}", same=False)
        _compare_shown(plan.name, one, two, found)
    else:
        _compare_spans(f"{plan.name} as {codec_of(stream)}", one, two, found)


def _compare_labels(
    plan: StreamPlan, original: Any, stream: Any, name: str, found: Verification
) -> None:
    """Language and title, and what the container keeps of the disposition."""
    language = language_for(name, plan.language)
    if stream.metadata.get("language", "und").replace("und", "") != language:
        found.say(f"{plan.name} language", f"{language} became {stream.metadata.get('language')}",
                  same=False)  # fmt: skip
    titles = [s.metadata.get("title", s.metadata.get("name", "")) for s in (original, stream)]
    if plan.kind != "attachment" and titles[0] and titles[0] != titles[1]:
        found.equal(f"{plan.name} title", *titles)
    _compare_dispositions(plan, original.disposition, stream.disposition, name, found)


def _compare_dispositions(
    plan: StreamPlan, was: Any, now: Any, name: str, found: Verification
) -> None:
    if was == now or plan.kind == "cover":
        return
    kept = disposition_for(name, plan.kind, was)
    # mp4 shows the first of each kind where none is the default.
    default = av.stream.Disposition.default if name in ("mp4", "mov") else 0
    same = now in (kept, kept | default)
    how = f" in {name}" if same else ""
    found.say(f"{plan.name} disposition", f"{_names(was)} became {_names(now)}{how}", same=same)


def _names(disposition: Any) -> str:
    return "+".join(flag.name for flag in disposition) or "none"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _compare_packets(
    what: str, one: Packets, two: Packets, found: Verification, *, timed: bool
) -> None:
    n = len(one)
    if one.digests == two.digests:
        found.say(what, f"{n} packets, all the same")
        if timed:
            _compare_shown(what, one, two, found)
    elif one.whole.digest() == two.whole.digest():
        # Sound without compression and PGS have no packets of their own: containers cut as they do.
        found.say(what, f"the same bytes in {len(two)} packets, {n} before")
        _compare_spans(what, one, two, found)
    elif n != len(two):
        found.say(what, f"{n} packets became {len(two)}", same=False)
    else:
        wrong = [i for i in range(n) if one.digest(i) != two.digest(i)]
        where = float(one.times[wrong[0]] * one.unit)
        found.say(what, f"{len(wrong)} of {n} packets differ, first at {where:.3f} s", same=False)


def _compare_shown(what: str, one: Packets, two: Packets, found: Verification) -> None:
    counted = "(pcm" in what
    _compare_times(f"{what} times", one.starts, two.starts, found, counted=counted)
    if one.texts:
        _compare_times(f"{what} ends", one.ends, two.ends, found)


def _compare_spans(what: str, one: Packets, two: Packets, found: Verification) -> None:
    moves = [abs(a - b) for a, b in zip(one.span, two.span, strict=True)]
    # Some sources do not say how long their packets are.
    moved = max(moves) if all(one.durations) else moves[0]
    start, end = map(float, two.span)
    found.say(what, f"from {start:.3f} to {end:.3f} s, moved by at most {float(moved):.3f} s",
              same=moved <= SLACK_SECONDS)  # fmt: skip


# what is said about all


def _compare_chapters(
    plans: Iterable[StreamPlan], before: Any, after: Any, origin: Fraction, found: Verification
) -> None:
    plan = next((p for p in plans if p.kind == "chapters"), None)
    if plan is None:
        return
    if plan.fate == "lost":
        found.say("chapters", plan.outcome)
        return
    # mp4 keeps starts alone: each ends where the next one begins.
    ends = ("start", "end") if "matroska" in after.format.name else ("start",)
    lists = [
        [
            (
                *(round(float(c[end] * c["time_base"] - start), 3) for end in ends),
                c["metadata"].get("title", ""),
            )
            for c in container.chapters()
        ]
        for container, start in ((before, origin), (after, 0))
    ]
    if lists[0] and lists[0][0][0] > 0 and lists[1][:1] == [(0.0, "")]:
        del lists[1][0]  # mp4 has one from 0 on
    if lists[0] == lists[1]:
        found.say("chapters", f"{len(lists[0])}, all the same")
    else:
        found.equal("chapters", *lists)


def _compare_timecodes(
    plans: Iterable[StreamPlan], before: Any, after: Any, found: Verification
) -> None:
    if any(plan.fate == "lost" and "timecode" in (plan.kind, plan.codec) for plan in plans):
        return
    one, two = (timecodes(container)[:1] for container in (before, after))
    if one:
        found.equal("timecode", one[0], two[0] if two else None)


def _compare_tags(
    plans: Iterable[StreamPlan], before: Any, after: Any, found: Verification
) -> None:
    tags, kept = ({k.lower(): v for k, v in content_tags(c.metadata).items()}
                  for c in (before, after))  # fmt: skip
    lost = {"timecode"}
    for plan in plans:
        if plan.kind == "tags":
            found.say("tags", f"{plan.codec} {plan.outcome}")
            lost |= {key.lower() for key in plan.codec.split(", ")}
    for name in tags:
        if name in kept:
            if tags[name] != kept[name]:
                found.equal(f"tag {name}", tags[name], kept[name])
        elif name not in lost:
            found.say(f"tag {name}", "is missing from the output", same=False)
