"""verify: silent about every faithful output, whatever its times, and about no other."""

import struct
from fractions import Fraction

import av
import pytest
from media import frames_of, make_clip, packets_of, recode, seconds_of

from pipeline.encode import EncodeSettings
from pipeline.errors import ConfigError, SourceError
from pipeline.verify import verify

B_FRAMES = {"bf": "3", "b-pyramid": "normal", "crf": "10"}
VFR = [0, 512, 1024, 4000, 4100, 9000, 9512, 10000, 12000, 40000, 40300]
FAST = {".webm": EncodeSettings("libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime"})}
X264 = EncodeSettings(preset="fast", options={"bf": "3", "b-pyramid": "normal"})
EARLY = {"start_seconds": Fraction(-1, 5), "container_options": {"avoid_negative_ts": "disabled"}}
TIMES = {
    "constant": {},
    "ntsc": {"rate": Fraction(30000, 1001), "time_base": Fraction(1001, 30000)},
    "variable": {"pts": VFR, "n_frames": 11, "time_base": Fraction(1, 12800)},
    "from 5 s": {"start_seconds": Fraction(5)},
    "from a third": {"start_seconds": Fraction(1, 3), "time_base": Fraction(1, 90000)},
    "no B-frames": {"options": {"bf": "0"}},
    # An edit list skips it in mp4 and mov; a clock that runs over in MPEG-TS.
    "from before 0": EARLY,
    "one frame": {"n_frames": 1},
}


def source_of(folder, suffix, times):
    what = {"audio": "aac", "options": B_FRAMES, **TIMES[times]}
    return make_clip(folder / f"in{suffix}", **what)


# faithful


@pytest.mark.parametrize("before", [".mp4", ".mov", ".mkv", ".ts"])
@pytest.mark.parametrize("times", TIMES)
def test_every_time_goes_through_every_container(tmp_path, times, before):
    source = source_of(tmp_path, before, times)
    for after in (".mp4", ".mov", ".mkv", ".webm"):
        output = tmp_path / f"out{after}"
        recode(source, output, FAST.get(after, X264))
        assert verify(source, output).differences == [], after


def test_mp4_keeps_times_that_are_no_milliseconds(tmp_path):
    """With FFmpeg's unit of edit lists sound and picture came up to 0.7 ms early."""
    source = source_of(tmp_path, ".ts", "from a third")
    recode(source, tmp_path / "out.mp4")
    assert seconds_of(tmp_path / "out.mp4") == seconds_of(source)
    before, after = (packets_of(p, "audio") for p in (source, tmp_path / "out.mp4"))
    assert max(abs(a - b) for (a, _), (b, _) in zip(before, after, strict=True)) < Fraction(
        1, 48000
    )


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx", "libx264"])
def test_a_time_base_finer_than_an_encoders_clock_is_no_error(tmp_path, codec):
    """As in a clip of a camera: libvpx counts in 10 MHz and gave other pts than it was given."""
    base, step = Fraction(1, 23_040_000), 767_849
    source = make_clip(
        tmp_path / "in.mp4", time_base=base, pts=[n * step for n in range(20)], rate=Fraction(30)
    )
    recode(source, tmp_path / "out.mkv", EncodeSettings(codec))
    assert verify(source, tmp_path / "out.mkv").differences == []


def test_frames_before_zero_are_all_there_and_that_is_said(tmp_path):
    source = source_of(tmp_path, ".ts", "from before 0")
    assert seconds_of(source)[0] == Fraction(-1, 5)
    writer = recode(source, tmp_path / "out.mp4")
    assert any("0.200 s before 0" in warning for warning in writer.warnings)
    assert len(frames_of(tmp_path / "out.mp4")) == 20
    assert "start: moved from -0.200000 s to 0" in verify(source, tmp_path / "out.mp4").lines


@pytest.mark.parametrize("after", [".mp4", ".mkv", ".webm"])
def test_streams_without_packets_are_no_difference(tmp_path, after):
    source = make_clip(tmp_path / "in.mkv", audio="aac", subtitles=[(0.1, 0.3, "eins")])
    only_video = lambda _, packet: packet if packet.stream.type == "video" else None  # noqa: E731
    empty = remux(source, tmp_path / "empty.mkv", only_video)
    recode(empty, tmp_path / f"out{after}", FAST.get(after))
    assert verify(empty, tmp_path / f"out{after}").differences == []


def test_the_last_frames_are_flushed(tmp_path):
    source = source_of(tmp_path, ".mkv", "constant")
    recode(source, tmp_path / "out.mkv", EncodeSettings("libx265", preset="medium"))
    found = verify(source, tmp_path / "out.mkv")
    assert "frames: 20" in found.lines
    assert found.differences == []


# not faithful


