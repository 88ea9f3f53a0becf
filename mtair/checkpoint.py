"""Weights on disk: one safetensors file that holds its own dimensions, record and SHA-256.

Owns reading, writing and naming of weights; knows nothing of how they were trained.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from mtair.model import MTAIR, Dimensions

FORMAT = "mtair-1"


class CheckpointError(RuntimeError):
    """A weights file is missing, damaged, or not of this network; the message is one line."""


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a weights file says of itself."""

    name: str
    path: Path
    sha256: str
    """Of all tensors and dimensions, in hex: what the weights are, whatever the file's name."""
    dims: Dimensions
    record: dict[str, Any]
    """How the weights came to be: data, steps, loss, hardware, time."""

    @property
    def hours(self) -> float:
        """Of training, with those of the weights that this run was started from."""
        before = self.record.get("started_from") or {}
        return round(float(self.record.get("hours", 0)) + float(before.get("hours", 0)), 2)


def weights_folder() -> Path:
    """Where the weights that ship with the package lie."""
    return Path(str(resources.files("mtair.weights")))


def list_models() -> list[str]:
    """The names that load_model knows without a path."""
    return sorted(p.stem for p in weights_folder().glob("*.safetensors"))


def locate(name_or_path: str) -> Path:
    """A shipped name or the path of a file. Raises CheckpointError when it is neither."""
    shipped = weights_folder() / f"{name_or_path}.safetensors"
    if "/" not in name_or_path and shipped.is_file():
        return shipped
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.suffix or "/" in name_or_path:
        raise CheckpointError(f"{name_or_path}: no such weights file")
    raise CheckpointError(
        f"{name_or_path}: no weights of that name ship with this version; "
        f"there are {', '.join(list_models()) or 'none'}, or give a path"
    )


def fingerprint(tensors: dict[str, Tensor], dims: Dimensions) -> str:
    """SHA-256 over the dimensions and every tensor's name, dtype, shape and bytes, by name."""
    digest = hashlib.sha256(json.dumps(dims.to_dict(), sort_keys=True).encode())
    for name in sorted(tensors):
        # A 1x1 kernel counts as contiguous whatever its strides say: copy to be sure.
        tensor = tensors[name].clone(memory_format=torch.contiguous_format)
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(model: MTAIR, path: Path, record: dict[str, Any]) -> str:
    """Write the model's weights to `path` (by rename, never half) and return their SHA-256."""
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    sha256 = fingerprint(tensors, model.dims)
    metadata = {
        "format": FORMAT,
        "dims": json.dumps(model.dims.to_dict()),
        "record": json.dumps(record),
        "sha256": sha256,
    }
    part = path.with_name(path.name + ".part")
    part.write_bytes(to_bytes(tensors, metadata))  # save_file would hide it from other users
    part.replace(path)
    return sha256


def _read(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not weights of this network (format {metadata.get('format')!r}, "
            f"expected {FORMAT!r})"
        )
    try:
        dims = Dimensions.from_dict(json.loads(metadata["dims"]))
        record = dict(json.loads(metadata["record"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its description is damaged ({error})") from error
    sha256 = fingerprint(tensors, dims)
    if sha256 != metadata.get("sha256"):
        raise CheckpointError(
            f"{path}: damaged, the SHA-256 of its tensors is not the one it names"
        )
    return CheckpointInfo(path.stem, path, sha256, dims, record), tensors


def describe(name_or_path: str) -> CheckpointInfo:
    """Read and verify a weights file without building the network. Raises CheckpointError."""
    return _read(locate(name_or_path))[0]


def load_model(name_or_path: str, device: str | torch.device = "cpu") -> MTAIR:
    """The network with its weights, in eval mode: float RGB `[N, 3, H, W]` in 0..1 in and out.

    `name_or_path` is a shipped name (see list_models) or a .safetensors file. Raises
    CheckpointError when the file is missing, damaged or of another network.
    """
    info, tensors = _read(locate(name_or_path))
    model = MTAIR(info.dims)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{info.path}: tensors do not fit the dimensions: {cause}") from error
    return model.to(device).eval()
