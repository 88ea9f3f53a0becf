"""Owns SMPTE timecodes: where a file says its own, which containers take one, one counted on."""

import math
import re
from fractions import Fraction
from typing import Any

# The only rates for which FFmpeg's mov muxer accepts a timecode.
_RATES = (24, 25, 30, 48, 50, 60, 100, 120, 150)
_TIMECODE = re.compile(r"(\d\d):(\d\d):(\d\d)([:;.])(\d\d+)")
_DAY_SECONDS = 24 * 60 * 60


def timecodes(container: Any) -> list[str]:
    """Every start timecode that the file and its streams are tagged with."""
    tagged = [*container.streams, container]
    tags = [tag for one in tagged for tag in one.metadata.items()]
    return [value for name, value in tags if name.lower() == "timecode"]


def takes_timecode(format_name: str, start: str, rate: Fraction | None) -> bool:
    """Whether a container of this format keeps it: the header of mp4 fails on what it does not."""
    match, nominal = _TIMECODE.fullmatch(start), round(rate or 0)
    # One that leaves out numbers is for 30 frames a second and their multiples: av_timecode_init.
    regular = match and nominal in _RATES and (match[4] == ":" or nominal % 30 == 0)
    return format_name not in ("mp4", "mov") or bool(regular)


def later(start: str, seconds: Fraction, rate: Fraction | None) -> str:
    """The timecode of the first frame at or after `seconds`; unchanged where it is none.

    With `;` or `.` before its frames it leaves out two numbers (four at 60) in every minute but
    each tenth, so that 29.97 frames a second keep step with the clock.
    """
    match = _TIMECODE.fullmatch(start)
    if match is None or not rate:
        return start
    hours, minutes, whole, frames = (int(match[group]) for group in (1, 2, 3, 5))
    nominal = round(rate)
    left_out = nominal // 15 if match[4] != ":" and nominal in (30, 60) else 0
    minutes += 60 * hours
    number = (60 * minutes + whole) * nominal + frames - left_out * (minutes - minutes // 10)
    number += math.ceil(seconds * rate)
    tens, rest = divmod(number, 600 * nominal - 9 * left_out)
    # The first of ten minutes leaves nothing out.
    others = max(rest - 60 * nominal, 0) // (60 * nominal - left_out) + (rest >= 60 * nominal)
    number += left_out * (9 * tens + others)
    whole, frames = divmod(number, nominal)
    whole %= _DAY_SECONDS
    clock = f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{clock}{match[4]}{frames:02}"
