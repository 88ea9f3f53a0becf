"""Reads videos back to compare them: frames, times, packets, and what an error says."""

import hashlib
from fractions import Fraction

import av
import numpy as np
import pytest
from media import read_index
from sample_clips import FAST

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import default_settings
from pipeline.errors import SourceError


def recode(source_path, path, settings=None, **options):
    """Decode and encode again as a job would, nothing restored; the writer, closed."""
    trim = {k: options[k] for k in ("start_seconds", "end_seconds") if k in options}
    with VideoSource(source_path, **trim) as source:
        chosen = settings or default_settings(path, source.info)
        with VideoWriter(path, source.info, chosen, copy_from=source_path, **options) as writer:
            for frame in source.frames():
                writer.write(frame)
    assert writer.n_written == writer.n_muxed == source.tally.n_decoded
    assert not list(path.parent.glob(".*.part"))
    return writer


def frames_of(path, **trim):
    """Every Frame of a file."""
    with VideoSource(path, **trim) as source:
        return list(source.frames())


def indices_of(path, **trim):
    """The numbers that a file's frames show."""
    return [read_index(frame.planes) for frame in frames_of(path, **trim)]


def seconds_of(path, **trim):
    """The exact time of every frame."""
    with VideoSource(path, **trim) as source:
        return [frame.pts * source.info.time_base for frame in source.frames()]


def packets_of(path, kind):
    """Time in seconds and hash of every packet of the first stream of this kind."""
    with av.open(f"file:{path}") as container:
        stream = next(s for s in container.streams if s.type == kind)
        return [
            (p.pts * Fraction(p.time_base), hashlib.sha256(bytes(p)).hexdigest())
            for p in container.demux(stream)
            if p.size
        ]


def assert_same_planes(one, two):
    pairs = zip(frames_of(one), frames_of(two), strict=True)
    for before, after in pairs:
        for a, b in zip(before.planes, after.planes, strict=True):
            assert np.array_equal(a, b)


def source_error(path, **trim):
    """The message with which reading the whole file fails."""
    with pytest.raises(SourceError) as caught:
        frames_of(path, **trim)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def refused(kind, path, source_path, settings=FAST, **options):
    """The message with which the writer's constructor fails, having left nothing behind."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with VideoSource(source_path) as source, pytest.raises(kind) as caught:
        VideoWriter(path, source.info, settings, copy_from=source_path, **options)
    assert "\n" not in str(caught.value)
    assert before is None or sorted(path.parent.iterdir()) == before
    return str(caught.value)
