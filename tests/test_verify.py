"""verify: silent about every faithful output, whatever its times, and about no other."""

import struct
from fractions import Fraction

import av
import pytest
from media import make_clip
from readback import frames_of, packets_of, recode, seconds_of
from sample_clips import B_FRAMES

from pipeline.encoder import EncodeSettings
from pipeline.errors import ConfigError, SourceError
from pipeline.verify import verify

DEFAULT, FORCED = av.stream.Disposition.default, av.stream.Disposition.forced
COMMENT = DEFAULT | av.stream.Disposition.comment
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


def test_a_trim_counts_from_the_first_frame_where_the_clock_runs_over(tmp_path):
    source = make_clip(tmp_path / "in.ts", **EARLY)
    assert len(frames_of(source, end_seconds=0.4)) == 10
    assert seconds_of(source, start_seconds=0.1, end_seconds=0.4)[0] == Fraction(-2, 25)


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


def remux(source, output, change, label=lambda stream: None, **options):
    """Copy a file with each packet as `change(number, packet)` gives it, None to leave it out.

    `label` may change what a stream of the copy is tagged with.
    """
    with av.open(str(source)) as one, av.open(str(output), "w", **options) as two:
        targets = {s.index: two.add_stream_from_template(s, opaque=True) for s in one.streams
                   if s.type in ("video", "audio", "subtitle")}  # fmt: skip
        for index, target in targets.items():
            target.metadata.update(one.streams[index].metadata)
            target.disposition = one.streams[index].disposition
            label(target)
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
        ({"rotation": 90}, "rotation: 270 degrees became 90 degrees"),
        ({"sample_aspect_ratio": Fraction(3, 2)}, "sample aspect ratio: 4/3 became 3/2"),
        ({"color": (1, 1, 1, 1)}, "matrix: bt2020 became bt709"),
        ({"chapters": [(0, 0.4, "eins")]}, "chapters:"),
        ({"chapters": [(0, 0.3, "one")]}, "chapters:"),
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


def as_it_is(_, packet):
    return packet


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [("audio", {"disposition": DEFAULT}, "disposition: default+comment became default"),
     ("audio", {"language": "eng"}, "language: fra became eng"),
     ("video", {"disposition": DEFAULT | FORCED}, "disposition: none became default+forced"),
     ("video", {"title": "another"}, "title: the video became another"),
     ("video", {"language": "eng"}, "language:  became eng")],
)  # fmt: skip
def test_labels_that_were_changed_are_found(tmp_path, kind, change, words):
    plain = make_clip(tmp_path / "plain.mkv", audio="aac")

    def of(kind, labels):
        def label(stream):
            if stream.type == kind:
                stream.disposition = labels.get("disposition", stream.disposition)
                stream.metadata.update({k: v for k, v in labels.items() if k != "disposition"})

        return label

    source = remux(plain, tmp_path / "in.mkv", as_it_is, of("audio", {"disposition": COMMENT}))
    same = remux(source, tmp_path / "same.mkv", as_it_is)
    assert verify(source, same).differences == []
    (found,) = verify(
        source, remux(source, tmp_path / "out.mkv", as_it_is, of(kind, change))
    ).differences
    assert words in found


@pytest.mark.parametrize(("after", "kept"), [(".mov", "default"), (".mp4", "default+comment")])
def test_a_disposition_that_a_container_does_not_keep_is_planned_and_no_difference(
    tmp_path, after, kept
):
    def label(stream):
        stream.disposition = COMMENT if stream.type == "audio" else DEFAULT

    plain = make_clip(tmp_path / "plain.mkv", audio="aac")
    source = remux(plain, tmp_path / "in.mkv", as_it_is, label)
    writer = recode(source, tmp_path / f"out{after}")
    assert any("keeps no disposition comment" in w for w in writer.warnings) == (after == ".mov")
    with av.open(str(tmp_path / f"out{after}")) as out:
        assert "+".join(f.name for f in out.streams.audio[0].disposition) == kept
    assert verify(source, tmp_path / f"out{after}").differences == []


