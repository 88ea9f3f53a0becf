"""Timecodes counted on, against a count of every frame by the rule itself."""

from fractions import Fraction
from itertools import islice

import av
import pytest
from media import make_clip
from readback import recode

from pipeline.timecode import later

NTSC = Fraction(30000, 1001)


def drop_frame_timecodes(nominal):
    """Every timecode of a day in turn: minutes but each tenth leave out their first numbers."""
    for minutes in range(24 * 60):
        for second in range(60):
            first = nominal // 15 if second == 0 and minutes % 10 else 0
            for frame in range(first, nominal):
                yield f"{minutes // 60:02}:{minutes % 60:02}:{second:02};{frame:02}"


@pytest.mark.parametrize(("nominal", "rate"), [(30, NTSC), (60, 2 * NTSC)])
def test_drop_frame_is_counted_as_it_is_defined(nominal, rate):
    known = list(islice(drop_frame_timecodes(nominal), 25 * 60 * nominal))
    for number in [*range(0, len(known), 997), *range(60 * nominal - 3, 60 * nominal + 4),
                   *range(600 * nominal - 20, 600 * nominal + 4)]:  # fmt: skip
        assert later(known[0], number / rate, rate) == known[number]
        assert later(known[7], number / rate, rate) == known[number + 7]


@pytest.mark.parametrize(
    ("start", "seconds", "rate", "expected"),
    [
        ("01:00:00:00", 10, 25, "01:00:10:00"),
        ("01:00:00:24", Fraction(1, 25), 25, "01:00:01:00"),
        ("23:59:59:00", 2, 24, "00:00:01:00"),
        ("00:00:00:00", Fraction(41, 1000), 25, "00:00:00:02"),
        ("00:00:59:29", 1 / NTSC, NTSC, "00:01:00:00"),
        ("01:00:00:00", 10, None, "01:00:00:00"),
        ("noon", 10, 25, "noon"),
    ],
)
def test_others_are_plain_counts(start, seconds, rate, expected):
    assert later(start, Fraction(seconds), rate and Fraction(rate)) == expected


@pytest.mark.parametrize("after", [".mov", ".mkv"])
def test_a_trim_begins_at_its_own_timecode(tmp_path, after):
    source = make_clip(
        tmp_path / "in.mov", n_frames=50, metadata={"timecode": "01:00:00:20"},
        start_seconds=Fraction(2),
    )  # fmt: skip
    recode(source, tmp_path / f"out{after}", start_seconds=1.0)
    with av.open(str(tmp_path / f"out{after}")) as out:
        tags = [*out.streams, out]
        found = {v for t in tags for k, v in t.metadata.items() if k.lower() == "timecode"}
    assert found == {"01:00:01:20"}
