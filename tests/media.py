"""Makes small clips whose pixels carry their frame's number, and reads that number again."""

import io
import struct
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np

BITS = 8


@dataclass
class Clip:
    """What `make_clip` writes. Times in `pts` count in `time_base`."""

    n_frames: int = 20
    size: tuple[int, int] = (64, 48)
    pix_fmt: str = "yuv420p"
    codec: str = "libx264"
    options: dict[str, str] = field(default_factory=lambda: {"crf": "10", "preset": "ultrafast"})
    rate: Fraction = Fraction(25)
    time_base: Fraction = Fraction(1, 1000)
    pts: list[int] | None = None
    start_seconds: Fraction = Fraction(0)
    audio: str | None = None
    audio_seconds: float | None = None
    subtitles: list[tuple[float, float, str]] = field(default_factory=list)
    subtitle_codec: str = "subrip"
    language: str = "deu"
    attachment: tuple[str, str, bytes] | None = None
    cover: bool = False
    chapters: list[tuple[float, float, str]] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    rotation: int = 0
    display_matrix: tuple[int, ...] | None = None
    sample_aspect_ratio: Fraction | None = None
    color: tuple[int, int, int, int] = (2, 2, 2, 0)
    """primaries, trc, colorspace, range"""
    noise: bool = False
    """Random samples in every plane instead of flat ones, for exactness."""
    fields: str = ""
    """What the frames' flags say: `tff` or `bff`; the encoder must be told by `flags=+ildct`."""
    container_options: dict[str, str] = field(default_factory=dict)

    def pts_list(self) -> list[int]:
        """The pts of every frame as they are given to the encoder."""
        step = 1 / self.rate / self.time_base
        start = round(self.start_seconds / self.time_base)
        pts = self.pts or [round(i * step) for i in range(self.n_frames)]
        return [start + p for p in pts[: self.n_frames]]


def make_clip(path, **what):
    """Write a clip; `what` are the fields of Clip. Returns the path."""
    clip = Clip(**what)
    with av.open(f"file:{path}", "w", container_options=clip.container_options) as out:
        out.metadata.update(clip.metadata)
        video = _add_video(out, clip)
        subtitle = _add_subtitles(out, clip) if clip.subtitles else None
        sound = out.add_stream(clip.audio, rate=48000) if clip.audio else None
        if sound is not None:
            sound.codec_context.layout = "mono"
            sound.metadata["language"] = "fra"
        if clip.attachment:
            out.add_attachment(*clip.attachment)
        picture = _add_cover(out) if clip.cover else None
        if clip.chapters:
            out.set_chapters([_chapter(i, *c) for i, c in enumerate(clip.chapters)])
        out.start_encoding()
        if picture is not None:
            out.mux(_packet(picture, jpeg(), 0, 0, Fraction(1, 1000)))
        for text in clip.subtitles:
            _mux_subtitle(out, subtitle, clip.subtitle_codec, *text)
        packets = _video_packets(video, clip)
        if sound is not None:
            packets += _sound_packets(sound, clip)
        packets.sort(key=lambda p: p.dts * p.time_base)
        for packet in packets:
            out.mux(packet)
    return path


def _add_video(out, clip):
    video = out.add_stream(clip.codec, rate=clip.rate, options=dict(clip.options))
    context = video.codec_context
    video.width, video.height = clip.size
    context.pix_fmt = clip.pix_fmt
    video.time_base = context.time_base = clip.time_base
    context.color_primaries, context.color_trc, context.colorspace, context.color_range = clip.color
    if clip.rotation:
        video.set_display_rotation(clip.rotation)
    if clip.display_matrix:
        video.set_display_matrix(clip.display_matrix)
    if clip.sample_aspect_ratio:
        context.sample_aspect_ratio = clip.sample_aspect_ratio
    video.metadata["title"] = "the video"
    return video


