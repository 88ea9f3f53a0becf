"""What becomes of every kind of stream in every container: the table of docs/streams.md."""

from pathlib import Path

import pytest
from many_streams import clip_with_klv
from media import make_clip
from readback import recode
from sample_clips import FONT, QUICK, TEXTS

from pipeline.containers import CONTAINERS
from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings, default_settings
from pipeline.plan import table
from pipeline.verify import verify

AUDIO = {
    "AAC": "aac", "AC-3": "ac3", "E-AC-3": "eac3", "MP3": "libmp3lame", "MP2": "mp2",
    "Opus": "libopus", "FLAC": "flac", "ALAC": "alac", "WavPack": "wavpack", "TTA": "tta",
    "PCM 16 bit": "pcm_s16le", "PCM 24 bit": "pcm_s24le", "PCM A-law": "pcm_alaw",
}  # fmt: skip
SUBTITLES = {
    "SubRip": ("subrip", ".mkv"), "ASS": ("ass", ".mkv"), "WebVTT": ("webvtt", ".mkv"),
    "mov_text": ("mov_text", ".mp4"), "PGS": ("hdmv_pgs_subtitle", ".mkv"),
    "DVD": ("dvd_subtitle", ".mkv"),
}  # fmt: skip


SUFFIXES = (".mp4", ".mov", ".mkv", ".webm")


def clip_with(folder, kind):
    """A clip of eight frames that holds one more stream of this kind."""
    few = {"n_frames": 8, "size": (32, 32)}
    if kind in AUDIO:
        suffix = ".mov" if AUDIO[kind] in ("alac", "pcm_alaw") else ".mkv"
        return make_clip(folder / f"in{suffix}", audio=AUDIO[kind], **few)
    if kind in SUBTITLES:
        codec, suffix = SUBTITLES[kind]
        return make_clip(folder / f"in{suffix}", subtitle_codec=codec, subtitles=TEXTS, **few)
    what = {
        "font": (".mkv", {"attachment": FONT}),
        "cover art (JPEG)": (".mp4", {"cover": True}),
        "timecode track": (".mov", {"metadata": {"timecode": "01:02:03:04"}}),
        "chapters": (".mkv", {"chapters": [(0, 0.1, "one"), (0.1, 0.3, "two")]}),
    }
    if kind == "data (KLV)":
        return clip_with_klv(folder / "in.ts")
    suffix, options = what[kind]
    return make_clip(folder / f"in{suffix}", **options, **few)


def cell(plan):
    """A plan as it stands in the table."""
    return f"→ {plan.target}" if plan.fate == "transcoded" else plan.fate


KINDS = [
    *AUDIO, *SUBTITLES, "font", "cover art (JPEG)", "timecode track", "data (KLV)", "chapters"
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_documents_table_is_what_happens(tmp_path, kind):
    source = clip_with(tmp_path, kind)
    cells = []
    for suffix in SUFFIXES:
        settings = QUICK.get(suffix, EncodeSettings(preset="ultrafast"))
        output = tmp_path / f"out{suffix}"
        writer = recode(source, output, settings)
        (plan,) = [p for p in writer.plan if p.fate != "restored"]
        assert verify(source, output).differences == [], suffix
        said = any(plan.name in w and plan.outcome in w for w in writer.warnings)
        assert said == (plan.fate not in ("copied", "restored"))
        if plan.fate == "lost":
            assert "cannot hold it" in plan.why or ".mkv" in plan.why
        cells.append(cell(plan))
    row = f"| {kind} | {' | '.join(cells)} |"
    document = Path(__file__).parents[1] / "docs" / "streams.md"
    assert row in document.read_text().splitlines(), f"docs/streams.md lacks: {row}"


def test_every_container_has_a_column():
    assert {CONTAINERS[s] for s in SUFFIXES} == set(CONTAINERS.values())


def test_a_plan_as_a_table_has_a_line_for_each_stream(tmp_path):
    source = make_clip(tmp_path / "in.mkv", audio="aac", subtitles=TEXTS, attachment=FONT)
    with VideoSource(source) as video:
        settings = default_settings("out.mp4", video.info)
        writer = VideoWriter(
            tmp_path / "out.mp4", video.info, settings, copy_from=source, dry_run=True
        )
        lines = table(writer.plan)
        writer.abort()
    assert len(lines) == 5
    assert all(word in lines[2] for word in ("subrip", "deu", "mov_text", ".mkv"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mkv"]
