"""Streams that are silent, damaged or unknown cost themselves alone, and that is said."""

import re
from fractions import Fraction

import av
import pytest
from many_streams import clip_with_klv
from media import make_clip, with_silent_track
from readback import recode

from pipeline import RestoreConfig, restore_file
from pipeline.muxing import Muxing


def test_a_track_in_which_nothing_is_sent_costs_only_itself(tmp_path):
    """MPEG-TS names all tracks of a programme: a second language, a description for the blind."""
    clip = make_clip(tmp_path / "a.mkv", n_frames=30)
    source = with_silent_track(clip, tmp_path / "in.ts")
    writer = recode(source, tmp_path / "out.mkv")
    assert any("no sound was found in it" in warning for warning in writer.warnings)
    with av.open(str(tmp_path / "out.mkv")) as out:
        assert [stream.type for stream in out.streams] == ["video"]


def without_times(path, pid):
    """Take the pts and dts out of every PES header of one stream of an MPEG-TS."""
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 188):
        if int.from_bytes(data[at + 1 : at + 3]) & 0x1FFF != pid or not data[at + 1] & 0x40:
            continue
        pes = at + 4 + (1 + data[at + 4] if data[at + 3] & 0x20 else 0)
        length = data[pes + 8]
        data[pes + 7] &= 0x3F
        data[pes + 9 : pes + 9 + length] = b"\xff" * length
    path.write_bytes(data)
    return path


def test_data_without_times_is_of_when_it_comes(tmp_path):
    """Asynchronous KLV, as drones send it, has none in MPEG-TS."""
    source = without_times(clip_with_klv(tmp_path / "in.ts"), pid=0x101)
    with av.open(str(source)) as made:
        assert all(p.pts is None for p in made.demux(data=0) if p.size)
    recode(source, tmp_path / "out.mov")
    with av.open(str(tmp_path / "out.mov")) as out:
        times = [p.pts * p.time_base for p in out.demux(data=0) if p.size]
    assert len(times) == 13
    assert times == sorted(times)


def test_a_damaged_packet_of_sound_costs_that_packet_and_not_the_job(tmp_path, caplog):
    """One bit of an ADTS syncword: FFmpeg cannot make Matroska's form of AAC of it."""
    options = {"crf": "30", "preset": "ultrafast", "g": "10"}
    source = make_clip(
        tmp_path / "in.ts", n_frames=50, options=options, size=(48, 48), audio="aac",
        audio_seconds=2.0, time_base=Fraction(1, 90000),
    )  # fmt: skip
    n_packets = len(times_of_sound(source))
    data = bytearray(source.read_bytes())
    at = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xf1"]
    data[at[len(at) // 2]] ^= 0x10
    source.write_bytes(data)
    recode(source, tmp_path / "out.mkv")
    assert n_packets - 3 <= len(times_of_sound(tmp_path / "out.mkv")) < n_packets
    assert re.search(r"in\.ts: the output's audio stream 1: \d damaged packets are", caplog.text)


def test_a_muxer_that_refuses_all_ends_the_job(tmp_path):
    class Refusing:
        format = type("F", (), {"flags": 0})

        def mux(self, _):
            raise av.error.InvalidDataError(1, "refused")

    with av.open(str(make_clip(tmp_path / "in.mkv", audio="aac"))) as source:
        packet, muxing = next(source.demux(audio=0)), Muxing(Refusing())
        for _ in range(100):
            muxing.mux(packet)
        with pytest.raises(av.error.InvalidDataError):
            muxing.mux(packet)


def times_of_sound(path):
    with av.open(str(path)) as container:
        return [packet.pts for packet in container.demux(audio=0) if packet.size]


def test_a_stream_that_begins_within_the_file_is_lost_and_said(tmp_path, tiny_checkpoint):
    """PyAV does not know it, and stumbles over it at the end of the packets."""
    common = {
        "options": {"crf": "1", "preset": "ultrafast", "g": "10"}, "size": (480, 360),
        "noise": True, "time_base": Fraction(1, 90000),
    }  # fmt: skip
    # No sound in the first 5 MB, which FFmpeg probes, nor at the end, whose times it reads.
    first = make_clip(tmp_path / "a.ts", n_frames=40, **common)
    last = make_clip(tmp_path / "c.ts", n_frames=20, start_seconds=Fraction(50, 25), **common)
    late = make_clip(tmp_path / "b.ts", n_frames=10, start_seconds=Fraction(40, 25), audio="mp2",
                     audio_seconds=0.4, **common)  # fmt: skip
    source = tmp_path / "in.ts"
    source.write_bytes(b"".join(path.read_bytes() for path in (first, late, last)))
    with av.open(str(source)) as container:
        assert len(container.streams) == 1
    settings = {"model.strength": 0, "model.model": tiny_checkpoint, "pool.kind": "local"}
    report = restore_file(source, config=RestoreConfig.load(overrides=settings))
    assert report.n_frames == 70
    assert report.warnings[-1] == (
        "a stream that begins within the file: in the source, and in no output of this program"
    )


def test_a_track_that_nothing_knows_beside_one_that_is_kept_is_lost_and_said(tmp_path):
    """As newer telephones add of spatial sound: it must not cost the film."""
    plain = make_clip(tmp_path / "a.mp4", audio="aac", n_frames=10)
    source = tmp_path / "in.mp4"
    with av.open(str(plain)) as one, av.open(str(source), "w") as two:
        sound = one.streams.audio[0]
        targets = {s.index: [two.add_stream_from_template(s)] for s in one.streams}
        targets[sound.index].append(two.add_stream_from_template(sound))
        for packet in one.demux():
            for target in targets[packet.stream.index] if packet.size else []:
                copy = av.Packet(bytes(packet))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.duration, copy.is_keyframe = packet.duration, packet.is_keyframe
                copy.stream = target
                two.mux(copy)
    data = source.read_bytes()
    for known, unknown in ((b"mp4a", b"apac"), (b"esds", b"dapa")):  # of the second one
        place = data.rindex(known)
        data = data[:place] + unknown + data[place + 4 :]
    source.write_bytes(data)
    writer = recode(source, tmp_path / "out.mp4")
    assert [line for line in writer.warnings if "audio" in line and "lost" in line]
    with av.open(str(tmp_path / "out.mp4")) as out:
        assert [s.codec_context.name for s in out.streams.audio] == ["aac"]
