"""Sound that is encoded anew: in step, without holes of its own, to its end."""

import itertools
from fractions import Fraction

import av
import numpy as np
import pytest
from many_streams import two_of_each
from media import make_clip
from readback import recode
from sample_clips import QUICK

from pipeline.decode import VideoSource
from pipeline.encode import VideoWriter
from pipeline.encoder import EncodeSettings, default_settings
from pipeline.errors import SinkError
from pipeline.transcode import AudioTranscoder
from pipeline.verify import verify


@pytest.mark.parametrize("start", [0, 5])
def test_transcoded_sound_stays_in_step(tmp_path, start):
    source = make_clip(
        tmp_path / "in.mkv", audio="aac", n_frames=50, audio_seconds=2.0, start_seconds=start
    )
    recode(source, tmp_path / "out.webm", QUICK[".webm"])
    before, after = (sound_of(p) for p in (source, tmp_path / "out.webm"))
    n = min(len(before), len(after)) - 4800
    lags = range(-480, 481, 4)
    parts = [float(np.dot(before[2400:n], after[2400 + lag : n + lag])) for lag in lags]
    best = lags[int(np.argmax(parts))]
    assert abs(best) <= 48 * 5, f"{best / 48} ms"
    assert abs(len(after) - len(before)) < 4800


def sound_of(path):
    """Samples at 48 kHz from the file's second 0 or 5 on, as players show them."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler("flt", "mono", 48000)
        pieces = []
        for frame in container.decode(stream):
            for piece in resampler.resample(frame):
                pieces.append((piece.pts * piece.time_base, piece.to_ndarray()[0]))
    origin = round(pieces[0][0])
    first = round((pieces[0][0] - origin) * 48000)
    samples = np.concatenate([p for _, p in pieces])
    return samples[-first:] if first < 0 else np.pad(samples, (first, 0))


def test_lossless_sound_becomes_lossless_sound(tmp_path):
    source = two_of_each(tmp_path / "in.mkv")
    recode(source, tmp_path / "out.mov")
    with av.open(str(source)) as one, av.open(str(tmp_path / "out.mov")) as two:
        for number in range(2):
            before, after = (
                np.concatenate([f.to_ndarray().reshape(-1, 2) if f.format.is_packed else
                                f.to_ndarray().T for f in c.decode(audio=number)])
                for c in (one, two)
            )  # fmt: skip
            one.seek(0)
            two.seek(0)
            assert two.streams.audio[number].codec_context.name == "alac"
            n = min(len(before), len(after))
            assert n >= 19200
            assert np.array_equal(before.reshape(-1, 2)[:n], after[:n])


def test_sound_with_a_hole_keeps_the_hole(tmp_path):
    plain = make_clip(tmp_path / "a.mkv", audio="aac", n_frames=50, audio_seconds=2.0)
    source = tmp_path / "in.mkv"
    with av.open(str(plain)) as one, av.open(str(source), "w") as two:
        targets = {s.index: two.add_stream_from_template(s) for s in one.streams}
        for packet in one.demux():
            hole = packet.stream.type == "audio" and 0.5 < (packet.pts or 0) * packet.time_base < 1
            if packet.size and not hole:
                packet.stream = targets[packet.stream.index]
                two.mux(packet)
    recode(source, tmp_path / "out.webm", QUICK[".webm"])
    with av.open(str(tmp_path / "out.webm")) as out:
        times = [float(p.pts * p.time_base) for p in out.demux(audio=0) if p.size]
    assert 0.4 < max(b - a for a, b in itertools.pairwise(times)) < 0.55
    assert verify(source, tmp_path / "out.webm").differences == []


def with_sound(path, codec, rate, clip, start=0, n_frames=10):
    """The video of a clip, and frames of silence that begin at sample `start`."""
    with av.open(str(clip)) as one, av.open(str(path), "w") as two:
        video = two.add_stream_from_template(one.streams.video[0], opaque=True)
        sound = two.add_stream(codec, rate=rate, bit_rate=96000)
        two.start_encoding()
        packets = [p for p in one.demux(video=0) if p.size]
        for packet in packets:
            packet.stream = video
            two.mux(packet)
        size = sound.codec_context.frame_size
        for number in range(n_frames):
            silence = np.zeros((2, size), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = start + size * number
            two.mux(sound.encode(frame))
        two.mux(sound.encode(None))
    return path


def test_sound_whose_last_samples_have_no_time_is_encoded_to_its_end(tmp_path):
    """As a decoder gives when it is drained; FLAC's last packet then had none either."""
    source = with_sound(
        tmp_path / "in.wmv", "wmav2", 44100, make_clip(
            tmp_path / "a.wmv", codec="wmv2", options={}, time_base=Fraction(1, 25)
        ), n_frames=13,
    )  # fmt: skip
    writer = recode(source, tmp_path / "out.mkv")
    assert [plan.target for plan in writer.plan][1:] == ["flac"]
    assert verify(source, tmp_path / "out.mkv").differences == []