def _video_packets(video, clip):
    packets = []
    setfield = _setfield(clip) if clip.fields else None
    for index, pts in enumerate(clip.pts_list()):
        frame = numbered_picture(index, clip.size, clip.pix_fmt, noise=clip.noise)
        if setfield is not None:
            setfield.push(frame)
            frame = setfield.pull()
        frame.pts, frame.time_base = pts, clip.time_base
        frame.duration = max(round(1 / clip.rate / clip.time_base), 1)
        packets += video.encode(frame)
    return packets + video.encode(None)


def _setfield(clip):
    graph = av.filter.Graph()
    size = "{}x{}".format(*clip.size)
    source = graph.add(
        "buffer", video_size=size, pix_fmt=clip.pix_fmt, time_base="1/1", pixel_aspect="1/1"
    )
    graph.link_nodes(source, graph.add("setfield", clip.fields), graph.add("buffersink"))
    graph.configure()
    return graph


def numbered_picture(index, size, pix_fmt, noise=False):
    """An av.VideoFrame whose first plane shows `index` as BITS vertical bars, black or white."""
    frame = av.VideoFrame(*size, pix_fmt)
    random = np.random.default_rng(index)
    for number, plane in enumerate(frame.planes):
        component = next(c for c in frame.format.components if c.plane == number)
        dtype = np.uint8 if component.bits == 8 else np.dtype("<u2")
        top = 1 << component.bits
        width = plane.line_size // np.dtype(dtype).itemsize
        rows = np.frombuffer(plane, dtype)[: plane.height * width].reshape(plane.height, width)
        rows[:] = random.integers(0, top, rows.shape) if noise else top // 2
        if number == 0 and not noise:
            used = plane.width * (width // plane.width if not frame.format.is_planar else 1)
            bits = (index >> (np.arange(used) * BITS // used)) & 1
            rows[:, :used] = np.where(bits, top * 7 // 8, top // 8)
    return frame


def read_index(planes):
    """The number that `numbered_picture` wrote, from the first plane."""
    first = planes[0]
    top = 256 if first.dtype == np.uint8 else 1 << max(int(first.max()).bit_length(), 9)
    middles = (np.arange(BITS) * 2 + 1) * first.shape[1] // (2 * BITS)
    bits = first[:, middles].mean(axis=0) > top // 2
    return int((bits << np.arange(BITS)).sum())


def _sound_packets(sound, clip):
    seconds = clip.audio_seconds or clip.n_frames / clip.rate
    context = sound.codec_context
    samples = np.sin(np.arange(int(48000 * seconds)) * 0.05) * 8000
    packets, size = [], context.frame_size or 1024
    for at in range(0, len(samples), size):
        part = samples[at : at + size].astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
        frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
        frame.pts = at + round(clip.start_seconds * 48000)
        resampler = av.AudioResampler(context.format, context.layout, 48000)
        for piece in resampler.resample(frame):
            packets += sound.encode(piece)
    return packets + sound.encode(None)


ASS_HEADER = (
    "[Script Info]\nScriptType: v4.00+\n[V4+ Styles]\nFormat: Name, Fontname, Fontsize\n"
    "Style: Default,Arial,16\n[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, "
    "MarginV, Effect, Text\n"
)
PGS = b"\x16\x00\x0b\x00\x40\x00\x30\x10\x00\x00\x80\x00\x00\x00" + b"\x80\x00\x00"


def _add_subtitles(out, clip):
    if clip.subtitle_codec in ("ass", "mov_text"):
        stream = out.add_stream(clip.subtitle_codec)
        stream.codec_context.subtitle_header = ASS_HEADER.encode()
        stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        stream.codec_context.open()
    else:
        stream = out.add_mux_stream(clip.subtitle_codec, time_base=Fraction(1, 1000))
    stream.metadata["language"] = clip.language
    return stream


def _mux_subtitle(out, stream, codec, start, end, text):
    data = {
        "ass": b"0,0,Default,,0,0,0,," + text.encode(),
        "mov_text": len(text.encode()).to_bytes(2, "big") + text.encode(),
        "hdmv_pgs_subtitle": PGS,
        "dvd_subtitle": b"\0\4\0\4" + text.encode(),
    }.get(codec, text.encode())
    duration = round((end - start) * 1000)
    out.mux(_packet(stream, data, round(start * 1000), duration, Fraction(1, 1000)))


def _packet(stream, data, pts, duration, time_base):
    packet = av.Packet(data)
    packet.stream, packet.time_base = stream, time_base
    packet.pts = packet.dts = pts
    packet.duration, packet.is_keyframe = duration, True
    return packet


def jpeg(index=1, size=(16, 16)):
    """A JPEG file as bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as out:
        stream = out.add_stream("mjpeg", rate=1)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p"
        out.mux(stream.encode(numbered_picture(index, size, "yuvj420p")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _add_cover(out):
    stream = out.add_mux_stream("mjpeg", width=16, height=16)
    stream.disposition = av.stream.Disposition.attached_pic
    return stream


def _chapter(number, start, end, title):
    base = Fraction(1, 1000)
    at = {"start": round(start * 1000), "end": round(end * 1000)}
    return {"id": number + 1, "time_base": base, "metadata": {"title": title}, **at}


def with_silent_track(source, path):
    """The clip's video in an MPEG-TS that names a track of sound too, in which none ever comes."""
    with av.open(str(source)) as one, av.open(str(path), "w") as out:
        video = out.add_stream_from_template(one.streams.video[0])
        out.add_mux_stream("ac3", rate=48000, layout="stereo")
        for packet in one.demux(video=0):
            if packet.size:
                packet.stream = video
                out.mux(packet)
    return path


def copied(source, path):
    """Its video's packets in another container."""
    with av.open(str(source)) as before, av.open(str(path), "w") as after:
        stream = after.add_stream_from_template(before.streams.video[0], opaque=True)
        for packet in before.demux(video=0):
            if packet.size:
                packet.stream = stream
                after.mux(packet)
    return path


def joined(folder, *clips):
    """Several clips as one MPEG-TS, whatever their sizes and formats, one after the other."""
    out = folder / "joined.ts"
    with av.open(str(out), "w") as file:
        target, start = None, Fraction(0)
        for clip in clips:
            with av.open(str(clip)) as one:
                stream = one.streams.video[0]
                target = target or file.add_stream_from_template(stream, opaque=True)
                packets = [p for p in one.demux(stream) if p.size]
                first = min(p.pts for p in packets)
                for packet in packets:
                    moved = round(start / packet.time_base) - first
                    packet.pts, packet.dts = packet.pts + moved, packet.dts + moved
                    packet.stream = target
                    file.mux(packet)
                start += Fraction(len(packets), 25)
    return out


def _boxes(data):
    """The boxes of an mp4: (type, content)."""
    at = 0
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, data[at + 8 : at + size]
        at += size


def _box(kind, content):
    return struct.pack(">I4s", len(content) + 8, kind) + content


def with_edits(source, path, edits):
    """A copy of an mp4 of which only these are played: (seconds, from which second on)."""

    def edited_track(track, movie_ticks):
        boxes = list(_boxes(track))
        media = dict(_boxes(dict(boxes)[b"mdia"]))
        (media_ticks,) = struct.unpack_from(">I", media[b"mdhd"], 12)
        (start,) = struct.unpack_from(">i", dict(_boxes(dict(boxes)[b"edts"]))[b"elst"], 12)
        entries = b"".join(
            struct.pack(">Iihh", round(n * movie_ticks), start + round(at * media_ticks), 1, 0)
            for n, at in edits
        )
        elst = _box(b"elst", struct.pack(">II", 0, len(edits)) + entries)
        return b"".join(_box(k, elst if k == b"edts" else c) for k, c in boxes)

    def edited_movie(movie):
        boxes = list(_boxes(movie))
        (ticks,) = struct.unpack_from(">I", dict(boxes)[b"mvhd"], 12)
        return b"".join(_box(k, edited_track(c, ticks) if k == b"trak" else c) for k, c in boxes)

    boxes = _boxes(source.read_bytes())
    path.write_bytes(b"".join(_box(k, edited_movie(c) if k == b"moov" else c) for k, c in boxes))
    return path
