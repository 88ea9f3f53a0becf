"""Owns the way from interlaced pictures to whole ones: one picture for each, none moved in time."""

import re
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import av

from pipeline.frames import StreamInfo

# bwdif would have any other converted, by way of other samples.
_TAKES = re.compile(r"(gray(16le)?|yuv41[01]p|yuv440p|(yuv(420|422|444)p|gbrp)((9|1[0246])le)?)")

_SMALLEST = (4, 3)
"""bwdif refuses smaller planes, with EINVAL when the graph is configured: rows, columns."""


def can_deinterlace(info: StreamInfo) -> bool:
    """Whether its pictures can be deinterlaced without a conversion."""
    shapes = info.pixel_format.plane_shapes(info.width, info.height)
    large = all(rows >= _SMALLEST[0] and columns >= _SMALLEST[1] for rows, columns in shapes)
    return large and _TAKES.fullmatch(info.pixel_format.name) is not None


def deinterlaced(
    pictures: Iterator[Any], planar: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any]]:
    """Each picture with what is to be shown of it: itself, or made whole where it is interlaced.

    `planar` brings a picture into a format of `can_deinterlace`. Which pictures are interlaced, and
    which field comes first, their flags say. A result depends on the picture, the one before and
    the one after it alone, so that decoding may start anywhere before the one before it.
    """
    pictures = iter(pictures)
    before: Any = None
    for picture in pictures:
        if picture.interlaced_frame:
            yield from _through_bwdif(before, picture, pictures, planar)
            return
        yield picture, picture
        before = picture


def _through_bwdif(
    before: Any, first: Any, rest: Iterator[Any], planar: Callable[[Any], Any]
) -> Iterator[tuple[Any, Any]]:
    """`before` is the picture before `first`, if any, and was given out already."""
    graph = _graph(planar(first))
    waiting: deque[Any] = deque()

    def push(picture: Any) -> Iterator[tuple[Any, Any]]:
        # The filter halves the time base and counts on pts: its results come in the order given.
        graph.push(None if picture is None else planar(picture))
        while True:
            try:
                whole = graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            original = waiting.popleft()
            if original is not None:
                yield original, whole

    if before is not None:
        waiting.append(None)
        yield from push(before)
    for picture in chain([first], rest):
        waiting.append(picture)
        yield from push(picture)
    yield from push(None)  # the last one comes only now


def _graph(template: Any) -> Any:
    graph = av.filter.Graph()
    source = graph.add(
        "buffer", video_size=f"{template.width}x{template.height}",
        pix_fmt=template.format.name, time_base="1/1000", pixel_aspect="1/1",
    )  # fmt: skip
    # send_frame: one for each; deint=interlaced: others pass as they are.
    bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
    graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
    return graph