def remux(source, output, change, **options):
    """Copy a file with each packet as `change(number, packet)` gives it, None to leave it out."""
    with av.open(str(source)) as one, av.open(str(output), "w", **options) as two:
        targets = {s.index: two.add_stream_from_template(s, opaque=True) for s in one.streams
                   if s.type in ("video", "audio", "subtitle")}  # fmt: skip
        for index, target in targets.items():
            target.metadata.update(one.streams[index].metadata)
        counts = dict.fromkeys(targets, 0)
        for packet in one.demux(list(map(one.streams.__getitem__, targets))):
            index = packet.stream.index
            kept = packet.size and change(counts[index], packet)
            counts[index] += 1
            if kept:
                kept.stream = targets[index]
                two.mux(kept)
    return output


def kind_at(kind, number):
    return lambda n, packet: packet.stream.type == kind and n == number


def without(kind, number):
    hit = kind_at(kind, number)
    return lambda n, packet: None if hit(n, packet) else packet


def later(kind, ticks):
    def change(number, packet):
        if packet.stream.type == kind:
            packet.pts += ticks
            packet.dts += ticks
        return packet

    return change


def spoiled(number, packet):
    if not kind_at("audio", 5)(number, packet):
        return packet
    data = bytearray(bytes(packet))
    data[-1] ^= 1
    other = av.Packet(bytes(data))
    other.pts, other.dts, other.duration = packet.pts, packet.dts, packet.duration
    other.time_base, other.stream = packet.time_base, packet.stream
    return other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("video", 19), "frames: 20 became 19"),
        (without("audio", 5), "39 packets became 38"),
        (spoiled, "1 of 39 packets differ, first at 0.085 s"),
        (later("video", 40), "times of frames: all 0.040000 s later"),
        (later("audio", 40), "times: all 0.040000 s later"),
        (later("subtitle", 40), "times: all 0.040000 s later"),
    ],
    ids=["a frame", "a packet", "a bit", "late picture", "late sound", "late text"],
)
def test_what_is_lost_spoiled_or_late_is_found(tmp_path, change, words):
    source = make_clip(
        tmp_path / "in.mkv", audio="aac", subtitles=[(0.1, 0.3, "eins")], options={"bf": "0"}
    )
    whole = remux(source, tmp_path / "whole.mkv", lambda _, packet: packet)
    assert verify(source, whole).differences == []
    differences = verify(source, remux(source, tmp_path / "out.mkv", change)).differences
    assert words in differences[0]
    assert len(differences) == (2 if "subtitle" in differences[0] else 1)  # its end too


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"audio": None}, "audio stream 1 (aac): is missing from the output"),
        ({"rotation": 90}, "rotation: -90 became 90"),
        ({"sample_aspect_ratio": Fraction(3, 2)}, "sample aspect ratio: 4/3 became 3/2"),
        ({"color": (1, 1, 1, 1)}, "matrix: bt2020 became bt709"),
        ({"chapters": [(0, 0.4, "eins")]}, "chapters:"),
        ({"metadata": {"title": "B"}}, "tag title: A became B"),
        ({"size": (64, 32)}, "height: 48 became 32"),
    ],
)
def test_what_is_said_otherwise_is_found(tmp_path, what, words):
    right = {
        "audio": "aac", "rotation": -90, "sample_aspect_ratio": Fraction(4, 3),
        "color": (9, 16, 9, 1), "chapters": [(0, 0.4, "one")], "metadata": {"title": "A"},
    }  # fmt: skip
    source = make_clip(tmp_path / "in.mkv", **right)
    assert verify(source, make_clip(tmp_path / "same.mkv", **right)).differences == []
    found = verify(source, make_clip(tmp_path / "out.mkv", **right | what))
    assert any(words in line for line in found.differences), found.differences


def test_a_text_that_was_changed_is_found(tmp_path):
    source = make_clip(tmp_path / "in.mkv", subtitles=[(0.1, 0.3, "eins"), (0.4, 0.6, "zwei")])
    recode(source, tmp_path / "right.mp4")
    data = (tmp_path / "right.mp4").read_bytes()
    text = struct.pack(">H", 4) + b"zwei"
    assert data.count(text) == 1
    (tmp_path / "out.mp4").write_bytes(data.replace(text, struct.pack(">H", 4) + b"drei"))
    assert verify(source, tmp_path / "right.mp4").differences == []
    (difference,) = verify(source, tmp_path / "out.mp4").differences
    assert "1 texts differ, first 'zwei'" in difference


def test_files_that_cannot_be_compared(tmp_path):
    source = make_clip(tmp_path / "in.mkv")
    with pytest.raises(SourceError, match="no such file"):
        verify(source, tmp_path / "out.mkv")
    with pytest.raises(ConfigError, match="no output of this program"):
        verify(source, make_clip(tmp_path / "out.avi", time_base=Fraction(1, 25)))
