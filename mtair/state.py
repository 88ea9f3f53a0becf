"""A run's state on disk: one `torch.save` in pieces, which a manifest names and its SHA-256 holds.

Owns the files `state.json` and `state-*.bin` of a run's folder; knows nothing of what is in them.
"""

import hashlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

PIECE_BYTES = 16 << 20
"""The largest file that is written: places that keep files may refuse larger ones."""


class StateError(RuntimeError):
    """The state of a run is incomplete or damaged; the message is one line."""


def save(state: dict[str, Any], folder: Path) -> None:
    """Write `state`; until the manifest is renamed, the state before it stands whole."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    sha256 = hashlib.sha256(data).hexdigest()
    names = []
    for number, first in enumerate(range(0, len(data), PIECE_BYTES)):
        # Named by content: a piece never overwrites one of the state before.
        names.append(f"state-{sha256[:12]}-{number:03}.bin")
        _write(folder / names[-1], data[first : first + PIECE_BYTES])
    manifest = json.dumps({"sha256": sha256, "bytes": len(data), "pieces": names}, indent=1)
    part = folder / "state.json.part"
    _write(part, manifest.encode())
    part.replace(folder / "state.json")
    for path in folder.glob("state-*.bin"):
        if path.name not in names:
            path.unlink()


def _write(path: Path, data: bytes | memoryview) -> None:
    """And have it on the disk: the state before is removed once this one is named."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def is_in(folder: Path) -> bool:
    """Whether there is a state in `folder`."""
    return (folder / "state.json").exists()


def load(folder: Path) -> dict[str, Any] | None:
    """The state last saved in `folder`, or None. Raises StateError where it is damaged."""
    manifest = folder / "state.json"
    if not manifest.exists():
        return None
    try:
        named = json.loads(manifest.read_text())
        data = b"".join((folder / name).read_bytes() for name in named["pieces"])
        sha256 = named["sha256"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{manifest}: the state is incomplete ({error})") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise StateError(f"{manifest}: the pieces are not those whose SHA-256 it names")
    return _unpack(manifest, data)


def _unpack(path: Path, data: bytes) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise StateError(f"{path}: not the state of a run; start one in another folder") from error
    return dict(state)