HDR = {
    "pix_fmt": "yuv420p10le", "codec": "libx265", "color": (9, 16, 9, 1),
    "options": {"x265-params": "log-level=error:max-cll=1000,400:master-display="
                "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [(("max-cll=1000,400", "max-cll=1000,401"),
      "content light level: (1000, 400) became (1000, 401)"),
     (("max-cll=1000,400:", ""), "content light level: (1000, 400) became None"),
     (("L(10000000,50)", "L(9000000,50)"), "mastering display: 0.68 0.32 "),
     (("master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)", ""),
      " became None")],
    ids=["light", "no light", "display", "no display"],
)  # fmt: skip
def test_hdr10_that_was_changed_is_found(tmp_path, change, words):
    source = make_clip(tmp_path / "in.mkv", **HDR)
    assert verify(source, make_clip(tmp_path / "same.mkv", **HDR)).differences == []
    other = {**HDR, "options": {"x265-params": HDR["options"]["x265-params"].replace(*change)}}
    (found,) = verify(source, make_clip(tmp_path / "out.mkv", **other)).differences
    assert words in found


BOTH = ["mastering display", "content light level"]


@pytest.mark.parametrize(
    ("codec", "suffix", "lost"),
    [("libx265", ".mp4", []), ("libx265", ".mkv", []), ("libsvtav1", ".mp4", []),
     ("libsvtav1", ".webm", []), ("ffv1", ".mkv", []), ("prores_ks", ".mov", BOTH)],
)  # fmt: skip
def test_hdr10_is_the_same_where_the_output_keeps_it(tmp_path, codec, suffix, lost):
    source = make_clip(tmp_path / "in.mkv", n_frames=3, **HDR)
    writer = recode(source, tmp_path / f"out{suffix}", EncodeSettings(codec))
    assert any("mastering display" in warning for warning in writer.warnings) == bool(lost)
    differences = verify(source, tmp_path / f"out{suffix}").differences
    assert [difference.split(":")[0] for difference in differences] == lost


@pytest.mark.parametrize("after", [".mkv", ".mp4"])
def test_hdr10_that_only_the_container_tells_of_is_kept(tmp_path, after):
    source = make_clip(tmp_path / "in.mkv", n_frames=3, **HDR)
    recode(source, tmp_path / "master.mkv", EncodeSettings("ffv1"))  # FFV1 says nothing of it
    recode(tmp_path / "master.mkv", tmp_path / f"out{after}", EncodeSettings("libx265"))
    assert verify(source, tmp_path / f"out{after}").differences == []


MIRRORED = (-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
LEANING = (65536, 0, 0, 6553, 65536, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [(MIRRORED, "rotation: 0 degrees became 180 degrees, mirrored"),
     (LEANING, "matrix 65536 0 0 6553 65536")],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_a_picture_that_was_mirrored_is_found(tmp_path, suffix, matrix, words):
    source = make_clip(tmp_path / f"in{suffix}")
    mirrored = make_clip(tmp_path / f"out{suffix}", display_matrix=matrix)
    (found,) = verify(source, mirrored).differences
    assert words in found
    recode(mirrored, tmp_path / f"again{suffix}")
    assert verify(mirrored, tmp_path / f"again{suffix}").differences == []


def test_interlaced_frames_are_said_and_none_may_be_in_the_output(tmp_path):
    fields = {"fields": "tff", "options": {"flags": "+ildct+ilme"}}
    source = make_clip(tmp_path / "in.mkv", **fields)
    recode(source, tmp_path / "out.mkv")
    found = verify(source, tmp_path / "out.mkv")
    assert found.differences == []
    assert any("20 interlaced frames" in line for line in found.lines)
    (difference,) = verify(source, make_clip(tmp_path / "woven.mkv", **fields)).differences
    assert "20 frames of the output are flagged interlaced" in difference


def test_a_timecode_that_was_changed_is_found(tmp_path):
    source = make_clip(tmp_path / "in.mov", metadata={"timecode": "01:02:03:04"})
    recode(source, tmp_path / "right.mov")
    assert verify(source, tmp_path / "right.mov").differences == []
    other = make_clip(tmp_path / "out.mov", metadata={"timecode": "01:02:03:05"})
    assert verify(source, other).differences == ["timecode: 01:02:03:04 became 01:02:03:05"]


def test_a_frame_too_many_is_found(tmp_path):
    source = make_clip(tmp_path / "in.mkv", codec="ffv1", options={"g": "1"})
    twice = make_clip(
        tmp_path / "out.mkv", codec="ffv1", options={"g": "1"}, n_frames=21,
        pts=[*range(0, 800, 40), 760 + 20],
    )  # fmt: skip
    assert "frames: 20 became 21" in verify(source, twice).differences


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
