"""The settings of a job, checked once at the edge. Knows no stage: each gets plain arguments."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import ConfigError
from pipeline.quality import Quality

TileSize = tuple[int, int] | Literal["auto"] | None


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelConfig(_Frozen):
    """Which network, on what."""

    model: str = "tiny"
    """A shipped name (tiny, small) or the path of a .safetensors file."""
    fallback: str | None = None
    """Of live streams: likewise the smaller network for when that one is far too slow."""
    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The share of the network's correction that is applied; 0 leaves every pixel as it is."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class TileConfig(_Frozen):
    """How a frame is cut for the network."""

    size: TileSize = "auto"
    """(width, height) in pixels; None is the whole frame at once."""
    overlap: Annotated[int, Field(ge=0)] = 32
    """Pixels that neighbours share, half of them thrown away on each side: see docs/seams.md."""
    batch: Annotated[int, Field(ge=1)] = 1
    """Tiles given to a worker at once: it measures how many of them to restore together."""
    static_threshold: Annotated[float, Field(ge=0, le=255)] = 0
    """8-bit code values; a tile whose every 16x16 block changed by less is not restored again."""

    @field_validator("size", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        """auto; 0 for the whole frame; N for a square; WxH."""
        if not isinstance(value, str | int) or value == "auto":
            return value
        width, _, height = str(value).lower().partition("x")
        try:
            size = int(width), int(height or width)
        except ValueError:
            raise ValueError("a tile is auto, 0, N or WxH in pixels") from None
        if size == (0, 0):
            return None
        if min(size) < 16:
            raise ValueError("a tile is at least 16 pixels wide and high")
        return size

    @model_validator(mode="after")
    def _overlap_fits(self) -> Self:
        if isinstance(self.size, tuple) and self.overlap >= min(self.size):
            raise ValueError(f"an overlap of {self.overlap} does not fit into tiles of {self.size}")
        return self


class PoolConfig(_Frozen):
    """Where the tiles are restored."""

    kind: Literal["auto", "local", "ray"] = "auto"
    """local: in this process; ray: in worker processes; auto: ray from the second GPU on."""
    window: Annotated[int, Field(ge=1)] = 4
    """Frames admitted and not yet emitted: the bound of memory and of latency."""


class EncodeConfig(_Frozen):
    """The output's video. None leaves the choice to what fits the container and the source."""

    # In YAML `preset: 10` and `options: {g: 48}` are numbers; FFmpeg wants text.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    codec: str | None = None
    crf: Annotated[float, Field(ge=0, le=63)] | None = None
    quality: Quality | None = None
    """A level instead of a crf, for every encoder that has such: docs/streams.md."""
    preset: str | None = None
    pix_fmt: str | None = None
    options: dict[str, str] = {}
    """FFmpeg's options for the encoder, by name; an unknown one is an error."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Of the encoder. The output's bytes depend on it: name it where machines differ."""

    @model_validator(mode="after")
    def _one_quality(self) -> Self:
        if self.crf is not None and self.quality is not None:
            raise ValueError("crf and quality say the same thing: choose one")
        return self


class DecodeConfig(_Frozen):
    """How the source is read: see docs/fidelity.md."""

    deinterlace: Literal["auto", "off", "error"] = "auto"
    """Frames that are flagged as interlaced are made whole, left as they are, or an error."""
    hwaccel: Literal["none", "auto"] = "none"
    """auto: the first hardware decoder that decodes the file's first frame, else the processor."""
    max_pixels: Annotated[int, Field(ge=1)] = 1 << 27
    """Of one picture; a larger one is refused before it is decoded."""
    stall_timeout: Annotated[float, Field(gt=0, le=86400)] = 60
    """Seconds in which nothing is read or decoded, after which the job ends."""


class SegmentConfig(_Frozen):
    """How often a job secures what is done: see pipeline/segments.py."""

    frames: Annotated[int, Field(ge=1)] = 240
    """A segment ends before the first source keyframe after so many, at the latest at the double.
    It is what a killed job loses, and what is finished after one Ctrl-C."""


class LiveConfig(_Frozen):
    """A live stream: how its ends are reached, and what is given up to keep up with it."""

    transport: Literal["tcp", "udp"] = "tcp"
    """Of RTSP sources."""
    audio: bool = True
    """Pass the source's first audio stream through."""
    max_latency_seconds: Annotated[float, Field(gt=0)] = 0.5
    """How long a frame may wait beyond the model's own time."""
    drop_policy: Literal["oldest", "latest", "none"] = "oldest"
    open_timeout_seconds: Annotated[float, Field(gt=0)] = 5
    """How long either end may take to be opened."""
    stall_timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = 10
    """A source that sends no frame for so long is opened anew."""
    sink_timeout_seconds: Annotated[float, Field(gt=0)] = 5
    """A sink that takes no frame for so long is opened anew."""
    reconnects: Annotated[int, Field(ge=0)] | None = None
    """Attempts in a row to reach a lost source; None: without end."""
    backoff_first_seconds: Annotated[float, Field(gt=0)] = 0.25
    """Before the first of them; doubled each time."""
    backoff_most_seconds: Annotated[float, Field(gt=0)] = 1.5
    stub: Path | None = None
    """A picture that is shown in place of the last frame of a source that stays away."""


_INSTEAD_OF = {"encode.crf": "encode.quality", "encode.quality": "encode.crf"}


