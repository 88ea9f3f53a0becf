"""Clips with more streams than a video and a sound."""

import av
import numpy as np
from media import make_clip


def clip_with_klv(path):
    plain = make_clip(path.with_suffix(".mkv"), n_frames=13, size=(32, 32))
    with av.open(str(plain)) as source, av.open(str(path), "w") as out:
        video = out.add_stream_from_template(source.streams.video[0])
        data = out.add_mux_stream("klv")
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                packet.stream = video
                out.mux(packet)
                klv = av.Packet(b"\x06\x0e\x2b\x34" + bytes([number]) * 12)
                klv.pts = klv.dts = packet.pts
                klv.time_base, klv.stream = packet.time_base, data
                out.mux(klv)
    return path


def two_of_each(path):
    """Two sounds and two texts in several languages, one forced; the second sound is described."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        kinds = av.stream.Disposition
        streams = []
        for language, disposition, title in [
            ("deu", kinds.default, ""), ("eng", kinds.comment, "Director"),
        ]:  # fmt: skip
            sound = out.add_stream("flac", rate=48000)
            sound.codec_context.layout = "stereo"
            sound.metadata.update({"language": language} | ({"title": title} if title else {}))
            sound.disposition = disposition
            streams.append(sound)
        texts = []
        for language, disposition in [("swe", kinds.default | kinds.forced), ("und", kinds(0))]:
            text = out.add_mux_stream("subrip")
            text.metadata["language"] = language
            text.disposition = disposition
            texts.append(text)
        out.start_encoding()
        for text in texts:
            packet = av.Packet(b"words")
            packet.stream, packet.pts, packet.dts, packet.duration = text, 100, 100, 200
            packet.time_base = text.time_base
            out.mux(packet)
        out.mux(sorted(
            (p for n, stream in enumerate([video, *streams]) for p in coded(stream, n)),
            key=lambda p: p.dts * p.time_base,
        ))  # fmt: skip
    return path


def coded(stream, number):
    if stream.type == "video":
        pictures = [av.VideoFrame(32, 32, "yuv420p") for _ in range(10)]
        for index, picture in enumerate(pictures):
            picture.pts = index
        return [p for picture in [*pictures, None] for p in stream.encode(picture)]
    samples = np.random.default_rng(number).integers(-9000, 9000, (1, 2 * 19200)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
    frame.rate, frame.pts = 48000, 0
    resampler = av.AudioResampler(
        stream.codec_context.format, "stereo", 48000, stream.codec_context.frame_size
    )
    pieces = [*resampler.resample(frame), *resampler.resample(None), None]
    return [p for piece in pieces for p in stream.encode(piece)]
