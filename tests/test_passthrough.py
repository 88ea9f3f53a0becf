"""What is copied beside the video: sound, texts, covers, chapters, tags; and what a trim moves."""

from fractions import Fraction

import av
import pytest
from clips import B_FRAMES, FAST
from media import make_clip
from readback import indices_of, packets_of, recode, seconds_of

# what is copied


@pytest.mark.parametrize(
    ("suffix", "audio"),
    [(".mp4", "aac"), (".mkv", "aac"), (".mkv", "libopus"), (".mkv", "pcm_s16le"), (".mov", "aac")],
)
def test_audio_packets_are_copied_bit_for_bit(tmp_path, suffix, audio):
    source = make_clip(
        tmp_path / f"in{suffix}", audio=audio, audio_seconds=1.5, options=B_FRAMES,
        time_base=Fraction(1, 12800),
    )  # fmt: skip
    recode(source, tmp_path / f"out{suffix}")
    assert packets_of(tmp_path / f"out{suffix}", "audio") == packets_of(source, "audio")
    assert seconds_of(tmp_path / f"out{suffix}") == seconds_of(source)


def test_audio_goes_from_mp4_to_matroska(tmp_path):
    source = make_clip(tmp_path / "in.mp4", audio="aac", time_base=Fraction(1, 1000))
    recode(source, tmp_path / "out.mkv")
    before, after = packets_of(source, "audio"), packets_of(tmp_path / "out.mkv", "audio")
    assert [h for _, h in after] == [h for _, h in before]
    assert all(
        abs(a - b) <= Fraction(1, 1000) for (a, _), (b, _) in zip(after, before, strict=True)
    )
    assert seconds_of(tmp_path / "out.mkv") == seconds_of(source)


RICH = {
    "audio": "aac",
    "subtitles": [(0.1, 0.3, "eins"), (0.4, 0.6, "zwei")],
    "attachment": ("font.ttf", "application/x-truetype-font", b"glyphs" * 9),
    "chapters": [(0, 0.4, "one"), (0.4, 0.8, "two")],
    "metadata": {"title": "A title"},
}


def test_matroska_keeps_everything(tmp_path):
    source = make_clip(tmp_path / "in.mkv", **RICH)
    assert recode(source, tmp_path / "out.mkv").warnings == []
    for kind in ("audio", "subtitle"):
        assert packets_of(tmp_path / "out.mkv", kind) == packets_of(source, kind)
    with av.open(str(source)) as one, av.open(str(tmp_path / "out.mkv")) as two:
        assert [s.type for s in two.streams] == [s.type for s in one.streams]
        assert two.chapters() == one.chapters()
        assert two.metadata["title"] == "A title"
        assert two.streams.video[0].metadata["title"] == "the video"
        assert two.streams.subtitles[0].metadata["language"] == "deu"
        assert [s.disposition for s in two.streams] == [s.disposition for s in one.streams]
        attachment = next(s for s in two.streams if s.type == "attachment")
        assert (attachment.data, attachment.mimetype) == (b"glyphs" * 9, RICH["attachment"][1])


def test_webm_keeps_chapters_or_says_that_it_does_not(tmp_path):
    source = make_clip(tmp_path / "in.mkv", n_frames=3, chapters=[(0, 0.1, "one")])
    warnings = recode(source, tmp_path / "out.webm").warnings
    with av.open(str(tmp_path / "out.webm")) as out:
        assert bool(out.chapters()) != bool(warnings)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_cover_art_is_kept(tmp_path, suffix):
    source = make_clip(tmp_path / "in.mp4", cover=True)
    recode(source, tmp_path / f"out{suffix}")
    with av.open(str(source)) as one, av.open(str(tmp_path / f"out{suffix}")) as two:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in two.streams if s.disposition & cover]
        assert len(streams) == 1
        data = [bytes(next(c.demux(next(s for s in c.streams if s.disposition & cover))))
                for c in (one, two)]  # fmt: skip
        assert data[0] == data[1]
    assert indices_of(tmp_path / f"out{suffix}") == list(range(20))
    recode(tmp_path / f"out{suffix}", tmp_path / "again.mkv")
    with av.open(str(tmp_path / "again.mkv")) as out:
        assert sum(bool(s.disposition & cover) for s in out.streams) == 1


def test_a_timecode_is_carried(tmp_path):
    source = make_clip(tmp_path / "in.mov", metadata={"timecode": "01:02:03:04"})
    with av.open(str(source)) as opened:
        assert any(s.type == "data" for s in opened.streams)
    (warning,) = recode(source, tmp_path / "out.mov").warnings
    assert "01:02:03:04" in warning
    with av.open(str(tmp_path / "out.mov")) as out:
        assert any(s.metadata.get("timecode") == "01:02:03:04" for s in out.streams)


def test_streams_are_interleaved(tmp_path):
    source = make_clip(tmp_path / "in.mkv", audio="pcm_s16le", n_frames=100)
    recode(source, tmp_path / "out.mkv", FAST)
    with av.open(str(tmp_path / "out.mkv")) as out:
        kinds = [p.stream.type for p in out.demux() if p.size]
    middle = kinds[len(kinds) // 3 : 2 * len(kinds) // 3]
    assert {"video", "audio"} == set(middle)


# trims


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_trim_moves_everything_to_zero(tmp_path, suffix):
    source = make_clip(
        tmp_path / f"in{suffix}", n_frames=50, options=B_FRAMES, audio="aac",
        start_seconds=Fraction(5), chapters=[(5, 6, "one"), (6, 7, "two")],
        subtitles=RICH["subtitles"] if suffix == ".mkv" else [],
    )  # fmt: skip
    out = tmp_path / f"out{suffix}"
    recode(source, out, start_seconds=0.8, end_seconds=1.6)
    assert indices_of(out) == list(range(20, 40))
    # In mp4 the file starts with the priming of AAC, 22 ms before the first frame.
    lead = seconds_of(out)[0]
    assert 0 <= lead <= Fraction(22, 1000)
    assert seconds_of(out) == [lead + Fraction(i, 25) for i in range(20)]
    before = {h: t for t, h in packets_of(source, "audio")}
    sound = packets_of(out, "audio")
    assert 0 <= sound[0][0] < Fraction(22, 1000)
    assert Fraction(75, 100) < sound[-1][0] < Fraction(8, 10)
    for time, digest in sound:
        assert abs(before[digest] - time - (Fraction(58, 10) - lead)) <= Fraction(1, 1000)
    with av.open(str(out)) as opened:
        titles = [
            (c["metadata"]["title"], float(c["start"] * c["time_base"])) for c in opened.chapters()
        ]
    assert titles == [("one", 0), ("two", pytest.approx(0.2 + float(lead)))]


def test_a_subtitle_on_screen_at_the_start_is_kept(tmp_path):
    source = make_clip(tmp_path / "in.mkv", subtitles=[(0.1, 0.5, "eins"), (0.6, 0.7, "zwei")])
    recode(source, tmp_path / "out.mkv", start_seconds=0.4)
    with av.open(str(tmp_path / "out.mkv")) as out:
        shown = [(p.pts, p.duration) for p in out.demux(subtitles=0) if p.size]
    assert shown == [(0, 100), (200, 100)]
