"""Owns the picture that is shown while a source is away. Knows neither when that is nor a sink."""

from pathlib import Path

import av

from pipeline.errors import ConfigError
from pipeline.frames import Planes, StreamInfo
from pipeline.pictures import from_rgb
from pipeline.planes import planes_of


class Stub:
    """A picture that FFmpeg reads: PNG, JPEG and more. Raises ConfigError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with av.open(str(path)) as container:
                picture = next(container.decode(video=0))
        except (av.FFmpegError, OSError, IndexError, StopIteration) as error:
            cause = getattr(error, "strerror", None) or "no picture in it"
            raise ConfigError(f"--stub {path}: {cause}; give a PNG or JPEG file") from error
        self._rgb = picture.reformat(format="rgb24")

    def planes(self, info: StreamInfo) -> Planes:
        """It as a frame of such a stream: scaled to its size, in its format and colours."""
        return planes_of(from_rgb(self._rgb, info), info, self._path)
