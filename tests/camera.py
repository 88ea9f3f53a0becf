"""A camera for the tests: a process that publishes numbered frames in real time, without end.

    python tests/camera.py URL [SIZE [RATE [AUDIO [CODEC]]]]      # 160x120 25 "" libx264

URL: rtsp://, udp:// or hls:PLAYLIST.
Frame n shows n % 256 (media.numbered_picture); a tone is on while that is below 128.
A server that goes away is tried again.
"""

import sys
import time
from fractions import Fraction

import av
import numpy as np
from media import numbered_picture

_OPTIONS = {
    "libx264": {"preset": "ultrafast", "tune": "zerolatency", "g": "10", "crf": "18"},
    "libx265": {"preset": "ultrafast", "x265-params": "keyint=10:bframes=0:log-level=none",
                "tune": "zerolatency"},
}  # fmt: skip
_FORMATS = {"rtsp": ("rtsp", {"rtsp_transport": "tcp"}), "udp": ("mpegts", {}),
            "hls": ("hls", {"hls_time": "1", "hls_flags": "delete_segments"})}  # fmt: skip


def publish(url, size, rate, audio, codec, n_frames=None):
    """Until `n_frames` were sent, or the server is gone."""
    scheme, _, path = url.partition(":")
    container, options = _FORMATS[scheme]
    url = path if scheme == "hls" else url
    with av.open(url, "w", format=container, options=options) as out:
        video = out.add_stream(codec, rate=rate, options=_OPTIONS[codec])
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        sound = out.add_stream(audio, rate=48000) if audio else None
        if sound is not None:
            sound.codec_context.layout = "mono"
        began, n_samples = time.monotonic(), 0
        index = 0
        while n_frames is None or index < n_frames:
            while sound is not None and n_samples <= index * 48000 // rate:
                out.mux(sound.encode(_tone(sound, n_samples, rate)))
                n_samples += sound.codec_context.frame_size or 1024
            picture = numbered_picture(index % 256, size, "yuv420p")
            picture.pts, picture.time_base = index, Fraction(1, rate)
            out.mux(video.encode(picture))
            index += 1
            time.sleep(max(0, began + index / rate - time.monotonic()))


def _tone(sound, at, rate):
    n = sound.codec_context.frame_size or 1024
    times = at + np.arange(n)
    loud = times * rate // 48000 % 256 < 128
    samples = (np.sin(times * 0.05) * 0.3 * loud).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), at
    resampler = av.AudioResampler(sound.codec_context.format, "mono", 48000)
    return resampler.resample(frame)[0]


def main():
    url, size, rate, audio, codec = [*sys.argv[1:], "", "", "", "", ""][:5]
    width, height = map(int, (size or "160x120").split("x"))
    while True:
        try:
            publish(url, (width, height), int(rate or 25), audio, codec or "libx264")
        except (av.FFmpegError, OSError):
            time.sleep(0.2)


if __name__ == "__main__":
    main()
