"""Owns the list of a batch: which files, to what names, with what settings. Opens no video."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from pipeline.config import RestoreConfig
from pipeline.containers import CONTAINERS
from pipeline.encoder import encoder_name
from pipeline.errors import ConfigError
from pipeline.remote import Place, Remote, is_url, place

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    ".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gif", ".h264",
    ".h265", ".hevc", ".ivf", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mkv", ".mod",
    ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb",
    ".tod", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip
"""What is taken from a folder; a file that is named is taken whatever its name."""
_MANIFESTS = (".csv", ".jsonl")


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One file of a batch."""

    source: Place
    output: Place
    config: RestoreConfig


def list_inputs(
    inputs: Sequence[str | Place], folder: str | Place, settings: Mapping[str, Any],
    preset: Path | None,
) -> list[BatchItem]:  # fmt: skip
    """What `inputs` mean: video files, folders, globs and manifests (.csv, .jsonl), or their URLs.

    `settings` are the dotted names that hold for all; a manifest's line wins over them. A folder's
    tree is kept below the output's. Raises ConfigError for what cannot be meant: nothing there, an
    unknown key, two files with one output.
    """
    items: list[BatchItem] = []
    folder = place(folder)
    for given in map(place, inputs):
        found = list(_expanded(given, folder, dict(settings), preset))
        if not found:
            raise ConfigError(f"{given}: no video files there")
        items += found
    items = _without_outputs(items)
    by_output: dict[Place, BatchItem] = {}
    for item in items:
        other = by_output.setdefault(item.output, item)
        if other != item:
            raise ConfigError(
                f"{other.source} and {item.source} would both become {item.output}; give names in "
                "a manifest's column output"
            )
    return list({item.output: item for item in items}.values())


def _without_outputs(items: list[BatchItem]) -> list[BatchItem]:
    """Without what an earlier run of the same command has left among its inputs.

    Where outputs may be replaced the two stay, and are refused: it could be a source.
    """
    made = {
        _identity(item.output) for item in items
        if not item.config.overwrite and _identity(item.source) != _identity(item.output)
    }  # fmt: skip
    kept = [item for item in items if _identity(item.source) not in made]
    if len(kept) < len(items):
        logger.info("%d inputs are outputs of others and are left out", len(items) - len(kept))
    return kept


def _identity(file: Place) -> str:
    return file.url.rstrip("/") if isinstance(file, Remote) else str(file.resolve())


def _expanded(
    given: Place, folder: Place, settings: dict[str, Any], preset: Path | None
) -> Iterator[BatchItem]:
    if given.suffix.lower() in _MANIFESTS and (isinstance(given, Remote) or not _is_folder(given)):
        yield from _of_manifest(given, folder, settings, preset)
        return
    config = _checked(RestoreConfig.load(preset, settings))
    if isinstance(given, Remote):
        for source, name in _remote_files(given):
            if not _is_ours(source, given, folder):
                yield BatchItem(source, _output(folder, name), config)
    elif _is_folder(given):
        paths = sorted(given.rglob("*"))
        _say_what_is_left_out(given, paths)
        for path in paths:
            if _is_video(path, given) and not _is_ours(path, given, folder):
                yield BatchItem(path, _output(folder, path.relative_to(given)), config)
    elif has_magic(str(given)) and not given.exists():
        for path in map(Path, sorted(glob(str(given), recursive=True))):
            if path.is_file():
                yield BatchItem(path, _output(folder, Path(path.name)), config)
    else:  # one that is missing fails by itself, in the report
        yield BatchItem(given, _output(folder, Path(given.name)), config)


def _checked(config: RestoreConfig) -> RestoreConfig:
    """Raises ConfigError for what else each file would fail with."""
    if config.encode.codec is not None:
        encoder_name(config.encode.codec)
    return config


def _say_what_is_left_out(folder: Path, paths: list[Path]) -> None:
    others = Counter(
        path.suffix.lower() or path.name for path in paths
        if path.suffix.lower() not in VIDEO_SUFFIXES
        and not _is_hidden(path.relative_to(folder)) and path.is_file()
    )  # fmt: skip
    if others:
        kinds = ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(8))
        logger.warning("%s: left out, for it is not named as video is: %s", folder, kinds)


def _remote_files(given: Remote) -> list[tuple[Remote, PurePosixPath]]:
    """The files that a URL means, each with its name below the output's folder."""
    alone = [(given, PurePosixPath(given.name or "video"))]
    if given.suffix.lower() in VIDEO_SUFFIXES and not has_magic(given.url):
        return alone  # no listing for each of thousands
    try:
        if has_magic(given.url) and not given.exists():
            return [(file, PurePosixPath(file.name)) for file in given.matches()] or alone
        if given.is_folder():
            below = ((file, PurePosixPath(name.lstrip("/"))) for name, file in given.below())
            return [(file, name) for file, name in below if _looks_like_video(name)]
    except OSError:
        pass  # it fails by itself, in the report
    return alone


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not to be entered: it fails by itself, in the report
        return False


def _is_ours(source: Place, root: Place, outputs: Place) -> bool:
    """Whether it is what an earlier run left in the outputs' folder, below the inputs' root."""
    one, other, folder = (_identity(file) for file in (source, root, outputs))
    return folder != other and one.startswith(f"{folder.rstrip('/')}/")


def _is_video(path: Path, root: Path) -> bool:
    return _looks_like_video(path.relative_to(root)) and path.is_file()


def _looks_like_video(name: PurePath) -> bool:
    return name.suffix.lower() in VIDEO_SUFFIXES and not _is_hidden(name)


def _is_hidden(name: PurePath) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _output(folder: Place, name: PurePath) -> Place:
    return folder / (name if name.suffix.lower() in CONTAINERS else name.with_suffix(".mkv"))


def _of_manifest(
    manifest: Place, folder: Place, settings: dict[str, Any], preset: Path | None
) -> Iterator[BatchItem]:
    for number, line in _lines(manifest):
        where = f"{manifest}:{number}"
        source, output = line.pop("source", None), line.pop("output", None)
        if not source or not isinstance(source, str):
            raise ConfigError(f"{where}: no source; name the video file")
        if output is not None and not isinstance(output, str):
            raise ConfigError(f"{where}: output {output!r} is no file name")
        try:
            # Relative to the manifest, so that it can be moved with its files.
            path = place(source) if is_url(source) else manifest.parent / source
            config = _checked(RestoreConfig.load(preset, settings | line))
            to = place(output) if output and is_url(output) else None
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        yield BatchItem(path, to or _output(folder, PurePath(output or path.name)), config)


def _lines(manifest: Place) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number and the values of each line; empty cells and nulls are not there."""
    try:
        data = manifest.read() if isinstance(manifest, Remote) else manifest.read_bytes()
        with io.StringIO(data.decode("utf-8-sig"), newline="") as file:
            if manifest.suffix.lower() == ".csv":
                rows = csv.DictReader(file)
                for row in rows:
                    if None in row:
                        raise ValueError(f"line {rows.line_num} has more cells than the header")
                    yield rows.line_num, {key: value for key, value in row.items() if value}
                return
            for number, text in enumerate(file, start=1):
                if text.strip():
                    values = json.loads(text)
                    if not isinstance(values, dict):
                        raise ValueError(f"line {number} is no object")
                    yield number, {key: v for key, v in values.items() if v is not None}
    except (OSError, ValueError) as error:  # JSON's and Unicode's are ValueErrors
        cause = getattr(error, "strerror", None) or error
        raise ConfigError(f"{manifest}: not a readable manifest: {cause}") from error
