"""The settings of a job, checked once at the edge. Knows no stage: each gets plain arguments."""

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
    """A shipped name (tiny, small, base) or the path of a .safetensors file."""
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
    """Tiles in one call of the network."""
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
    stall_timeout: Annotated[float, Field(gt=0)] = 60
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
    stall_timeout_seconds: Annotated[float, Field(gt=0)] = 10
    """A source that sends no frame for so long is opened anew."""
    sink_timeout_seconds: Annotated[float, Field(gt=0)] = 5
    """A sink that takes no frame for so long is opened anew."""
    reconnects: Annotated[int, Field(ge=0)] | None = None
    """Attempts in a row to reach a lost source; None: without end."""
    backoff_first_seconds: Annotated[float, Field(gt=0)] = 0.25
    """Before the first of them; doubled each time."""
    backoff_most_seconds: Annotated[float, Field(gt=0)] = 1.5


class RestoreConfig(_Frozen):
    """Everything about a job but its files. An unknown key is an error that names it."""

    model: ModelConfig = ModelConfig()
    tile: TileConfig = TileConfig()
    pool: PoolConfig = PoolConfig()
    decode: DecodeConfig = DecodeConfig()
    encode: EncodeConfig = EncodeConfig()
    temporal: Annotated[float, Field(ge=0, le=1)] = 0
    """Weight of the frames before in each one, along the motion; 0: every frame for itself."""
    segment: SegmentConfig = SegmentConfig()
    live: LiveConfig = LiveConfig()
    """Of `restore_stream` alone."""
    start_seconds: Annotated[float, Field(ge=0)] | None = None
    end_seconds: Annotated[float, Field(gt=0)] | None = None
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

        overrides: dotted names to values, such as `{"tile.size": 256}`; None values are skipped.
        Raises ConfigError naming the file, the key and what is wrong with it.
        """
        values = _read_yaml(path) if path else {}
        for name, value in (overrides or {}).items():
            if value is not None:
                *parents, key = name.split(".")
                target = values
                for parent in parents:
                    target = target.setdefault(parent, {})
                target[key] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            where = f"{path}: " if path else ""
            raise ConfigError(where + "; ".join(map(_one_line, error.errors()))) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise ConfigError(f"{path}: not a readable YAML file: {cause}") from error
    sections = ("model", "tile", "pool", "decode", "encode", "segment", "live")
    if not isinstance(values, dict) or not all(
        isinstance(values.get(name, {}), dict) for name in sections
    ):
        raise ConfigError(f"{path}: a preset is a mapping of sections; see configs/presets")
    return values


def _one_line(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"])) or "settings"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown setting"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')} (got {problem['input']!r})"
