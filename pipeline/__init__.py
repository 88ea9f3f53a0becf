"""Restore videos: the public API and nothing else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline._version import __version__
from pipeline.config import RestoreConfig
from pipeline.errors import RestoreError

if TYPE_CHECKING:
    from pipeline.batch import restore_batch
    from pipeline.cameras import restore_stream
    from pipeline.jobs import restore_file

__all__ = [
    "RestoreConfig", "RestoreError", "__version__", "restore_batch", "restore_file",
    "restore_stream",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # jobs.py reaches torch and ray, which take seconds to import: not for `--help`.
    homes = {"restore_file": "jobs", "restore_stream": "cameras", "restore_batch": "batch"}
    if name in homes:
        return getattr(import_module(f"pipeline.{homes[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