@pytest.mark.parametrize("after", [".mp4", ".mov"])
@pytest.mark.parametrize("rate", [44100, 48000, 22050])
def test_sound_that_starts_late_keeps_every_sample_in_its_place(tmp_path, after, rate):
    """The unit of an mp4's edit list has to suit the picture and the sound."""
    plain = make_clip(tmp_path / "a.mp4", time_base=Fraction(1, 12800))
    source = with_sound(tmp_path / "in.mkv", "aac", rate, plain, start=rate // 2)
    recode(source, tmp_path / f"first{after}")
    recode(tmp_path / f"first{after}", tmp_path / f"out{after}")
    assert verify(tmp_path / f"first{after}", tmp_path / f"out{after}").differences == []


@pytest.mark.parametrize("after", [".mkv", ".mp4", ".webm"])
def test_sound_that_steps_back_does_not_end_a_job_at_its_join(tmp_path, caplog, after):
    """As in a capture with lost packets, or of two recordings: what steps back is moved on."""
    first = make_clip(tmp_path / "a.ts", n_frames=25, audio="aac", audio_seconds=1.5)
    second = make_clip(
        tmp_path / "b.ts", n_frames=25, audio="aac", audio_seconds=1, start_seconds=1
    )
    source = tmp_path / "in.ts"
    source.write_bytes(first.read_bytes() + second.read_bytes())
    recode(source, tmp_path / f"out{after}", EncodeSettings("libvpx") if after == ".webm" else None)
    assert "packets lay before the one before them and are moved on" in caplog.text
    with av.open(str(tmp_path / f"out{after}")) as out:
        times = [float(p.pts * p.time_base) for p in out.demux(audio=0) if p.size]
    assert times == sorted(times)
    assert len(times) > 100
    assert times[-1] == pytest.approx(2.0, abs=0.1)


def test_surround_goes_to_opus_in_its_own_order(tmp_path):
    with av.open(str(tmp_path / "x.webm"), "w") as out:
        context = av.CodecContext.create("aac", "r")
        context.layout, context.sample_rate, context.format = "5.1(side)", 44100, "fltp"
        transcoder = AudioTranscoder(type("S", (), {"codec_context": context})(), out, "libopus")
        assert transcoder.stream.codec_context.layout.name == "5.1"
        assert transcoder.stream.codec_context.sample_rate == 48000


def test_sound_of_a_damaged_file_that_has_no_rate_is_refused(tmp_path):
    with av.open(str(tmp_path / "x.webm"), "w") as out:
        context = av.CodecContext.create("mp2", "r")
        source = type("S", (), {"codec_context": context})()
        with pytest.raises(ValueError, match="sample rate"):
            AudioTranscoder(source, out, "aac")


def test_sound_that_cannot_be_decoded_is_refused_before_the_first_frame(tmp_path):
    source = tmp_path / "in.mkv"
    with av.open(str(source), "w") as out:
        clip = make_clip(tmp_path / "a.mkv", n_frames=3)
        with av.open(str(clip)) as one:
            video = out.add_stream_from_template(one.streams.video[0])
            sound = out.add_mux_stream("truehd", rate=48000, layout="stereo")
            for packet in one.demux(video=0):
                if packet.size:
                    packet.stream = video
                    out.mux(packet)
            packet = av.Packet(b"no such thing")
            packet.stream, packet.pts, packet.dts = sound, 0, 0
            packet.time_base = sound.time_base
            out.mux(packet)
    with VideoSource(source) as video, pytest.raises(SinkError, match=r"truehd.*\.mkv"):
        VideoWriter(
            tmp_path / "out.webm", video.info, default_settings("out.webm", video.info),
            copy_from=source,
        )  # fmt: skip
    assert not list(tmp_path.glob("out*"))


def test_sound_that_goes_from_stereo_to_surround_is_encoded_to_its_end(tmp_path):
    """As broadcasts do at advertisements; a resampler takes one kind alone."""

    def silence(layout, n):
        context = av.CodecContext.create("ac3", "w")
        context.layout, context.sample_rate, context.format = layout, 48000, "fltp"
        context.time_base = Fraction(1, 48000)
        for number in range(n):
            channels = context.layout.nb_channels
            plane = np.zeros((channels, 1536), np.float32)
            frame = av.AudioFrame.from_ndarray(plane, format="fltp", layout=layout)
            frame.sample_rate, frame.pts = 48000, 1536 * number
            yield from (bytes(packet) for packet in context.encode(frame))
        yield from (bytes(packet) for packet in context.encode(None))

    decoder = av.CodecContext.create("ac3", "r")
    decoder.layout, decoder.sample_rate, decoder.format = "stereo", 48000, "fltp"
    with av.open(str(tmp_path / "x.webm"), "w") as out:
        transcoder = AudioTranscoder(type("S", (), {"codec_context": decoder})(), out, "libopus")
        given, made = 0, Fraction(0)
        for data in [*silence("stereo", 10), *silence("5.1", 10), *silence("stereo", 10)]:
            packet = av.Packet(data)
            packet.pts = packet.dts = 1536 * given
            packet.time_base = Fraction(1, 48000)
            given += 1
            made += sum(p.duration * p.time_base for p in transcoder.packets(packet))
        made += sum(p.duration * p.time_base for p in transcoder.packets(None))
    assert abs(made - Fraction(given * 1536, 48000)) < Fraction(1, 10)


@pytest.mark.parametrize("codec", ["subrip", "ass"])
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_subtitles_that_overlap_begin_when_they_did(tmp_path, codec, suffix, caplog):
    """mp4 shows one at a time: FFmpeg's muxer moves each to the end of the one before it."""
    lines = [(1, 4, "one"), (2, 5, "two"), (5.5, 6.5, "sign A"), (5.5, 6.5, "sign B"), (7, 8, "x")]
    source = make_clip(tmp_path / "in.mkv", n_frames=200, subtitle_codec=codec, subtitles=lines,
                       time_base=Fraction(1, 25))  # fmt: skip
    recode(source, tmp_path / f"out{suffix}")
    with av.open(str(tmp_path / f"out{suffix}")) as out:
        stream = out.streams.subtitles[0]
        shown = [
            (float(p.pts * p.time_base), float(p.duration * p.time_base), bytes(p)[2:])
            for p in out.demux(stream)
            if p.size > 2
        ]
    assert [round(start, 3) for start, _, _ in shown] == [1, 2, 5.5, 7]
    assert [round(seconds, 3) for _, seconds, _ in shown] == [1, 3, 1, 1]
    assert shown[2][2].startswith(b"sign A\nsign B")
    assert "2 subtitles end where the next begins" in caplog.text
