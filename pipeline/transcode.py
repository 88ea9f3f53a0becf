"""Owns what is encoded anew beside the video: sound and text that a container refuses as it is."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av

AUDIO_BIT_RATES = {"libopus": 96_000, "aac": 128_000}
"""Bits per second and channel: where listeners no longer tell stereo from its source."""
_OPUS_RATE = 48_000
# Opus places its channels as Vorbis does, which knows no side pair in these; swresample moves it.
_OPUS_LAYOUTS = {"5.1(side)": "5.1", "5.0(side)": "5.0", "quad(side)": "quad"}
_PLACES = {1: "mono", 2: "stereo", 3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


class AudioTranscoder:
    """Decodes the packets of one audio stream and encodes them into `output`, times kept.

    Open once made, so that its container's header can be written. `n_corrupt` counts the packets
    that could not be decoded; their time is left silent. Raises av.FFmpegError and ValueError
    where the encoder does not take the sound.
    """

    def __init__(self, source: Any, output: Any, encoder: str) -> None:
        decoder = source.codec_context
        rate, layout = decoder.sample_rate, decoder.layout.name
        if not rate:  # of a damaged file
            raise ValueError("its sample rate is unknown")
        if layout.endswith(" channels"):  # TTA and others give a number and no places
            layout = _PLACES.get(decoder.layout.nb_channels, layout)
        if encoder == "libopus":
            rate, layout = _OPUS_RATE, _OPUS_LAYOUTS.get(layout, layout)
        self.stream = output.add_stream(encoder, rate=rate)
        self.n_corrupt = 0
        self._end, self._time_base = Fraction(0), Fraction(1, rate)
        self._decoder = decoder
        self._encoder = context = self.stream.codec_context
        context.layout = layout
        context.format = _sample_format(context.codec, decoder.format)
        context.time_base = Fraction(1, rate)
        if encoder in AUDIO_BIT_RATES:
            context.bit_rate = AUDIO_BIT_RATES[encoder] * context.layout.nb_channels
        context.open()
        self._taken: tuple[str, str, int] | None = None
        self._resampler = self._new_resampler()

    def _new_resampler(self) -> Any:
        context = self._encoder
        return av.AudioResampler(
            context.format, context.layout, context.sample_rate, frame_size=context.frame_size
        )

    def packets(self, packet: Any) -> Iterator[Any]:
        """What one packet of the source gives; None drains the encoder."""
        try:
            frames = self._decoder.decode(packet)
        except av.FFmpegError:
            self.n_corrupt += 1
            return
        for frame in frames:
            yield from self._encoded(self._timed(frame))
        if packet is None:
            yield from self._encoded(None)
            yield from self._muxable(self._encoder.encode(None))

    def _timed(self, frame: Any) -> Any:
        """What a decoder gives when it is drained may have no time: it follows what came before."""
        if frame.pts is None:
            frame.time_base = self._time_base
            frame.pts = round(self._end / self._time_base)
        self._time_base = frame.time_base
        self._end = frame.pts * frame.time_base + Fraction(frame.samples, frame.sample_rate)
        return frame

    def _encoded(self, frame: Any) -> Iterator[Any]:
        if frame is not None:
            # Broadcasts go from 5.1 to stereo and back; a resampler takes one kind alone.
            given = frame.format.name, frame.layout.name, frame.sample_rate
            if self._taken not in (None, given):
                yield from self._encoded(None)
                self._resampler = self._new_resampler()
            self._taken = given
        for piece in self._resampler.resample(frame):
            yield from self._muxable(self._encoder.encode(piece))

    def _muxable(self, packets: list[Any]) -> Iterator[Any]:
        for packet in packets:
            packet.stream = self.stream
            yield packet


class SubtitleTranscoder:
    """Likewise for subtitles that are text; each keeps its own time.

    mp4 shows one at a time, and FFmpeg's muxer moves one that overlaps the one before to its end,
    and the next after that: there one ends where the next begins, or is shown together with it.
    """

    def __init__(self, source: Any, output: Any, encoder: str) -> None:
        self.stream = output.add_stream(encoder)
        self.n_corrupt = self.n_shortened = 0
        self._one_at_a_time = encoder == "mov_text"
        self._held: Any = None
        self._decoder = source.codec_context
        self._decoder.open(strict=False)
        self._encoder = context = self.stream.codec_context
        context.subtitle_header = self._decoder.subtitle_header
        # FFmpeg's subtitles count in milliseconds.
        context.time_base = self.stream.time_base = Fraction(1, 1000)
        context.open()

    def packets(self, packet: Any) -> Iterator[Any]:
        """What one packet of the source gives, or with None what is held."""
        if packet is None:
            if self._held is not None:
                yield self._held
            return
        try:
            shown = self._decoder.decode2(packet)
        except av.FFmpegError:
            self.n_corrupt += 1
            return
        if shown is None or not len(shown):
            return  # the empty text that mp4 keeps between two subtitles
        coded = self._encoder.encode_subtitle(shown)
        coded.pts = coded.dts = packet.pts
        coded.duration, coded.time_base = packet.duration, packet.time_base
        coded.stream = self.stream
        if not self._one_at_a_time:
            yield coded
            return
        held, self._held = self._held, coded
        if held is None:
            return
        if coded.pts < held.pts:
            held, self._held = coded, held
        n_overlap = held.pts + (held.duration or 0) - self._held.pts
        self.n_shortened += n_overlap > 0
        if held.pts == self._held.pts:
            self._held = _together(held, self._held)
            return
        if n_overlap > 0:
            held.duration -= n_overlap
        yield held


def _together(one: Any, other: Any) -> Any:
    """Two packets of mov_text, which is a length, a text and its styles, as one without these."""
    texts = [bytes(p)[2 : 2 + int.from_bytes(bytes(p)[:2], "big")] for p in (one, other)]
    text = b"\n".join(texts)
    both = av.Packet(len(text).to_bytes(2, "big") + text)
    both.pts, both.dts, both.time_base = one.pts, one.dts, one.time_base
    both.duration, both.stream = max(one.duration or 0, other.duration or 0), one.stream
    return both


def _sample_format(codec: Any, source: Any) -> Any:
    """The smallest sample format of the encoder that holds the source's, else its largest."""
    formats = codec.audio_formats
    enough = [f for f in formats if f.bits >= source.bits]
    return min(enough, key=lambda f: f.bits) if enough else max(formats, key=lambda f: f.bits)
