"""What several test files make clips of, and with which settings they write them."""

from dataclasses import replace
from fractions import Fraction

import numpy as np

from pipeline.encoder import EncodeSettings

B_FRAMES = {"bf": "3", "b-pyramid": "normal", "crf": "10"}
SHORT_GOPS = {"bf": "3", "crf": "10", "g": "10", "sc_threshold": "0"}
VFR = [0, 512, 1024, 4000, 4100, 9000, 9512, 10000, 12000, 40000, 40001, 40300]
FAST = EncodeSettings(crf=10, preset="ultrafast")
LOSSLESS = EncodeSettings("ffv1")
QUICK = {".webm": EncodeSettings("libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"})}
"""By suffix: encoders that take their time otherwise."""
TEXTS = [(0.1, 0.3, "eins"), (0.4, 0.6, "zwei, drei")]
FONT = ("font.ttf", "application/x-truetype-font", b"glyphs" * 9)

MPEG2 = {"codec": "mpeg2video", "time_base": Fraction(1, 25), "options": {"bf": "2", "g": "10"}}
SOURCES = {
    "x264 closed": (".mkv", {"options": {**SHORT_GOPS, "b-pyramid": "normal"}}),
    "x264 open": (".mkv", {"options": {**SHORT_GOPS, "x264-params": "open-gop=1"}}),
    "x264 open mp4": (".mp4", {"options": {**SHORT_GOPS, "x264-params": "open-gop=1"}}),
    "x264 open ts": (".ts", {"options": {**SHORT_GOPS, "x264-params": "open-gop=1"}}),
    "x264 refresh": (".mp4", {"options": {"g": "20", "x264-params": "intra-refresh=1"}}),
    "x264 no index": (".h264", {"options": SHORT_GOPS}),
    "x265 open": (".mp4", {"codec": "libx265", "options": {
        "x265-params": "open-gop=1:keyint=10:min-keyint=10:bframes=4:log-level=error"}}),
    "x265 open mkv": (".mkv", {"codec": "libx265", "options": {
        "x265-params": "open-gop=1:keyint=10:min-keyint=10:bframes=4:log-level=error"}}),
    "mpeg2": (".mpg", MPEG2),
    "mpeg2 ts": (".ts", MPEG2),
    "avi": (".avi", {"codec": "mpeg4", "options": {"bf": "2", "g": "10"},
                     "time_base": Fraction(1, 25)}),
    "one gop": (".mp4", {"options": {"g": "500", "bf": "2"}}),
    "ffv1": (".mkv", {"codec": "ffv1", "options": {"g": "1"}}),
    "from 5 s": (".mp4", {"options": SHORT_GOPS, "start_seconds": Fraction(5)}),
}  # fmt: skip


def assert_same(one, two):
    assert [replace(f, planes=()) for f in one] == [replace(f, planes=()) for f in two]
    for a, b in zip(one, two, strict=True):
        assert all(np.array_equal(p, q) for p, q in zip(a.planes, b.planes, strict=True)), a.index
