"""The importer of the authors' checkpoint, should one turn up: a Lightning file, by names.

Owns what is known of the names in the released class (arXiv 2412.15845's repository) and the report
of what fits. The insides of two blocks are not in that repository, so their names are not known: a
file that holds anything unknown, or lacks anything, is refused, and the report says what.
"""

import hashlib
import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from mtair import checkpoint
from mtair.checkpoint import CheckpointError
from mtair.model import MTAIR, Dimensions, Stage

PREFIX = "net."
"""The LightningModule holds the network as `self.net`."""

DEAD = frozenset(
    f"{name}_{number}.weight" if "noise" in name else f"{name}{number}.weight"
    for name in ("chnl_reduce", "reduce_noise_channel")
    for number in (1, 2, 3)
)
"""Built by the released class and never used in its forward."""

_STAGES: dict[str, Stage] = dict(
    zip(
        ("encoder_level1", "encoder_level2", "encoder_level3", "latent", "decoder_level3",
         "decoder_level2", "decoder_level1", "refinement"),
        get_args(Stage), strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of every tensor of a file, by name; `renamed` are among the matched."""

    dims: Dimensions
    matched: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """In the file and not in this network, or there in another shape."""
    missing: list[str] = field(default_factory=list)
    """In this network and not in the file."""

    @property
    def complete(self) -> bool:
        """Nothing of the file is unknown and nothing of the network is missing."""
        return not self.unknown and not self.missing

    def __str__(self) -> str:
        """Counts, then the names that need a look."""
        stages = ", ".join(self.dims.mamba_stages) or "none"
        lines = [f"Mamba stages in the file: {stages}", f"matched {len(self.matched)}"]
        for name in ("renamed", "dead", "unknown", "missing"):
            names = getattr(self, name)
            lines += [f"{name} {len(names)}", *(f"  {line}" for line in names)]
        return "\n".join(lines)


def import_checkpoint(path: Path, target: Path, dims: Dimensions) -> ImportReport:
    """Write `target` from the Lightning checkpoint `path`, if every tensor finds its place.

    `dims` is the shape expected, but for the stages of the Mamba branch: the file tells them.
    Nothing is written unless the report is complete. Raises CheckpointError where the file cannot
    be read as weights alone.
    """
    tensors = _read(path)
    stages = {_STAGES[stage] for name in tensors if (stage := _mamba_stage(name))}
    dims = replace(dims, mamba_stages=tuple(s for s in get_args(Stage) if s in stages))
    model = MTAIR(dims)
    report, found = _match(tensors, model)
    if report.complete:
        model.load_state_dict(found)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        checkpoint.save(model, target, {"imported": path.name, "imported_sha256": digest})
    return report


def _read(path: Path) -> dict[str, Tensor]:
    try:
        # Lightning keeps objects beside the weights; none of them is ever made here.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: not readable as weights alone ({cause})") from error
    values = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(values, dict) or not all(isinstance(v, Tensor) for v in values.values()):
        raise CheckpointError(f"{path}: not a Lightning checkpoint, there is no state_dict")
    return {str(name).removeprefix(PREFIX): value for name, value in values.items()}


def _mamba_stage(name: str) -> str:
    """The stage whose block holds this tensor, if it is one of a selective scan."""
    stage = name.split(".", 1)[0]
    return stage if name.endswith(".A_logs") and stage in _STAGES else ""


def _match(tensors: dict[str, Tensor], model: MTAIR) -> tuple[ImportReport, dict[str, Tensor]]:
    ours = model.state_dict()
    # MambaIR's SS2D names its tensors as ours does; what a block calls it is not known.
    scans = {name.removesuffix(".A_logs") for name in tensors if _mamba_stage(name)}
    report, found = ImportReport(model.dims), {}
    for name, value in sorted(tensors.items()):
        if name in DEAD:
            report.dead.append(name)
            continue
        scan = next((s for s in scans if name.startswith(f"{s}.")), None)
        target = name
        if scan is not None:
            block = ".".join(scan.split(".")[:2])
            target = f"{block}.ssm.{name.removeprefix(f'{scan}.')}"
        if target not in ours:
            report.unknown.append(f"{name} {tuple(value.shape)}")
        elif value.shape != ours[target].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(ours[target].shape)}"
            report.unknown.append(f"{name} {shapes}")
        else:
            report.matched.append(name)
            found[target] = value
            if target != name:
                report.renamed.append(f"{name} -> {target}")
    # A tensor there in another shape is unknown, and missing as well.
    report.missing.extend(
        sorted(f"{n} {tuple(v.shape)}" for n, v in ours.items() if n not in found)
    )
    return report, found