class RestoreConfig(_Frozen):
    """Everything about a job but its files. An unknown key is an error that names it."""

    model: ModelConfig = ModelConfig()
    tile: TileConfig = TileConfig()
    pool: PoolConfig = PoolConfig()
    decode: DecodeConfig = DecodeConfig()
    encode: EncodeConfig = EncodeConfig()
    temporal: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the frames before in each one, along the motion; 0: every frame for itself, as
    live streams have it whatever this says."""
    segment: SegmentConfig = SegmentConfig()
    live: LiveConfig = LiveConfig()
    """Of `restore_stream` alone."""
    start_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    end_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    overwrite: bool = False
    resume: bool = True
    """Go on from the finished segments of an interrupted job; keep them when this one stops."""

    @model_validator(mode="after")
    def _span_is_not_empty(self) -> Self:
        if self.end_seconds is not None and self.end_seconds <= (self.start_seconds or 0):
            raise ValueError(f"the end, {self.end_seconds:g} s, is not after the start")
        return self

    @classmethod
    def load(cls, path: Path | None = None, overrides: dict[str, Any] | None = None) -> Self:
        """A YAML file, if any, and what the command line sets, which wins.

        overrides: dotted names to values, such as `{"tile.size": 256}`; None values are skipped,
        dicts are merged, and a crf takes the place of a quality, as that does of a crf.
        Raises ConfigError naming the file, the key and what is wrong with it.
        """
        values = _read_yaml(path) if path else {}
        return cls._checked(values, overrides, f"{path}: " if path else "")

    @classmethod
    def _checked(cls, values: dict[str, Any], overrides: dict[str, Any] | None, where: str) -> Self:
        for name, value in (overrides or {}).items():
            if value is not None:
                *parents, key = name.split(".")
                target = values
                for parent in parents:
                    target = target.setdefault(parent, {})
                    if not isinstance(target, dict):
                        raise ConfigError(f"{where}{name}: {parent} is {target!r}, not settings")
                if isinstance(value, dict) and isinstance(target.get(key), dict):
                    value = target[key] | value
                target[key] = value
                if (other := _INSTEAD_OF.get(name)) and (overrides or {}).get(other) is None:
                    target.pop(other.rpartition(".")[2], None)
        with _named_errors(where):
            return cls.model_validate(values)


class CameraConfig(_Frozen):
    """One of several live streams: its ends, and what differs from the settings of all."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    """In messages, on the page and as the label `camera` of every metric."""
    source: str | None = None
    source_env: str | None = None
    """The URL is in the variable of this name, or in the file that NAME_FILE names."""
    sink: str | None = None
    sink_env: str | None = None
    live: dict[str, Any] = {}
    """Settings over those of all; likewise `tile` and `encode`."""
    tile: dict[str, Any] = {}
    encode: dict[str, Any] = {}

    @model_validator(mode="after")
    def _each_end_once(self) -> Self:
        for end in ("source", "sink"):
            if (getattr(self, end) is None) == (getattr(self, f"{end}_env") is None):
                raise ValueError(f"give either {end} or {end}_env")
        return self


def load_cameras(
    path: Path, overrides: dict[str, Any] | None = None
) -> list[tuple[CameraConfig, RestoreConfig]]:
    """The `cameras` of a YAML file, each with its settings; empty where it has no such list.

    Its own settings win over those of the file, and `overrides`, as in RestoreConfig.load, over
    both. Raises ConfigError, in which no URL is shown.
    """
    values = _read_yaml(path)
    if "cameras" not in values:
        return []
    listed = values.pop("cameras")
    with _named_errors(f"{path}: "):
        cameras = _Cameras.model_validate({"cameras": listed}).cameras
    found = []
    for camera in cameras:
        own = {
            section: {**values.get(section, {}), **getattr(camera, section)}
            for section in ("live", "tile", "encode")
        }
        where = f"{path}: camera {camera.name}: "
        found.append((camera, RestoreConfig._checked({**values, **own}, overrides, where)))
    return found


class _Cameras(_Frozen):
    cameras: Annotated[list[CameraConfig], Field(min_length=1)]

    @field_validator("cameras")
    @classmethod
    def _names_differ(cls, cameras: list[CameraConfig]) -> list[CameraConfig]:
        names = [camera.name for camera in cameras]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two cameras have the name {twice[0]}")
        return cameras


@contextmanager
def _named_errors(where: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ConfigError(where + "; ".join(map(_one_line, error.errors()))) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{path}: not a readable YAML file: {cause}") from error
    except yaml.YAMLError as error:
        # Not its own text, which quotes the line: there may be a password in it.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        cause = f"line {mark.line + 1}: {problem}" if mark else "not YAML"
        raise ConfigError(f"{path}: not a readable YAML file: {cause}") from None
    except ValueError as error:  # a date that there is not
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from None
    sections = ("model", "tile", "pool", "decode", "encode", "segment", "live")
    if isinstance(values, dict):
        empty = {name for name in sections if name in values and values[name] is None}
        values = {name: value for name, value in values.items() if name not in empty}
    if not isinstance(values, dict) or not all(
        isinstance(values.get(name, {}), dict) for name in sections
    ):
        raise ConfigError(f"{path}: a preset is a mapping of sections; see configs/presets")
    return values


def _one_line(problem: Any) -> str:
    key = ".".join("***" if "://" in str(part) else str(part) for part in problem["loc"])
    key = key or "settings"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown setting"
    text = f"{key}: {problem['msg'].removeprefix('Value error, ')}"
    given = problem["input"]
    if isinstance(given, dict | list) or re.search(r"@|://", str(given)):
        return text  # a camera, or its address
    return f"{text} (got {given!r})"


NO_MATTER: dict[str, Any] = {
    "overwrite": True, "resume": True, "model": {"model", "fallback"}, "pool": {"window"},
    "decode": {"max_pixels", "stall_timeout"}, "live": True,
}  # fmt: skip
"""Settings on which no byte of an output depends; the model's name stands for its weights."""
