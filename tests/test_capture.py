"""What a process that reads a live source sends: real streams, the waits alone are told."""

import time
from contextlib import ExitStack
from fractions import Fraction

import av
import pytest
from media import make_clip

from pipeline import capture
from pipeline.address import Address
from pipeline.capture import Damaged, LeftOut, Opened, Picture, Request

INTERVAL = 0.04


def messages(path, monkeypatch, waits, behind_seconds=0.5):
    """Of each packet, where the n-th one was waited for as `waits(n)` says."""

    def packets(demuxed, _):
        began = time.monotonic()
        for number, packet in enumerate(demuxed):
            yield packet, waits(number), began + number * INTERVAL

    monkeypatch.setattr(capture, "_packets", packets)
    request = Request(Address.parse(str(path)), "tcp", True, 5.0, 5.0, behind_seconds)
    with ExitStack() as stack:
        container = stack.enter_context(capture._open(request))
        return list(capture._messages(container, request))


@pytest.fixture
def clip(tmp_path):
    """Four seconds at 25 frames a second, a keyframe every second."""
    options = {"g": "25", "tune": "zerolatency", "sc_threshold": "0"}
    return make_clip(tmp_path / "in.ts", n_frames=100, codec="libx264", options=options,
                     time_base=Fraction(1, 25))  # fmt: skip


def test_every_frame_is_sent_where_reads_wait(clip, monkeypatch):
    sent = messages(clip, monkeypatch, lambda number: 0.01)
    assert sum(isinstance(message, Picture) for message in sent) == 100
    assert not [message for message in sent if isinstance(message, LeftOut | Damaged)]


def test_frames_are_left_out_while_no_read_has_to_wait_and_come_again_with_a_keyframe(
    clip, monkeypatch
):
    """The first half second, then none; from 1 s on keyframes alone are decoded. At 2.2 s a read
    waits again: the next frame to be seen is the keyframe of 3 s."""
    sent = messages(clip, monkeypatch, lambda number: 0.01 if number >= 55 else 0.0)
    shown = [message for message in sent if isinstance(message, Picture)]
    numbers = [round(message.seconds * 25 - shown[0].seconds * 25) for message in shown]
    n_before = numbers.index(75)
    assert 11 <= n_before <= 14
    assert numbers == [*range(n_before), *range(75, 100)]
    assert shown[n_before].key
    assert not [message for message in sent if isinstance(message, Damaged)]
    assert any(isinstance(message, LeftOut) for message in sent)


def test_a_source_without_further_keyframes_is_shown_again_after_a_while(tmp_path, monkeypatch):
    """Cameras with gradual refresh send one at the start alone."""
    monkeypatch.setattr(capture, "KEY_SECONDS", 1.0)
    options = {"g": "1000", "keyint_min": "1000", "tune": "zerolatency", "sc_threshold": "0"}
    path = make_clip(tmp_path / "in.ts", n_frames=100, codec="libx264", options=options,
                     time_base=Fraction(1, 25))  # fmt: skip
    sent = messages(path, monkeypatch, lambda number: 0.01 if number >= 55 else 0.0)
    shown = [message for message in sent if isinstance(message, Picture)]
    numbers = [round(message.seconds * 25 - shown[0].seconds * 25) for message in shown]
    assert numbers[-20:] == list(range(80, 100))
    assert 50 not in numbers


def test_nothing_is_left_out_where_it_is_not_asked_for(clip, monkeypatch):
    sent = messages(clip, monkeypatch, lambda number: 0.0, behind_seconds=None)
    assert sum(isinstance(message, Picture) for message in sent) == 100


def test_an_interlaced_source_is_named(tmp_path, monkeypatch):
    options = {"g": "25", "tune": "zerolatency", "flags": "+ilme+ildct",
               "x264-params": "interlaced=1"}  # fmt: skip
    path = make_clip(tmp_path / "in.ts", n_frames=10, codec="libx264", options=options)
    (opened,) = [m for m in messages(path, monkeypatch, lambda n: 0.01) if isinstance(m, Opened)]
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    assert "interlaced" in opened.warning
